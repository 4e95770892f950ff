"""The tables of `experiments/ffa.py` in `docs/results.md`: accuracies, differences seed by seed, and the rates found."""

from __future__ import annotations

import datetime
import itertools
import math
import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

import results
from ffa import ASIDE, BATCH, BROKEN, DATA, KEPT, RAW, TUNING_SEED, WAYS, Cell, Known
from scipy import stats

NAME, TITLE = "9-ffa", "FFA-LoRA's claim again"
CLAIM = (
    "FFA-LoRA: under differential privacy and label skew, A frozen is better than A and B trained, because the noise of both "
    "is multiplied in the product."
)
MAIN = [way for way in WAYS if way != ASIDE]
PLAIN, BUDGETS, SKEWS = "LoRA", (6.0, 3.0, 1.0, 0.5), ("mild", "severe")
CHANCE = {"Banking77": 1 / 77, "SST-2": 1 / 2, "Fashion-MNIST": 1 / 10}  # what a run that diverged counts as


class Found:
    """Accuracies in percent by cell, of designs that every way has."""

    def __init__(self, known: Known) -> None:
        lines = {cell: line for (cell, _), line in known.found.items() if cell.seed != TUNING_SEED}
        self.rates = {cell: line["rate"] for cell, line in lines.items()}
        self.noise = {cell: line["noise"] for cell, line in lines.items() if "noise" in line}
        self.diverged = sum(line["accuracy"] == BROKEN for line in lines.values())
        alike = {replace(cell, way=PLAIN) for cell in lines}
        whole = {cell for cell in alike if all(replace(cell, way=way) in lines for way in MAIN)}
        self.by_cell = {
            cell: 100 * (CHANCE[cell.data] if line["accuracy"] == BROKEN else line["accuracy"])
            for cell, line in lines.items() if replace(cell, way=PLAIN) in whole
        }  # fmt: skip
        self.tuning = sum(cell.seed == TUNING_SEED for cell, _ in known.found)

    def settings(self) -> list[Cell]:
        """What has at least one seed; `seed` 0 stands for all."""
        order = itertools.product((8, 32, 4), DATA, BUDGETS, BATCH, SKEWS)
        every = [Cell(data, PLAIN, epsilon, rank, clients, skew, 0) for rank, data, epsilon, clients, skew in order]
        return [cell for cell in every if self.seeds(cell)]

    def seeds(self, cell: Cell) -> list[int]:
        return [seed for seed in range(5) if replace(cell, seed=seed) in self.by_cell]

    def accuracies(self, cell: Cell, way: str) -> list[float]:
        return [self.by_cell[replace(cell, way=way, seed=seed)] for seed in self.seeds(cell)]

    def gains(self, cell: Cell, way: str, other: str = PLAIN) -> list[float]:
        """Seed by seed, what `way` is ahead of `other`."""
        pairs = zip(self.accuracies(cell, way), self.accuracies(cell, other), strict=True)
        return [ours - theirs for ours, theirs in pairs]


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean, by Student's t; infinite for one value."""
    if len(values) < 2:
        return math.inf
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float]) -> str:
    """Mean and half of its interval, and how many are above zero; bold where the interval excludes zero."""
    mean, half = statistics.fmean(values), interval(values)
    ahead = f"({sum(value > 0 for value in values)}/{len(values)})"
    text = f"{mean:+.1f}" + (f" ± {half:.1f}" if math.isfinite(half) else "")
    return f"{f'**{text}**' if abs(mean) > half else text} {ahead}"


def table(head: Iterable[str], rows: Iterable[Iterable[object]], words: int) -> str:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * words}{' ---: |' * (len(head) - words)}"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def by_setting(found: Found, rank: int) -> str:
    others = [way for way in MAIN if way != PLAIN]
    rows = []
    for cell in found.settings():
        if cell.rank == rank:
            plain = found.accuracies(cell, PLAIN)
            spread = f" ± {statistics.stdev(plain):.1f}" if len(plain) > 1 else ""
            gains = [shown(found.gains(cell, way)) for way in others]
            own = [cell.data, f"{cell.epsilon:g}", cell.clients, cell.skew, len(plain)]
            rows.append([*own, f"{statistics.fmean(plain):.1f}{spread}", *gains])
    return table(["data", "ε", "clients", "skew", "seeds", PLAIN, *others], rows, 1)


def pooled(found: Found, rank: int) -> str:
    """Over skews and seeds together. Pairs of one seed share A's start and the noise's draws: intervals are a little narrow."""
    others = [way for way in MAIN if way != PLAIN]
    groups: dict[tuple, list[Cell]] = {}
    for cell in found.settings():
        if cell.rank == rank:
            groups.setdefault((cell.data, cell.epsilon, cell.clients), []).append(cell)
    rows = []
    for (data, epsilon, clients), cells in groups.items():
        gains = [shown([gain for cell in cells for gain in found.gains(cell, way)]) for way in others]
        rows.append([data, f"{epsilon:g}", clients, *gains])
    return table(["data", "ε", "clients", *others], rows, 1)


def rates(found: Found, rank: int) -> str:
    rows = []
    for data, epsilon, clients in itertools.product(DATA, BUDGETS, BATCH):
        cells = [
            cell
            for cell in found.settings()
            if (cell.data, cell.epsilon, cell.clients, cell.rank) == (data, epsilon, clients, rank)
        ]
        if cells:
            seed = found.seeds(cells[0])[0]
            at = replace(cells[0], seed=seed)
            noise = found.noise.get(at, math.nan)
            rows.append(
                [data, f"{epsilon:g}", clients, f"{noise:.2f}", *(f"{found.rates[replace(at, way=way)]:g}" for way in MAIN)]
            )
    return table(["data", "ε", "clients", "noise multiplier", *MAIN], rows, 1)


def frozen(found: Found) -> str:
    """The ways to freeze A against each other, over all settings and seeds that have both."""
    plain, rows = "FFA-LoRA", []
    for data in DATA:
        cells = [cell for cell in found.by_cell if cell.data == data and cell.way == plain]
        row: list[object] = [data]
        for way in ("FFA-LoRA, preconditioned", ASIDE, "FedSVD"):
            both = [cell for cell in cells if replace(cell, way=way) in found.by_cell]
            gains = [found.by_cell[replace(cell, way=way)] - found.by_cell[cell] for cell in both]
            row.append(
                f"{statistics.fmean(gains):+.1f} ± {statistics.stdev(gains):.1f} ({sum(g > 0 for g in gains)}/{len(gains)})"
            )
        rows.append(row)
    return table(["data", "preconditioned", "A orthonormal", "FedSVD"], rows, 1)


def write(known: Known, wall_s: float) -> None:
    import ffa_why  # it takes `table` from here

    found = Found(known)
    runs, ranks = len(found.by_cell), sorted({cell.rank for cell in found.settings()})
    told = f"`python experiments/ffa.py` · {runs} runs, and {found.tuning} to find learning rates · "
    lines = [f"*{CLAIM}*", told + results.circumstances(wall_s, datetime.date.today().isoformat())]
    for rank in ranks:
        lines += [
            f"**Rank {rank}: accuracy in %, last five rounds, and differences to LoRA in points**",
            by_setting(found, rank),
        ]
        lines += [f"**Rank {rank}: differences to LoRA over both skews and all seeds**", pooled(found, rank)]
        lines += [f"**Rank {rank}: learning rates that were found**", rates(found, rank)]
    lines += ["**Frozen A: differences to FFA-LoRA over settings and seeds (mean ± standard deviation)**", frozen(found)]
    results.put(NAME, TITLE, [*lines, *ffa_why.tables()])
    RAW.parent.mkdir(exist_ok=True)
    shutil.copyfile(KEPT, RAW)
    if ffa_why.KEPT.exists():
        shutil.copyfile(ffa_why.KEPT, ffa_why.RAW)
