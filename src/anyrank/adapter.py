"""The records of an adapter, and PEFT's folders in and out.

A `LoraLayer` is one low-rank change `scaling * B @ A` of one frozen weight; an `Adapter` is all of them under their
module names, with the plain tensors (a head, biases) that are trained beside them. Shapes are checked once, at birth.
"""

from __future__ import annotations

import enum
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyrank.errors import AdapterError
from anyrank.files import write_whole

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")
_KINDS = ("linear", "conv2d", "embedding")
# PEFT options whose forward pass is more than base(x) + scaling * B @ A @ x: merging their factors would be wrong.
_REFUSED = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "trainable_token_indices")


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One LoRA layer: the effective weight is `W0 + scaling * B @ A` (Hu et al. 2021, section 4.1).

    `A` `[rank, in]`, `B` `[out, rank]`, one floating dtype. A Conv2d layer is held as `in = channels * height * width`
    of its `kernel`; an Embedding layer as `in = number of embeddings`, `out = embedding size`.

    >>> layer = LoraLayer(A=torch.ones(1, 3), B=torch.ones(2, 1), scaling=2.0)
    >>> layer.rank, layer.delta().shape
    (1, torch.Size([2, 3]))
    """

    A: Tensor
    B: Tensor
    scaling: float
    kind: str = "linear"
    kernel: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("A", "B"):
            factor = torch.as_tensor(getattr(self, name))
            object.__setattr__(self, name, factor)
            if factor.ndim != 2 or 0 in factor.shape or not factor.is_floating_point():
                raise AdapterError(
                    f"{name}: expected a two-dimensional floating tensor with no empty side, "
                    f"got {factor.dtype} of shape {tuple(factor.shape)}"
                )
        if self.A.shape[0] != self.B.shape[1] or self.A.dtype != self.B.dtype:
            raise AdapterError(
                f"A [rank, in] and B [out, rank] must share rank and dtype, got A {self.A.dtype} "
                f"{tuple(self.A.shape)} and B {self.B.dtype} {tuple(self.B.shape)}"
            )
        object.__setattr__(self, "scaling", float(self.scaling))
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise AdapterError(f"scaling: expected a positive number, got {self.scaling}")
        if self.kind not in _KINDS:
            raise AdapterError(f"kind: expected one of {', '.join(_KINDS)}, got {self.kind!r}")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the change it applies."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """The change of the weight, `scaling * B @ A`, `[out, in]`, dense. For looking at small layers and for tests."""
        return self.scaling * (self.B @ self.A)

    def with_factors(self, A: Tensor, B: Tensor, scaling: float | None = None) -> LoraLayer:
        """The same kind of layer with other factors (and, if given, another scaling), in this layer's dtype."""
        scaling = self.scaling if scaling is None else scaling
        return LoraLayer(A.to(self.A.dtype), B.to(self.B.dtype), scaling, self.kind, self.kernel)


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA layers by module name, and plain tensors (head, biases) by parameter name.

    `config` holds what PEFT's `adapter_config.json` says beside ranks and scaling (base model, target modules, task type),
    and goes back into the folder on `save`.
    """

    layers: Mapping[str, LoraLayer]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """`{layer: rank}`."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], config: Any) -> Adapter:
        """An adapter from PEFT's own state dict (`get_peft_model_state_dict`), of tensors or NumPy arrays, and its config.

        `config`: a `LoraConfig`, or what its `to_dict()` gives. Arrays are not copied. Raises `AdapterError` as `load` does.

        >>> state = {"q.lora_A.weight": torch.ones(1, 3).numpy(), "q.lora_B.weight": torch.ones(2, 1).numpy()}
        >>> Adapter.from_state_dict(state, {"peft_type": "LORA", "r": 1, "lora_alpha": 2}).layers["q"].delta().sum()
        tensor(12.)
        """
        values = config if isinstance(config, Mapping) else config.to_dict()
        config = check_config({key: _plain(value) for key, value in values.items()}, "adapter config")
        return from_peft_state({key: torch.as_tensor(value) for key, value in state.items()}, config)

    def state_dict(self, numpy: bool = False) -> dict[str, Any]:
        """The adapter under PEFT's keys, in sorted order, as `set_peft_model_state_dict` takes it; as NumPy arrays if asked.

        The scaling is not in it: a model that takes it in must have this adapter's ranks and alphas.
        """
        state = dict(sorted(_peft_tensors(self).items()))
        narrow = next((key for key, value in state.items() if numpy and value.dtype == torch.bfloat16), None)
        if narrow:
            raise AdapterError(f"{narrow}: NumPy has no bfloat16; take tensors, or make the adapter float32 first")
        return {key: value.cpu().numpy() for key, value in state.items()} if numpy else state

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Read a PEFT LoRA folder (`adapter_config.json`, `adapter_model.safetensors`); nothing is ever unpickled.

        Raises `AdapterError` for a missing or unreadable file, pickled weights, a LoRA variant whose update is not
        `scaling * B @ A`, a factor without its partner, wrong shapes, and values that are not finite.
        """
        return _load(Path(folder))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a PEFT LoRA folder, which `PeftModel.from_pretrained` takes as it is. Files appear whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(peft_config(self), indent=2, sort_keys=True) + "\n"

        def write_both(weights: Path) -> None:  # both are on the disk before either is put in place
            save_file(_peft_tensors(self), weights, metadata={"format": "pt"})
            write_whole(folder / CONFIG_FILE, lambda path: path.write_text(config))

        write_whole(folder / WEIGHTS_FILE, write_both)
        return folder


# --- reading ---------------------------------------------------------------------------------------------------------


def _load(folder: Path) -> Adapter:
    config, weights = read_config(folder), find_weights(folder)
    try:
        with safe_open(weights, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise unreadable(weights, error) from None
    return from_peft_state(tensors, config, where=str(folder))


def find_weights(folder: Path) -> Path:
    """The safetensors file of a PEFT folder."""
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickled = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()), None)
        hint = (
            f"it holds pickled weights ({pickled}), which are never read: save it again with safe_serialization=True"
            if pickled
            else "save the adapter with PEFT's save_pretrained"
        )
        raise AdapterError(f"{folder}: no {WEIGHTS_FILE}; {hint}")
    return weights


def unreadable(weights: Path, error: object) -> AdapterError:
    return AdapterError(f"{weights}: not a readable safetensors file ({error}); save the adapter again")


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a PEFT folder, if its adapter is a plain LoRA."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        what = "no such folder" if not folder.is_dir() else f"no {CONFIG_FILE} in it"
        raise AdapterError(f"{folder}: {what}; expected a PEFT adapter folder, as save_pretrained writes it")
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error}); save the adapter again") from None
    return check_config(config, str(path))


def check_config(config: Any, path: str) -> dict[str, Any]:
    """`config`, if it is that of a LoRA adapter which applies `scaling * B @ A` and nothing more."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{path}: expected peft_type 'LORA', got {kind!r}; only LoRA adapters can be merged")
    refused = [name for name in _REFUSED if config.get(name)]
    if refused:
        raise AdapterError(
            f"{path}: {', '.join(refused)} is set, and such an adapter does more than scaling * B @ A; train without it"
        )
    return config


def from_peft_state(state: Mapping[str, Tensor], config: Mapping[str, Any], where: str = "adapter") -> Adapter:
    """An adapter from PEFT's state dict (`get_peft_model_state_dict`) and its config as a dict (`to_dict()`)."""
    factors: dict[str, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for key in sorted(state):
        name = key.removeprefix(PREFIX)
        match = FACTOR.fullmatch(name)
        if match:
            factors.setdefault(match[1], {"kind": match[2] or ""})[match[3]] = state[key]
        elif "lora_" in name:
            raise AdapterError(f"{where}: tensor {key!r} belongs to a LoRA variant that is not supported; train without it")
        else:
            tensors[name] = finite(state[key], where, name)
    layers = {name: _read_layer(name, pair, config, where) for name, pair in factors.items()}
    if not layers:
        raise AdapterError(f"{where}: holds no LoRA factors (keys like '{PREFIX}NAME.lora_A.weight')")
    return Adapter(layers, tensors, {k: v for k, v in config.items() if k not in _OWN_KEYS})


def _read_layer(name: str, pair: dict[str, Any], config: Mapping[str, Any], where: str) -> LoraLayer:
    missing = {"A", "B"} - pair.keys()
    if missing:
        raise AdapterError(f"{where}, layer {name}: factor {missing.pop()} is missing; save the adapter again")
    A, B = finite(pair["A"], where, name), finite(pair["B"], where, name)
    kind, kernel = ("embedding" if pair["kind"] else "linear"), (1, 1)
    if A.ndim == 4 and B.ndim == 4 and tuple(B.shape[2:]) == (1, 1):
        kind, kernel = "conv2d", tuple(A.shape[2:])
        A, B = A.flatten(1), B.flatten(1)
    try:
        rank = _pattern("rank_pattern", name, config, config.get("r"))
        if A.ndim == 2 and rank is not None and A.shape[0] != rank:
            raise AdapterError(f"{CONFIG_FILE} says rank {rank}, A has {A.shape[0]} rows; the two files are not of one adapter")
        return LoraLayer(A, B, _scaling(name, A.shape[0], config), kind, kernel)
    except (AdapterError, TypeError) as error:
        raise AdapterError(f"{where}, layer {name}: {error}") from None


def _scaling(name: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = _pattern("alpha_pattern", name, config, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)):
        raise AdapterError(f"lora_alpha: expected a number in {CONFIG_FILE}, got {alpha!r}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(key: str, name: str, config: Mapping[str, Any], default: Any) -> Any:
    """PEFT's rule for `rank_pattern` and `alpha_pattern`: the first entry that matches the end of the module's name."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"{key}: expected {{name pattern: number}} in {CONFIG_FILE}, got {patterns!r}")
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise AdapterError(f"{key}: expected regular expressions in {CONFIG_FILE}, got {pattern!r} ({error})") from None
        if found:
            return value
    return default


def _plain(value: Any) -> Any:
    """What JSON can hold, as PEFT writes it: sets as lists, enumerations as their values."""
    value = value.value if isinstance(value, enum.Enum) else value
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def finite(tensor: Tensor, where: str, name: str) -> Tensor:
    """`tensor`, if all its numbers are."""
    # The sum is NaN or infinite where any entry is, and the quickest pass; large entries may also overflow it, so there the
    # extremes decide. An outline ("meta") has no entries.
    known = tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta"
    if known and not math.isfinite(tensor.sum()) and not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise AdapterError(f"{where}, {name}: holds NaN or infinite values; the training that made it diverged")
    return tensor


# --- writing ---------------------------------------------------------------------------------------------------------

_OWN_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def _peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    # Copies, because the file format refuses tensors that share memory, as two views of one tensor do.
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in adapter.tensors.items()}
    for name, layer in adapter.layers.items():
        tensors |= layer_tensors(name, layer)
    return {key: _copy(tensor) for key, tensor in tensors.items()}


def layer_tensors(name: str, layer: LoraLayer) -> dict[str, Tensor]:
    """One layer under PEFT's keys, in PEFT's shapes."""
    A, B = layer.A, layer.B
    if layer.kind == "embedding":
        return {f"{PREFIX}{name}.lora_embedding_A": A, f"{PREFIX}{name}.lora_embedding_B": B}
    if layer.kind == "conv2d":
        A, B = A.unflatten(1, (-1, *layer.kernel)), B[:, :, None, None]
    return {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS")  # task types of which PEFT wants a head in the folder


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """What `adapter_config.json` says of `adapter`: its own config, with the ranks and alphas that its layers have."""
    rslora = bool(adapter.config.get("use_rslora"))
    alphas = {name: layer.scaling * (math.sqrt(layer.rank) if rslora else layer.rank) for name, layer in adapter.layers.items()}
    alphas = {name: _tidy(alpha) for name, alpha in alphas.items()}
    rank, rank_pattern = _common(adapter.ranks)
    alpha, alpha_pattern = _common(alphas)
    heads = sorted({name.rpartition(".")[0] for name in adapter.tensors} - adapter.layers.keys() - {""})
    defaults = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "target_modules": sorted(adapter.layers),
        "modules_to_save": heads or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "inference_mode": True,
    }
    own = {"r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    config = dict(adapter.config)
    if not adapter.tensors:  # a part without the head, such as what goes into the base model: PEFT would look for it
        config |= {"modules_to_save": None, "bias": "none"}
        if config.get("task_type") in _WITH_HEAD:
            config["task_type"] = None
    return defaults | config | own


def _tidy(alpha: float) -> float | int:
    """An integer where the number is one but for rounding, as people write alpha."""
    return round(alpha) if round(alpha) and abs(alpha - round(alpha)) < 1e-12 * abs(alpha) else alpha


def _common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and `{anchored name pattern: value}` for the layers that differ from it."""
    common = max(sorted(set(values.values())), key=Counter(values.values()).__getitem__)
    return common, {f"^{re.escape(name)}": value for name, value in values.items() if value != common}


def iter_names(adapters: Mapping[str, Adapter]) -> Iterator[str]:
    """The layer names that all of `adapters` (by client) share, sorted; an `AdapterError` where they differ."""
    first, *others = adapters
    names = adapters[first].layers.keys()
    for other in others:
        differing = names ^ adapters[other].layers.keys()
        if differing:
            layer = min(differing)
            has, lacks = (first, other) if layer in names else (other, first)
            raise AdapterError(
                f"layer {layer}: {has} has it, {lacks} does not; all clients must adapt the same modules of the same model"
            )
    yield from sorted(names)
