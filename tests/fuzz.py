"""Hands the library as many spoiled inputs as there is time for: folders, words, replies (`make fuzz`).

    python tests/fuzz.py --seconds 180 --seed 0

Each case has a number of its own, from which it is made again: `--case folders:123`. What is neither done nor refused in one
line, takes too long, or is done wrong is told with that number, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import math
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.stored import open_adapter
from anyrank.aggregation.aggregates import aggregate_folders
from anyrank.aggregation.inspect import inspect_folders
from anyrank.cli import arguments
from anyrank.errors import AnyRankError, printable
from anyrank.federation.intake import collect
from anyrank.messages.records import Client, ClientUpdate, Download, Job
from hostile import hostile_reply, spoiled_folder, words, write_folder

SOON = 2.0
METHODS = ("rbla", "raflora", "flexlora", "flora", "zeropad", "hetlora", "stayput", "florist", "lora_fair", "fedex", "fedavg")


def folders(chance: random.Random, root: Path) -> str:
    """Read in both ways, look into, merge with a good one: what is written is whole and finite."""
    folder, good = spoiled_folder(root / "ada", chance), write_folder(root / "good")
    loaded = tried(lambda: Adapter.load(folder))
    opened = tried(lambda: open_adapter(folder))
    assert loaded is None or opened.ranks == loaded.ranks, "two ways to read it differ"
    tried(lambda: inspect_folders([folder]))
    told = tried(lambda: aggregate_folders([folder, good], chance.choice(METHODS), root / "out", ranks=[1, 3]))
    assert (told is not None) == (root / "out").exists(), "half of a merge was left"
    for part in told["folders"] if told else ():
        for layer in Adapter.load(root / "out" / part).layers.values():
            assert math.isfinite(float(layer.delta().double().norm())), "a change that is not finite was written"
    return "merged" if told else "refused"


def typed(chance: random.Random, root: Path) -> str:
    found = tried(lambda: arguments.updates([words(chance) for _ in range(3)]))
    assert found is None or all(0 < count <= 2**53 for _, count in found), "a weight that is none was taken"
    tried(lambda: arguments.ranks(words(chance)))
    tried(lambda: arguments.options([words(chance)]))
    return "refused" if found is None else "taken"


def replies(chance: random.Random, root: Path) -> str:
    """One honest reply, one hostile one: the honest one enters the round, the other is a row."""
    layer = LoraLayer(torch.ones(2, 6), torch.zeros(5, 2), 1.0)
    jobs = [Job(Client(name, 2), 3, lambda: Download(Adapter({"x": layer}), {"x": (0, 1)})) for name in ("ada", "eve")]
    honest = ClientUpdate(Adapter({"x": layer.with_factors(layer.A, layer.B + 1)}), 3, "ada", {"loss": 1.0})
    collected = collect(iter([honest, hostile_reply(jobs[1], chance)]), jobs, [], 1)
    assert [update.client for update in collected.updates] == ["ada"], "a hostile reply entered the round"
    row = next(row for row in collected.rows if row["client"] == "eve")
    assert printable(row["reason"]) == row["reason"], "a reason that is not printable"
    assert len(row["reason"]) < 3000, "a reason without end"
    return row["status"]


def tried(act: Callable[[], object]) -> object:
    """What `act` gives; `None` where it is refused as it should be."""
    try:
        return act()
    except AnyRankError as error:
        told = str(error)
    assert told == printable(told), "an error that is not printable"
    return None


DOORS = {"folders": folders, "typed": typed, "replies": replies}


def one(door: str, number: int) -> tuple[str, str]:
    """The outcome of a case, and what is wrong with it, if anything."""
    root = Path(tempfile.mkdtemp(prefix="anyrank-fuzz-"))
    began = time.process_time()
    try:
        outcome = DOORS[door](random.Random(number), root)
    except Exception:
        return "wrong", traceback.format_exc(limit=-4)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    took = time.process_time() - began
    return outcome, f"took {took:.1f} s\n" if took > SOON else ""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--case", help="DOOR:NUMBER, one case alone")
    asked = options.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if asked.case:
        door, _, number = asked.case.partition(":")
        print(*one(door, int(number)), sep="\n")
        return 0
    counts, found, ends = collections.Counter(), {}, time.monotonic() + asked.seconds
    number = asked.seed * 10**9
    while time.monotonic() < ends:
        for door in DOORS:
            outcome, wrong = one(door, number)
            counts[f"{door} {outcome}"] += 1
            if wrong and wrong not in found:
                found[wrong] = f"{door}:{number}"
                print(f"--case {found[wrong]}\n{wrong}", flush=True)
        number += 1
    told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    print(f"seed {asked.seed}, {asked.seconds:g} s: {len(found)} kinds of wrong; {told}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
