"""How the replies of workers are received: within the limit that follows from their downloads, large ones into a file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from anyrank.messages.frame import Frame, Readable, read
from anyrank.messages.records import Download
from anyrank.messages.spool import Spool, Spooled, receive
from anyrank.messages.spooled import reply_limit


class Inbox:
    """Receives the replies of one worker, or of several that are asked for the same. Several threads may use it.

    `folder`: where large replies are kept; without one, they are held in memory. Each opening has a file of its own, which is
    gone with the last update that lies in it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self._apart = folder, False
        self._lock = threading.Lock()
        self._close()

    @contextmanager
    def open(self, apart: bool = False) -> Iterator[None]:
        """While replies are received that may be large. `apart`: each has a file of its own."""
        self._opened, self._apart = True, apart
        try:
            yield
        finally:
            self._close()

    def expect(self, download: Download, in_memory: bool = False) -> None:
        """A reply to this download may come. `in_memory`: its updates are to be held longer than a round."""
        self._most = max(self._most, reply_limit(download))
        self._in_memory = self._in_memory or in_memory

    def __call__(self, stream: Readable, limit: int) -> Frame | Spooled:
        """Receive one frame of at most `limit` bytes, and no more than the replies that are expected may have."""
        limit = min(limit, self._most or limit)
        if not self._opened or self.folder is None or self._in_memory:
            return read(stream, limit)
        return receive(stream, limit, partial(Spool, self.folder) if self._apart else self._spool_of_round)

    def _spool_of_round(self) -> Spool:
        with self._lock:
            if self._spool is None:
                self._spool = Spool(self.folder)
            return self._spool

    def _close(self) -> None:
        self._opened, self._apart, self._in_memory, self._most = False, False, False, 0
        self._spool: Spool | None = None
