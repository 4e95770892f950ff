"""What a frame costs: an adapter written and read as a frame, beside a copy of its bytes and their SHA-256 alone.

    python benchmarks/wire.py --repeats 7

One process, one thread, all ways by turns in every repeat; medians of CPU and wall seconds. The adapter has 64 modules of
4096 x 4096 at rank 116 in float32: 243 MB, the size at which the engines were compared. Peak memory is measured in a child of
its own, above what was held before.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aggregate import measure, peak_memory, table
from safetensors.torch import load, save

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages import frame as framing
from anyrank.messages import wire
from anyrank.messages.frame import Frame
from anyrank.messages.records import ClientUpdate, Download

SIDE, LIMIT = 4096, 1 << 33


def download(modules: int, rank: int, dtype: torch.dtype) -> Download:
    draw = torch.Generator().manual_seed(0)
    layers = {}
    for number in range(modules):
        A, B = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((rank, SIDE), (SIDE, rank)))
        layers[f"model.layers.{number // 2}.self_attn.{'qv'[number % 2]}_proj"] = LoraLayer(A, B, 1.0)
    return Download(Adapter(layers), {name: tuple(range(rank)) for name in layers})


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def fresh_copy(data: bytes) -> np.ndarray:
    """The bytes in memory that was not used before: what every reading takes at least."""
    return np.frombuffer(data, np.uint8).copy()


def write_file(path: Path, frame: Frame) -> None:
    with open(path, "wb", buffering=0) as stream:
        framing.write(stream, frame)


def write_nowhere(frame: Frame) -> None:
    with open(os.devnull, "wb", buffering=0) as stream:
        framing.write(stream, frame)


def read_file(path: Path) -> Frame:
    with open(path, "rb", buffering=0) as stream:
        return framing.read(stream, LIMIT, last=True)


def ways(sent: Download, folder: Path) -> dict[str, Callable[[], Any]]:
    update = ClientUpdate(sent.adapter, 100, "st-mary", {"loss": 1.0})
    frame = wire.update_frame(update, sent)
    data, tensors = framing.to_bytes(frame), sent.adapter.state_dict()
    plain = save(tensors)
    numbers, used = np.frombuffer(data, np.uint8), np.zeros(len(data), np.uint8)
    write_file(folder / "frame", frame)
    return {
        "memory copy, memory in use": lambda: np.copyto(used, numbers),
        "memory copy, fresh memory": lambda: fresh_copy(data),
        "SHA-256 alone": lambda: sha256(data),
        "SHA-256, and a copy to fresh memory": lambda: (sha256(data), fresh_copy(data)),
        "update to frame, written to nowhere": lambda: write_nowhere(wire.update_frame(update, sent)),
        "update to frame, to bytes": lambda: framing.to_bytes(wire.update_frame(update, sent)),
        "bytes to frame, to update": lambda: wire.update_of(framing.from_bytes(data, LIMIT), sent),
        "file to frame, to update": lambda: wire.update_of(read_file(folder / "frame"), sent),
        "safetensors to bytes (no digest)": lambda: save(tensors),
        "bytes to safetensors (no digest)": lambda: load(plain),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--modules", type=int, default=64)
    options.add_argument("--rank", type=int, default=116)
    options.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    asked = options.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}")
    sent = download(asked.modules, asked.rank, getattr(torch, asked.dtype))
    size = sent.upload_bytes() / 1e6
    with tempfile.TemporaryDirectory() as folder:
        found = ways(sent, Path(folder))
        times = measure(found, asked.repeats)
        memory = {name: peak_memory(way, lambda: None) for name, way in found.items()}
    floor, rows = times["SHA-256, and a copy to fresh memory"][0], []
    for name, (cpu, wall) in times.items():
        rows.append([name, f"{cpu:.3f}", f"{wall:.3f}", f"{size / cpu:.0f}", f"{cpu / floor:.2f}", f"{memory[name]:.0f}"])
    heads = ["way", "CPU s", "wall s", "MB per CPU s", "times the fourth line", "peak MB"]
    table(f"{size:.0f} MB: {asked.modules} modules of {SIDE} x {SIDE}, rank {asked.rank}, {asked.dtype}", heads, rows)


if __name__ == "__main__":
    main()
