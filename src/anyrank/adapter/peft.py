"""PEFT's folder format: its file names, its config, its keys and its rules for patterns."""

from __future__ import annotations

import enum
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyrank.adapter.layer import LoraLayer, finite
from anyrank.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")


# PEFT options whose forward pass is more than base(x) + scaling * B @ A @ x: merging their factors would be wrong.
_REFUSED = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "trainable_token_indices")


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
        config = json.loads(path.read_text(encoding="utf-8"))
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


def read_layer(name: str, pair: dict[str, Any], config: Mapping[str, Any], where: str) -> LoraLayer:
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
            raise AdapterError(
                f"{CONFIG_FILE} says rank {rank}, A has {A.shape[0]} rows; the two files belong to different adapters"
            )
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


def plain(value: Any) -> Any:
    """What JSON can hold, as PEFT writes it: sets as lists, enumerations as their values."""
    value = value.value if isinstance(value, enum.Enum) else value
    return sorted(value) if isinstance(value, (set, frozenset)) else value


# --- writing ---------------------------------------------------------------------------------------------------------

OWN_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def peft_tensors(layers: Mapping[str, LoraLayer], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers and plain tensors under PEFT's keys."""
    # Copies, because the file format refuses tensors that share memory, as two views of one tensor do.
    keyed = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    for name, layer in layers.items():
        keyed |= layer_tensors(name, layer)
    return {key: _copy(tensor) for key, tensor in keyed.items()}


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


def peft_config(layers: Mapping[str, LoraLayer], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter: its own `config`, with the ranks and alphas that its layers have."""
    rslora = bool(config.get("use_rslora"))
    alphas = {name: layer.scaling * (math.sqrt(layer.rank) if rslora else layer.rank) for name, layer in layers.items()}
    alphas = {name: _tidy(alpha) for name, alpha in alphas.items()}
    rank, rank_pattern = _common({name: layer.rank for name, layer in layers.items()})
    alpha, alpha_pattern = _common(alphas)
    heads = sorted({name.rpartition(".")[0] for name in tensors} - layers.keys() - {""})
    defaults = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "target_modules": sorted(layers),
        "modules_to_save": heads or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "inference_mode": True,
    }
    own = {"r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    known = dict(config)
    if not tensors:  # a part without the head, such as what goes into the base model: PEFT would look for it
        known |= {"modules_to_save": None, "bias": "none"}
        if known.get("task_type") in _WITH_HEAD:
            known["task_type"] = None
    return defaults | known | own


def _tidy(alpha: float) -> float | int:
    """An integer where the number is one but for rounding, as people write alpha."""
    return round(alpha) if round(alpha) and abs(alpha - round(alpha)) < 1e-12 * abs(alpha) else alpha


def _common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and `{anchored name pattern: value}` for the layers that differ from it."""
    common = max(sorted(set(values.values())), key=Counter(values.values()).__getitem__)
    return common, {f"^{re.escape(name)}": value for name, value in values.items() if value != common}
