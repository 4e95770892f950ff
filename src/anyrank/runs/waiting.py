"""Who a run waits for now: `status.json` in its folder, for those who watch it from outside.

The file is no part of the run. Nothing reads it back, it is removed when the wait is over, and one that ends within seconds
never has it. It is written beside the run's own writes: it is not one of the events of `anyrank.files`, it is not flushed to
disk, and where it cannot be written, the run goes on without it. It is written again every `EVERY_S` seconds, so that its age
shows whether its process still runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from anyrank import stopping
from anyrank.runs.names import CONFIG, STATUS

SOON_S, EVERY_S = 3.0, 2.0  # of a wait before the file is written; between two writings of it
MOST_NAMES = 500  # in the file
BEFORE_ROUNDS = 0  # the round of a wait for sites that have not come yet
_END_S = 10.0  # that the end of a wait takes at most for a writing in progress, on a disk that hangs


@contextlib.contextmanager
def shown(folder: Path, round: int, asked: Sequence[str]) -> Iterator[Wait]:
    """Meanwhile, `folder` says which of the clients `asked` have not replied in a round. Raises nothing of its own.

    `folder`: that of a run; where no run has begun, nothing is written. `round`: its number, or `BEFORE_ROUNDS`.
    """
    wait = Wait(folder / STATUS, round, asked)
    with contextlib.ExitStack() as ours:
        for path in (wait.path, wait.temporary):
            if not path.is_dir():  # a folder of that name is somebody else's
                ours.enter_context(stopping.unfinished(path))
        ours.callback(wait.end)
        yield wait


class Wait:
    """Writes the file from a thread of its own, so that it is there while the run only waits."""

    def __init__(self, path: Path, round: int, asked: Sequence[str]) -> None:
        self.path, self._round, self._began = path, round, time.time()
        self.temporary = path.with_name(f".{STATUS}.{os.getpid()}.tmp")  # a name that the next process sweeps away
        self._asked, self._waiting, self._heard = len(asked), dict.fromkeys(asked), 0.0
        self._over, self._lock = threading.Event(), threading.Lock()
        _remove(path)  # a killed process may have left one
        self._thread: threading.Thread | None = threading.Thread(target=self._write, name="waiting", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no further thread
            self._thread = None

    def heard(self, replies: Iterable[Any]) -> Iterator[Any]:
        """Pass replies on, and note whose they are."""
        for reply in replies:
            self._note(reply)
            yield reply

    def only(self, names: Iterable[str]) -> None:
        """From now on, only these are waited for."""
        with self._lock:
            self._waiting = dict.fromkeys(names)

    def end(self) -> None:
        self._over.set()
        if self._thread:
            self._thread.join(_END_S)
        _remove(self.path)

    def _note(self, reply: Any) -> None:
        try:
            name = reply.client
        except Exception:  # a reply may be anything, and break in ways of its own
            return
        if type(name) is str:
            with self._lock:
                self._heard = time.time()
                self._waiting.pop(name, None)

    def _write(self) -> None:
        pause = SOON_S
        while not self._over.wait(pause):
            pause = EVERY_S
            with self._lock:
                names, heard = list(self._waiting), self._heard
            table = {"round": self._round, "began": self._began, "heard": heard, "asked": self._asked, "missing": len(names)}
            self._put(json.dumps(table | {"waiting_for": names[:MOST_NAMES]}) + "\n")

    def _put(self, text: str) -> None:
        if not os.path.lexists(self.path.with_name(CONFIG)):  # a new run expects an empty folder
            return
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)
            with open(self.temporary, "x", encoding="utf-8") as file:
                file.write(text)
            if not self._over.is_set():
                os.replace(self.temporary, self.path)
        _remove(self.temporary)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
