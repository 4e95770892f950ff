"""What the parts of a round cost in this process: CPU seconds, and resident memory as Linux tells it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Stopwatch:
    """CPU seconds of the parts of a round. Parts inside others count once, for the inner one."""

    def __init__(self) -> None:
        self.seconds = {name: 0.0 for name in ("dispatch", "train", "guard", "aggregate", "spectra", "run folder")}
        self.inner = [0.0]

    def watch(self, built) -> None:
        """Put a clock around each part of the round loop."""
        from anyrank.federation import figures, guard
        from anyrank.runs import folder

        self._wrap(type(built.method), "dispatch", "dispatch")  # a download is made when it is sent, inside of training
        self._wrap(guard, "admit", "guard")
        self._wrap(type(built.method), "aggregate", "aggregate")
        for name in ("spectra", "energy_beyond", "effective_rank"):
            self._wrap(figures, name, "spectra")
        self._wrap(folder.RunDir, "commit", "run folder")
        train = type(built.engine).train

        def timed(engine, jobs, plan, mechanism=None):
            replies = iter(train(engine, jobs, plan, mechanism))
            following = self._timed(lambda: next(replies, None), "train")
            while (reply := following()) is not None:
                yield reply

        type(built.engine).train = timed

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, function: Callable, part: str) -> Callable:
        def call(*arguments, **keywords):
            self.inner.append(0.0)
            began = time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                spent = time.process_time() - began
                self.seconds[part] += spent - self.inner.pop()
                self.inner[-1] += spent

        return call


def memory(field: str) -> float:
    """Resident memory (VmRSS) of this process or its peak (VmHWM), MB; Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
