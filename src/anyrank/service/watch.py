"""All runs below some folders, found again and read on while they grow. Bounded work a turn; one turn at a time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from anyrank.errors import in_a_line
from anyrank.service import locks
from anyrank.service.finding import find, roots
from anyrank.service.run import Run

_FIND_EVERY_S, _FIND_SHARE = 5.0, 20  # between two searches: seconds, and how many times as long as one takes
_FIRST_S = 10.0  # seconds that a request waits for the first turn
_TURN_S = 0.25  # seconds of reading in one turn


class Watch:
    """The runs in the folders `named`. Raises `RunError` for one that is not there.

    A run that was found once stays on the list, also when its folder is gone. `clock`: seconds since 1970.
    """

    def __init__(self, named: Sequence[Path], clock: Callable[[], float] = time.time) -> None:
        self._roots = roots(named)
        self.clock = clock
        self.runs: dict[str, Run] = {}
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._next_search = 0.0
        self._turned = 0.0

    def refresh(self, older_than_s: float = 0.0) -> bool:
        """Look for new runs, if it is time, and read on in all of them; returns whether there is more to read at once.

        Does nothing if the last turn was less than `older_than_s` seconds ago, or while another thread is at it; but it waits
        for the first turn, before which there is nothing to show.
        """
        is_recent = self._turned and time.monotonic() - self._turned < older_than_s
        if is_recent or not self._lock.acquire(timeout=0.0 if self._turned else _FIRST_S):
            return False
        try:
            self._search()
            behind = self._read()
            self._turned = time.monotonic()
            return behind
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Within it nothing is read on, so that what is taken from several runs, or from one, is of one moment."""
        with self._lock:
            yield

    def _search(self) -> None:
        began = time.monotonic()
        if began < self._next_search:
            return
        places, self.notes = find(self._roots)
        found = {}
        for place in places:
            run = self.runs.get(place.key)
            found[place.key] = run if run and run.place == place else Run(place)  # what could not be read may be a run by now
        self.runs = found | {key: run for key, run in self.runs.items() if key not in found}
        took = time.monotonic() - began
        self._next_search = time.monotonic() + max(_FIND_EVERY_S, _FIND_SHARE * took)

    def _read(self) -> bool:
        held, until = locks.held_files(), time.monotonic() + _TURN_S
        for run in self.runs.values():
            _refresh(run, held)
        while (behind := [run for run in self.runs.values() if run.behind]) and time.monotonic() < until:
            for run in behind:
                if time.monotonic() < until:
                    _refresh(run, held)
        return bool(behind)


def _refresh(run: Run, held: frozenset[int] | None) -> None:
    """Read on in one run. Whatever its folder does to this reader is that run's own line, and the others go on."""
    try:
        run.refresh(held)
    except Exception as error:
        run.broke(in_a_line(error))
