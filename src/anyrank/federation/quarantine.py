"""Clients whose uploads are rejected again and again rest for some rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class Quarantine:
    """A client rests for `rest` rounds after each `offences` rejected uploads; with `offences` or `rest` 0, nobody rests.

    It is a pure function of the rows of clients.jsonl, so that a run that goes on needs nothing but its log.

    >>> row = {"client": "eve", "status": "rejected", "round": 7}
    >>> found = Quarantine(offences=2, rest=3, log=[row | {"round": 4}, row])
    >>> [found.until("eve", round) for round in (7, 8, 10, 11)]
    [0, 10, 10, 0]
    """

    def __init__(self, offences: int, rest: int, log: Iterable[Mapping[str, Any]] = ()) -> None:
        self._offences, self._rest = offences, rest
        self._counts: dict[str, int] = {}
        self._last: dict[str, tuple[int, int]] = {}  # {client: first and last round of its rest}
        self.note(log)

    def note(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take in the rows of a round, after those of all rounds before."""
        if not (self._offences and self._rest):
            return
        for row in rows:
            if row.get("status") == "rejected":
                client, round = row["client"], row["round"]
                self._counts[client] = self._counts.get(client, 0) + 1
                if self._counts[client] % self._offences == 0:
                    self._last[client] = (round + 1, round + self._rest)

    def until(self, client: str, round: int) -> int:
        """The last round of the client's rest, if it rests in `round`; else 0."""
        first, last = self._last.get(client, (0, 0))
        return last if first <= round <= last else 0

    def reason(self, client: str, round: int) -> str:
        """Why a client is not asked in `round`; empty if it is."""
        last = self.until(client, round)
        return f"rests until round {last}: {self._counts[client]} of its uploads were rejected" if last else ""
