"""The page's table of named sites: each one's rank, examples and scores on its own held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from anyrank.errors import printable, shortened
from anyrank.report import words
from anyrank.report.groups import Group
from anyrank.report.runs import Run, finite, section

_MOST_SITES = 100


def sites(groups: Sequence[Group]) -> dict[str, Any]:
    """A row for each site of the finished runs, with each label's accuracy there (the loss, if no label has an accuracy): the
    mean over seeds. `worst`: a sentence for each label. `rows` is empty if no run has named sites.
    """
    named = [group for group in groups if any(_sites(run) for run in group.runs)]
    names = sorted({name for group in named for run in group.runs for name in _sites(run)})
    figure = "accuracy" if any(_values(group, name, "accuracy") for group in named for name in names) else "loss"
    rows = [
        {
            "site": printable(shortened(name, 60)),
            "facts": [_fact(named, name, key) for key in ("rank", "train_examples", "test_examples")],
            "cells": [_mean(_values(group, name, figure), figure) for group in named],
        }
        for name in names[:_MOST_SITES]
    ]
    columns = [(group.label, group.style) for group in named]
    told = [_worst(group) for group in named] if figure == "accuracy" else []
    more = max(0, len(names) - _MOST_SITES)
    return {"rows": rows, "columns": columns, "figure": figure, "worst": [text for text in told if text], "more": more}


def _sites(run: Run) -> dict[str, Mapping[str, Any]]:
    """The sites in a run's summary, as far as they can be read."""
    return {name: row for name, row in section(run.summary, "sites").items() if isinstance(row, Mapping)}


def _values(group: Group, name: str, key: str) -> list[float]:
    found = [finite(_sites(run).get(name, {}).get(key)) for run in group.runs]
    return [value for value in found if value is not None]


def _fact(groups: Sequence[Group], name: str, key: str) -> str:
    """A number that all runs share; several, if they differ."""
    values = {value for group in groups for value in _values(group, name, key)}
    return ", ".join(f"{value:g}" for value in sorted(values)) or "–"


def _mean(values: Sequence[float], figure: str) -> str:
    if not values:
        return "–"
    scale, digits = (100, 2) if figure == "accuracy" else (1, 4)
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * fmean(values):.{digits}f}{spread}"


def _worst(group: Group) -> str:
    """The site with the lowest mean accuracy, and the spread over sites, which is the mean over seeds."""
    names = sorted({name for run in group.runs for name in _sites(run)})
    means = {name: fmean(values) for name in names if (values := _values(group, name, "accuracy"))}
    spread = group.stat("client_accuracy_std")
    if not means:
        return ""
    worst = min(means, key=lambda name: means[name])
    told = f", standard deviation over sites {words.places(100 * spread.mean, 2)} points" if spread else ""
    return f"{group.label}: worst site {printable(shortened(worst, 60))}, {100 * means[worst]:.2f} %{told}."
