"""The checkpoint: one safetensors file, everything that is not a tensor in its header."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from anyrank.adapter.packed import pack, unpack
from anyrank.errors import RunError
from anyrank.files import write_whole
from anyrank.messages.records import Scaling, ServerState

_FORMAT = 1


# --- the checkpoint: one safetensors file, everything that is not a tensor in its header -------------------------------


def save_state(state: ServerState, path: Path) -> None:
    """Write a server state whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    header = {
        "format": _FORMAT,
        "round": state.round,
        "seed": state.seed,
        "scaling": vars(state.scaling) | {"layer_alpha": dict(state.scaling.layer_alpha)},
        "adapter": pack("adapter", state.adapter, tensors),
        "merged": pack("merged", state.merged, tensors) if state.merged else None,
        "extra": {name: pack(f"extra/{name}", adapter, tensors) for name, adapter in sorted(state.extra.items())},
    }
    write_whole(path, lambda file: save_file(tensors, file, metadata={"state": json.dumps(header)}))


def load_state(path: Path) -> ServerState:
    """Read a server state back, bit for bit."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["state"])
            # Copies: safetensors maps the file, and where it is mapped Windows lets no next checkpoint take its place.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RunError(f"{path}: not a readable checkpoint ({error}); start a new run with another --out") from None
    if header["format"] != _FORMAT:
        raise RunError(f"{path}: expected checkpoint format {_FORMAT}, got {header['format']}; use the version that wrote it")
    return ServerState(
        round=header["round"],
        seed=header["seed"],
        adapter=unpack("adapter", header["adapter"], tensors),
        scaling=Scaling(**header["scaling"]),
        merged=unpack("merged", header["merged"], tensors) if header["merged"] else None,
        extra={name: unpack(f"extra/{name}", packed, tensors) for name, packed in header["extra"].items()},
    )
