"""A site's log: what was asked, what was refused and why, and what left the site. It stays at the site."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from anyrank.errors import printable, shortened
from anyrank.files import append, move

LOG, BEFORE = "site.log", "site.log.1"
_MOST_BYTES = 8 << 20  # of each of the two files
_LONGEST = 500  # characters of a value, some of which a server has chosen


class SiteLog:
    """The log in `folder`: a JSON object a line, with the time in UTC. When the file is full, it takes the place of the one
    before, so that both together are bounded."""

    def __init__(self, folder: Path, most_bytes: int = _MOST_BYTES) -> None:
        self.path, self._before, self._most_bytes = folder / LOG, folder / BEFORE, most_bytes

    def write(self, what: str, **values: Any) -> None:
        """One line, on disk when this returns. Raises `RunFailed` where it cannot be written: nothing leaves without a line."""
        row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "what": what}
        row |= {key: _bounded(value) for key, value in values.items()}
        if self.path.exists() and self.path.stat().st_size > self._most_bytes:
            move(self.path, self._before)
        append(self.path, json.dumps(row).encode() + b"\n")


def _bounded(value: Any) -> Any:
    return shortened(printable(value), _LONGEST) if isinstance(value, str) else value
