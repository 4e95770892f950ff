"""What the template `page.html.j2` shows: the headline, the facts, the results, and every section's charts and tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anyrank.report import charts, clients, faults, sites, statements, words
from anyrank.report.groups import Group, Stat, metric_names, seed_count, tells_accuracy
from anyrank.report.runs import Run
from anyrank.report.style import DARK, LIGHT


def contents(groups: Sequence[Group], notes: Sequence[str]) -> dict[str, Any]:
    """All values for the template."""
    return {
        "title": f"anyrank report: {', '.join(group.label for group in groups)}",
        "headline": _headline(groups),
        "notes": notes,
        "facts": _facts(groups),
        "table": _table(groups),
        "keys": [(group.label, group.style) for group in groups],
        "learning": charts.learning(groups),
        "accuracy": tells_accuracy(groups),
        "metrics": charts.metrics(groups),
        "collapse": charts.collapse(groups),
        "spectra": charts.spectra(groups),
        "partitions": charts.partitions(groups),
        "layers": charts.layers(groups),
        "traffic": charts.traffic(groups),
        "sites": sites.sites(groups),
        "federations": clients.federations(groups),
        "rejections": clients.rejections(groups),
        "conduct": faults.conduct(groups),
        "idle": faults.idle(groups),
        "privacy": charts.privacy(groups),
        "statements": statements.statements(groups),
        "configs": [
            (group.label, group.runs[0].seed, group.runs[0].config_text) for group in groups if group.runs[0].config_text
        ],
        "methods": _methods(groups),
        "versions": _versions(groups),
        "light": LIGHT,
        "dark": DARK,
    }


def _headline(groups: Sequence[Group]) -> str:
    """One sentence from the numbers: the best mean final accuracy (else loss), the ties with it, and the energy."""
    score = _ACCURACY if tells_accuracy(groups) else _LOSS
    scored = [(stat, group) for group in groups if (stat := group.stat(score.name))]
    scored.sort(key=lambda pair: -score.sign * pair[0].mean)
    if not scored:
        return "No round of these runs has been scored yet."
    (best, winner), *rest = scored
    value = best.text(score.digits, score.scale) + score.unit
    seeds = words.count(best.n, "seed")
    if not rest:
        sentence = f"{winner.label} ends at {score.of} {value} after {words.count(winner.rounds, 'round')} ({seeds})"
    else:
        sentence = f"{winner.label} has the {score.best}, {value} ({seeds}), {_rivals(best, rest, score)}"
    energy = _energy_clause(groups)
    return f"{sentence}; {energy}." if energy else f"{sentence}."


@dataclass(frozen=True)
class _Score:
    """How runs are compared: the figure `name`, its `sign` (1: higher is better), and its texts."""

    name: str
    sign: int
    digits: int
    scale: float
    unit: str
    of: str
    best: str
    ahead: str


_ACCURACY = _Score("accuracy", 1, 2, 100, " %", "an accuracy of", "highest final accuracy", "points ahead of")
_LOSS = _Score("loss", -1, 4, 1, "", "a loss of", "lowest final loss", "below")


def _rivals(best: Stat, rest: Sequence[tuple[Stat, Group]], score: _Score) -> str:
    ties = [group.label for stat, group in rest if _tie(best, stat)]
    second, runner = rest[0]
    if ties:
        return f"a tie with {words.joined(ties)} within the spread"
    gap = f"{words.places(score.sign * score.scale * (best.mean - second.mean), score.digits)} {score.ahead} {runner.label}"
    if best.mean == second.mean:
        return f"level with {runner.label}, with too few seeds to distinguish them"
    return f"{gap}, more than the spread" if min(best.n, second.n) > 1 else f"{gap}, with too few seeds to know the spread"


def _tie(one: Stat, other: Stat) -> bool:
    """Whether two means differ by at most the larger of their standard deviations; false if the spread is not known."""
    return min(one.n, other.n) > 1 and abs(one.mean - other.mean) <= max(one.std, other.std)


def _energy_clause(groups: Sequence[Group]) -> str:
    ends = sorted(
        ((stat.mean, i, group) for i, group in enumerate(groups) if group.mixed and (stat := group.stat("collapse"))),
        reverse=True,
    )
    if not ends:
        return ""
    ranks = {group.levels[0] for _, _, group in ends if group.levels}
    beyond = f"beyond rank {ranks.pop()}" if len(ranks) == 1 else "beyond the minimum rank"
    told = [
        f"{words.share(mean)} with {group.label}{_from(group)}"
        for mean, _, group in (ends if len(ends) < 3 else (ends[0], ends[-1]))
    ]
    if len(ends) == 1:
        return (
            f"the energy of its update {beyond} ends at {words.share(ends[0][0])}{_from(ends[0][2])}"
            if len(groups) == 1
            else f"energy {beyond} ends at {told[0]}"
        )
    if len(ends) == 2:
        return f"energy {beyond} ends at {told[0]} and at {told[1]}"
    return f"energy {beyond} ends highest at {told[0]} and lowest at {told[1]}"


def _from(group: Group) -> str:
    line = group.series("collapse")
    return f" (round {line.x[0]:.0f}: {words.share(line.mean[0])})" if len(line.x) > 1 else ""


def _facts(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Facts about the runs, as short pairs; if the runs differ in a fact, all values are listed."""
    runs = [run for group in groups for run in group.runs]
    mixed = max(groups, key=lambda group: len(group.levels))
    examples = [f"{told} {what}" for what in ("train", "test") if (told := _shared(runs, f"{what}_examples"))]
    pairs = [
        ("task", _shared(runs, "task")),
        ("base model", _shared(runs, "base_model")),
        ("head", _shared(runs, "head")),
        ("clients", _shared(runs, "clients")),
        ("cohort", _shared(runs, "cohort")),
        ("ranks", ", ".join(map(str, mixed.levels))),
        ("rounds", str(max(group.rounds for group in groups))),
        ("seeds", seed_count(groups).removesuffix(" seeds").removesuffix(" seed")),
        ("examples", ", ".join(examples)),
    ]
    return [(name, value) for name, value in pairs if value]


def _shared(runs: Iterable[Run], key: str) -> str:
    return ", ".join(dict.fromkeys(str(run.summary[key]) for run in runs if run.summary.get(key) not in (None, "")))


# heading, name of the figure, decimals, scale, whether the spread is shown
_ACCURACIES = (
    ("final accuracy, %", "accuracy", 2, 100, True),
    ("best, %", "best_accuracy", 2, 100, True),
    ("last 5, %", "last_accuracy", 2, 100, True),
    ("worst client, %", "worst_client_accuracy", 2, 100, True),
)
_LOSSES = (("final loss", "loss", 4, 1, True),)
_OTHERS = (
    ("energy beyond min rank, %", "collapse", 2, 100, True),
    ("up, MB", "upload_bytes", 1, 1e-6, False),
    ("down, MB", "download_bytes", 1, 1e-6, False),
    ("time, s", "seconds", 1, 1, False),
    ("not used", "rejected", 0, 1, False),
)


def _table(groups: Sequence[Group]) -> dict[str, Any]:
    """The results: one row per label, cells as text. Accuracy and energy in %, traffic in MB (10^6 bytes), time in s, metrics
    without a unit."""
    score = _ACCURACY if tells_accuracy(groups) else _LOSS
    own = [(name, name, 3, 1, True) for name in metric_names(groups)]
    table = (*(_ACCURACIES if score is _ACCURACY else _LOSSES), *own, *_OTHERS)
    means = [stat.mean for group in groups if (stat := group.stat(score.name))]
    best = max(means, key=lambda mean: score.sign * mean, default=None)
    rows = []
    for group in groups:
        stats = {name: group.stat(name) for _, name, *_ in table if name != "collapse" or group.mixed}
        cells = [_cell(stats.get(name), digits, scale, spread) for _, name, digits, scale, spread in table]
        top = len(groups) > 1 and stats[score.name] is not None and stats[score.name].mean == best
        rows.append({"label": group.label, "style": group.style, "seeds": len(group.runs), "cells": cells, "best": top})
    return {
        "columns": [heading for heading, *_ in table],
        "rows": rows,
        "alone": [group.label for group in groups if not group.mixed],
        "spread": any(len(group.runs) > 1 for group in groups),
    }


def _cell(stat: Stat | None, digits: int, scale: float, spread: bool) -> str:
    if stat is None:
        return "–"
    if digits == 0:  # a count, whose mean need not be whole
        return f"{round(stat.mean, 1):g}"
    return (stat if spread else replace(stat, n=1)).text(digits, scale)


def _methods(groups: Sequence[Group]) -> list[tuple[str, str, str, str]]:
    """Label, method, options and paper, as far as they are recorded."""
    rows = []
    for group in groups:
        summary = group.runs[0].summary
        options = summary.get("options")
        told = ", ".join(f"{key} = {value}" for key, value in options.items()) if isinstance(options, Mapping) else ""
        rows.append((group.label, group.runs[0].method, told, str(summary.get("paper") or "")))
    return rows


def _versions(groups: Sequence[Group]) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for run in (run for group in groups for run in group.runs):
        versions = run.summary.get("versions")
        for name, version in versions.items() if isinstance(versions, Mapping) else ():
            found[str(name)][str(version)] = None
        if run.summary.get("platform"):
            found["platform"][str(run.summary["platform"])] = None
    return [(name, ", ".join(values)) for name, values in found.items()]
