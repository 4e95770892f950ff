"""Delete what commands wrote, file by file by its name, and only in a folder that a marker of ours names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from anyrank import files
from anyrank.errors import AnyRankError, RunError, RunFailed
from anyrank.runs import lock
from anyrank.runs.lock import LOCK
from anyrank.runs.names import (
    ADAPTER,
    BASE_UPDATE,
    BEFORE,
    CHECKPOINT,
    CLIENTS,
    COMPARISON,
    CONFIG,
    IDENTITY,
    LABELS,
    LEDGER,
    METRICS,
    PRIVACY,
    SCORES,
    SEAL,
    SITES,
    STATE,
    STATUS,
    SUMMARY,
    read_object,
)

# What a comparison leaves, by depth below its folder: METHOD/SEED are runs, in which adapters have folders of their own.
_COMPARED = {COMPARISON, LOCK, "report.html", "figure.png", "demo.toml"}
_IN_RUN = {CONFIG, METRICS, CLIENTS, SUMMARY, PRIVACY, LEDGER, IDENTITY, SEAL, STATUS, LOCK, "report.html", "labels.json"}
_IN_ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "labels.json", "README.md"}
_OF_SITE = {ADAPTER, BASE_UPDATE}  # folders of adapters in that of a site
_FOLDER = re.compile(rf"{CHECKPOINT}|adapter(-[\w-]+)?|base-update")
_START = {CONFIG, IDENTITY, PRIVACY, LOCK}  # what a run writes before its first round

Parts = tuple[str, ...]


def remove_run(path: Path) -> None:
    """Delete a folder of runs, as a comparison or the demo leaves it wherever it is stopped, or an empty folder.

    The folder's own list says which folders in it are runs. Files go by their names, and no link is followed. Raises
    `RunError`, before anything is deleted, if anything else lies in it, or if another process writes in it.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise RunError(f"{path}: expected a folder of runs, or no such folder, got a file; choose another --out")
    _check_all_ours(path)
    with lock.holding(path, "these runs"):
        for run in sorted(_runs(path)):
            if (path.joinpath(*run)).is_dir():
                lock.take(path.joinpath(*run)).release()
        found = _check_all_ours(path)
        last = [entry for entry in found if entry.parent == path and entry.name in (COMPARISON, LOCK)]
        with files.naming(path):
            for entry in [*(entry for entry in found if entry not in last), path / COMPARISON]:
                _remove(entry)
    with files.naming(path):  # Windows deletes no file that is open
        _remove(path / LOCK)
        path.rmdir()


@contextmanager
def unless_begun(folder: Path) -> Iterator[None]:
    """A run that writes `folder`, if there is none yet. Where an error ends it before round 1 that is no `RunFailed`, the
    request has to be corrected, there is nothing to resume, and what was written is removed."""
    new = not folder.exists()
    try:
        yield
    except RunFailed:
        raise
    except AnyRankError:
        if new:
            remove_start(folder)
        raise


def remove_start(path: Path) -> None:
    """Delete the folder of a run in which no client was asked yet, unless another process writes it, or anything else lies in
    it."""
    if not path.is_dir():
        return
    try:
        with lock.holding(path, "this run"):
            if {entry.name for entry in files.contents(path)} - _START:
                return
            for name in _START - {LOCK}:
                (path / name).unlink(missing_ok=True)
        (path / LOCK).unlink(missing_ok=True)
        path.rmdir()
    except (RunError, RunFailed, OSError):  # it stays: the command that calls this reports what was wrong with its request
        return


def _check_all_ours(path: Path) -> list[Path]:
    """All that lies below a comparison's folder, what is in a folder before it. Raises `RunError` for what is not ours."""
    found, runs = sorted(path.rglob("*"), reverse=True), _runs(path)
    strangers = [entry for entry in found if not _is_ours(entry, entry.relative_to(path).parts, runs)]
    if strangers:
        first = min(strangers, key=lambda entry: (entry.is_dir(), len(entry.parts), entry))  # a file says most
        raise RunError(
            f"{path}: expected a folder with nothing but runs, got {first.relative_to(path)} in it, which is not deleted; "
            "choose another --out"
        )
    return found


def _runs(path: Path) -> set[Parts]:
    """The runs that a comparison's folder names, each by the parts of its path below that."""
    if not (path / COMPARISON).is_file():
        return set()
    listed = read_object(path / COMPARISON).get("runs")
    return {PurePosixPath(run).parts for run in listed if isinstance(run, str)} if isinstance(listed, list) else set()


def _is_ours(entry: Path, parts: Parts, runs: set[Parts]) -> bool:
    """Whether a comparison of these `runs` made what lies at `parts` below its folder."""
    *above, name = parts
    if entry.is_symlink():
        return False
    if entry.is_dir():
        of_site = len(parts) <= 4 or (len(parts) == 5 and name in _OF_SITE)  # sites, sites/NAME, and sites/NAME/adapter
        of_sites = parts[2:3] == (SITES,) and of_site
        inside = parts[:2] in runs and (of_sites or (len(parts) == 3 and bool(_FOLDER.fullmatch(name))))
        return inside or (bool(parts) and any(run[: len(parts)] == parts for run in runs))
    if len(above) <= 1:
        marked = bool(runs) or name == LOCK or name.startswith(f".{COMPARISON}.")
        return not above and marked and (name in _COMPARED or files.is_temporary(entry))
    of_sites = above[2:3] == [SITES]
    in_folder = set() if of_sites else {STATE, BEFORE} if CHECKPOINT in above else _IN_ADAPTER
    known = {2: _IN_RUN, 3: in_folder}
    if of_sites:
        known |= {4: {SCORES, LABELS}, 5: _IN_ADAPTER if above[4:] and above[4] in _OF_SITE else set()}
    return tuple(above[:2]) in runs and (files.is_temporary(entry) or name in known.get(len(above), ()))


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        entry.rmdir()
    else:
        entry.unlink(missing_ok=True)
