"""The header of a safetensors file: which tensors it holds, of which numbers and shapes, and where they lie."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from anyrank.adapter.peft import unreadable
from anyrank.errors import AdapterError, shortened

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """`{key: {"dtype", "shape", "data_offsets"}}` of a file, and where its tensors begin.

    Raises `AdapterError` for what is no safetensors file, or holds numbers that are not read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no file")
        with safe_open(path, framework="pt"):
            pass  # its own checks: the header is whole, and describes exactly the bytes that follow
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from None
    entries.pop("__metadata__", None)
    foreign = next((key for key, entry in entries.items() if entry["dtype"] not in DTYPES), None)
    if foreign is not None:
        told = f"{path}, {shortened(foreign, 200)}: {entries[foreign]['dtype']}"
        raise AdapterError(f"{told} numbers are not read; save it as float32")
    return entries, 8 + length
