"""A ledger on disk: lines that are only ever added, each with the digest of the line before it.

`ledger.jsonl` has the lines, and `ledger.json` their number and the digest of the last one. A line that was changed, removed or
cut, and an older copy of one of the two files, are found when the ledger is opened: it is then refused. Older copies of both
files together are not found here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anyrank.errors import RunError
from anyrank.files import append, cut, naming, parse_json, read_bounded, write_whole

LEDGER, HEAD = "ledger.jsonl", "ledger.json"
_MOST_BYTES = 1 << 27
_FIRST = "0" * 64  # what stands for the digest of the line before the first one
_OWNER = 0o600


class Chain:
    """The ledger in `folder`. Whoever opens it holds the folder's lock.

    `is_entry` says whether a line's object is an entry of this ledger; `note` gets each entry, those that are there already and
    those that are added; `remedy` says what to do about a damaged ledger. `reading`: nothing is written when it is opened.
    `private`: only the files' owner may read them. Raises `RunError` for a ledger that is not as it was written.
    """

    def __init__(
        self,
        folder: Path,
        is_entry: Callable[[Mapping[str, Any]], bool],
        note: Callable[[Mapping[str, Any]], None],
        remedy: str,
        reading: bool = False,
        private: bool = False,
    ) -> None:
        self.folder, self._is_entry, self._note, self._remedy = folder, is_entry, note, remedy
        self._private = private
        self.count, self._last, self._head = 0, _FIRST, 0
        self._open(reading)

    def add(self, entries: Mapping[str, Any]) -> int:
        """Add a line with these entries, and return its number: it is on disk when this returns."""
        if self._head < self.count:  # a failed write: a second one would look like damage
            self._write_head()
        row = {"number": self.count + 1, "before": self._last, **entries}
        line = json.dumps(row, sort_keys=True)
        self._make_private()
        append(self.folder / LEDGER, line.encode() + b"\n")
        self._take(row, line)
        self._write_head()
        return self.count

    def damaged(self, what: str) -> RunError:
        """The error for a ledger of which `what` is wrong."""
        return RunError(f"{self.folder / LEDGER}: {what}, so that what was spent is not known; {self._remedy}")

    def _open(self, reading: bool) -> None:
        lines, torn = self._lines()
        head = self._read_head()
        self._head = head["charges"]
        digests = [_FIRST]
        for number, line in enumerate(lines, 1):
            row = self._row(line)
            if row is None or row["number"] != number or row["before"] != digests[-1]:
                raise self.damaged(f"line {number} is not the one that was written")
            digests.append(_digest(line))
            self._take(row, line)
        if not 0 <= head["charges"] <= len(lines) or len(lines) - head["charges"] > 1:
            raise self.damaged(f"it has {len(lines)} charges, {HEAD} says {head['charges']}")
        if digests[head["charges"]] != head["last"]:
            raise self.damaged(f"charge {head['charges']} is not the one that {HEAD} names")
        if reading:
            return
        if torn is not None:
            cut(self.folder / LEDGER, torn)
        if head["charges"] < len(lines):  # the process was ended between the two writes
            self._write_head()

    def _lines(self) -> tuple[list[str], int | None]:
        """The whole lines, and the length of the file without a last line that was not finished (`None`: all were)."""
        data = self._bytes(LEDGER)
        if data is None:
            return [], None
        whole = data.rfind(b"\n") + 1
        try:
            lines = data[:whole].decode().split("\n")[:-1]
        except UnicodeDecodeError:
            raise self.damaged("it is no text") from None
        return lines, whole if whole < len(data) else None

    def _row(self, line: str) -> Mapping[str, Any] | None:
        """The entry of a line; `None` for what is none."""
        try:
            row = parse_json(line)
        except ValueError:
            return None
        right = isinstance(row, dict) and type(row.get("number")) is int and isinstance(row.get("before"), str)
        return row if right and self._is_entry(row) else None

    def _read_head(self) -> Mapping[str, Any]:
        data = self._bytes(HEAD)
        if data is None:
            return {"charges": 0, "last": _FIRST}
        try:
            table = parse_json(data)
        except ValueError:
            table = None
        if not isinstance(table, dict) or type(table.get("charges")) is not int or not isinstance(table.get("last"), str):
            raise self.damaged(f"{HEAD} cannot be read")
        return table

    def _bytes(self, name: str) -> bytes | None:
        try:
            return read_bounded(self.folder / name, _MOST_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.damaged(f"{name} cannot be read ({error.strerror or error})") from None

    def _take(self, row: Mapping[str, Any], line: str) -> None:
        self._note(row)
        self.count, self._last = row["number"], _digest(line)

    def _write_head(self) -> None:
        text = json.dumps({"charges": self.count, "last": self._last}) + "\n"
        write_whole(self.folder / HEAD, lambda path: write_text(path, text, self._private))
        self._head = self.count

    def _make_private(self) -> None:
        """Make an empty file for its owner, if there is none yet."""
        if self._private and not os.path.lexists(self.folder / LEDGER):
            with naming(self.folder / LEDGER):
                os.close(os.open(self.folder / LEDGER, os.O_WRONLY | os.O_CREAT, _OWNER))


def write_text(path: Path, text: str, private: bool) -> None:
    """Write a new file, in UTF-8 with line feeds; `private`: only its owner may read it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _OWNER if private else 0o666)
    with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()
