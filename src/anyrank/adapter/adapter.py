"""The records of an adapter, and PEFT's folders in and out.

A `LoraLayer` is one low-rank change `scaling * B @ A` of one frozen weight; an `Adapter` is all of them under their
module names, with the plain tensors (a head, biases) that are trained beside them. Shapes are checked once, at birth.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anyrank.adapter.header import DTYPES, read_header
from anyrank.adapter.layer import LoraLayer, finite
from anyrank.adapter.lazy import outlined
from anyrank.adapter.names import FACTOR, PREFIX, plain_names
from anyrank.adapter.peft import (
    CONFIG_FILE,
    OWN_KEYS,
    WEIGHTS_FILE,
    Rules,
    check_config,
    find_weights,
    not_empty,
    peft_config,
    peft_tensors,
    plain,
    read_config,
    read_layer,
    unreadable,
)
from anyrank.adapter.saving import save_file
from anyrank.errors import AdapterError
from anyrank.files import make_folder, write_whole, write_whole_text


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
        return {name: layer.rank for name, layer in outlined(self.layers).items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], config: Any) -> Adapter:
        """An adapter from PEFT's own state dict (`get_peft_model_state_dict`), of tensors or NumPy arrays, and its config.

        `config`: a `LoraConfig`, or what its `to_dict()` gives. Arrays are not copied. Raises `AdapterError` as `load` does.

        >>> state = {"q.lora_A.weight": torch.ones(1, 3).numpy(), "q.lora_B.weight": torch.ones(2, 1).numpy()}
        >>> Adapter.from_state_dict(state, {"peft_type": "LORA", "r": 1, "lora_alpha": 2}).layers["q"].delta().sum()
        tensor(12.)
        """
        values = config if isinstance(config, Mapping) else config.to_dict()
        config = check_config({key: plain(value) for key, value in values.items()}, "adapter config")
        return from_peft_state({key: torch.as_tensor(value) for key, value in state.items()}, config)

    def state_dict(self, numpy: bool = False) -> dict[str, Any]:
        """The adapter under PEFT's keys, in sorted order, as `set_peft_model_state_dict` takes it; as NumPy arrays if asked.

        The scaling is not in it: a model that takes it in must have this adapter's ranks and alphas.
        """
        state = dict(sorted(peft_tensors(self.layers, self.tensors).items()))
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
        """Write a PEFT LoRA folder, which `PeftModel.from_pretrained` takes as it is. Files appear whole or not at all.

        Raises `RunFailed` or `RunError`, in one line, for what the system refuses to write.
        """
        folder = Path(folder)
        make_folder(folder)
        config = json.dumps(peft_config(self.layers, self.tensors, self.config), indent=2, sort_keys=True) + "\n"

        def write_both(weights: Path) -> None:  # both are on the disk before either is put in place
            save_file(peft_tensors(self.layers, self.tensors), weights, metadata={"format": "pt"})
            write_whole_text(folder / CONFIG_FILE, config)

        write_whole(folder / WEIGHTS_FILE, write_both)
        return folder


# --- reading ---------------------------------------------------------------------------------------------------------


def _load(folder: Path) -> Adapter:
    config, weights = read_config(folder), find_weights(folder)
    read_header(weights)
    try:
        with safe_open(weights, framework="pt") as file:
            # Copies, not safetensors' map of the file: so that it can be saved again in its folder, on Windows too.
            tensors = {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise unreadable(weights, error) from None
    return from_peft_state(tensors, config, where=str(folder))


def from_peft_state(state: Mapping[str, Tensor], config: Mapping[str, Any], where: str = "adapter") -> Adapter:
    """An adapter from PEFT's state dict (`get_peft_model_state_dict`) and its config as a dict (`to_dict()`)."""
    names = plain_names(sorted(state), config, where)
    return from_plain_state({name: state[key] for key, name in names.items()}, config, where)


def from_plain_state(state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Adapter:
    """`from_peft_state` of tensors by their plain names (`plain_names`)."""
    factors: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name in sorted(state):
        match = FACTOR.fullmatch(name)
        if match:
            pair = factors.setdefault(match[1], {"kind": match[2] or ""})
            if match[3] in pair or pair["kind"] != (match[2] or ""):
                raise AdapterError(
                    f"{where}, layer {match[1]}: has factors of two layers, or of two kinds; save the adapter again"
                )
            pair[match[3]] = state[name]
        else:
            tensors[name] = finite(not_empty(f"{where}, {name}", _dense(state[name], f"{where}, {name}")), where, name)
    rules = Rules.of(config, where)
    layers = {name: read_layer(name, pair, rules, where) for name, pair in factors.items()}
    if not layers:
        raise AdapterError(f"{where}: contains no LoRA factors (keys like '{PREFIX}NAME.lora_A.weight')")
    return Adapter(layers, tensors, {k: v for k, v in config.items() if k not in OWN_KEYS})


def _dense(tensor: Tensor, where: str) -> Tensor:
    """`tensor`, if it is one of numbers that files hold and that lie side by side."""
    if tensor.dtype not in DTYPES.values() or tensor.layout is not torch.strided:
        raise AdapterError(f"{where}: {tensor.dtype} numbers ({tensor.layout}) are not read; make it a plain float32 tensor")
    return tensor


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
                f"layer {layer}: {has} has it, {lacks} does not; all clients must adapt the same modules of the same model "
                "(a merge of adapters can let those who lack a layer be silent in it: --absent silent, absent='silent')"
            )
    yield from sorted(names)
