"""The checkpoint: one safetensors file, everything that is not a tensor in its header, with a digest over all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from anyrank.adapter.lazy import Gathered
from anyrank.adapter.packed import pack, unpack
from anyrank.adapter.saving import save_file
from anyrank.errors import RunError, in_a_line
from anyrank.files import write_whole
from anyrank.messages.records import Scaling, ServerState
from anyrank.runs.logs import Mark

_FORMAT = 2
_UNSEALED = 1  # the format before: without a digest, and without marks of the logs


class OtherVersion(RunError):
    """A whole checkpoint, of a format that this version does not read."""


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds: the `state`, how far each log went, and the digest of what its run began with. The last two are
    `None` in one of the format before."""

    state: ServerState
    marks: Mapping[str, Mark] | None
    run: str | None


def save_state(
    state: ServerState, path: Path, marks: Mapping[str, Mark] | None = None, before: Path | None = None, run: str | None = None
) -> None:
    """Write a server state, with the marks of the logs that belong to it, and the digest of what its `run` began with, whole
    or not at all. `before`: where the checkpoint goes that stands at `path`."""
    tensors: Gathered[torch.Tensor] = Gathered()
    header = {
        "format": _FORMAT,
        "round": state.round,
        "seed": state.seed,
        "scaling": vars(state.scaling) | {"layer_alpha": dict(state.scaling.layer_alpha)},
        "adapter": pack("adapter", state.adapter, tensors),
        "merged": pack("merged", state.merged, tensors) if state.merged else None,
        "extra": {name: pack(f"extra/{name}", adapter, tensors) for name, adapter in sorted(state.extra.items())},
        "logs": dict(marks or {}),
    }
    header |= {"run": run} if run is not None else {}
    header = json.loads(json.dumps(header))  # as it will be read
    sealed = json.dumps(header | {"sha256": _digest(header, tensors)})
    write_whole(path, lambda file: save_file(tensors, file, metadata={"state": sealed}), before)


def load_state(path: Path) -> ServerState:
    """Read a server state back, bit for bit. Raises `RunError` as `load` does."""
    return load(path).state


def load(path: Path) -> Stored:
    """Read a checkpoint back. Raises `RunError` if it is damaged, and `OtherVersion` if it is whole and of another format."""
    try:
        header, tensors = _read(path)
        digest = header.pop("sha256", None)
        if header["format"] != _UNSEALED or digest is not None:
            _expect(digest == _digest(header, tensors), "its digest does not fit")
        if header["format"] not in (_UNSEALED, _FORMAT):
            expected = f"expected checkpoint format {_FORMAT}, got {header['format']}"
            raise OtherVersion(f"{path}: {expected}; use the version that wrote it")
        marks = {name: Mark(*mark) for name, mark in header["logs"].items()} if "logs" in header else None
        return Stored(_state(header, tensors), marks, header.get("run"))
    except OtherVersion:
        raise
    except Exception as error:  # what is damaged may break in any way
        raise RunError(f"{path}: not a readable checkpoint ({in_a_line(error)}); start the run anew in another --out") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    _expect(path.is_file(), "not a file")
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})["state"])
        # Copies: safetensors maps the file, and where it is mapped Windows lets no next checkpoint take its place.
        return header, {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping


def _state(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> ServerState:
    return ServerState(
        round=header["round"],
        seed=header["seed"],
        adapter=unpack("adapter", header["adapter"], tensors),
        scaling=Scaling(**header["scaling"]),
        merged=unpack("merged", header["merged"], tensors) if header["merged"] else None,
        extra={name: unpack(f"extra/{name}", packed, tensors) for name, packed in header["extra"].items()},
    )


def _digest(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of the header and of all tensors' names, types, shapes and bytes."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
        total.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def _expect(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)
