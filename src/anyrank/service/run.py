"""One run as the service knows it: its folder, read on as it grows."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from anyrank.config.tables import parse_toml
from anyrank.report.runs import finite, section
from anyrank.runs.names import CLIENTS, CONFIG, LEDGER, METRICS, PRIVACY, STATUS, SUMMARY
from anyrank.service import locks
from anyrank.service.finding import Place
from anyrank.service.reading import Stamp, read, read_object, reason, stamp
from anyrank.service.tail import Tail
from anyrank.service.tally import FIGURES, MOST_CLIENTS, Event, Tally, number, text
from anyrank.service.verdict import Facts, Verdict, Waiting, verdict

_MOST_CONFIG, _MOST_STATUS = 1 << 20, 1 << 20  # bytes
_DEFAULT_PATIENCE = 3  # of a configuration without rounds.patience
_MOST_RESUMES = 20
_RESUMED = "the run was resumed: rounds after its last checkpoint are run again"
_GREW_UNHELD = 2  # times that a log grew while nobody seemed to hold the lock, after which the lock counts as not visible


class Run:
    """A run folder in progress or over. `refresh` reads on; everything else is what was read so far.

    What cannot be read becomes `problem`, or a note; nothing is raised.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.summary: Mapping[str, Any] = {}
        self.config: Mapping[str, Any] = {}
        self.plan: Mapping[str, Any] = {}
        self.notes: list[str] = []
        self.gone = False
        self.held: bool | None = None
        self.waiting: Waiting | None = None
        self.resumes: deque[Event] = deque(maxlen=_MOST_RESUMES)  # that were noticed
        self.version = 0  # grows when anything changed
        self._stamps: dict[str, Stamp | None] = {}
        self._broken: dict[str, str] = {}
        self._grew_unheld = 0
        self._settled = False  # whether all that was there at first was read: from then on rows are seen as they come
        self._begin()

    def _begin(self) -> None:
        """Forget what the logs said."""
        folder = self.place.folder
        self.tally = Tally()
        self.metrics, self.clients, self.ledger = (Tail(folder, name) for name in (METRICS, CLIENTS, LEDGER))
        self.charges: Counter[str] = Counter()

    @property
    def behind(self) -> bool:
        """Whether there is more to read at once."""
        return not self.gone and (self.metrics.behind or self.clients.behind or self.ledger.behind)

    def refresh(self, held: frozenset[int] | None) -> None:
        """Read on, at most some pieces of each log. `held`: as `locks.held_files` has it."""
        folder = self.place.folder
        if self.place.problem:
            return
        before, settled = self._state(), self._settled
        self.gone = not folder.is_dir()
        if self.gone:
            self.version += before != self._state()
            return
        self.held = locks.is_held(folder, held)
        self._read_file(CONFIG, self._read_config)
        self._read_file(SUMMARY, self._read_summary)
        self._read_file(PRIVACY, self._read_plan)
        self._read_file(STATUS, self._read_status)
        try:
            grew = self._read_logs()
            self._broken.pop("log", None)
        except OSError as error:
            grew, self._broken["log"] = False, f"a log: {reason(error)}"
        if grew and settled:
            self._grew_unheld = self._grew_unheld + 1 if self.held is False else 0
        self.version += before != self._state()

    def broke(self, why: str) -> None:
        """Its files made the reading fail in a way that was not expected."""
        self._broken["log"] = f"reading it failed ({why}); please report this"
        self.version += 1

    def _state(self) -> tuple[Any, ...]:
        """Something that changes whenever anything on the page does, but for ages."""
        logs = (self.metrics.offset, self.clients.offset, self.ledger.offset)
        return (*logs, *self._stamps.values(), self.held, self.gone, *self._broken.values())

    def _read_logs(self) -> bool:
        """Read the logs on; returns whether they grew."""
        cut = self.metrics.is_cut() or self.clients.is_cut()
        if cut:
            self._begin()
        turn = self.metrics.advance()
        at, grew = self._time_of(self.metrics.stamp), bool(turn.lines)
        for line in turn.lines:
            last = line is turn.lines[-1] and not self.metrics.behind
            self.tally.add_metrics(line.row, at if self._settled or last else None)
        if not self.metrics.behind:  # whether a round was idle must be known before its clients count
            turn = self.clients.advance()
            for line in turn.lines:
                of_last = line.row.get("round") == self.tally.round
                self.tally.add_client(line.row, at if self._settled or of_last else None)
            grew = grew or bool(turn.lines)
            self._charge()
        if cut and self._settled:
            self.resumes.append(Event("resumed", "", self.tally.round, self.tally.round, 1, _RESUMED, time.time()))
        self._settled = self._settled or not self.behind
        return grew

    def _charge(self) -> None:
        """Count the charges of a private run by client."""
        for line in self.ledger.advance().lines:
            client = text(line.row.get("client"), 100)
            if client in self.charges or len(self.charges) < MOST_CLIENTS:
                self.charges[client] += 1

    @staticmethod
    def _time_of(found: Stamp | None) -> float | None:
        return found.changed_ns / 1e9 if found else None

    def _read_file(self, name: str, take) -> None:
        """Read a small file if it is another than before. What is wrong with it is a note."""
        now = stamp(self.place.folder, name)
        if name in self._stamps and self._stamps[name] == now:
            return
        self._stamps[name] = now
        self._broken.pop(name, None)
        try:
            take(now is not None)
        except FileNotFoundError:
            self._stamps[name] = None
        except (OSError, ValueError) as error:
            self._broken[name] = f"{name}: {reason(error)}"

    def _read_config(self, there: bool) -> None:
        self.config = {}
        if there:
            self.config = parse_toml(read(self.place.folder, CONFIG, _MOST_CONFIG).decode("utf-8", "replace"))

    def _read_summary(self, there: bool) -> None:
        self.summary = {}
        if there:
            self.summary = read_object(self.place.folder, SUMMARY)

    def _read_plan(self, there: bool) -> None:
        """The plan of a private run; the name of its key is left out."""
        self.plan = {}
        if there:
            self.plan = dict(section(read_object(self.place.folder, PRIVACY), "plan"))

    def _read_status(self, there: bool) -> None:
        self.waiting = None
        if there:
            found = read_object(self.place.folder, STATUS, _MOST_STATUS)
            round, began, missing = number(found.get("round")), finite(found.get("began")), number(found.get("missing"))
            names = [text(name, 100) for name in _list(found, "waiting_for")]
            if round is not None and began is not None:
                heard, count = finite(found.get("heard")) or 0.0, max(missing or 0, len(names))
                self.waiting = Waiting(round, began, names, count, number(found.get("asked")) or count, heard)

    @property
    def problem(self) -> str:
        """Why the run cannot be read at all; empty if it can."""
        if self.place.problem or self.gone:
            return self.place.problem or "its folder is no longer there"
        hopeless = [self._broken[name] for name in (CONFIG, "log") if name in self._broken]
        return "; ".join(hopeless)

    @property
    def told(self) -> list[str]:
        """What a reader of the page should know of the files."""
        damaged = {METRICS: self.metrics.damaged, CLIENTS: self.clients.damaged, LEDGER: self.ledger.damaged}
        notes = [f"{name}: {count:,} lines could not be read and are left out." for name, count in damaged.items() if count]
        notes += [f"{why}." for name, why in self._broken.items() if name not in (CONFIG, "log")]
        if self.tally.omitted:
            notes.append(f"Only {MOST_CLIENTS:,} clients are shown one by one.")
        if self.behind:
            notes.append(f"Its logs are being read: {self.share_read:.0%} so far.")
        return notes

    @property
    def damaged(self) -> int:
        """Lines of the logs that could not be read."""
        return self.metrics.damaged + self.clients.damaged + self.ledger.damaged

    @property
    def share_read(self) -> float:
        logs = [log for log in (self.metrics, self.clients) if log.stamp]
        return sum(log.offset for log in logs) / max(sum(log.stamp.size for log in logs if log.stamp), 1)

    @property
    def changed(self) -> float:
        """When the run last wrote anything that counts as an event (seconds since 1970)."""
        stamps = [self.metrics.stamp, self.clients.stamp, *(self._stamps.get(name) for name in (CONFIG, SUMMARY))]
        heard = min(self.waiting.heard, self._said) if self.waiting else 0.0  # the file is written while nothing happens, too
        return max([heard, *(each.changed_ns / 1e9 for each in stamps if each)])

    @property
    def _said(self) -> float:
        """When `status.json` was last written (seconds since 1970): its process was there then."""
        found = self._stamps.get(STATUS)
        return found.changed_ns / 1e9 if found else 0.0

    @property
    def planned(self) -> int | None:
        return number(section(self.config, "run").get("rounds"))

    def figure(self, name: str) -> float | None:
        """The final figure of a finished run, else that of the last round that has one."""
        final = finite(self.summary.get(name))
        curve = self.tally.curves.get(name)
        return final if final is not None else curve.last[1] if curve and curve.last else None

    def facts(self) -> Facts:
        patience = number(section(self.config, "rounds").get("patience"))
        patience = _DEFAULT_PATIENCE if patience is None else patience
        hidden = self._grew_unheld >= _GREW_UNHELD
        return Facts(
            round=self.tally.round,
            planned=self.planned,
            problem=self.problem,
            finished=bool(self.summary),
            held=None if hidden and not self.held else self.held,
            changed=self.changed,
            round_s=self.tally.round_seconds,
            idle_in_a_row=self.tally.idle_in_a_row,
            idle_reason=self.tally.idle_reason,
            patience=min(patience, self.planned or patience),
            waiting=self.waiting,
            said=self._said,
            by_jobs=self.place.by_jobs,
            who="sites" if self.config.get("sites") else "clients",
            deadline_s=finite(section(self.config, "rounds").get("deadline_s")) or None,
            figures={name: value for name in FIGURES if (value := self.figure(name)) is not None},
            resume=self.place.resume,
        )

    def verdict(self, now: float) -> Verdict:
        return verdict(self.facts(), now)


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    value = found.get(key)
    return value[:MOST_CLIENTS] if isinstance(value, list) else []
