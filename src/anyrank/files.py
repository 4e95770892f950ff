"""Write files completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from anyrank import stopping


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to `path`, flush it to disk, then move it to `path` in one step.

    Windows cannot replace a file that is open or mapped, so a reader of a file that will be rewritten must copy it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with stopping.unfinished(temporary):
        try:
            write(temporary)
            with open(temporary, "r+b") as written:  # Windows flushes only what is open for writing
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_whole_text(path: Path, text: str) -> None:
    """Like `write_whole`, for a text; the bytes are the same on every system: UTF-8 with line feeds."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))
