"""This process's ends of the pipes of a child. No torch here.

A pipe ends when all processes that hold its other end have closed it. A child of the child may hold it for ever; so a read or
write here also ends when the child itself is dead and nothing more comes.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any

_GLANCE_MS = 200  # between two looks at the child while nothing comes


class Pipe:
    """A binary stream over one end of a pipe. `alive` is asked at times while the stream waits: whether the child lives.

    Where the system has no `poll` (Windows), the stream waits for the pipe alone.
    """

    def __init__(self, file: Any, alive: Callable[[], bool]) -> None:
        self._file, self._alive, self._poller = file, alive, None
        self.ended = False
        if hasattr(select, "poll"):
            os.set_blocking(file.fileno(), False)
            self._poller = select.poll()
            self._poller.register(file.fileno(), select.POLLOUT if file.writable() else select.POLLIN)

    def readinto(self, buffer: memoryview) -> int:
        """The number of bytes that were read, 0 at the end."""
        while (count := self._file.readinto(buffer)) is None:
            if not self._wait():
                count = 0
                break
        self.ended = not count
        return count

    def write(self, data: memoryview) -> int:
        """The number of bytes that were written, at least 1. `BrokenPipeError` at the end."""
        try:
            while (count := self._file.write(data)) is None:
                if not self._wait():
                    raise BrokenPipeError("the process that reads has ended")
        except BrokenPipeError:
            self.ended = True
            raise
        return count

    def is_silent(self) -> bool:
        """Whether there is nothing to read, not even the end."""
        return self._poller is None or not self._poller.poll(0)

    def _wait(self) -> bool:
        """Wait until the pipe is ready. False if the child has died and nothing more comes."""
        lives = True
        while not self._poller.poll(_GLANCE_MS):
            if not lives:
                return False
            lives = self._alive()
        return True
