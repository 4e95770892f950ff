"""Find runs below folders, again and again, in a bounded time: no link is followed, and a run has no runs inside.

Folders that are less deep come first, so that a large tree in one place does not hide runs in another. A run of a federation's
server lies deep below the folder that people know, in `kits/server/state/runs/NAME/run`, and is called NAME.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from anyrank.errors import RunError
from anyrank.runs.names import CLIENTS, COMPARISON, CONFIG, METRICS, RESULT, SUMMARY
from anyrank.service.reading import read_object
from anyrank.service.tally import text

MOST_RUNS = 500
_MOST_FOLDERS, _MOST_ENTRIES, _DEEPEST = 5000, 5000, 9
_MARKS = {CONFIG, METRICS, CLIENTS, SUMMARY}  # any of which makes a folder one of a run
_LONGEST = 120  # characters of a name that is shown
_OF_SERVER = ("state", "runs")  # folders of a server's kit, below which NAME/run is a run


class Place(NamedTuple):
    """Where a run is: its folder, its name on the page, the key in addresses, the command that continues it, and why it is not
    looked into (empty: it is). `by_jobs`: whether it is one of a federation's server, which runs it in jobs."""

    folder: Path
    name: str
    key: str
    resume: str
    problem: str = ""
    by_jobs: bool = False


def roots(named: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Each folder as it was named, and where it really is. Raises `RunError` for one that is not there, or is no folder."""
    found = []
    for path in named:
        try:
            real = path.resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise RunError(f"{path}: no such folder; name run folders, or folders with runs in them") from None
        if not real.is_dir():
            raise RunError(f"{path}: expected a run folder, or a folder with runs in it, got a file; name the folder")
        found.append((path, real))
    return found


def find(named: Sequence[tuple[Path, Path]]) -> tuple[list[Place], list[str]]:
    """The runs in these folders, each once, at most `MOST_RUNS`; and notes on what is not among them."""
    places: dict[Path, Place] = {}
    notes: list[str] = []
    left = _MOST_FOLDERS
    for typed, real in named:
        search = _Search(typed, real, len(named) == 1, left, notes)
        for place in _runs(search):
            if len(places) >= MOST_RUNS:
                return list(places.values()), [*notes, f"Only the first {MOST_RUNS} runs are shown; name fewer folders."]
            places.setdefault(place.folder, place)
        left = search.left
    if left < 0:
        notes.append(f"Only {_MOST_FOLDERS:,} folders were looked through; name folders with fewer in them.")
    return list(places.values()), notes


@dataclass
class _Search:
    """A search below `real`, which was named `typed`; `alone`: no other folder was named. `left`: folders that may still be
    looked into."""

    typed: Path
    real: Path
    alone: bool
    left: int
    notes: list[str]


def _runs(search: _Search) -> Iterator[Place]:
    """The runs in the folder of the search and below it, level by level."""
    waiting = deque([(search.real, 0, False)])
    while waiting:
        search.left -= 1
        if search.left < 0:
            return
        folder, depth, of_comparison = waiting.popleft()
        try:
            with os.scandir(folder) as entries:
                inside = sorted(itertools.islice(entries, _MOST_ENTRIES), key=lambda each: each.name)
        except OSError as error:
            yield _place(search, folder, of_comparison, f"its folder cannot be read ({error.strerror})")
            continue
        names = {entry.name for entry in inside}
        if RESULT in names:  # what a site keeps of a run that is the server's
            continue
        if names & _MARKS:
            yield _place(search, folder, of_comparison)
            continue
        if COMPARISON in names:
            of_comparison = True
            search.notes += _not_begun(folder)
        for entry in inside:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                if entry.is_dir():
                    yield _place(search, Path(entry.path), of_comparison, "a link; name what it leads to")
            elif depth < _DEEPEST and len(waiting) <= search.left and entry.is_dir(follow_symlinks=False):
                waiting.append((Path(entry.path), depth + 1, of_comparison))


def _place(search: _Search, folder: Path, of_comparison: bool, problem: str = "") -> Place:
    inside = folder.relative_to(search.real)
    shown = inside.parts if search.alone and inside.parts else (search.real.name, *inside.parts)
    of_server = _of_server(folder)
    if of_server:
        shown = _short(shown, folder, search.alone)
    name, where = text(Path(*shown), _LONGEST), text(search.typed / inside, 1000)
    resume = f"anyrank run {where}/{CONFIG} --out {where} --resume"
    if of_comparison:
        resume = "the same anyrank compare command with --resume, or the same anyrank study command"
    elif of_server:
        resume = f"anyrank deploy resume {text(folder.parent.name, _LONGEST)} --keep-going --kit KIT (the owner's kit)"
    return Place(folder, name, key_of(folder, name), f"To go on: {resume}", problem, of_server)


def _of_server(folder: Path) -> bool:
    """Whether this is the folder of a run in the kit of a federation's server."""
    return folder.name == "run" and folder.parts[-4:-2] == _OF_SERVER


def _short(shown: tuple[str, ...], folder: Path, alone: bool) -> tuple[str, ...]:
    """The way to a run of a server without the folders that are the same for all, `kits/server/state/runs` and `run`."""
    tail = 6 if folder.parts[-6:-5] == ("kits",) else 5
    above = shown[:-tail] if len(shown) > tail else () if alone else folder.parts[:-tail][-1:]
    return (*above, folder.parent.name)


def key_of(folder: Path, name: str) -> str:
    """The key of a run in addresses: some letters of its name, and a digest of its path."""
    letters = re.sub(r"[^a-z0-9]+", "-", name.lower())[-40:].strip("-") or "run"
    return f"{letters}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:10]}"


def _not_begun(folder: Path) -> list[str]:
    """A note on the runs of a comparison that have no folder yet."""
    try:
        listed = read_object(folder, COMPARISON).get("runs")
    except (OSError, ValueError):
        return [f"{text(folder.name, _LONGEST)}: its {COMPARISON} cannot be read; runs that have not begun are not counted."]
    runs = [run for run in listed if isinstance(run, str)] if isinstance(listed, list) else []
    missing = [run for run in runs[:MOST_RUNS] if ".." not in run and "\0" not in run and not (folder / run / CONFIG).is_file()]
    return [f"{text(folder.name, _LONGEST)}: {len(missing)} of {len(runs)} runs have not begun."] if missing else []
