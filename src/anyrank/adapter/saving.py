"""Tensors into a safetensors file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from anyrank.adapter.header import DTYPES
from anyrank.adapter.lazy import Gathered

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """safetensors' own `save_file`, which raises what the system refused as the `OSError` that it is.

    Of `Gathered` tensors that are read when they are asked for, one is held at a time; the file has the same bytes.
    """
    if isinstance(tensors, Gathered) and tensors.later:
        return _save_in_turn(tensors, path, metadata)
    try:
        safetensors.save_file(dict(tensors), path, metadata=metadata and dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def _save_in_turn(tensors: Gathered[Tensor], path: Path, metadata: Mapping[str, str] | None) -> None:
    """The format: the header's length in 8 bytes, the header in JSON, then the tensors, the widest numbers first, so that each
    begins at a multiple of its numbers' width."""
    keys = sorted(tensors.outline, key=lambda key: (-tensors.outline[key].itemsize, key))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in keys:
        tensor, start = tensors.outline[key], end
        end += tensor.numel() * tensor.itemsize
        entries[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for key in keys:
            file.write(memoryview(tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
