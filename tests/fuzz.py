"""Hands the library as many spoiled inputs as there is time for, at each of its doors (`make fuzz`).

    python tests/fuzz.py --seconds 180 --seed 0

The time is shared by the doors of `tests/doors.py`: adapter, config, data, run, reply and frame. With atheris (`pip install
'anyrank[fuzz]'`), inputs that reach new code are kept and changed further, each door in a process of its own; without it they
are drawn at random. What breaks the promise of `tests/oracle.py` is printed with its input, which `--case DOOR:FILE` hands in
again (`--case DOOR:NUMBER`: the input that was drawn as this number), and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

DOOR_NAMES = ("adapter", "config", "data", "run", "reply", "frame")
MEMORY_MB = 6000  # of a process, after which libFuzzer ends it
HANG_S = 60  # of one input, after which libFuzzer ends the process
LARGEST = 8192  # bytes of an input


class Finds:
    """The inputs that broke the promise, one for each kind, in a folder."""

    def __init__(self, folder: Path, door: str) -> None:
        self._folder, self._door = folder, door
        self._kinds: set[str] = set()
        self.outcomes: collections.Counter[str] = collections.Counter()

    def try_one(self, data: bytes) -> None:
        import doors

        try:
            self.outcomes[doors.enter(self._door, data)] += 1
        except (Exception, MemoryError) as error:
            self.outcomes["broken"] += 1
            self._keep(data, error)

    def _keep(self, data: bytes, error: BaseException) -> None:
        steps = traceback.extract_tb((error.__cause__ or error).__traceback__)
        kind = f"{type(error.__cause__ or error).__name__} at {Path(steps[-1].filename).name}:{steps[-1].lineno}"
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        file = self._folder / f"{self._door}-{hashlib.sha256(data).hexdigest()[:12]}"
        file.write_bytes(data)
        print(f"FOUND --case {self._door}:{file}\n  {kind}: {error}", file=sys.stderr, flush=True)

    def tell(self) -> None:
        """One line of JSON for the process that started this one."""
        told = {"door": self._door, "outcomes": dict(self.outcomes), "kinds": sorted(self._kinds)}
        print("TOLD " + json.dumps(told), file=sys.stderr, flush=True)


# --- one door ----------------------------------------------------------------------------------------------------------


def quiet() -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def guided(door: str, seconds: float, seed: int, folder: Path) -> None:
    """Fuzz a door by coverage of the package alone. libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["anyrank"]):
        import doors
    quiet()
    corpus, found = folder / "corpus" / door, Finds(folder, door)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(doors.DOORS[door].seeds()):
        (corpus / f"{number}").write_bytes(data)
    ends = time.monotonic() + max(0.5, seconds - 1)

    def one(data: bytes) -> None:
        nonlocal ends
        found.try_one(data)
        if time.monotonic() > ends:  # once: libFuzzer ends the process without a word to Python
            found.tell()
            ends = math.inf

    options = {"max_total_time": max(1, round(seconds)), "seed": seed + 1, "timeout": HANG_S, "rss_limit_mb": MEMORY_MB}
    options |= {"max_len": LARGEST, "len_control": 0, "artifact_prefix": f"{folder}/{door}-"}
    atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(corpus)], one)
    atheris.Fuzz()


def drawn(door: str, number: int) -> bytes:
    """Input `number` of a door, by chance: draws, or a valid input with some bytes spoiled."""
    import doors
    import hostile

    chance = random.Random(number)
    seed = chance.choice(doors.DOORS[door].seeds())
    kept = seed[:2]  # how it is read, and of what kind it is
    if seed[:1] == doors.CHANCE or door == "reply":
        return kept + chance.randbytes(64)
    return kept + hostile.spoiled_bytes(seed[2:], chance)


def unguided(door: str, seconds: float, seed: int, folder: Path) -> None:
    quiet()
    found, ends, number = Finds(folder, door), time.monotonic() + seconds, seed * 10**9
    while time.monotonic() < ends:
        found.try_one(drawn(door, number))
        number += 1
    found.tell()


# --- all doors ---------------------------------------------------------------------------------------------------------


def child(door: str, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Fuzz a door in a process of its own; returns what it told."""
    seconds = str(asked.seconds / len(asked.doors))
    command = [sys.executable, __file__, "--door", door, "--seconds", seconds, "--seed", str(asked.seed), "--out", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    told, last = {"door": door, "outcomes": {}, "kinds": []}, ""
    for line in process.stderr:
        if line.startswith("TOLD "):
            told = json.loads(line[5:])
        elif "cov:" in line:
            last = line
        elif line.startswith(("FOUND ", "  ")):
            sys.stderr.write(line)
        elif "ERROR: libFuzzer" in line:  # too slow, or too much memory: its input is in the folder
            told["kinds"].append(line.strip())
            sys.stderr.write(line)
    process.wait()
    figures = dict(re.findall(r"(cov|ft|corp): (\d+)", last))
    count = re.match(r"#(\d+)", last)
    if not told["outcomes"] and not told["kinds"]:
        told["kinds"].append(f"ended with status {process.returncode} and told nothing")
    return told | {"executions": int(count[1]) if count else sum(told["outcomes"].values()), **figures}


def report(rows: list[dict[str, Any]], folder: Path) -> int:
    for row in rows:
        reached = f", {row['cov']} edges and {row['ft']} features reached, {row['corp']} inputs kept" if "cov" in row else ""
        outcomes = ", ".join(f"{count} {what}" for what, count in sorted(row["outcomes"].items()))
        print(f"{row['door']:8} {row['executions']:>8} inputs{reached}; {len(row['kinds'])} kinds of fault ({outcomes})")
        for kind in row["kinds"]:
            print(f"         {kind}")
    faults = sum(len(row["kinds"]) for row in rows)
    if faults:
        print(f"{faults} faults; their inputs are in {folder}")
    return 1 if faults else 0


def again(case: str) -> int:
    """Hand in one input again, with the whole stack where it breaks the promise."""
    import doors

    door, _, what = case.partition(":")
    data = drawn(door, int(what)) if what.isdigit() else Path(what).read_bytes()
    print(doors.enter(door, data))
    return 0


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=60, help="for all doors together")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--case", help="DOOR:FILE or DOOR:NUMBER, one input alone")
    options.add_argument("--doors", default=",".join(DOOR_NAMES), help="some of the doors")
    options.add_argument("--out", type=Path, help="where inputs that break the promise go; a new temporary folder")
    options.add_argument("--door", help=argparse.SUPPRESS)
    asked = options.parse_args()
    asked.doors = asked.doors.split(",")
    if asked.case:
        quiet()
        return again(asked.case)
    has_atheris = importlib.util.find_spec("atheris") is not None
    if asked.door:
        (guided if has_atheris else unguided)(asked.door, asked.seconds, asked.seed, asked.out)
        return 0
    if not has_atheris:
        print("atheris is not installed (it has no wheel for every platform): inputs are drawn at random, without coverage")
    folder = asked.out or Path(tempfile.mkdtemp(prefix="anyrank-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ANYRANK_CACHE", str(folder / "cache"))
    return report([child(door, asked, folder) for door in asked.doors], folder)


if __name__ == "__main__":
    sys.exit(main())
