"""The keys of an adapter's weights: what wrappers put into them is taken out again, where nothing else can be meant."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from anyrank.errors import AdapterError, shortened

PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", re.DOTALL)
_NAMED = re.compile(r"(.+\.(?:lora_(?:embedding_)?[AB]|modules_to_save))\.(?!weight$)([^.]+)(\.[^.]+)?", re.DOTALL)
# No module of a model has such a name: FSDP, activation checkpointing and torch.compile wrap others in it.
_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_DOUBLED = re.compile(rf"(?:(?:module\.)*{re.escape(PREFIX)})+")
_WHOLE_MODEL = (".base_layer.weight", ".original_module.")  # (a trained bias is one of the base layer, too)
_BASE = ".base_layer.weight"
# Layers as long as the vocabulary, which `get_output_embeddings` of transformers' models returns.
_OF_VOCABULARY = frozenset({"lm_head", "embed_out", "output_layer", "decoder", "predictions_decoder"})
_FORMATS = {
    re.compile(r"\.lora_(up|down)\.weight$|^lora_(unet|te)"): "keys as kohya's scripts write them",
    re.compile(r"\.lora\.(up|down)\.weight$|_lora\.(up|down)\.weight$"): "keys as diffusers wrote them",
}


def plain_names(keys: Iterable[str], config: Mapping[str, Any], where: str) -> dict[str, str]:
    """`{key: name}`: the keys of an adapter without PEFT's prefix, and as if nothing had wrapped its model.

    Taken out are FSDP's, torch.compile's and checkpointing's own names, `module.` before PEFT's prefix, a prefix that stands
    there again, and the adapter's own name (`lora_A.default.weight`) where all keys have one and the same. Raises
    `AdapterError` where more than one thing can be meant, and for the keys of another format.
    """
    names = {key: _DOUBLED.sub("", _WRAPPERS.sub("", key), count=1) if _wrapped(key) else key for key in keys}
    names = _without_adapter_name(names, where)
    known = set(names.values())
    frozen = {name for name in known if _is_frozen(name, known)}
    for key, name in names.items():
        if name not in frozen:
            _check(key, name, where)
    if names and all(name.startswith("module.") for name in names.values()) and not _has_module(config, names):
        raise AdapterError(
            f"{where}: all keys begin with '{PREFIX}module.', as of a wrapped model (DistributedDataParallel); save the "
            "adapter of the model inside, or, if its own module is called so, list target_modules by their full names"
        )
    twice = sorted(names.values())
    same = next((name for name, after in itertools.pairwise(twice) if name == after), None)
    if same is not None:
        raise AdapterError(f"{where}: two tensors are both called {_told(same)}; save the adapter again")
    return names


def _wrapped(key: str) -> bool:
    return bool(_WRAPPERS.search(key) or _DOUBLED.match(key))


def _without_adapter_name(names: Mapping[str, str], where: str) -> dict[str, str]:
    found = {key: match for key, name in names.items() if (match := _NAMED.fullmatch(name))}
    adapters = sorted({match[2] for match in found.values()})
    if len(adapters) > 1:
        told = ", ".join(map(_told, adapters[:5]))
        raise AdapterError(
            f"{where}: holds several adapters in one file ({told}); save one: save_pretrained(selected_adapters=…)"
        )
    return {key: _joined(found[key]) if key in found else name for key, name in names.items()}


def _joined(match: re.Match[str]) -> str:
    return match[1].removesuffix(".modules_to_save") + (match[3] or "")


def is_frozen(name: str) -> bool:
    """Whether a plain tensor is the frozen weight below an adapted embedding, which PEFT saves with its factors."""
    return name.endswith(_BASE)


def _is_frozen(name: str, names: Collection[str]) -> bool:
    """PEFT saves the input and output embeddings with an adapter of one of them (`save_embedding_layers`)."""
    layer = name.removesuffix(_BASE)
    embedding = f"{layer}.lora_embedding_A" in names
    return is_frozen(name) and (embedding or (f"{layer}.lora_A.weight" in names and layer.split(".")[-1] in _OF_VOCABULARY))


def _check(key: str, name: str, where: str) -> None:
    if any(inner in name for inner in _WHOLE_MODEL):
        raise AdapterError(
            f"{where}: {_told(key)} is of the base model itself; save the adapter alone, with PEFT's save_pretrained"
        )
    if FACTOR.fullmatch(name):
        return
    told = next((told for pattern, told in _FORMATS.items() if pattern.search(name)), None)
    if told:
        raise AdapterError(f"{where}: {_told(key)}: {told}, which are not read; convert it to PEFT's format")
    if "lora_" in name:
        raise AdapterError(f"{where}: tensor {_told(key)} belongs to a LoRA variant that is not supported; train without it")


def _has_module(config: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    """Whether the model's own module is called `module`: its adapter lists full names, or its keys have no prefix at all."""
    targets = config.get("target_modules")
    full = isinstance(targets, (list, tuple)) and any(isinstance(t, str) and t.startswith("module.") for t in targets)
    return full or not any(key.startswith(PREFIX) for key in names)


def _told(name: str) -> str:
    return repr(shortened(name, 100))
