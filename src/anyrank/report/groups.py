"""Group runs by label: runs of one label and one configuration are its seeds. Anything unusual becomes a note on the page."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anyrank.errors import RunError, shortened
from anyrank.report import words
from anyrank.report.figures import Series
from anyrank.report.runs import Run, finite, section
from anyrank.report.style import Style, styles


@dataclass(frozen=True)
class Stat:
    """The mean over `n` seeds, and their sample standard deviation, 0 with one seed."""

    mean: float
    std: float
    n: int

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        mean = self.mean * scale
        return words.places(mean, digits) + (f" ± {self.std * scale:.{words.decimals(mean, digits)}f}" if self.n > 1 else "")


@dataclass(frozen=True)
class Group:
    """The runs of one label: its seeds. If any of them is finished, only the finished ones."""

    label: str
    runs: Sequence[Run]
    style: Style = field(default=Style(0, 0))

    @property
    def levels(self) -> list[int]:
        """The ranks of the federation, in ascending order."""
        return sorted({rank for run in self.runs for rank in (*run.ranks, *run.planned_ranks)})

    @property
    def mixed(self) -> bool:
        """Whether there can be energy beyond the minimum rank: if all clients have one rank, there is none by definition."""
        return len(self.levels) != 1 or any((run.columns["collapse"] > 1e-9).any() for run in self.runs)

    @property
    def rounds(self) -> int:
        return max((int(run.rounds[-1]) for run in self.runs if len(run.rounds)), default=0)

    @property
    def by_clients(self) -> bool:
        """Whether clients report the scores: each of what it downloads, on its own held-out examples."""
        return any(section(run.config, "eval").get("where") == "sites" for run in self.runs)

    @property
    def idle(self) -> list[int]:
        """The rounds that were idle with any of the seeds."""
        return sorted({number for run in self.runs for number in run.idle})

    def stat(self, name: str) -> Stat | None:
        return _stat([value for run in self.runs if (value := run.final(name)) is not None])

    def label_stat(self, name: str, label: str) -> Stat | None:
        """The final number of `label`, for a metric with a number for each label."""
        return _stat([run.by_label[name][label] for run in self.runs if label in run.by_label.get(name, ())])

    def series(self, name: str, start: str = "") -> Series:
        """The mean over seeds of a column, at the rounds that every seed has.

        `start`: the summary's key for the value before round 1, or for a table of such values.
        """
        tables = [table for run in self.runs if (table := _by_round(run, name, start))]
        shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        values = np.array([[table[number] for number in shared] for table in tables]).reshape(len(tables), len(shared))
        mean = values.mean(axis=0) if len(tables) else np.zeros(0)
        std = values.std(axis=0, ddof=1) if len(tables) > 1 else np.zeros(len(mean))
        return Series(self.label, self.style, np.array(shared, dtype=float), mean, std)


def _stat(values: Sequence[float]) -> Stat | None:
    if not values:
        return None
    return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def grouped(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """The runs by label, in the given order, and the notes about them."""
    if not runs:
        raise RunError("report: expected at least one run folder, got none; name the folders that `anyrank run` wrote")
    notes = [
        f"{run.folder.name}: left out {words.count(run.unreadable, 'line')} of its records that could not be read."
        for run in runs
        if run.unreadable
    ]
    by_label: dict[str, dict[str, dict[Any, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        seeds = by_label[run.label][_fingerprint(run)]
        if run.seed in seeds and run.seed is not None:
            notes.append(
                f"{run.folder.name} has the label, configuration and seed of {seeds[run.seed].folder.name}: counted once."
            )
        else:
            seeds[run.folder if run.seed is None else run.seed] = run
    named: list[tuple[str, list[Run]]] = []
    for label, variants in by_label.items():
        for number, seeds in enumerate(variants.values(), start=1):
            own = f"{label} #{number}" if len(variants) > 1 else label
            named.append((own, list(seeds.values())))
            if len(variants) > 1:
                folders = words.joined(run.folder.name for run in seeds.values())
                notes.append(f"Runs of {label} differ in configuration: {own} is {folders}.")
    chosen = styles([(label, members[0].method) for label, members in named])
    groups = []
    for label, members in named:
        kept, told = _finished(label, sorted(members, key=lambda run: -1 if run.seed is None else run.seed))
        groups.append(Group(label, kept, chosen[label]))
        notes += told
    return groups, notes + _unlike(groups) + _of_scores(groups)


def _of_scores(groups: Sequence[Group]) -> list[str]:
    """Who scored, if it was not the server, and why nobody did."""
    notes = []
    for group in groups:
        reasons = {str(run.summary["unscored"]) for run in group.runs if run.summary.get("unscored")}
        notes += [f"{group.label} is not scored: {shortened(reason, 200)}." for reason in sorted(reasons)]
        counts = {
            (run.summary.get("scored_by"), run.summary.get("scored_of")) for run in group.runs if "scored_of" in run.summary
        }
        told = ", ".join(f"{by} of {of}" for by, of in sorted(counts, key=str))
        if told:
            notes.append(
                f"Scores of {group.label} are as clients report them, of their own examples: in the end, {told} clients."
            )
    return notes


def _fingerprint(run: Run) -> str:
    """The configuration without what may differ between the seeds of one label."""
    config = {name: table for name, table in run.config.items() if name != "run"}
    return json.dumps([config, section(run.config, "run").get("rounds")], sort_keys=True, default=str)


def _finished(label: str, runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    done = [run for run in runs if run.finished]
    open_ = [run for run in runs if not run.finished]
    notes = []
    for run in open_:
        at = f"round {run.rounds[-1]}" if len(run.rounds) else "no round yet"
        seed = "" if run.seed is None else f", seed {run.seed}"
        of = f" of {run.planned}" if run.planned and len(run.rounds) else ""
        fate = "left out of all figures" if done else "shown up to this round"
        notes.append(f"{label}{seed} is unfinished ({at}{of}): {fate}.")
    return done or open_, notes


def _unlike(groups: Sequence[Group]) -> list[str]:
    """What the runs do not share, and that makes their accuracies hard to compare."""
    notes = []
    for key, what in (
        ("task", "task"),
        ("base_model", "base model"),
        ("head", "head"),
        ("test_examples", "number of test examples"),
        ("clients", "number of clients"),
        ("rounds", "number of rounds"),
    ):
        values = {str(run.summary[key]) for group in groups for run in group.runs if key in run.summary}
        if len(values) > 1:
            notes.append(f"These runs differ in their {what} ({words.joined(sorted(values))}): compare with care.")
    return notes


def _by_round(run: Run, name: str, start: str) -> dict[int, float]:
    if name not in run.columns:
        return {}
    table = {
        int(number): float(value) for number, value in zip(run.rounds, run.columns[name], strict=True) if not math.isnan(value)
    }
    before = run.summary.get(start)
    first = finite(before.get(name) if isinstance(before, Mapping) else before)
    return ({0: first} if first is not None and table else {}) | table


def metric_names(groups: Sequence[Group]) -> list[str]:
    """The metrics of one number that any of the runs has, in their order."""
    return list(dict.fromkeys(name for group in groups for run in group.runs for name in run.metrics))


def tells_accuracy(groups: Sequence[Group]) -> bool:
    """Whether these runs are reported by accuracy; if they have only a loss (no answer is right or wrong), they are not."""
    return any(group.stat("accuracy") for group in groups) or not any(group.stat("loss") for group in groups)


def seed_count(groups: Sequence[Group]) -> str:
    """How many seeds the groups have, in words: `3 seeds`, or `1 to 3 seeds`."""
    counts = sorted({len(group.runs) for group in groups})
    return words.count(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
