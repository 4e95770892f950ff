"""Where a frozen A helps private training: `python experiments/ffa.py --write` runs, and writes tables into `docs/results.md`.

Six ways to train LoRA under example-level privacy, on frozen features (Banking77, SST-2) and on pictures (Fashion-MNIST), over
budgets, ranks, cohorts and label skews. A cell is a whole run of ten rounds of ten steps. The learning rate of each way, data
set, budget, rank and cohort is climbed to by factors of 2, on examples held out of the training data, on a seed that no cell
has, and at a skew between the two of the cells. Cells stand in blocks, so that what is done after any time is a whole design.

Results are kept in `runs/ffa.jsonl`, one line a run; a second call goes on where the first one stopped, a first one where
`docs/results/ffa.jsonl` ends. `ANYRANK_DATA` has
the texts; the pictures come from Debian's package dataset-fashion-mnist (`--pictures` for another folder).
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import quick
import results
import torch

from anyrank import config as configs
from anyrank import keys, simulation
from anyrank.config.sections import Config
from anyrank.data.partition import Shards, by_hand
from anyrank.errors import AnyRankError
from anyrank.federation import asking, loop
from anyrank.federation.federation import Federation
from anyrank.messages.records import ServerState
from anyrank.privacy.noise import Mechanism
from anyrank.tasks.base import Examples, Task
from anyrank.tasks.inputs import TensorInputs
from anyrank.tasks.load import load_task

KEPT, RAW = results.ROOT / "runs" / "ffa.jsonl", results.PICTURES / "ffa.jsonl"
DATA = ("Banking77", "SST-2", "Fashion-MNIST")
# The ways to train, each with its method, further options, and the rate where its first climb begins.
WAYS: Mapping[str, tuple[str, tuple[str, ...], float]] = {
    "LoRA": ("fedavg", (), 2.0),
    "FFA-LoRA": ("ffa_lora", (), 8.0),
    "FFA-LoRA, preconditioned": ("ffa_lora", ("train.precondition=true",), 8.0),
    "FFA-LoRA, A orthonormal": ("ffa_lora", ("method.init_a=orthonormal",), 4.0),
    "RoLoRA": ("rolora", (), 2.0),
    "FedSVD": ("fedsvd", (), 4.0),
}
ASIDE = "FFA-LoRA, A orthonormal"  # is compared on its own, after the others
BATCH = {3: 128, 20: 20}  # nearly one sampling rate, and so one noise multiplier, for both cohorts
SKEW = {"mild": 0.6, "tuning": 0.75, "severe": 0.9}  # share of a client's examples that have its own labels
TUNING_SEED, BROKEN, LAST = 100, -1.0, 5
LEAST = 2.0**-5  # the smallest rate that is tried: from there on down, a run hardly leaves its start
FIXED = (
    *results.UNGUARDED, "clients.participation=1.0", "run.rounds=10", "train.optimizer=sgd", "train.local_steps=10",
    "privacy.level=example", "privacy.delta=1e-5",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run; `skew` "tuning" for a run on held-out training examples."""

    data: str
    way: str
    epsilon: float
    rank: int
    clients: int
    skew: str
    seed: int


def cells() -> list[Cell]:
    """All runs of the tables, in blocks: the most telling first."""
    first, more = range(3), range(3, 5)
    blocks = [
        ((6.0, 1.0), (8,), first),
        ((3.0, 0.5), (8,), first),
        ((6.0, 1.0), (32, 4), first),
        ((6.0, 1.0, 3.0, 0.5), (8,), more),
        ((6.0, 1.0), (32, 4), more),
        ((3.0, 0.5), (32, 4), (*first, *more)),
    ]
    found: dict[Cell, None] = {}
    for budgets, ranks, seeds in blocks:
        for seed, rank, epsilon, clients, skew in itertools.product(seeds, ranks, budgets, BATCH, ("mild", "severe")):
            found |= {Cell(data, way, epsilon, rank, clients, skew, seed): None for data in DATA for way in WAYS}
    return sorted(found, key=lambda cell: cell.way == ASIDE)


# --- one run ----------------------------------------------------------------------------------------------------------


class Bench:
    """The data sets, each loaded once."""

    def __init__(self, pictures: str) -> None:
        self.pictures = pictures
        self.task = cache(self._task)

    def config(self, cell: Cell, rate: float) -> Config:
        name, options, _ = WAYS[cell.way]
        asked = (
            *FIXED, *self._source(cell.data), f"run.seed={cell.seed}", f"clients.count={cell.clients}",
            f"clients.ranks=[{cell.rank}]", f"train.batch_size={BATCH[cell.clients]}", f"train.learning_rate={rate:g}",
            f"privacy.epsilon={cell.epsilon:g}", f"method.name={name}", *options,
        )  # fmt: skip
        return configs.load(_FILES[cell.data], asked)

    def _source(self, data: str) -> tuple[str, ...]:
        if data != "Fashion-MNIST":
            return ()
        return (f"data.source={self.pictures}", "data.train_examples=10000", "data.test_examples=2000")

    def _task(self, data: str, held_out: bool) -> Task:
        """The data set; `held_out`: a tenth of its training examples in place of its test set, the rest to train on."""
        if not held_out:
            task = load_task(self.config(Cell(data, "LoRA", 1.0, 8, 3, "mild", 0), 1.0))
            return replace(task, train=_in_memory(task.train), test=_in_memory(task.test))
        whole = self.task(data, False)
        order = keys.rng(TUNING_SEED, "ffa held out").permutation(len(whole.train.labels))
        test, train = torch.from_numpy(order).split([len(order) // 10, len(order) - len(order) // 10])
        held = whole.train.inputs
        parts = (Examples(TensorInputs(held.values[rows], held.name), whole.train.labels[rows]) for rows in (train, test))
        return replace(whole, **dict(zip(("train", "test"), parts, strict=True)))

    def run(self, cell: Cell, rate: float) -> dict[str, Any]:
        """The accuracies after the last rounds, and the noise multiplier."""
        config, task = self.config(cell, rate), self.task(cell.data, cell.skew == "tuning")
        shards = skewed(task.train.labels.numpy(), cell.clients, SKEW[cell.skew], cell.seed)
        built, began = simulation.build(config, task=task, shards=shards), time.process_time()
        try:
            found = [built.engine.evaluate(state.adapter, None).accuracy for state in rounds(built) if state.round > 10 - LAST]
        except (AnyRankError, torch.linalg.LinAlgError, ValueError) as error:
            return {"accuracy": BROKEN, "error": str(error)}
        finally:
            built.close()
        noise = max(built.privacy.noise.values())
        return {"accuracy": statistics.fmean(found), "last": found[-1], "noise": noise, "cpu_s": time.process_time() - began}


_FILES = {
    "Banking77": results.ROOT / "configs" / "banking77.toml",
    "SST-2": results.ROOT / "configs" / "sst2.toml",
    "Fashion-MNIST": results.ROOT / "configs" / "fashion-mlp.toml",
}


def _in_memory(examples: Examples) -> Examples:
    """The examples as one tensor, so that a step takes no time to read or scale them."""
    ((name, values),) = examples.inputs.batch(torch.arange(len(examples))).items()
    return Examples(TensorInputs(values, name), examples.labels)


def rounds(built: Federation, privacy: Mechanism | None = None) -> Iterator[ServerState]:
    """The state after each round. Samples and noise follow the run's seed: nobody's data is protected here."""
    state, config = loop.start(built), built.config
    privacy = privacy or Mechanism(built.privacy, f"ffa {config.run.seed}".encode())
    while state.round < config.run.rounds:
        jobs, _ = asking.dispatch(built, state, state.round + 1)
        replies = quick.train(built.engine.model, jobs, built.engine.shards, built.plan(state.round + 1), privacy)
        if not all(torch.isfinite(layer.B).all() and torch.isfinite(layer.A).all() for each in replies
                   for layer in each.adapter.layers.values()):  # fmt: skip
            raise ValueError(f"diverged in round {state.round + 1}")
        state = built.method.aggregate(state, replies)
        yield state


def skewed(labels: np.ndarray, clients: int, share: float, seed: int) -> Shards:
    """Shards of equal size, `share` of whose examples have the client's own labels (FFA-LoRA's mild 0.6 and severe 0.9).

    Labels are dealt to the clients in turn; with fewer labels than clients, clients to the labels, and a client that is left
    over has all labels alike. Proportions are fitted to equal sizes and to the labels' numbers of examples.
    """
    draw, kinds = keys.rng(seed, "ffa skew"), np.unique(labels)
    own = np.zeros((clients, len(kinds)), dtype=bool)
    if len(kinds) >= clients:
        own[np.arange(len(kinds)) % clients, draw.permutation(len(kinds))] = True
    else:
        most = clients // len(kinds) * len(kinds)
        own[draw.permutation(clients)[:most], np.arange(most) % len(kinds)] = True
    counts = np.array([np.sum(labels == kind) for kind in kinds], dtype=float)
    held = own.sum(axis=1, keepdims=True)
    rest = np.where(held > 0, 1 - share, 1) / np.maximum(1, len(kinds) - held)
    wanted = np.where(own, share / np.maximum(1, held), rest) * counts
    for _ in range(200):
        wanted *= len(labels) / clients / wanted.sum(axis=1, keepdims=True)
        wanted *= counts / wanted.sum(axis=0)
    shards: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for place, kind in enumerate(kinds):
        rows = draw.permutation(np.flatnonzero(labels == kind))
        ends = np.rint(np.cumsum(wanted[:, place])).astype(int)
        for client, part in enumerate(np.split(rows, ends[:-1])):
            shards[client].append(part)
    return by_hand({str(k): np.sort(np.concatenate(parts)) for k, parts in enumerate(shards)}, len(labels))


# --- many runs --------------------------------------------------------------------------------------------------------


class Known:
    """Runs by cell and rate, in a file of one line each."""

    def __init__(self, path: Path = KEPT) -> None:
        self.path, self.found = path, {}
        if not path.exists() and RAW.exists():  # what is in the repository
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(RAW, path)
        lines = path.read_text().splitlines() if path.exists() else []
        for line in map(json.loads, lines):
            self.found[Cell(**line["cell"]), line["rate"]] = line

    def result(self, bench: Bench, cell: Cell, rate: float) -> dict[str, Any]:
        if (cell, rate) not in self.found:
            line = {"cell": asdict(cell), "rate": rate, **bench.run(cell, rate)}
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.found[cell, rate] = line
        return self.found[cell, rate]

    def rate(self, bench: Bench, cell: Cell) -> float:
        """The rate that suits the cell's data set, way, budget, rank and cohort: neither half nor twice is better."""
        tuned = replace(cell, skew="tuning", seed=TUNING_SEED)

        def score(rate: float) -> float:
            return self.result(bench, tuned, rate)["accuracy"]

        best, rate = 0.0, max(LEAST, self._start(tuned))
        while rate != best:
            best = rate
            rate = max((best, 2 * best, max(LEAST, best / 2)), key=score)
        return best

    def _start(self, tuned: Cell) -> float:
        """What suited the nearest other setting of the same way."""
        tried: dict[Cell, dict[float, float]] = {}
        for (cell, rate), line in self.found.items():
            if cell.seed == TUNING_SEED and cell.way == tuned.way and line["accuracy"] != BROKEN:
                tried.setdefault(cell, {})[rate] = line["accuracy"]

        def distance(cell: Cell) -> tuple[bool, float, bool, bool]:
            times = abs(np.log2(cell.epsilon / tuned.epsilon))
            return cell.data != tuned.data, times, cell.clients != tuned.clients, cell.rank != tuned.rank

        nearest = min(tried, key=distance, default=None)
        return max(tried[nearest], key=tried[nearest].get) if nearest else WAYS[tuned.way][2]


def fill(known: Known, bench: Bench, until: float, only: Sequence[str]) -> None:
    wanted = [cell for cell in cells() if cell.data in only]
    done = {cell for cell, _ in known.found}
    for number, cell in enumerate(wanted):
        if time.monotonic() > until:
            return
        if cell not in done:
            line = known.result(bench, cell, known.rate(bench, cell))
            print(
                f"{number + 1} of {len(wanted)}",
                *asdict(cell).values(),
                f"rate {line['rate']:g}",
                round(line["accuracy"], 4),
                flush=True,
            )


def main() -> None:
    import ffa_tables
    import ffa_why

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long to run cells; 0: none")
    parser.add_argument("--why", type=int, default=0, help="measure what noise does, for this many seeds of what is known")
    parser.add_argument("--write", action="store_true", help="write the tables of what is known")
    parser.add_argument("--only", nargs="*", default=DATA, choices=DATA)
    parser.add_argument("--pictures", default="/usr/share/datasets/fashion-mnist", help="folder of Fashion-MNIST")
    asked, began = parser.parse_args(), time.monotonic()
    torch.set_num_threads(1)
    known, bench = Known(), Bench(asked.pictures)
    fill(known, bench, began + 60 * asked.minutes, asked.only)
    ffa_why.fill(known, bench, asked.why)
    if asked.write:
        ffa_tables.write(known, time.monotonic() - began)


if __name__ == "__main__":
    import ffa

    ffa.main()  # as a module: the other files know its records by that name
