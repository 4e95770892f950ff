"""How soon a command answers, or refuses, when it needs no torch: wall time of process starts, beside Python's and torch's own.

    python benchmarks/startup.py [--starts N]

The commands take turns, so that whatever else the machine does falls on all of them; the median of N starts of each is told.
"""

from __future__ import annotations

import argparse
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
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print("| command | seconds | least to most | times Python | share of importing torch |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"| `{name}` | {median:.2f} | {spread} | {median / medians[FLOOR]:.0f} | {median / medians[TORCH]:.2f} |")


def measure(folder: Path, starts: int) -> dict[str, list[float]]:
    """Seconds of each start of each command, the first of each left out: it may read files that are not in memory yet."""
    (folder / "small.toml").write_text(SMALL)
    for name in ("held", "empty", "adapter"):
        (folder / name).mkdir()
    (folder / "held" / "config.toml").write_text(SMALL)
    seconds: dict[str, list[float]] = {name: [] for name in [*BASES, *COMMANDS]}
    for turn in range(starts + 1):
        for name, times in seconds.items():
            arguments = BASES.get(name) or ["-m", *name.split()]
            began = time.perf_counter()
            done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
            spent = time.perf_counter() - began
            if done.returncode != COMMANDS.get(name, 0):
                sys.exit(f"{name}: ended with {done.returncode}\n{done.stderr}")
            if turn:
                times.append(spent)
    return seconds


if __name__ == "__main__":
    main()
