"""The page's tables of what the guard and the quorum did: the conduct of single clients, and the rounds that were idle."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from anyrank.errors import shortened
from anyrank.report import words
from anyrank.report.conduct import Conduct
from anyrank.report.groups import Group
from anyrank.report.runs import Run

_MOST = 20  # rows of a table
_LONGEST, _LONGEST_REASON = 60, 300  # characters of a client's name, and of a reason
_COUNTS = ("used", "rejected", "shortened", "excluded", "failed", "late", "rested", "stray")
_MEANINGS = {
    "rejected": "the upload did not pass the checks",
    "shortened": "the step was longer than guard.norm allows, and a part of it counted; smallest share: the smallest such part",
    "excluded": "left out by the rule of [robust]",
    "failed": "nothing came back, or the training failed",
    "late": "the reply arrived after its round",
    "rested": "not asked for a while, after repeated rejections",
    "stray": "replies that nobody asked for",
}


def conduct(groups: Sequence[Group]) -> dict[str, Any]:
    """One row for each client with anything to report, over all runs: the worst first, at most 20.

    A count that is 0 for all of them has no column.
    """
    sums, by_label = _by_client(groups)
    troubled = sorted((client for client, each in sums.items() if each.faults), key=lambda name: _badness(name, sums[name]))
    names = [name for name in _COUNTS if name == "used" or any(sums[client].counts[name] for client in troubled)]
    rows = [
        {
            "client": shortened(client, _LONGEST),
            "cells": [cell for name in names for cell in _cells(name, sums[client])],
            "labels": words.few([f"{label} {times}" for label, times in by_label[client].items()]),
        }
        for client in troubled[:_MOST]
    ]
    return {
        "columns": [column for name in names for column in ((name, "smallest share") if name == "shortened" else (name,))],
        "rows": rows,
        "more": len(troubled) - len(rows),
        "meanings": [(name, _MEANINGS[name]) for name in names if name in _MEANINGS],
        "runs": sum(len(group.runs) for group in groups),
        "labels": len(groups) > 1,
    }


def _by_client(groups: Sequence[Group]) -> tuple[dict[str, Conduct], dict[str, dict[str, int]]]:
    """Each client's conduct over all runs; and `{client: {label: how often there was anything to report}}`."""
    sums: dict[str, Conduct] = defaultdict(Conduct)
    by_label: dict[str, dict[str, int]] = defaultdict(dict)
    for group in groups:
        for client, each in ((client, each) for run in group.runs for client, each in run.taking_part.conduct.items()):
            sums[client].add(each)
            if each.faults:
                by_label[client][group.label] = by_label[client].get(group.label, 0) + each.faults
    return sums, by_label


def _badness(client: str, each: Conduct) -> tuple[Any, ...]:
    counts = each.counts
    return (
        -counts["rejected"],
        -counts["shortened"],
        each.least,
        -counts["excluded"],
        -counts["failed"] - counts["late"] - counts["stray"],
        client,
    )


def _cells(name: str, each: Conduct) -> tuple[str, ...]:
    count = str(each.counts[name])
    return (count, words.share(each.least) if each.counts[name] else "–") if name == "shortened" else (count,)


def idle(groups: Sequence[Group]) -> dict[str, Any]:
    """The rounds that left the state as it was: one row for each run and kind of reason, at most 20.

    Reasons that differ in their numbers, or in the client that they name after a semicolon, are of one kind.
    """
    rows = []
    for group in groups:
        for run in group.runs:
            seed = f", seed {run.seed}" if len(group.runs) > 1 and run.seed is not None else ""
            kinds: dict[str, list[int]] = defaultdict(list)
            for number, reason in run.idle.items():
                kinds[re.sub(r"\d+", "0", reason.partition(";")[0])].append(number)
            rows += [_idle_row(group.label + seed, rounds, run) for rounds in kinds.values()]
    return {"rows": rows[:_MOST], "more": max(len(rows) - _MOST, 0)}


def _idle_row(label: str, rounds: Sequence[int], run: Run) -> dict[str, Any]:
    return {
        "label": label,
        "count": f"{len(rounds)} of {len(run.rounds)}",
        "rounds": words.few(_spans(rounds)),
        "reason": shortened(run.idle[rounds[0]], _LONGEST_REASON),
        "several": len(rounds) > 1,
    }


def _spans(rounds: Sequence[int]) -> list[str]:
    """
    >>> _spans([1, 3, 4, 5, 9])
    ['1', '3–5', '9']
    """
    spans: list[tuple[int, int]] = []
    for number in rounds:
        if spans and spans[-1][1] + 1 == number:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return [f"{first}" if first == last else f"{first}–{last}" for first, last in spans]
