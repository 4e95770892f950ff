"""What the logs of a run add up to, line by line, in bounded memory: figures over rounds, a tally of each client, events."""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anyrank.errors import printable, shortened
from anyrank.report.conduct import RESTS, Conduct
from anyrank.report.runs import finite, section

FIGURES = ("accuracy", "loss", "collapse", "epsilon")  # that have a curve
MOST_CLIENTS = 2000  # with a tally of their own
MOST_EVENTS = 200
_MOST_POINTS, _MOST_SITE_POINTS = 400, 48  # of a curve
_MOST_ROUNDS = 20  # in full
_MOST_IDLE = 100_000  # rounds that are known to be idle, by number
_LONGEST_NAME, _LONGEST_REASON = 100, 300  # characters
_BYTES = ("upload_bytes", "download_bytes")
_ANSWERED = ("ok", "rejected", "excluded", "late", "stray")  # the statuses of a client that was heard
_MOST_ROUND = 1 << 53


class Curve:
    """A figure over the rounds, `[(round, value)]`: every round, or every so many rounds of a long run, and always the last."""

    def __init__(self, most: int = _MOST_POINTS) -> None:
        self._most, self._step, self._count = most, 1, 0
        self._points: list[tuple[int, float]] = []
        self.last: tuple[int, float] | None = None

    def add(self, round: int, value: float) -> None:
        self.last = (round, value)
        if self._count % self._step == 0:
            self._points.append(self.last)
        self._count += 1
        if len(self._points) > self._most:
            self._points, self._step = self._points[::2], 2 * self._step

    @property
    def points(self) -> list[tuple[int, float]]:
        return self._points if self._points[-1:] == [self.last] or not self.last else [*self._points, self.last]


@dataclass(slots=True)
class Event:
    """Something to report of one client, or of the whole round (`client` empty), in rounds `first` to `last`, `times` of them
    in a row. `at`: when it was noticed (seconds since 1970), if the service was there."""

    kind: str
    client: str
    first: int
    last: int
    times: int
    reason: str
    at: float | None


@dataclass(slots=True)
class ClientTally:
    """What the log says of one client: `round`, `status`, `reason` of its last row; `heard`, the last round in which it sent
    anything, and when that was noticed, `heard_at`; `seconds` of its training, and
    `bytes` up and down, in all, where its rows have them."""

    rank: int | None = None
    num_examples: float | None = None
    round: int = 0
    status: str = ""
    reason: str = ""
    heard: int = 0
    heard_at: float | None = None
    seconds: float = 0.0
    bytes: float = 0.0
    conduct: Conduct = field(default_factory=Conduct)
    accuracy: Curve | None = None
    event: Event | None = None  # the one that goes on, if its last row was one


class Tally:
    """The figures of one run. Rows of clients count once the metrics of their round are there: only then it is known whether
    the round was idle."""

    def __init__(self) -> None:
        self.curves = {name: Curve() for name in FIGURES}
        self.round = 0
        self.recent: deque[dict[str, Any]] = deque(maxlen=_MOST_ROUNDS)
        self.upload_bytes = self.download_bytes = 0.0
        self.idle = self.idle_in_a_row = 0
        self.idle_reason = ""
        self.clients: dict[str, ClientTally] = {}
        self.omitted = 0  # rows of clients beyond the most
        self.events: OrderedDict[int, Event] = OrderedDict()
        self._idle_rounds: set[int] = set()
        self._waiting: deque[Mapping[str, Any]] = deque(maxlen=100_000)

    @property
    def round_seconds(self) -> float | None:
        """The median time of the last rounds, in seconds."""
        seconds = [row["seconds"] for row in self.recent if row["seconds"] is not None]
        return statistics.median(seconds) if seconds else None

    def add_metrics(self, row: Mapping[str, Any], at: float | None) -> None:
        """Take in a line of metrics.jsonl; `at`: when it was written (seconds since 1970), if that is known."""
        round = number(row.get("round"))
        if round is None:
            return
        self.round = round
        for name, curve in self.curves.items():
            if (value := finite(row.get(name))) is not None:
                curve.add(round, value)
        self.upload_bytes += finite(row.get("upload_bytes")) or 0.0
        self.download_bytes += finite(row.get("download_bytes")) or 0.0
        self._note_idle(round, text(row.get("idle") or "", _LONGEST_REASON), at)
        figures = {name: finite(row.get(name)) for name in (*FIGURES, "seconds", "clients", "rejected", "shortened")}
        self.recent.append({"round": round, "idle": self.idle_reason, "at": at} | figures)
        for name, scores in section(row, "sites").items():
            accuracy = finite(scores.get("accuracy")) if isinstance(scores, Mapping) else None
            if accuracy is not None and (client := self._client(name)):
                client.accuracy = client.accuracy or Curve(_MOST_SITE_POINTS)
                client.accuracy.add(round, accuracy)
        while self._waiting and (number(self._waiting[0].get("round")) or 0) <= round:
            self._count(self._waiting.popleft(), at)

    def add_client(self, row: Mapping[str, Any], at: float | None) -> None:
        """Take in a line of clients.jsonl."""
        round = number(row.get("round"))
        if round is not None and round <= self.round:
            self._count(row, at)
        elif round is not None:
            self._waiting.append(row)

    def _note_idle(self, round: int, reason: str, at: float | None) -> None:
        self.idle_reason = reason
        if not reason:
            self.idle_in_a_row = 0
            return
        self.idle += 1
        self.idle_in_a_row += 1
        if len(self._idle_rounds) < _MOST_IDLE:
            self._idle_rounds.add(round)
        before = next(reversed(self.events.values()), None)
        going_on = self.idle_in_a_row > 1 and before is not None and before.kind == "idle"
        self._report(before if going_on else None, Event("idle", "", round, round, 1, reason, at))

    def _client(self, name: Any) -> ClientTally | None:
        """The tally of a client, made where there is none; `None` beyond the most."""
        name = text(name, _LONGEST_NAME)
        if name not in self.clients and len(self.clients) >= MOST_CLIENTS:
            return None
        return self.clients.setdefault(name, ClientTally())

    def _count(self, row: Mapping[str, Any], at: float | None) -> None:
        client = self._client(row.get("client"))
        if client is None:
            self.omitted += 1
            return
        round, status = number(row.get("round")) or 0, text(row.get("status"), _LONGEST_NAME)
        reason = text(row.get("reason") or "", _LONGEST_REASON)
        again = (client.status, client.reason) == (status, reason)
        rank, examples = number(row.get("rank")), finite(row.get("num_examples"))
        client.rank = client.rank if rank is None else rank
        client.num_examples = client.num_examples if examples is None else examples
        client.round, client.status, client.reason = round, status, reason
        if status in _ANSWERED:
            client.heard, client.heard_at = round, at
        client.seconds += max(finite(row.get("seconds")) or 0.0, 0.0)
        for name in _BYTES:
            if name in row:
                client.bytes += max(finite(row[name]) or 0.0, 0.0)
        client.conduct.note(row, round in self._idle_rounds)
        kind = _kind(row, status)
        if not kind or (kind == "skipped" and again):  # what is skipped in every round is told once
            client.event = client.event if kind else None
            return
        before = client.event if client.event and client.event.kind == kind else None
        client.event = self._report(before, Event(kind, text(row.get("client"), _LONGEST_NAME), round, round, 1, reason, at))

    def _report(self, before: Event | None, event: Event) -> Event:
        """Add an event, or let it go on from the one `before`; the newest stands last."""
        if before and self.events.get(id(before)) is before:
            del self.events[id(before)]
            event.first, event.times = before.first, before.times + 1
        self.events[id(event)] = event
        while len(self.events) > MOST_EVENTS:
            self.events.popitem(last=False)
        return event


def _kind(row: Mapping[str, Any], status: str) -> str:
    """The kind of event that a row of clients.jsonl is; empty if there is nothing to report."""
    if status == "ok":
        return "shortened" if finite(row.get("shortened")) is not None else ""
    if status == "skipped":
        return "rests" if str(row.get("reason")).startswith(RESTS) else "skipped"
    return status


def number(value: Any) -> int | None:
    """`value` if it is a whole number of at least 0 that is no larger than a log can mean, else `None`."""
    return value if type(value) is int and 0 <= value < _MOST_ROUND else None


def text(value: Any, longest: int) -> str:
    """Somebody's text as one line of at most `longest` characters that is safe to show; of lists and tables, their kind."""
    plain = value if isinstance(value, str) else type(value).__name__ if isinstance(value, (dict, list)) else str(value)
    return printable(plain if len(plain) <= longest else shortened(plain, longest))
