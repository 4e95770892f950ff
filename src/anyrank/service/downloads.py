"""The files of a run that may be taken away: names from a fixed list, no link, no checkpoint, no key, no ledger."""

from __future__ import annotations

import itertools
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from anyrank.runs.names import CLIENTS, METRICS, SUMMARY
from anyrank.service.reading import opened

_REPORT = "report.html"
_FILES = {_REPORT: "report", SUMMARY: "final figures", METRICS: "figures by round", CLIENTS: "rows by client and round"}
_FOLDERS = re.compile(r"adapter|adapter-best|base-update|adapter-rank-[0-9]{1,6}", re.ASCII)
_IN_FOLDER = ("adapter_config.json", "adapter_model.safetensors", "labels.json", "README.md")
_MOST_ENTRIES, _MOST_FOLDERS = 1000, 200
_PIECE = 1 << 18
_SUFFIX = ".zip"


class Item(NamedTuple):
    """Something to take away: its `name` in addresses, what it is, and its bytes."""

    name: str
    what: str
    bytes: int


def listed(folder: Path) -> list[Item]:
    """What may be taken from the run folder now: adapters as archives, then single files."""
    items, folders = [], 0
    try:
        with os.scandir(folder) as entries:
            inside = list(itertools.islice(entries, _MOST_ENTRIES))
    except OSError:
        return []
    for entry in sorted(inside, key=lambda entry: (len(entry.name), entry.name)):
        if _FOLDERS.fullmatch(entry.name) and folders < _MOST_FOLDERS and entry.is_dir(follow_symlinks=False):
            folders += 1
            size = sum(_size(Path(entry.path) / name) for name in _IN_FOLDER)
            items += [Item(entry.name + _SUFFIX, _what(entry.name), size)] if size else []
    return items + [Item(name, what, size) for name, what in _FILES.items() if (size := _size(folder / name))]


def _what(folder: str) -> str:
    rank = folder.removeprefix("adapter-rank-")
    if rank != folder:
        return f"adapter for clients of rank {rank}"
    return {"adapter": "global adapter", "adapter-best": "adapter of the best round"}.get(folder, "update of the base model")


def _size(path: Path) -> int:
    try:
        found = os.lstat(path)
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


class Download(NamedTuple):
    """Bytes to send, in pieces, and how many (`None`: not known before)."""

    pieces: Iterator[bytes]
    length: int | None


def take(folder: Path, name: str) -> Download:
    """The file or archive `name` of the run in `folder`. Raises `OSError` for anything that is not among `listed`."""
    if name in _FILES:
        file = opened(folder, name)
        length = os.fstat(file).st_size
        return Download(_begun(_pieces(file, length)), length)
    inner = name.removesuffix(_SUFFIX)
    if inner == name or not _FOLDERS.fullmatch(inner):
        raise FileNotFoundError(f"{name}: not a file that may be taken away")
    files = _open_all(folder, inner)
    return Download(_begun(_archive(inner, files)), None)


def _open_all(folder: Path, inner: str) -> dict[str, int]:
    """Descriptors of the files of an adapter folder, all from the same moment. Raises `OSError` where there is none."""
    files: dict[str, int] = {}
    try:
        for name in _IN_FOLDER:
            try:
                files[name] = opened(folder, inner, name)
            except FileNotFoundError:
                continue
    except OSError:
        for file in files.values():
            os.close(file)
        raise
    if not files:
        raise FileNotFoundError(f"{inner}: no such adapter")
    return files


def _begun(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The generator, past its first piece, which is empty: one that has not begun would leave its files open when dropped."""
    next(pieces)
    return pieces


def _pieces(file: int, length: int) -> Iterator[bytes]:
    """The first `length` bytes: a log may grow meanwhile."""
    with os.fdopen(file, "rb") as opened_file:
        yield b""
        while length > 0 and (piece := opened_file.read(min(_PIECE, length))):
            length -= len(piece)
            yield piece


class _Pipe:
    """Where `zipfile` writes to: what was written is taken out piece by piece, so that no archive is held whole."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def taken(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def _archive(inner: str, files: dict[str, int]) -> Iterator[bytes]:
    """A ZIP archive of these files in a folder `inner`, without compression: weights do not get smaller."""
    pipe, waiting = _Pipe(), dict(files)
    try:
        yield b""
        with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
            for name in files:
                length = os.fstat(waiting[name]).st_size
                with archive.open(zipfile.ZipInfo(f"{inner}/{name}"), "w", force_zip64=True) as entry:
                    for piece in _pieces(waiting.pop(name), length):
                        entry.write(piece)
                        yield pipe.taken()
        yield pipe.taken()
    finally:
        for file in waiting.values():
            os.close(file)
