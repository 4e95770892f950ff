"""Counts in a frame's header: a client's results on its own held-out examples, as sums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anyrank.errors import FrameError, shortened
from anyrank.messages.body import check_least, fields
from anyrank.messages.records import Counts

LARGEST = 1e100  # of a sum of losses, either way: the sums of all clients still add up to a number
MOST_LABELS = 100_000


def table(counts: Counts) -> dict[str, Any]:
    """The counts as JSON has them; a sum of losses that is not finite is `None`."""
    losses = counts.losses if counts.losses is not None and math.isfinite(counts.losses) else None
    by_label = {label: list(pair) for label, pair in counts.by_label.items()}
    return {"examples": counts.examples, "losses": losses, "correct": counts.correct, "by_label": by_label}


def of(where: str, table: Any) -> Counts:
    """The counts of a table. Raises `FrameError` for what no results on examples can be."""
    keys = {"examples": int, "losses": (float, int, type(None)), "correct": (int, type(None)), "by_label": dict}
    examples, losses, correct, by_label = fields(where, table, **keys)
    if len(by_label) > MOST_LABELS:
        raise FrameError(f"{where}, by_label: expected at most {MOST_LABELS} labels, got {len(by_label)}")
    for label, pair in by_label.items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise FrameError(
                f"{where}, by_label of {shortened(label, 100)}: expected [examples, correct], got {shortened(repr(pair), 100)}"
            )
    found = Counts(examples, losses, correct, {label: (pair[0], pair[1]) for label, pair in by_label.items()})
    check(where, found)
    return found


def check(where: str, counts: Counts) -> None:
    """Raise `FrameError` for counts that contradict themselves. How many examples a client has is for the server to know."""
    check_least(f"{where}, examples", counts.examples, 1)
    if counts.losses is not None:
        number = type(counts.losses) in (int, float)
        if not number or not -LARGEST <= counts.losses <= LARGEST:  # NaN is in no order
            got = "a large whole number" if type(counts.losses) is int else shortened(repr(counts.losses), 100)
            raise FrameError(f"{where}, losses: expected a finite number, at most 1e100 either way, or none, got {got}")
    if counts.correct is not None:
        _check_correct(where, counts.examples, counts.correct)
    _check_labels(where, counts)


def _check_labels(where: str, counts: Counts) -> None:
    by_label: Mapping[str, tuple[int, int]] = counts.by_label
    for label, (examples, correct) in by_label.items():
        own = f"{where}, by_label of {shortened(label, 100)}"
        check_least(f"{own}, examples", examples, 1)
        _check_correct(own, examples, correct)
    sums = [sum(pair[place] for pair in by_label.values()) for place in (0, 1)]
    if by_label and sums != [counts.examples, counts.correct]:
        expected = f"{counts.examples} examples and {counts.correct} correct"
        raise FrameError(f"{where}, by_label: expected {expected} in all, got {_told(sums[0])} and {_told(sums[1])}")


def _check_correct(where: str, examples: int, correct: int) -> None:
    check_least(f"{where}, correct", correct, 0)
    if correct > examples:
        raise FrameError(f"{where}, correct: expected at most {examples}, the examples, got {_told(correct)}")


def _told(number: int) -> str:
    return str(number) if number < LARGEST else "a whole number of more than 100 digits"
