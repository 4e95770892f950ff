"""Merge adapters of any ranks without training: one function, for folders of PEFT adapters or for your own loop."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyrank import devices, files, stopping
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer, overflow
from anyrank.adapter.lazy import outlined
from anyrank.adapter.peft import CONFIG_FILE, WEIGHTS_FILE
from anyrank.adapter.stored import FolderWriter
from anyrank.aggregation.merge import Merge, check_rank, prepare
from anyrank.aggregation.missed import Missed
from anyrank.algebra import lowrank, spectra
from anyrank.algebra.names import check_device
from anyrank.errors import AdapterError, RunError, RunFailed
from anyrank.messages.records import Client, ClientUpdate, Scaling, ServerState
from anyrank.methods import Method
from anyrank.methods.slices import times

__all__ = ["AggregateResult", "aggregate", "aggregate_folders"]

Updates = Iterable[ClientUpdate | str | os.PathLike[str]]
Progress = Callable[[int, int], None]
_BATCH_BYTES = 1 << 30


@dataclass(frozen=True)
class AggregateResult:
    """The merged update: the whole update, the share of any rank, and the part for the base model.

    `work` reports how singular values were computed: `work.paths` `{way: layers}` and `work.error`, the largest backward error.
    """

    method: Method
    state: ServerState
    work: lowrank.Work = field(default_factory=lowrank.Work)

    @property
    def adapter(self) -> Adapter:
        """The whole global update, at the largest rank of the clients, or the rank that was asked for."""
        return self.state.adapter

    @property
    def base_update(self) -> Adapter | None:
        """The part to merge into the frozen base model, for the methods that have one."""
        return self.state.merged

    def share(self, rank: int | None = None, like: Adapter | None = None) -> Adapter:
        """What a client gets to start its next round from: one of `rank`, or one of the layers, ranks and scalings of `like`,
        the client's own adapter (of a model with `rank_pattern` or `alpha_pattern`, or with another alpha than others)."""
        if (rank is None) == (like is None):
            raise AdapterError("share: expected a rank, or like=ADAPTER of the client, and not both")
        if like is not None:
            return self._share_like(like)
        if type(rank) is not int or rank < 1:
            raise AdapterError(f"share: expected a rank of at least 1, got {rank!r}")
        layers = self.state.adapter.layers.values()
        check_rank(rank, [side for layer in layers for side in (layer.rank, max(layer.shape))])
        return _storable(self.method.share(self.state, Client(f"rank-{rank}", rank)))

    def _share_like(self, like: Adapter) -> Adapter:
        if not isinstance(like, Adapter):
            raise AdapterError(
                f"share: like: expected an Adapter, got a {type(like).__name__}; read it with Adapter.load(folder)"
            )
        theirs = outlined(like.layers)
        for name, layer in theirs.items():
            merged = self.state.adapter.layers.get(name)
            if merged is None or merged.shape != layer.shape or merged.kind != layer.kind:
                found = "no such layer" if merged is None else f"{merged.kind} [out, in] {list(merged.shape)}"
                raise AdapterError(f"share, layer {name}: expected {layer.kind} [out, in] {list(layer.shape)}, got {found}")
        ranks = {name: layer.rank for name, layer in theirs.items()}
        shared = self.method.share(self.state, Client("like", max(ranks.values()), ranks))
        layers = {name: self._under(shared.layers[name], layer.scaling) for name, layer in theirs.items()}
        return _storable(Adapter(layers, shared.tensors, like.config or shared.config))

    def _under(self, layer: LoraLayer, scaling: float) -> LoraLayer:
        """The same product under another scaling, put where the method puts a change of it."""
        ratio = layer.scaling / scaling
        on_a, on_b = (math.sqrt(ratio), math.sqrt(ratio)) if self.method.rescale == "both" else (1.0, ratio)
        return layer.with_factors(times(layer.A, on_a), times(layer.B, on_b), scaling)

    def spectrum(self) -> dict[str, Tensor]:
        """`{layer: singular values of the global update}`, in descending order, float64."""
        return spectra.spectra(self.state.adapter, self.state.merged)


def aggregate(
    updates: Updates,
    method: str | Method,
    previous: Adapter | str | os.PathLike[str] | None = None,
    seed: int = 0,
    scaling: Scaling | None = None,
    algebra: str = "auto",
    device: str = "cpu",
    allow_different_base: bool = False,
    absent: str = "refused",
    rank: int = 0,
    **options: Any,
) -> AggregateResult:
    """Merge the clients' adapters by `method`; `options` are the method's own.

    `updates`: `ClientUpdate`s, or PEFT adapter folders (then all clients have the same weight), which are read as they are
    merged. `previous`: the global adapter that the clients started from, for methods that keep slices that no client of this
    round has. `scaling`: the rule that shares use; by default the one that explains the clients' own scalings. `algebra`: how
    singular values are computed, see `anyrank.algebra.lowrank`. `device`: where they are computed: `cpu` (one layer of all
    clients in memory at a time), `cuda` (as many layers as have 1 GiB of factors; layers of one shape as one batch) or `auto`
    (`cuda` if available, else `cpu`). `allow_different_base`: merge although the adapters name different base models (a model
    may have different names on different machines). `absent`: what a layer that a client lacks means: `refused`, or `silent`
    (the client has no weight in that layer; all others share it). `rank`: the rank of the result, from the clients' largest to
    the sum of theirs; 0: the largest. The result has the widest number type of the clients. Results of different
    devices differ by rounding.

    >>> import torch
    >>> from anyrank import LoraLayer
    >>> one = Adapter({"layer": LoraLayer(torch.eye(1, 2), torch.ones(2, 1), 1.0)})
    >>> two = Adapter({"layer": LoraLayer(torch.eye(2), torch.eye(2), 1.0)})
    >>> merged = aggregate([ClientUpdate(one, 3, "a"), ClientUpdate(two, 1, "b")], method="raflora")
    >>> merged.adapter.ranks, merged.share(rank=1).ranks
    ({'layer': 2}, {'layer': 1})
    """
    merge = prepare(updates, method, previous, seed, scaling, allow_different_base, options, absent, rank)
    with lowrank.using(algebra, *_place(device)) as work:
        whole = not merge.method.by_layer
        state = _whole(merge) if whole else _layer_by_layer(merge, work.batch_bytes)
    if merge.frozen:
        state = _with_frozen(state, {name: merge.frozen[name].clone() for name in sorted(merge.frozen)})
    return AggregateResult(merge.method, state, work)


def _place(device: str) -> tuple[torch.device, int]:
    """Where SVDs are made, and of how many bytes of the clients' factors at a time; 0 is one layer."""
    check_device(device)
    found = devices.find(device, "device")
    return (found, _BATCH_BYTES) if found.type == "cuda" else (torch.device("cpu"), 0)


def _whole(merge: Merge) -> ServerState:
    try:
        state = merge.method.aggregate(merge.state(), merge.updates)
    except (OverflowError, torch.linalg.LinAlgError):
        raise merge.too_large(", ".join(merge.names[:3]), "what is computed from it") from None
    for part in (state.adapter, state.merged):
        if part is not None:
            _storable(part)
    return state


def _with_frozen(state: ServerState, frozen: Mapping[str, Tensor]) -> ServerState:
    """PEFT puts such a weight in place of the base model's. So it stands in the part that is loaded first: a base update, which
    is merged into it, or else the adapter."""
    if state.merged is not None:
        return replace(state, merged=replace(state.merged, tensors={**state.merged.tensors, **frozen}))
    return replace(state, adapter=replace(state.adapter, tensors={**state.adapter.tensors, **frozen}))


def _storable(adapter: Adapter) -> Adapter:
    """`adapter`, if its number type can hold it."""
    for name, layer in adapter.layers.items():
        if large := overflow(layer):
            raise AdapterError(f"layer {name}: {large} is too large for {layer.A.dtype}; look for the largest adapter merged")
    return adapter


def _layer_by_layer(merge: Merge, batch_bytes: int) -> ServerState:
    # Copies: unchanged tensors (a frozen A, a head that no client sent) may still be pages of a mapped file.
    layers, into_base = {}, {}
    for names in merge.batches(batch_bytes):
        for name, (layer, base) in merge.layers(names).items():
            layers[name] = _copy(layer)
            into_base |= {name: _copy(base)} if base is not None else {}
    tensors = {name: merge.tensor(name).clone() for name in merge.tensors}
    adapter = Adapter(layers, tensors, merge.config)
    return ServerState(1, merge.seed, adapter, merge.scaling, Adapter(into_base, {}, merge.config) if into_base else None)


def _copy(layer: LoraLayer) -> LoraLayer:
    return layer.with_factors(layer.A.clone(), layer.B.clone())


def aggregate_folders(
    updates: Updates,
    method: str | Method,
    out: str | os.PathLike[str],
    ranks: Sequence[int] = (),
    previous: Adapter | str | os.PathLike[str] | None = None,
    seed: int = 0,
    scaling: Scaling | None = None,
    algebra: str = "auto",
    device: str = "cpu",
    allow_different_base: bool = False,
    absent: str = "refused",
    rank: int = 0,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> dict[str, Any]:
    """Like `aggregate`, but write the result to `out` layer by layer, so that memory holds one layer of all clients, or one
    batch of layers if `device` is not the CPU.

    `out/global` is the whole update, `out/rank-R` the adapter for a client of each rank in `ranks`, and `out/base-update` the
    part for the base model (for methods that have one). The numbers are the same, byte for byte, as those of `aggregate`. `out`
    must not exist, and is written completely or not at all. `progress(done, total)` counts layers. Returns a dict of figures.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise RunError(f"{out}: exists already; name a new folder, or remove this one")
    merge = prepare(updates, method, previous, seed, scaling, allow_different_base, options, absent, rank)
    for rank in ranks:
        merge.check_rank(rank)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    for left in files.leftovers(out):
        _remove_merge(left)
    with stopping.unfinished(unfinished):
        try:
            with lowrank.using(algebra, *_place(device)) as work, _Folders(unfinished, merge, ranks) as folders:
                folders.fill(progress, work.batch_bytes)
            _put_in_place(unfinished, out)
        except OSError as error:
            raise RunFailed(f"{out}: cannot be written ({error.strerror or error}); nothing was left there") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return {
        "method": merge.method.name,
        "out": str(out),
        "folders": sorted(folders.writers),
        "layers": len(merge.names),
        "clients": [merge.describe(update) for update in merge.updates],
        "algebra": work.paths,
        "error": work.error,
        "missed": folders.missed.shares(),
    }


def _put_in_place(unfinished: Path, out: Path) -> None:
    """Give a whole merge its name, on disk when this returns. Where that fails it has the other name still, or again."""
    files.flush_folder(unfinished)
    files.reached("replace", out)
    os.replace(unfinished, out)
    try:
        files.flush_folder(out.parent)
    except OSError:
        os.replace(out, unfinished)
        raise


def _remove_merge(folder: Path) -> None:
    """Remove what a killed merge left, file by file by its name; a folder that holds anything else stays."""
    with suppress(OSError):
        for entry in sorted(folder.rglob("*"), reverse=True):  # what is in a folder stands before it
            if entry.is_dir() and not entry.is_symlink():
                entry.rmdir()
            elif entry.name in (CONFIG_FILE, WEIGHTS_FILE):
                entry.unlink()
        folder.rmdir()


class _Folders:
    """Write the folders of one merge, each layer into all of them."""

    def __init__(self, root: Path, merge: Merge, ranks: Sequence[int]) -> None:
        self._root, self._merge, self._ranks = root, merge, sorted(set(ranks))
        self.writers: dict[str, FolderWriter] = {}
        self.missed = Missed()

    def __enter__(self) -> _Folders:
        files.reached("folder", self._root)
        self._root.mkdir(parents=True)
        merge = self._merge
        if merge.frozen and merge.has_base_update:
            self._open("base-update", merge.frozen)
        whole = merge.tensors if "base-update" in self.writers else {**merge.tensors, **outlined(merge.frozen)}
        for name in ("global", *(f"rank-{rank}" for rank in self._ranks)):
            self._open(name, whole)
        return self

    def __exit__(self, *failed: object) -> None:
        for writer in self.writers.values():
            writer.close()

    def _open(self, name: str, tensors: Mapping[str, Tensor]) -> FolderWriter:
        self.writers[name] = FolderWriter(self._root / name, self._merge.outline, tensors)
        return self.writers[name]

    def fill(self, progress: Progress, batch_bytes: int) -> None:
        merge = self._merge
        plain = {**merge.tensors, **outlined(merge.frozen)}
        wide = [name for name, tensor in plain.items() if tensor.dtype.itemsize >= merge.dtype.itemsize]
        wide.sort(key=lambda name: -plain[name].dtype.itemsize)
        narrow = sorted(plain.keys() - set(wide), key=lambda name: (-plain[name].dtype.itemsize, name))
        self._tensors(wide)
        done = 0
        for names in merge.batches(batch_bytes):
            for name, (layer, base) in merge.layers(names).items():
                self._layer(name, layer, base)
                progress(done := done + 1, len(merge.names))
        self._tensors(narrow)
        for writer in self.writers.values():
            writer.finish(merge.config)

    def _layer(self, name: str, layer: LoraLayer, base: LoraLayer | None) -> None:
        shares = {f"rank-{rank}": self._merge.share(name, layer, rank) for rank in self._ranks}
        for folder, share in {"global": layer, **shares}.items():
            self.writers[folder].add_layer(name, share)
        below = [] if base is None else [base]
        merged = {folder: [share, *below] for folder, share in {"global": layer, **shares}.items()}
        self.missed.add(self._merge.sent(name), self._merge.updates, merged)
        if base is not None:
            (self.writers.get("base-update") or self._open("base-update", {})).add_layer(name, base)

    def _tensors(self, names: Sequence[str]) -> None:
        for name in names:
            frozen = name in self._merge.frozen
            tensor = self._merge.frozen[name] if frozen else self._merge.tensor(name)
            base = self.writers.get("base-update")
            for writer in [base] if frozen and base else (each for each in self.writers.values() if each is not base):
                writer.add_tensor(name, tensor)
