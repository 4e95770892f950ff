"""How soon a command answers, or refuses, when it needs no torch: wall time of process starts, beside Python's and torch's own.

    python benchmarks/startup.py [--starts N]

The commands take turns, so that whatever else the machine does falls on all of them; the median of N starts of each is told,
its wall seconds with the least and the most of them, its CPU seconds, and the ratios of the wall seconds.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = '[run]\nname = "small"\n'
FLOOR, TORCH = "python -c pass", 'python -c "import torch"'
BASES = {FLOOR: ["-c", "pass"], TORCH: ["-c", "import torch"]}
COMMANDS = {
    "anyrank --version": 0,
    "anyrank --help": 0,
    "anyrank report --help": 0,
    "anyrank methods": 0,
    "anyrank explain": 0,
    "anyrank explain lora.alpha": 0,
    "anyrank run absent.toml": 2,
    "anyrank run small.toml --set train.lr=1": 2,
    "anyrank run small.toml --set rounds=3": 2,
    "anyrank run small.toml --set method.name=rafola": 2,
    "anyrank run small.toml --out held": 2,
    "anyrank compare small.toml --methods rafola": 2,
    "anyrank aggregate --method raflora --out merged --ranks 4,x adapter": 2,
    "anyrank aggregate --method raflora --out merged --option splt=1 adapter": 2,
    "anyrank report empty": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=7)
    starts = parser.parse_args().starts
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), starts)
    medians = {name: statistics.median(wall for wall, _ in times) for name, times in seconds.items()}
    print("| command | seconds | minimum to maximum | CPU seconds | times Python | share of importing torch |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, median in medians.items():
        walls, cpu = [wall for wall, _ in seconds[name]], statistics.median(cpu for _, cpu in seconds[name])
        ratios = f"{median / medians[FLOOR]:.0f} | {median / medians[TORCH]:.2f}"
        print(f"| `{name}` | {median:.2f} | {min(walls):.2f} to {max(walls):.2f} | {cpu:.2f} | {ratios} |")


def measure(folder: Path, starts: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each start of each command, its first left out: that may read files not in memory yet."""
    (folder / "small.toml").write_text(SMALL)
    for name in ("held", "empty", "adapter"):
        (folder / name).mkdir()
    (folder / "held" / "config.toml").write_text(SMALL)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in [*BASES, *COMMANDS]}
    for turn in range(starts + 1):
        for name, times in seconds.items():
            arguments = BASES.get(name) or ["-m", *name.split()]
            began, spent = time.perf_counter(), _cpu()
            done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
            wall, cpu = time.perf_counter() - began, _cpu() - spent
            if done.returncode != COMMANDS.get(name, 0):
                sys.exit(f"{name}: ended with {done.returncode}\n{done.stderr}")
            if turn:
                times.append((wall, cpu))
    return seconds


def _cpu() -> float:
    """CPU seconds of all processes that have been started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
