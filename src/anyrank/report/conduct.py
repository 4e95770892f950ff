"""The conduct of each client in a run: how many of its updates were used, rejected, excluded, shortened, and so on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

RESTS = "rests until round "  # how the reason of a skipped client begins, if it rests after rejected uploads
_STATUSES = {"ok": "used", "rejected": "rejected", "excluded": "excluded", "failed": "failed", "stray": "stray", "late": "late"}


@dataclass
class Conduct:
    """A client's `counts`: used, rejected, shortened, excluded, failed, rested, late, stray; and `least`, the smallest share of
    a shortened step that counted, 1 if no step was shortened. In an idle round, no update is used.
    """

    counts: Counter[str] = field(default_factory=Counter)
    least: float = 1.0

    def note(self, row: Mapping[str, Any], idle: bool) -> None:
        """Take in one row of clients.jsonl. `idle`: whether its round left the state as it was."""
        status, share = row.get("status"), row.get("shortened")
        if status == "skipped":
            self.counts["rested"] += str(row.get("reason")).startswith(RESTS)
        elif isinstance(status, str) and status in _STATUSES and not (status == "ok" and idle):
            self.counts[_STATUSES[status]] += 1
        if status == "ok" and type(share) in (int, float) and 0 <= share <= 1:
            self.counts["shortened"] += 1
            self.least = min(self.least, float(share))

    def add(self, other: Conduct) -> None:
        self.counts.update(other.counts)
        self.least = min(self.least, other.least)

    @property
    def faults(self) -> int:
        """How often there is anything to report beside used updates."""
        return sum(count for name, count in self.counts.items() if name != "used")


def tally(rows: Iterable[Mapping[str, Any]], idle: Container[int]) -> dict[str, Conduct]:
    """`{client: conduct}` over the rows of clients.jsonl; `idle`: the idle rounds."""
    found: dict[str, Conduct] = {}
    for row in rows:
        found.setdefault(str(row.get("client")), Conduct()).note(row, is_idle(row, idle))
    return found


def is_idle(row: Mapping[str, Any], idle: Container[int]) -> bool:
    """Whether a row of clients.jsonl is of an idle round."""
    return type(row.get("round")) is int and row["round"] in idle


def once(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows without those of a round that was repeated after a resume: its last rows count.

    The rows of a round are sorted by client. A client may have several: of its update, of stray replies under its name, and of
    its late reply of the round before.
    """
    kept: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    seen: Counter[str] = Counter()
    before = ("", "")
    for row in rows:
        round, client = str(row.get("round")), str(row.get("client"))
        if round != before[0] or client < before[1]:
            seen = Counter()
        kept[round, client, seen[client]] = row
        seen[client] += 1
        before = (round, client)
    return list(kept.values())
