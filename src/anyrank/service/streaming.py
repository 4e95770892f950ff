"""Server-sent events of one run, replayed from its logs: each line that has something to say is an event.

The id of an event says how far both logs were read, `METRICS-CLIENTS` in bytes, so that whoever comes back with `Last-Event-ID`
gets what was added since, read from the logs again: the service keeps nothing for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool

from anyrank.report.runs import finite
from anyrank.runs.names import CLIENTS, METRICS
from anyrank.service.run import Run
from anyrank.service.tail import Line, Tail
from anyrank.service.tally import FIGURES, number, text
from anyrank.service.watch import Watch

EVERY_S, ALIVE_S = 0.5, 15.0  # between two looks at the logs; between two signs of life
MOST_STREAMS = 64
MOST_BEHIND = 8 << 20  # bytes of the logs that are replayed; whoever is further behind loads the page anew
_ID = re.compile(r"([0-9]{1,18})-([0-9]{1,18})", re.ASCII)


class Follower:
    """What one listener has got of a run's logs. `last`: the id of the last event that it has; none: it starts from now."""

    def __init__(self, run: Run, last: str = "") -> None:
        self._run = run
        known = _ID.fullmatch(last)
        at = [int(known[1]), int(known[2])] if known else [run.metrics.offset, run.clients.offset]
        self._tails = [Tail(run.place.folder, name, offset) for name, offset in zip((METRICS, CLIENTS), at, strict=True)]
        self._reset = bool(last) and not known
        self._sent = [tail.offset for tail in self._tails]  # up to where the listener has got the logs
        self._told: tuple[Any, ...] = ()

    def news(self, now: float) -> str:
        """The events since the last call, as they are sent; empty if there are none. `now`: seconds since 1970."""
        return "".join(self._news(now))

    def _news(self, now: float) -> Iterator[str]:
        verdict = self._run.verdict(now)
        try:
            turns = [] if self._run.gone else [tail.advance() for tail in self._tails]
        except OSError:  # the verdict says so
            turns = []
        if self._reset or any(turn.cut for turn in turns) or self._is_far_behind():
            self._start_anew()
            yield self._event("reset", {"reason": "the logs are not as they were: load the page anew"})
            turns = []
        for place, (turn, make) in enumerate(zip(turns, (_round, _client), strict=False)):
            for line in turn.lines:
                self._sent[place] = line.end
                if event := make(line):
                    yield self._event(*event)
        self._sent = [tail.offset for tail in self._tails]
        if (told := (verdict.state, verdict.text, verdict.hint)) != self._told:
            self._told = told
            yield self._event("verdict", {"state": verdict.state, "text": verdict.text, "hint": verdict.hint})

    def _is_far_behind(self) -> bool:
        return sum(tail.stamp.size - tail.offset for tail in self._tails if tail.stamp) > MOST_BEHIND

    def _start_anew(self) -> None:
        """Go on from the whole lines that the service has read by now."""
        logs = ((METRICS, self._run.metrics), (CLIENTS, self._run.clients))
        self._tails, self._reset = [Tail(self._run.place.folder, name, log.offset) for name, log in logs], False
        self._sent = [tail.offset for tail in self._tails]

    def _event(self, kind: str, data: dict[str, Any]) -> str:
        return f"id: {self._sent[0]}-{self._sent[1]}\nevent: {kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n"


def _round(line: Line) -> tuple[str, dict[str, Any]] | None:
    row, round = line.row, number(line.row.get("round"))
    if round is None:
        return None
    figures = {name: finite(row.get(name)) for name in (*FIGURES, "seconds", "clients", "rejected")}
    return "round", {"round": round, **figures, "idle": text(row.get("idle") or "", 300)}


def _client(line: Line) -> tuple[str, dict[str, Any]] | None:
    """The event of a client's row; `None` for an update that was used as it is."""
    row, share = line.row, finite(line.row.get("shortened"))
    if row.get("status") == "ok" and share is None:
        return None
    told = {key: text(row.get(key), 300) for key in ("client", "status", "reason")}
    return "client", {"round": number(row.get("round")), **told, "shortened": share}


class Streams:
    """How many listeners there are now."""

    def __init__(self, most: int = MOST_STREAMS) -> None:
        self.most, self.count = most, 0

    @property
    def full(self) -> bool:
        return self.count >= self.most

    async def follow(self, news: Callable[[], str]) -> AsyncIterator[str]:
        """What `news` gives, again and again without end, for one listener."""
        self.count += 1
        try:
            quiet = 0.0
            yield "retry: 3000\n\n"
            while True:
                if told := await run_in_threadpool(news):
                    quiet = 0.0
                    yield told
                elif quiet >= ALIVE_S:
                    quiet = 0.0
                    yield ": alive\n\n"
                await anyio.sleep(EVERY_S)
                quiet += EVERY_S
        finally:
            self.count -= 1


class Overview:
    """What one listener has got of all runs: an event whenever anything on the overview changed."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._told: object = None

    def news(self, now: float) -> str:
        state = [(key, run.version, run.verdict(now).text) for key, run in self._watch.runs.items()]
        before, self._told = self._told, state
        return "" if before in (None, state) else "event: change\ndata: {}\n\n"
