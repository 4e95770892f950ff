"""PEFT's folder format: its file names, its config, its keys and its rules for patterns."""

from __future__ import annotations

import enum
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyrank.adapter import options
from anyrank.adapter.bounds import CONFIG_BYTES, CONFIG_DEPTH
from anyrank.adapter.layer import LoraLayer, finite
from anyrank.adapter.lazy import Gathered, Lazy, outlined
from anyrank.adapter.names import PREFIX, is_frozen
from anyrank.adapter.patterns import Patterns
from anyrank.errors import AdapterError, shortened
from anyrank.files import read_bounded

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def find_weights(folder: Path) -> Path:
    """The safetensors file of a PEFT folder."""
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise AdapterError(f"{folder}: no {WEIGHTS_FILE}; {_instead(folder)}")
    return weights


def _instead(folder: Path) -> str:
    """What to do about a folder without weights, by what else is in it."""
    if os.path.lexists(folder / WEIGHTS_FILE):
        return "what has that name there is no file"
    pickled = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()), None)
    if pickled:
        return f"it holds pickled weights ({pickled}), which are never read: save it again with safe_serialization=True"
    shard = next((path.name for path in sorted(folder.glob("*.safetensors"))), None)
    found = f" ({shard} is there: weights in parts, or under another name, are not read)" if shard else ""
    return f"save the adapter with PEFT's save_pretrained{found}"


def unreadable(weights: Path, error: object) -> AdapterError:
    return AdapterError(f"{weights}: not a readable safetensors file ({error}); save the adapter again")


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a PEFT folder, if its adapter is a plain LoRA."""
    path = folder / CONFIG_FILE
    if not os.path.lexists(path):
        raise AdapterError(f"{folder}: {_no_adapter(folder)}; expected a PEFT adapter folder, as save_pretrained writes it")
    try:
        text = read_bounded(path, CONFIG_BYTES).decode("utf-8")
        config = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise AdapterError(f"{path}: {_TOO_DEEP}") from None
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error}); save the adapter again") from None
    return check_config(config, str(path))


def _no_adapter(folder: Path) -> str:
    """What is wrong with a folder in which there is no configuration of an adapter."""
    text = os.fspath(folder)
    if "\0" in text or not os.path.lexists(folder):
        download = f" (an adapter on the hub? download it first: hf download {text} --local-dir FOLDER)"
        return "no such folder" + (download if _HUB_ID.fullmatch(text) else "")
    if not folder.is_dir():
        return f"is no folder; name the folder it is in, {folder.parent}" if folder.is_file() else "is no folder"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    if inner:
        return f"no {CONFIG_FILE} in it, but adapters in its subfolders {', '.join(inner[:5])}: name one of them"
    return f"no {CONFIG_FILE} in it"


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TOO_DEEP = f"tables within tables, more than {CONFIG_DEPTH}; expected what PEFT's save_pretrained writes"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ: of two values for one key, nobody knows which was meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {shortened(twice, 100)!r} stands twice in one table")
    return found


def check_config(config: Any, path: str) -> dict[str, Any]:
    """`config`, if it is that of a LoRA adapter which applies `scaling * B @ A` and nothing more."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(
            f"{path}: expected peft_type 'LORA', got {shortened(repr(kind), 100)}; only LoRA adapters can be merged"
        )
    _check_values(config, path)
    options.check(config, path)
    return config


def _check_values(config: Mapping[str, Any], path: str) -> None:
    """Refuse what JSON cannot say again, or what is nested without end. (Ranks and alphas are judged layer by layer.)"""
    level: list[tuple[str, Any]] = [(key, value) for key, value in config.items() if key not in OWN_KEYS]
    for _ in range(CONFIG_DEPTH):
        wrong = next((key for key, value in level if isinstance(value, float) and not math.isfinite(value)), None)
        if wrong is not None:
            raise AdapterError(f"{path}: {shortened(wrong, 100)}: expected a finite number; save the adapter again")
        level = [(key, inner) for key, value in level for inner in _inner(value)]
        if not level:
            return
    raise AdapterError(f"{path}: {_TOO_DEEP}")


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


@dataclass(frozen=True)
class Rules:
    """What a configuration says of each layer: its rank and its alpha, by PEFT's rule for patterns."""

    config: Mapping[str, Any]
    ranks: Patterns
    alphas: Patterns

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Rules:
        """Raises `AdapterError` for patterns that are none."""
        try:
            return cls(config, *(Patterns(key, config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")))
        except AdapterError as error:
            raise AdapterError(f"{where}: {error}") from None

    def check_rank(self, name: str, rows: int) -> None:
        """Raise `AdapterError` where the configuration has another rank for the layer than `A` has rows."""
        rank = self.ranks.value(name, self.config.get("r"))
        if rank is None:
            return
        if type(rank) is not int or rank < 1:
            told = shortened(repr(rank), 100)
            raise AdapterError(f"r: expected a whole number of at least 1 as its rank in {CONFIG_FILE}, got {told}")
        if rows != rank:
            told = f"{rank}" if rank < 10**9 else "10^9 or more"  # a number may have thousands of digits
            raise AdapterError(f"{CONFIG_FILE} says rank {told}, A has {rows} rows; the two files are not of one adapter")

    def scaling(self, name: str, rank: int) -> float:
        alpha = self.alphas.value(name, self.config.get("lora_alpha"))
        if type(alpha) not in (int, float):
            told = shortened(repr(alpha), 100)
            raise AdapterError(f"lora_alpha: expected a number in {CONFIG_FILE}, got {told}")
        try:
            return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        except OverflowError:
            raise AdapterError(f"lora_alpha: expected a number in {CONFIG_FILE}, got one of more than 300 digits") from None


def read_layer(name: str, pair: dict[str, Any], rules: Rules, where: str) -> LoraLayer:
    missing = {"A", "B"} - pair.keys()
    if missing:
        raise AdapterError(f"{where}, layer {name}: factor {missing.pop()} is missing; save the adapter again")
    try:
        A, B = not_empty("A", pair["A"]), not_empty("B", pair["B"])
        kind, kernel = ("embedding" if pair["kind"] else "linear"), (1, 1)
        if A.ndim == B.ndim and A.ndim in _OF_CONVOLUTIONS:
            raise AdapterError(
                f"A and B have {A.ndim} dimensions, as those of a {_OF_CONVOLUTIONS[A.ndim]} layer; the layers that are merged "
                "are linear, Conv2d and embedding layers"
            )
        if A.ndim == 4 and B.ndim == 4 and tuple(B.shape[2:]) == (1, 1):
            kind, kernel = "conv2d", tuple(A.shape[2:])
            A, B = A.flatten(1), B.flatten(1)
        if A.ndim == 2:
            rules.check_rank(name, A.shape[0])
        layer = LoraLayer(A, B, rules.scaling(name, A.shape[0]) if A.ndim == 2 else 1.0, kind, kernel)
    except AdapterError as error:
        raise AdapterError(f"{where}, layer {name}: {error}") from None
    finite(A, where, name)
    finite(B, where, name)
    return layer


_OF_CONVOLUTIONS = {3: "Conv1d", 5: "Conv3d"}


def not_empty(what: str, tensor: Tensor) -> Tensor:
    """`tensor`, if there is anything in it."""
    if tensor.numel() == 0:
        raise AdapterError(
            f"{what}: expected a tensor with no empty side, got shape {tuple(tensor.shape)}; such are left by training in "
            "shards (DeepSpeed ZeRO-3, FSDP): gather the shards before saving"
        )
    return tensor


def plain(value: Any) -> Any:
    """What JSON can hold, as PEFT writes it: sets as lists, enumerations as their values."""
    value = value.value if isinstance(value, enum.Enum) else value
    return sorted(value) if isinstance(value, (set, frozenset)) else value


# --- writing ---------------------------------------------------------------------------------------------------------

OWN_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def peft_tensors(layers: Mapping[str, LoraLayer], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Layers and plain tensors under PEFT's keys. Layers that are read when they are asked for are read when they are saved."""
    if isinstance(layers, Lazy):
        return _peft_tensors_later(layers, tensors)
    # Copies, because the file format refuses tensors that share memory, as two views of one tensor do.
    keyed = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    for name, layer in layers.items():
        keyed |= layer_tensors(name, layer)
    return {key: _copy(tensor) for key, tensor in keyed.items()}


def _peft_tensors_later(layers: Lazy[LoraLayer], tensors: Mapping[str, Tensor]) -> Gathered[Tensor]:
    found: Gathered[Tensor] = Gathered()
    for name, outline in outlined(tensors).items():
        found.add_later(f"{PREFIX}{name}", outline, partial(tensors.__getitem__, name))
    for name, layer in layers.outline.items():
        for key, outline in layer_tensors(name, layer).items():
            found.add_later(key, outline, partial(_layer_tensor, layers, name, key))
    return found


def _layer_tensor(layers: Mapping[str, LoraLayer], name: str, key: str) -> Tensor:
    return layer_tensors(name, layers[name])[key]


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
    rslora, layers = bool(config.get("use_rslora")), outlined(layers)
    alphas = {name: layer.scaling * (math.sqrt(layer.rank) if rslora else layer.rank) for name, layer in layers.items()}
    alphas = {name: _tidy(alpha) for name, alpha in alphas.items()}
    rank, rank_pattern = _common({name: layer.rank for name, layer in layers.items()})
    alpha, alpha_pattern = _common(alphas)
    trained = (name for name in tensors if not is_frozen(name))
    heads = sorted({name.rpartition(".")[0] for name in trained} - layers.keys() - {""})
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
    if all(map(is_frozen, tensors)):  # a part without the head, such as what goes into the base model: PEFT would look for it
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
