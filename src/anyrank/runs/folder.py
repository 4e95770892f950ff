"""The run folder: what a run writes, how it is read back, and how a killed run continues.

Logs are appended first, the checkpoint follows, each in one step that happens or does not. On resume the checkpoint decides: it
has the lengths and digests of the logs, and what was added after it is removed, because those rounds are run again. There are
two checkpoints, of the last two rounds. If the last one is damaged, or the logs are shorter than it has them, the run continues
from the one before it.

Torch is loaded only with a checkpoint, when a run continues. Whether a folder may be used is answered without it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from anyrank import files
from anyrank.config.sections import Config
from anyrank.config.tables import to_table
from anyrank.errors import RunError
from anyrank.runs import identity, lock, logs, seal, sites
from anyrank.runs.logs import Log, Mark
from anyrank.runs.matching import check_config, check_same, stored_config
from anyrank.runs.names import (
    BEFORE,
    CHECKPOINT,
    CLIENTS,
    CONFIG,
    IDENTITY,
    LEDGER,
    METRICS,
    PRIVACY,
    RESULT,
    SEAL,
    STATE,
    SUMMARY,
    read_lines,
    read_object,
)

if TYPE_CHECKING:
    from anyrank.adapter.adapter import Adapter
    from anyrank.messages.records import ServerState
    from anyrank.runs.checkpoint import Stored


class RunDir:
    """One run's folder, locked while it is open, so that two processes never write one run."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self._logs: dict[str, Log] = {}
        self._ledger: Mark | None = None  # as the checkpoint has it that the run went on from
        self._mark = ""
        self._origin: Callable[[], str] = str
        self._lock = lock.take(path)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: Config,
        resume: bool = False,
        agreed: Mapping[str, str] | None = None,
        held: Mapping[str, str] | None = None,
    ) -> RunDir:
        """A new run folder, or (with `resume`) one that continues; made if there is none yet. Raises what `check` raises.

        `agreed`: digests of what the sites of a federation have in common, which is noted, and must be the same later; `held`:
        digests of what a private run holds in memory, of which the same is true."""
        path = Path(path)
        cls.check(path, config, resume)
        identity.check_agreed(path, agreed)
        identity.check_held(path, config, held)
        files.make_folder(path)
        run = cls(path, config)
        try:
            for folder in (path, *(entry for entry in files.contents(path) if entry.is_dir())):
                files.sweep(folder)
            run._begin(agreed, held)
        except BaseException:
            run.close()
            raise
        return run

    def _begin(self, agreed: Mapping[str, str] | None, held: Mapping[str, str] | None) -> None:
        """Note what a new run begins with."""
        self._origin = partial(identity.origin, self.config, agreed, held)
        if not os.path.lexists(self.path / CONFIG):
            identity.note(self.path, self.config, agreed, held)
            files.write_whole_text(self.path / CONFIG, tomli_w.dumps(to_table(self.config)))
        self._mark = identity.mark(self.path)

    def _grow(self) -> None:
        """If the run is to have more rounds than before, remove what says that it is finished, then write that down."""
        if stored_config(self.path).run.rounds != self.config.run.rounds:
            files.remove(self.path / SUMMARY)
            files.remove(self.path / SEAL)
            files.write_whole_text(self.path / CONFIG, tomli_w.dumps(to_table(self.config)))

    @staticmethod
    def check(path: Path, config: Config, resume: bool = False) -> None:
        """Raise `RunError` if the folder holds something else, a run although `resume` is not given, or a run of another
        configuration or of files that have changed since. More rounds than before may be given. Writes nothing."""
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: expected a folder for the run, got a file; choose another --out")
        if os.path.lexists(path / RESULT):  # without rounds, it would pass for a run that was killed before round 1
            raise RunError(f"{path}: is what a site keeps of a federation that ended, and no run; choose another --out")
        begun = os.path.lexists(path / CONFIG)
        if not begun and any(not _is_start(entry) for entry in files.contents(path)):
            raise RunError(f"{path}: expected an empty or new folder, or one with a run in it; choose another --out")
        if begun:
            if not resume:
                raise RunError(f"{path}: contains a run already; continue it with --resume, or choose another --out")
            _check_links(path)
            check_config(path, config)
            _check_noted(path)
            identity.check(path, config)

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self) -> ServerState | None:
        """The state after the last whole round, with the logs cut back to it; `None` if no round was finished.

        If the last checkpoint is damaged or of another run, or the logs are not as it has them, one line on stderr says so,
        and the checkpoint before it is used. Raises `RunError` if that cannot be used either, or if both were removed.
        """
        state, marks, reasons = None, dict.fromkeys((METRICS, CLIENTS), Mark(0, "")), []
        for name in (STATE, BEFORE):
            if os.path.lexists(self.path / CHECKPOINT / name):
                try:
                    state, marks = self._stored(self.path / CHECKPOINT / name)
                    break
                except _Unusable as reason:
                    reasons.append(str(reason))
        if reasons and not state:
            raise RunError(reasons[0])
        if not state and any(row.get("round") != 1 for row in self.metrics()):  # round 1 is logged before its checkpoint
            missing = f"is missing, and {METRICS} has rounds that led to it"
            raise RunError(f"{self.path / CHECKPOINT / STATE}: {missing}; restore it, or start the run anew in another --out")
        if state and state.round > self.config.run.rounds:
            had = f"expected at most run.rounds = {self.config.run.rounds} rounds in it, got {state.round}"
            raise RunError(f"{self.path / CHECKPOINT / name}: {had}; set run.rounds to that, or choose another --out")
        if state and name == BEFORE:
            files.move(self.path / CHECKPOINT / BEFORE, self.path / CHECKPOINT / STATE)
            for reason in reasons:  # none if the process was killed between the two steps that put a new one in place
                used = f"{reason.split('; ')[0]}; going on from the checkpoint before, of round {state.round}"
                sys.stderr.write(f"anyrank: {used}\n")
        for name in (METRICS, CLIENTS):
            logs.cut_to(self.path / name, marks[name])
        self._logs, self._ledger = {}, marks.get(LEDGER)
        self._grow()
        return state

    def _stored(self, path: Path) -> tuple[ServerState, dict[str, Mark]]:
        """The state in a checkpoint, and the marks of the logs, which fit them. Raises `_Unusable` where one is damaged."""
        from anyrank.runs import checkpoint

        try:
            stored = checkpoint.load(path)
            self._check_of_this_run(path, stored)
            marks = dict(stored.marks or {})
            for name in (METRICS, CLIENTS):
                marks[name] = marks.get(name) or logs.mark_of_rounds(self.path / name, stored.state.round)
                logs.check(self.path / name, marks[name])
        except checkpoint.OtherVersion:
            raise
        except RunError as error:
            raise _Unusable(str(error)) from None
        return stored.state, marks

    def _check_of_this_run(self, path: Path, stored: Stored) -> None:
        """Raise `RunError` for a checkpoint of another run."""
        note = self.path / IDENTITY
        if stored.run and not self._mark:
            raise RunError(f"{note}: is missing; restore the file, or start the run anew in another --out")
        if stored.run is not None and stored.run != self._mark:
            raise RunError(f"{path}: is of another run than {note}; restore both, or start the run anew in another --out")

    def commit(self, state: ServerState, metrics: Mapping[str, Any], clients: Iterable[Mapping[str, Any]]) -> None:
        """Log the round that led to `state`, then make `state` the checkpoint."""
        from anyrank.runs import checkpoint

        self._append(CLIENTS, clients)
        self._append(METRICS, [metrics])
        marks = {name: self._log(name).mark() for name in (METRICS, CLIENTS, LEDGER) if (self.path / name).exists()}
        folder = self.path / CHECKPOINT
        files.make_folder(folder)
        checkpoint.save_state(state, folder / STATE, marks, folder / BEFORE, self._mark)

    def finish(self, adapters: Mapping[str, Adapter | str], summary: Mapping[str, Any]) -> None:
        """Write the adapters by folder name and what named sites take away, then the summary, whose presence says that the run
        is finished, and last the digests of these files."""
        sites.save(self.path, adapters)
        sites.write(self.path, summary)
        files.write_whole_text(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")
        seal.write(self.path)

    def metrics(self) -> list[dict[str, Any]]:
        """All rounds' metrics so far."""
        return read_lines(self.path / METRICS)

    @staticmethod
    def read_metrics(path: Path) -> list[dict[str, Any]]:
        """All rounds' metrics of the run in the folder `path`."""
        return read_lines(path / METRICS)

    def clients(self) -> list[dict[str, Any]]:
        """All clients' rows so far."""
        return read_lines(self.path / CLIENTS)

    @property
    def origin(self) -> str:
        """A digest of all that the run's releases are computed from, for its noise key. It is never written."""
        return self._origin()

    def keep_plan(self, plan: Mapping[str, Any], make_key: Callable[[], str]) -> str:
        """Store the run's privacy plan and the name of its noise key, or see that the plan is the one that is there.

        Returns the name of the key. Raises `RunError` for another plan.
        """
        path = self.path / PRIVACY
        if not os.path.lexists(path):
            if (self.path / LEDGER).exists():
                raise RunError(f"{path}: is missing, but {LEDGER} exists; start a new run with another --out")
            name = make_key()
            files.write_whole_text(path, json.dumps({"plan": plan, "key": name}, indent=2) + "\n")
            return name
        stored = read_object(path)
        if not isinstance(stored.get("plan"), dict) or not re.fullmatch(r"[0-9a-f]*", str(stored.get("key"))):
            raise RunError(f"{path}: damaged; restore the file, or start the run anew in another --out")
        check_same("privacy", path, stored["plan"], plan)
        return stored["key"]

    def charges(self) -> list[dict[str, Any]]:
        """All charges of the privacy ledger. They are never cut back: what was begun may have been released.

        Only a last line that a kill cut off is removed: the clients that it would have charged had not begun to train.
        """
        path = self.path / LEDGER
        rows = read_lines(path)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            files.cut(path, path.read_bytes().rfind(b"\n") + 1)
        return rows

    def check_charges(self) -> None:
        """Raise `RunError` if the ledger does not begin as it was at the checkpoint that the run continues from."""
        if self._ledger:
            logs.check(self.path / LEDGER, self._ledger)

    def charge(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add to the privacy ledger; on disk when this returns."""
        self._append(LEDGER, rows)

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        self._log(name).add(rows)

    def _log(self, name: str) -> Log:
        if name not in self._logs:
            self._logs[name] = Log(self.path / name)
        return self._logs[name]


def _check_links(path: Path) -> None:
    """Raise `RunError` for a link in the place of the checkpoint or of a log: what is written there would be another run's."""
    for name in (CHECKPOINT, METRICS, CLIENTS, LEDGER):
        if (path / name).is_symlink():
            raise RunError(f"{path / name}: expected a part of this run, got a link; put what it points to in its place")


class _Unusable(Exception):
    """A checkpoint that the run cannot continue from; its text says why."""


def _check_noted(path: Path) -> None:
    """Raise `RunError` if a run without a checkpoint has no note of what it began with. Where there is a checkpoint, that has
    the digest of the note, or is of a version that wrote none."""
    if not any(os.path.lexists(path / name) for name in (IDENTITY, f"{CHECKPOINT}/{STATE}", f"{CHECKPOINT}/{BEFORE}")):
        raise RunError(f"{path / IDENTITY}: is missing; restore the file, or start the run anew in another --out")


def _is_start(entry: Path) -> bool:
    """Whether a killed process may have left it before there was a run: a lock, a temporary file, or the note."""
    return entry.name.startswith(".") or entry.name == IDENTITY
