"""Adapters for programs that know less than PEFT does: one adapter, one scaling, or a whole model with the update in it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyrank import files, stopping
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.lazy import Lazy, outlined
from anyrank.adapter.names import is_frozen
from anyrank.adapter.stored import FolderWriter, open_adapter
from anyrank.aggregation.merge import check_rank
from anyrank.algebra import lowrank
from anyrank.errors import AdapterError, ModelError, RunError, RunFailed, in_a_line, shortened

Progress = Callable[[int, int], None]
FORMATS = ("peft", "vllm", "merged")


def export(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "peft",
    base_update: str | os.PathLike[str] | None = None,
    base: str = "",
    rank: int = 0,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Write the model that `adapter` makes of its base model, in another format, to the new folder `out`.

    `peft`: one adapter folder; `base_update`, which a user would have to merge into the base model first, is in its factors.
    `vllm`: the same with the scaling in the factors, one rank and one alpha for all layers, for servers that read no patterns.
    `merged`: the base model, a folder of transformers' (`base`, or the one that the adapter names), with the update in it.
    `rank`: of the adapter; 0: as large as the parts need together, so that nothing is lost. Returns figures, with `missed`, the
    share of the update's norm that a cut to `rank` took. Raises `AdapterError` or `ModelError` for what does not fit.
    """
    if format not in FORMATS:
        raise AdapterError(f"format: expected one of {', '.join(FORMATS)}, got {shortened(repr(format), 50)}")
    out = Path(out)
    if os.path.lexists(out):
        raise RunError(f"{out}: exists already; name a new folder, or remove this one")
    parts = [open_adapter(each) for each in (base_update, adapter) if each is not None]
    if rank:
        check_rank(rank, [max(layer.shape) for layer in outlined(parts[-1].layers).values()])
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with stopping.unfinished(unfinished):
        try:
            if format == "merged":
                figures = _write_merged(parts, unfinished, base, progress)
            else:
                figures = _write_adapter(parts, unfinished, rank, format == "vllm", progress)
            files.flush_folder(unfinished)
            os.replace(unfinished, out)
        except OSError as error:
            raise RunFailed(f"{out}: cannot be written ({error.strerror or error}); nothing was left there") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return {"format": format, "out": str(out), "base_update": str(base_update) if base_update else "", **figures}


# --- adapters ------------------------------------------------------------------------------------------------------------


def _write_adapter(parts: list[Adapter], folder: Path, rank: int, one_scaling: bool, progress: Progress) -> dict[str, Any]:
    held = {name: [outlined(part.layers)[name] for part in parts if name in part.layers] for name in _names(parts)}
    ranks = {name: rank or sum(layer.rank for layer in layers) for name, layers in held.items()}
    if one_scaling:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    most = max(sum(layer.rank for layer in layers) for layers in held.values())
    if rank > most:
        raise AdapterError(f"rank: expected at most {most}, at which nothing is lost, got {rank}")
    tensors = _tensors(parts)
    if one_scaling:  # such servers have the base model's own embeddings
        tensors = Lazy({name: each for name, each in tensors.outline.items() if not is_frozen(name)}, tensors.__getitem__)
    if one_scaling and tensors:
        raise AdapterError(
            f"format vllm: the adapter has {len(tensors)} trained tensors beside its factors ({shortened(min(tensors), 100)}), "
            "which such servers do not load; export it as merged, or train with model.head = 'frozen'"
        )
    writer = FolderWriter(folder, {name: layers[0] for name, layers in held.items()}, outlined(tensors))
    lost = whole = 0.0
    try:
        wide = [name for name, tensor in outlined(tensors).items() if tensor.itemsize >= _width(held)]
        for name in sorted(wide, key=lambda name: -outlined(tensors)[name].itemsize):
            writer.add_tensor(name, tensors[name])
        for done, (name, size) in enumerate(sorted(ranks.items()), 1):
            layers = [part.layers[name] for part in parts if name in part.layers]
            layer, missed, norm = _one_layer(layers, size, one_scaling)
            lost, whole = lost + missed, whole + norm
            writer.add_layer(name, layer)
            progress(done, len(ranks))
        for name in sorted(tensors.keys() - set(wide), key=lambda name: (-outlined(tensors)[name].itemsize, name)):
            writer.add_tensor(name, tensors[name])
        writer.finish(_config(parts, one_scaling))
    finally:
        writer.close()
    return {
        "layers": len(ranks),
        "ranks": sorted(set(ranks.values())),
        "missed": math.sqrt(max(0.0, lost) / whole) if whole else 0.0,
    }


def _names(parts: list[Adapter]) -> list[str]:
    return sorted({name for part in parts for name in part.layers})


def _width(held: Mapping[str, list[LoraLayer]]) -> int:
    return max(layer.A.itemsize for layers in held.values() for layer in layers)


def _tensors(parts: list[Adapter]) -> Lazy[Tensor]:
    """The plain tensors of the last part that has each, and the frozen weights below an adapted embedding."""
    owner = {name: part for part in parts for name in part.tensors}
    return Lazy({name: outlined(part.tensors)[name] for name, part in owner.items()}, lambda name: owner[name].tensors[name])


def _config(parts: list[Adapter], one_scaling: bool) -> dict[str, Any]:
    config = {**parts[-1].config, "target_modules": _names(parts)}
    chosen: dict[str, Any] = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
    return {**config, **chosen, **({"use_rslora": False, "modules_to_save": None} if one_scaling else {})}


def _one_layer(layers: list[LoraLayer], rank: int, one_scaling: bool) -> tuple[LoraLayer, float, float]:
    """One layer of `rank` that applies what `layers` apply together, the square of what it misses, and of their norm."""
    whole = lowrank.stack([lowrank.of_layer(layer) for layer in layers])
    square, missed = lowrank.inner(whole, whole), 0.0
    if rank < whole.slices:
        found = lowrank.svd(whole, rank)
        roots = found.S.sqrt()
        left, right = found.U * roots, roots[:, None] * found.Vt
        missed = square - float(found.S.square().sum())
        scaling = 1.0
    elif len(layers) == 1 and not one_scaling:
        left, right, scaling = layers[0].B.double(), layers[0].A.double(), layers[0].scaling
    else:
        left, right, scaling = whole.left, whole.right, 1.0
    left = torch.cat([left, left.new_zeros(left.shape[0], rank - left.shape[1])], dim=1)
    right = torch.cat([right, right.new_zeros(rank - right.shape[0], right.shape[1])])
    like = max(layers, key=lambda layer: layer.A.itemsize)
    layer = LoraLayer(right.to(like.A.dtype), left.to(like.A.dtype), scaling, like.kind, like.kernel)
    return layer, missed, square


# --- a whole model -------------------------------------------------------------------------------------------------------


def _write_merged(parts: list[Adapter], folder: Path, base: str, progress: Progress) -> dict[str, Any]:
    path = base or parts[-1].config.get("base_model_name_or_path") or ""
    model = _open(path)
    _untie(model, parts)
    modules, names = dict(model.named_modules()), _names(parts)
    missing = next((name for name in names if not isinstance(getattr(modules.get(name), "weight", None), Tensor)), None)
    if missing is not None:
        raise AdapterError(f"layer {missing}: {path} has no such layer; name the adapter's own base model with --base")
    with torch.no_grad():
        for name, tensor in _tensors(parts).items():
            _replace(model, name, tensor, path)
        for done, name in enumerate(names, 1):
            for part in (part for part in parts if name in part.layers):
                _add(modules[name], part.layers[name], f"{path}, layer {name}")
            progress(done, len(names))
    files.make_folder(folder)
    model.save_pretrained(folder)
    for each in sorted(Path(path).iterdir() if Path(path).is_dir() else []):  # tokenizer, processor, templates
        if each.is_file() and each.suffix in _BESIDE and not (folder / each.name).exists() and "adapter" not in each.name:
            shutil.copyfile(each, folder / each.name)
    return {"layers": len(names), "base": path, "model": type(model).__name__, "missed": 0.0}


_BESIDE = (".json", ".txt", ".model", ".jinja", ".vocab")


def _open(path: str) -> Any:
    """The model as its own class, with its own number type, from a local folder or what the hub's cache has."""
    try:
        import transformers
    except ImportError:
        raise ModelError("format merged: needs transformers; install it with: pip install 'anyrank[text]'") from None
    if not path:
        raise AdapterError("format merged: the adapter does not name its base model; name it with --base")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if kind is None:
            raise ValueError("its config.json does not name a class of transformers (architectures)")
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantised: an update cannot be added to them; name the model before quantisation")
        return kind.from_pretrained(path, dtype="auto")
    except (OSError, ValueError, RuntimeError) as error:
        told = shortened(in_a_line(error), 300)
        raise ModelError(
            f"{path}: cannot be opened as the base model of transformers ({told}); name its folder with --base"
        ) from None


def _untie(model: Any, parts: list[Adapter]) -> None:
    """Where one matrix is the input and the output embedding, an update of one of them is not one of the other."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    if inner is None or outer is None or inner.weight is not outer.weight:
        return
    touched = {name for name, module in model.named_modules(remove_duplicate=False) if module in (inner, outer)}
    changed = {*_names(parts), *(name.rpartition(".")[0] for name in _tensors(parts) if not is_frozen(name))}
    if touched & changed:
        outer.weight = nn.Parameter(inner.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model._tied_weights_keys = None
        model.all_tied_weights_keys = {}


def _replace(model: Any, name: str, tensor: Tensor, path: str) -> None:
    """A head that was trained, a bias, or the base weight that was saved with an adapted embedding."""
    plain = name.replace(".base_layer.", ".")
    known = dict(model.named_parameters(remove_duplicate=False)).get(plain)
    if known is None or known.shape != tensor.shape:
        found = "no such tensor" if known is None else f"shape {list(known.shape)}"
        raise AdapterError(
            f"{name}: expected shape {list(tensor.shape)} in {path}, got {found}; name the right model with --base"
        )
    known.copy_(tensor)


def _add(module: Any, layer: LoraLayer, where: str) -> None:
    """Add the update to the module's weight: computed in float64, rounded once."""
    weight = module.weight
    delta = layer.scaling * (layer.B.double() @ layer.A.double())  # [out, in]
    if layer.kind == "embedding" or type(module).__name__ == "Conv1D":  # these hold their weight as [in, out]
        delta = delta.T
    if delta.numel() != weight.numel() or (layer.kind != "conv2d" and delta.shape != weight.shape):
        raise AdapterError(
            f"{where}: expected a weight of shape {list(delta.shape)}, got {list(weight.shape)}; name the adapter's own base "
            "model with --base"
        )
    weight.copy_(weight.double() + delta.reshape(weight.shape))
