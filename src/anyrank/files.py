"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from anyrank import stopping


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then put it in place in one step.

    Windows puts no file in the place of one that is open or mapped: whoever reads a file that is written again copies it.
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
    """`write_whole` of a text, in the same bytes on every system: UTF-8, lines that end with a line feed alone."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))
