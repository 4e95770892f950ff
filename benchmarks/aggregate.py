"""How long a merge takes, and what it holds in memory, beside the ways that others use: `make bench`.

One process, one thread unless asked otherwise, all ways by turns in every repeat. CPU seconds, so that other people's work on
the machine counts little. Adapters are shaped like those of a 7B Llama: 4096 x 4096 modules, ranks 4 to 64 mixed, a start
and a signal that all clients share, and noise of their own.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not count as work

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyrank import Adapter, ClientUpdate, LoraLayer, devices, methods
from anyrank.aggregation.aggregates import aggregate_folders
from anyrank.algebra import lowrank
from anyrank.messages.records import Scaling, ServerState

SIDE, RANKS, ALPHA, LAYERS = 4096, (4, 8, 16, 32, 64), 16, 32
QV, QKVO = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
Layers = Sequence[LoraLayer]


# --- the other ways, written out -------------------------------------------------------------------------------------


def dense_way(layers: Layers, weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    """FlexLoRA as released: every client's product in full, their mean, its whole SVD."""
    total = torch.zeros(SIDE, SIDE)
    for layer, weight in zip(layers, weights, strict=True):
        total += weight * layer.scaling * (layer.B @ layer.A)
    U, S, Vt = torch.linalg.svd(total, full_matrices=False)
    return U[:, :rank] * S[:rank], Vt[:rank]


def qr_way(layers: Layers, weights: Sequence[float], rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The best exact way seen released: QR of both stacks of factors, SVD of the small core between them."""
    pairs = list(zip(layers, weights, strict=True))
    left = torch.cat([weight * layer.scaling * layer.B for layer, weight in pairs], dim=1).to(dtype)
    right = torch.cat([layer.A for layer in layers], dim=0).to(dtype)
    Ql, Rl = torch.linalg.qr(left)
    Qr, Rr = torch.linalg.qr(right.T)
    U, S, Vt = torch.linalg.svd(Rl @ Rr.T)
    return (Ql @ U[:, :rank]) * S[:rank], Vt[:rank] @ Qr.T


def dictionary_way(folders: Sequence[Path], out: Path) -> None:
    """What a hand-written loop does: all state dicts in memory, factors padded with zeros, averaged, saved."""
    states = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    mean = {}
    for key in states[0]:
        shape = [max(sizes) for sizes in zip(*(state[key].shape for state in states), strict=True)]
        mean[key] = torch.zeros(shape)
        for state in states:
            rows, columns = state[key].shape
            mean[key][:rows, :columns] += state[key] / len(states)
    save_file(mean, out)


def plain_read(folders: Sequence[Path]) -> None:
    """Every file into memory, one after another, as `read_bytes` does it: the bar is three times this."""
    for folder in folders:
        (folder / "adapter_model.safetensors").read_bytes()


def buffered_read(folders: Sequence[Path]) -> None:
    """The floor of all reading: every byte into one small buffer that stays in the core's cache. Nothing is kept or made."""
    buffer = bytearray(1 << 20)
    for folder in folders:
        with open(folder / "adapter_model.safetensors", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_and_write(folders: Sequence[Path], out: Path) -> None:
    """What a merge cannot do without: every file into memory of its own, one after another, and a result on the disk."""
    largest = b""
    for folder in folders:
        held = (folder / "adapter_model.safetensors").read_bytes()
        largest = max(largest, held, key=len)  # the result has the size of the largest
    with open(out, "wb") as file:
        file.write(largest)
        file.flush()
        os.fsync(file.fileno())


# --- adapters --------------------------------------------------------------------------------------------------------


def clients(count: int, seed: int) -> list[LoraLayer]:
    """One module of `count` clients: a common start and a common signal with a falling spectrum, and each client's own."""
    draw = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, RANKS[-1] + 1) ** -0.7
    A0 = (torch.rand(RANKS[-1], SIDE, generator=draw) * 2 - 1) / SIDE**0.5
    B0 = torch.randn(SIDE, RANKS[-1], generator=draw) * 0.02 * decay
    found = []
    for i in range(count):
        rank = RANKS[i % len(RANKS)]
        A = A0[:rank] + 0.3 * (torch.rand(rank, SIDE, generator=draw) * 2 - 1) / SIDE**0.5
        B = B0[:, :rank] + 0.5 * torch.randn(SIDE, rank, generator=draw) * 0.02 * decay[:rank]
        found.append(LoraLayer(A, B, ALPHA / rank))
    return found


def write_folders(root: Path, count: int, modules: Sequence[str], layers: int) -> list[Path]:
    """`count` PEFT folders; two distinct layers, repeated under the names of all."""
    distinct = [clients(count, seed) for seed in (0, 1)]
    folders = []
    for i in range(count):
        held = {}
        for number in range(layers):
            for module in modules:
                held[f"model.layers.{number}.self_attn.{module}"] = distinct[number % 2][i]
        folders.append(Adapter(held).save(root / f"client-{i}"))
    return folders


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(
    ways: dict[str, Callable[[], Any]], repeats: int, clean: Callable[[], Any] = lambda: None
) -> dict[str, tuple[float, float]]:
    """Median CPU and wall seconds of each way, all of them by turns; `clean` runs after each, off the clock."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            clean()
            taken[name].append((cpu, wall))
    return {name: tuple(statistics.median(column) for column in zip(*times, strict=True)) for name, times in taken.items()}


def peak_memory(work: Callable[[], Any], clean: Callable[[], Any]) -> float:
    """MB of resident memory at the peak of `work`, above what was held before; in a child, so that none is left over.

    The second run counts: the first loads code. What is free goes back before it, since memory used again would not show.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        work()
        clean()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
        before = _status("VmRSS")
        work()
        os.write(theirs, str(_status("VmHWM") - before).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours) as answer:
        kilobytes = float(answer.read())
    os.waitpid(child, 0)
    return kilobytes / 1e3


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return float(line.split()[1])


def error(found: tuple[Tensor, Tensor] | LoraLayer, exact: tuple[Tensor, Tensor]) -> float:
    """`|found - exact|_F / |exact|_F` of two products `B A`, from their factors."""
    found = (found.B, found.A) if isinstance(found, LoraLayer) else found
    left = torch.cat([found[0].double(), -exact[0]], dim=1)
    right = torch.cat([found[1].double(), exact[1]], dim=0)
    return lowrank.norm(lowrank.Product(left, right)) / lowrank.norm(lowrank.Product(*exact))


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n\n| " + " | ".join(heads) + " |\n| " + " | ".join(["---"] + ["---:"] * (len(heads) - 1)) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


# --- one module, in memory -------------------------------------------------------------------------------------------


def anyrank_way(layers: Layers) -> Callable[[], LoraLayer]:
    """The library's own rule for one layer, from the clients' factors to the server's; what the server held is there."""
    rank = max(layer.rank for layer in layers)
    start = LoraLayer(torch.zeros(rank, SIDE), torch.zeros(SIDE, rank), 1.0)
    state = ServerState(0, 0, Adapter({"layer": start}), Scaling(1.0, "constant"))
    updates = [ClientUpdate(Adapter({"layer": layer}), 1, f"{i:03d}") for i, layer in enumerate(layers)]
    return lambda: methods.make("flexlora").aggregate(state, updates).adapter.layers["layer"]


def one_module(counts: Sequence[int], repeats: int, with_dense: bool) -> None:
    rows = []
    for count in counts:
        layers, weights = clients(count, seed=0), [1 / count] * count
        slices = sum(layer.rank for layer in layers)
        ways = {
            "QR way, float32": lambda layers=layers, weights=weights: qr_way(layers, weights, RANKS[-1]),
            "anyrank": anyrank_way(layers),
        }
        exact = qr_way(layers, weights, RANKS[-1], torch.float64)
        with lowrank.using("auto"):  # as a merge does, around all its layers
            errors = {name: error(way(), exact) for name, way in ways.items()}
            times = measure(ways, repeats if count <= 20 else 3)
        if with_dense and count == counts[0]:
            found: list[tuple[Tensor, Tensor]] = []
            times |= measure({"dense way, measured once": lambda: found.append(dense_way(layers, weights, RANKS[-1]))}, 1)  # noqa: B023
            errors["dense way, measured once"] = error(found[0], exact)
        megabytes = sum(layer.A.numel() + layer.B.numel() for layer in layers) * 4 / 1e6
        floor = f"{megabytes:.0f} MB, {8 * SIDE * slices * RANKS[-1] / 1e9:.1f} GFLOP"
        for name, (cpu, wall) in times.items():
            ratio = f"{cpu / times['anyrank'][0]:.1f}"
            rows.append([f"{count} ({slices})", name, f"{cpu:.3f}", f"{wall:.3f}", ratio, f"{errors[name]:.1e}", floor])
    heads = ["clients (sum of ranks)", "way", "CPU s", "wall s", "x anyrank", "error", "floor: read, two thin products"]
    table("One 4096 x 4096 module, in memory, to rank 64 (error of the product, against float64)", heads, rows)


# --- whole folders ---------------------------------------------------------------------------------------------------


def whole_folders(plans: Sequence[tuple[int, Sequence[str], int]], root: Path, repeats: int) -> None:
    rows = []
    for count, modules, layers in plans:
        folders = write_folders(root / "in", count, modules, layers)
        size = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
        ways = {
            "read through one small buffer": lambda folders=folders: buffered_read(folders),
            "plain read of the files": lambda folders=folders: plain_read(folders),
            "plain read, and a result written": lambda folders=folders: read_and_write(folders, root / "copy.safetensors"),
            "dictionary averaging": lambda folders=folders: dictionary_way(folders, root / "mean.safetensors"),
            "anyrank zeropad": lambda folders=folders: aggregate_folders(folders, "zeropad", root / "out"),
            "anyrank rbla": lambda folders=folders: aggregate_folders(folders, "rbla", root / "out"),
            "anyrank raflora": lambda folders=folders: aggregate_folders(folders, "raflora", root / "out"),
        }
        if count > 20:
            del ways["dictionary averaging"]  # holds all files at once
        buffered_read(folders)  # so that all find the files in the disk cache
        clean = lambda: shutil.rmtree(root / "out", ignore_errors=True)  # noqa: E731
        times, memory = measure(ways, repeats if count <= 20 else 1, clean), {}
        for name, way in ways.items():
            memory[name] = peak_memory(way, clean)
            clean()
        for name, (cpu, wall) in times.items():
            module_ms = 1e3 * cpu / (layers * len(modules))
            what = f"{count} x {layers} x {','.join(module[0] for module in modules)}"
            rows.append(
                [what, f"{size / 1e9:.2f}", name, f"{cpu:.2f}", f"{wall:.2f}", f"{module_ms:.1f}", f"{memory[name]:.0f}"]
            )
        shutil.rmtree(root / "in")
    heads = ["clients x layers x modules", "GB read", "way", "CPU s", "wall s", "CPU ms a module", "peak MB"]
    table("PEFT folders, float32, from disk cache to a written folder", heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a minute: few clients, few layers, no dense way")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    print(f"{cpu}, {devices.cores()} cores, {chosen.threads} thread(s), torch {torch.__version__}")
    print(f"python benchmarks/aggregate.py {' '.join(sys.argv[1:])}".strip())
    one_module([10, 20] if chosen.quick else [10, 20, 100], chosen.repeats, not chosen.quick)
    plans = [(20, QV, 4), (20, QV, 8)]
    if not chosen.quick:
        plans = [(10, QV, LAYERS), (20, QV, LAYERS // 4), (20, QV, LAYERS), (20, QKVO, LAYERS), (100, QV, LAYERS)]
    with tempfile.TemporaryDirectory(prefix="anyrank-bench-") as root:
        whole_folders(plans, Path(root), 3)


if __name__ == "__main__":
    main()
