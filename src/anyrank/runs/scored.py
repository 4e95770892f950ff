"""The scores in a run's rounds, each at the round that led to the state that they are of. No torch here: reports use it.

If clients score what they download (`eval.where = "sites"`), a round's row has the scores of the state that it started from,
and says so: `scored_round`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SCORED = "scored_round"
_FIGURES = ("accuracy", "loss", "worst_client_accuracy", "client_accuracy_std", "sites")


def by_state(rows: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows, sorted by round, each with the scores of the state after its round; `end`: those of the last state (empty: not
    known yet). Rows of a run in which the server scores stay as they are.
    """
    if not any(_SCORED in row for row in rows):
        return [dict(row) for row in rows]
    scores = {row[_SCORED]: row for row in rows if type(row.get(_SCORED)) is int}
    moved = [row | {key: scores.get(row["round"], {}).get(key) for key in _FIGURES} for row in map(dict, rows)]
    moved[-1] |= {key: end[key] for key in _FIGURES if key in end}
    return moved


def started_with(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Accuracy and loss of the state before round 1, if the rows have them."""
    first = next((row for row in rows if _SCORED in row and row[_SCORED] == 0), None)
    return None if first is None else {key: first.get(key) for key in ("accuracy", "loss")}
