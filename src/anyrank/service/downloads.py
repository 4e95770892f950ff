"""The files of a run that may be taken away: names from a fixed list, no link, no checkpoint, no key, no ledger.

Of each named site, `site-NAME.zip` has what it takes away: its adapter, the update of its base model, its labels and scores.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from anyrank.runs.names import ADAPTER, BASE_UPDATE, CLIENTS, LABELS, METRICS, SCORES, SITES, SUMMARY
from anyrank.service.reading import opened

_REPORT = "report.html"
_FILES = {_REPORT: "report", SUMMARY: "final figures", METRICS: "figures by round", CLIENTS: "rows by client and round"}
_FOLDERS = re.compile(r"adapter|adapter-best|base-update|adapter-rank-[0-9]{1,6}", re.ASCII)
_IN_FOLDER = ("adapter_config.json", "adapter_model.safetensors", "labels.json", "README.md")
_OF_SITE = ((LABELS,), (SCORES,), *((folder, name) for folder in (ADAPTER, BASE_UPDATE) for name in _IN_FOLDER))
_MOST_ENTRIES, _MOST_FOLDERS, _MOST_SITES = 1000, 200, 500
_SITE = "site-"
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


def of_sites(folder: Path) -> list[Item]:
    """What may be taken of each named site, one archive each, by name; at most of the first `_MOST_SITES` sites."""
    try:
        if os.path.islink(folder / SITES):
            return []
        with os.scandir(folder / SITES) as entries:
            inside = [entry.name for entry in itertools.islice(entries, _MOST_SITES) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    sizes = {name: sum(_sizes(f"{folder}/{SITES}/{name}")) for name in sorted(inside)}
    return [Item(f"{_SITE}{name}{_SUFFIX}", name, size) for name, size in sizes.items() if size]


def _sizes(site: str) -> Iterator[int]:
    """The bytes of each file of a site; no link is followed."""
    yield from (_size(f"{site}/{name}") for name in (LABELS, SCORES))
    for folder in (ADAPTER, BASE_UPDATE):
        if os.path.isdir(f"{site}/{folder}") and not os.path.islink(f"{site}/{folder}"):
            yield from (_size(f"{site}/{folder}/{name}") for name in _IN_FOLDER)


def _what(folder: str) -> str:
    rank = folder.removeprefix("adapter-rank-")
    if rank != folder:
        return f"adapter for clients of rank {rank}"
    return {"adapter": "global adapter", "adapter-best": "adapter of the best round"}.get(folder, "update of the base model")


def _size(path: str | Path) -> int:
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
    if inner != name and _FOLDERS.fullmatch(inner):
        return _archived(folder, (), {(inner, each): f"{inner}/{each}" for each in _IN_FOLDER})
    site = inner.removeprefix(_SITE)
    if site in (inner, name) or inner == name:
        raise FileNotFoundError(f"{name}: not a file that may be taken away")
    return _archived(folder, (SITES, site), {parts: "/".join((site, *parts)) for parts in _OF_SITE})


def _archived(folder: Path, below: tuple[str, ...], wanted: Mapping[tuple[str, ...], str]) -> Download:
    """An archive of those files of `wanted` that are there, with the names that it gives them."""
    return Download(_begun(_archive(_open_all(folder, below, wanted))), None)


def _open_all(folder: Path, below: tuple[str, ...], wanted: Mapping[tuple[str, ...], str]) -> dict[str, int]:
    """Descriptors of these files, all from the same moment, by their names. Raises `OSError` where there is none."""
    files: dict[str, int] = {}
    try:
        for parts, name in wanted.items():
            try:
                files[name] = opened(folder, *below, *parts)
            except FileNotFoundError:
                continue
    except (OSError, ValueError):
        for file in files.values():
            os.close(file)
        raise
    if not files:
        raise FileNotFoundError("no such adapter")
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


def _archive(files: dict[str, int]) -> Iterator[bytes]:
    """A ZIP archive of these files, without compression: weights do not get smaller."""
    pipe, waiting = _Pipe(), dict(files)
    try:
        yield b""
        with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
            for name in files:
                length = os.fstat(waiting[name]).st_size
                with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
                    for piece in _pieces(waiting.pop(name), length):
                        entry.write(piece)
                        yield pipe.taken()
        yield pipe.taken()
    finally:
        for file in waiting.values():
            os.close(file)
