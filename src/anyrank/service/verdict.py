"""The first line of a run: what became of it, as far as its folder shows. A function of facts and the time, without I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from anyrank.report import words

QUIET_S, QUIET_ROUNDS = 120.0, 5  # a run is quiet after so many seconds, or so many times its usual round, without an event
FRESH_S = 15.0  # after which the process that wrote `status.json` counts as gone: it writes every few seconds
_MOST_NAMED, _MINUTE_S, _LONG_S = 3, 60.0, 10.0


@dataclass(frozen=True)
class Waiting:
    """What `status.json` says of a wait: for which round (0: for clients that have not come yet) and since when (seconds since
    1970); `clients`: the first of the `count` that are waited for, of `asked` in all; `heard`: when the last one replied, or 0.
    """

    round: int
    began: float
    clients: Sequence[str]
    count: int = 0
    asked: int = 0
    heard: float = 0.0


@dataclass(frozen=True)
class Facts:
    """What is known of a run. Times in seconds since 1970.

    `problem`: why its folder cannot be read. `held`: whether a process on this machine holds the run's lock; `None` if that
    cannot be seen. `changed`: when its files were last written to. `round_s`: the usual time of a round. `idle_in_a_row`: the
    idle rounds at the end of the log, `patience` of which end a run. `said`: when its process last wrote that it waits. `who`:
    what its clients are called. `by_jobs`: whether it is run by jobs of a server, between which nobody holds the lock.
    """

    round: int = 0
    planned: int | None = None
    problem: str = ""
    finished: bool = False
    held: bool | None = None
    changed: float = 0.0
    round_s: float | None = None
    idle_in_a_row: int = 0
    idle_reason: str = ""
    patience: int | None = None
    waiting: Waiting | None = None
    said: float = 0.0
    who: str = "clients"
    by_jobs: bool = False
    deadline_s: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    resume: str = ""

    @property
    def waits(self) -> Waiting | None:
        """`waiting`, if it is of the round in progress and of anybody."""
        waiting = self.waiting
        return waiting if waiting and waiting.clients and waiting.round in (0, self.round + 1) else None


@dataclass(frozen=True)
class Verdict:
    """`state`, one of `STATES`; the line itself; and what to do, or empty."""

    state: str
    text: str
    hint: str = ""


# In the order of an overview: what needs somebody comes first.
STATES = ("failed", "unreadable", "stopped", "slow", "running", "done")


def verdict(facts: Facts, now: float) -> Verdict:
    """The verdict of a run at the time `now` (seconds since 1970).

    >>> verdict(Facts(round=6, planned=40, held=True, changed=100.0), now=110.0).text
    'running, round 7 of 40'
    """
    return next(found for rule in _RULES if (found := rule(facts, now)))


def _unreadable(facts: Facts, now: float) -> Verdict | None:
    return Verdict("unreadable", f"cannot be read: {facts.problem}") if facts.problem else None


def _done(facts: Facts, now: float) -> Verdict | None:
    if not facts.finished:
        return None
    accuracy = facts.figures.get("accuracy")
    return Verdict("done", f"done, {words.count(facts.round, 'round')}" + _percent(", accuracy", accuracy))


def _failed(facts: Facts, now: float) -> Verdict | None:
    """As many idle rounds in a row as end a run, and nobody continues it."""
    if facts.held or not facts.patience or facts.idle_in_a_row < facts.patience:
        return None
    times = f"{words.count(facts.idle_in_a_row, 'round')} in a row {'was' if facts.idle_in_a_row == 1 else 'were'} idle"
    return Verdict("failed", f"failed after round {_of(facts.round, facts)}: {times}: {facts.idle_reason}", facts.resume)


def _running(facts: Facts, now: float) -> Verdict | None:
    quiet, there = _is_quiet(facts, now), facts.held or abs(now - facts.said) < FRESH_S
    if not there and (quiet or (facts.held is False and not facts.by_jobs)):
        return None
    text = f"running, round {_of(facts.round + 1, facts)}" if not _is_over(facts) else "running, writing its results"
    if facts.waits:
        text += f", waiting for {_waited(facts, now)}"
    elif facts.held is False and not there:
        text += " (between two jobs)"
    if facts.idle_in_a_row:
        text += f"; {words.count(facts.idle_in_a_row, 'idle round')} so far in a row"
    if not quiet:
        return Verdict("running", text)
    usual = f", a round takes {_short(facts.round_s)}" if facts.round_s else ""
    hint = f"No event for {duration(now - facts.changed)}{usual}. Its process is still there: {_hangs(facts)}"
    return Verdict("slow", text, hint)


def _waited(facts: Facts, now: float) -> str:
    """Who is waited for, and how long in whole minutes: what changes every second would be read out every second."""
    waits, seconds = facts.waits, now - facts.waits.began
    who = words.few(waits.clients) if waits.count <= _MOST_NAMED else f"{waits.count:,} of {waits.asked:,} {facts.who}"
    return f"{who} ({duration(seconds)})" if seconds >= _MINUTE_S else who


def _hangs(facts: Facts) -> str:
    """What a quiet run waits for, and until when."""
    waits = facts.waits
    if not waits:
        return "a client may hang."
    begun = "has not come" if waits.round == 0 else "has not replied"
    who = f"{waits.clients[0]} {begun}" if waits.count == 1 else f"{waits.count:,} {facts.who} {begun.replace('has', 'have')}"
    if waits.round == 0:
        return f"{who}."
    if facts.deadline_s:
        return f"{who}; soon after the deadline of {duration(facts.deadline_s)} (rounds.deadline_s) the round goes on without."
    return f"{who}, and no deadline is set (rounds.deadline_s)."


def _stopped(facts: Facts, now: float) -> Verdict:
    reason = "no process on this machine writes it" if facts.held is False else f"no event for {duration(now - facts.changed)}"
    return Verdict("stopped", f"stopped after round {_of(facts.round, facts)} ({reason})", facts.resume)


_RULES: Sequence[Callable[[Facts, float], Verdict | None]] = (_unreadable, _done, _failed, _running, _stopped)


def _is_quiet(facts: Facts, now: float) -> bool:
    return now - facts.changed > max(QUIET_S, QUIET_ROUNDS * (facts.round_s or 0.0))


def _is_over(facts: Facts) -> bool:
    return facts.planned is not None and facts.round >= facts.planned


def _of(round: int, facts: Facts) -> str:
    return f"{round} of {facts.planned}" if facts.planned is not None else str(round)


def _percent(what: str, value: float | None) -> str:
    return "" if value is None else f"{what} {words.share(value)}"


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < _LONG_S else duration(seconds)


_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def duration(seconds: float) -> str:
    """A time in words, by its largest unit.

    >>> [duration(seconds) for seconds in (0.2, 59, 61, 7300, 200000)]
    ['0 s', '59 s', '1 min', '2 h', '2 d']
    """
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= size), (1, "s"))
    return f"{int(max(seconds, 0.0) // size)} {unit}"
