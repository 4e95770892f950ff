"""Computed tensors kept on disk between runs: one safetensors file per key, with the key and a checksum in it.

A file that is missing, truncated, damaged or made for another key is no error: it counts as missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anyrank.adapter.saving import save_file
from anyrank.errors import RunError, RunFailed
from anyrank.files import make_folder, write_whole

_STAMP = "anyrank"


def digest(parts: Iterable[str]) -> str:
    """The sha256 of a sequence of texts; each text is hashed with its length, so that different sequences have different
    digests.

    >>> digest(["ab", "c"]) == digest(["a", "bc"])
    False
    """
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


def load(folder: Path, kind: str, key: Mapping[str, str], mapped: bool = False) -> dict[str, Tensor] | None:
    """The tensors stored for `key`, or `None` if there is no complete and undamaged file for it.

    `mapped`: the tensors stay in the file, and the operating system reads and caches what is used; otherwise they are in
    memory.
    """
    path, text = _place(folder, kind, key)
    if not path.is_file() or not path.stat().st_size:
        return None
    try:
        tensors, stamp = _open(path)
        if stamp != _stamp(text, tensors):
            return None
        if mapped:
            return _open(path)[0]  # a new mapping, because the check has read every page of the first one
    except Exception:  # a damaged file fails in any way, and counts as missing
        return None
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _open(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """A file's tensors, as safetensors maps them, and its stamp."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, (file.metadata() or {}).get(_STAMP)


def store(folder: Path, kind: str, key: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Path:
    """Write the tensors of `key` completely or not at all; `kind` begins the file's name. Raises what `files` raises."""
    path, text = _place(folder, kind, key)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {_STAMP: _stamp(text, tensors)}
    try:
        make_folder(folder)
        write_whole(path, lambda file: save_file(tensors, file, metadata=metadata))
    except (RunError, RunFailed, SafetensorError) as error:
        if load(folder, kind, key, mapped=True) is not None:  # Windows replaces no file that another process has mapped
            return path
        kind = RunError if isinstance(error, RunError) else RunFailed  # a place that cannot be, or a disk that takes nothing
        raise kind(f"cannot write to the cache: {error}; or set $ANYRANK_CACHE to another folder") from None
    return path


def _place(folder: Path, kind: str, key: Mapping[str, str]) -> tuple[Path, str]:
    text = json.dumps(dict(key), sort_keys=True)
    return folder / f"{kind}-{digest([text])[:16]}.safetensors", text


def _stamp(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Key and checksum in one entry: safetensors writes several in an order that differs from file to file."""
    return json.dumps({"key": text, "sha256": _checksum(tensors)})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()
