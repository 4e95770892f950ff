"""The run folder: what a run writes, how it is read back, and how a killed run goes on.

Logs are appended first, the checkpoint follows, each in one step that happens or does not. On resume the checkpoint
rules: it has the lengths and digests of the logs as they were, and what was added after is dropped, since those rounds are
run again. There are two checkpoints, of the last two rounds: where the last one is damaged, or the logs are shorter than it
has them, the one before is gone on from.

No torch here but for the checkpoint itself, which is loaded where a run goes on: whether a folder may be used, and which
runs lie in it, is answered without.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from anyrank import files
from anyrank.config.sections import Config
from anyrank.config.tables import to_table
from anyrank.errors import RunError
from anyrank.runs import identity, lock, logs, seal
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
    SEAL,
    STATE,
    SUMMARY,
    read_lines,
    read_object,
)

if TYPE_CHECKING:
    from anyrank.adapter.adapter import Adapter
    from anyrank.messages.records import ServerState


class RunDir:
    """One run's folder, locked while it is open, so that two processes never write one run."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self._logs: dict[str, Log] = {}
        self._ledger: Mark | None = None  # as the checkpoint has it that the run went on from
        self._lock = lock.take(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: Config, resume: bool = False) -> RunDir:
        """A new run folder, or (with `resume`) one to go on with; made if there is none yet. Raises what `check` raises."""
        path = Path(path)
        cls.check(path, config, resume)
        files.make_folder(path)
        run = cls(path, config)
        try:
            run._sweep()
            run._begin()
        except BaseException:
            run.close()
            raise
        return run

    def _begin(self) -> None:
        """Write down what the run is of, and take back that it is finished where it is to have more rounds."""
        if (self.path / CONFIG).exists() and stored_config(self.path).run.rounds != self.config.run.rounds:
            files.remove(self.path / SUMMARY)
            files.remove(self.path / SEAL)
        if not os.path.lexists(self.path / IDENTITY):
            found = json.dumps(identity.of(self.config), indent=2) + "\n"
            files.write_whole_text(self.path / IDENTITY, found)
        files.write_whole_text(self.path / CONFIG, tomli_w.dumps(to_table(self.config)))

    @staticmethod
    def check(path: Path, config: Config, resume: bool = False) -> None:
        """Raise `RunError` where the folder is of something else, holds a run although `resume` is not asked for, or holds
        one of another configuration, or of files that have changed since. More rounds than before may be asked for. Writes
        nothing."""
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: expected a folder for the run, got a file; choose another --out")
        begun = os.path.lexists(path / CONFIG)
        if not begun and any(not _is_start(entry) for entry in files.contents(path)):
            raise RunError(f"{path}: expected an empty or new folder, or one with a run in it; choose another --out")
        if begun:
            if not resume:
                raise RunError(f"{path}: contains a run already; continue it with --resume, or choose another --out")
            check_config(path, config)
            identity.check(path, config)

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self) -> ServerState | None:
        """The state after the last whole round, with the logs cut back to it; `None` where no round was finished.

        Where the last checkpoint is damaged, or the logs are not what it has them to be, that is told on stderr in a line,
        and the one before is taken. Raises `RunError` where that cannot be, either.
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
        if state and name == BEFORE:
            files.move(self.path / CHECKPOINT / BEFORE, self.path / CHECKPOINT / STATE)
            for reason in reasons:  # none where a kill came between the steps that put a new one in place
                told = f"{reason.split('; ')[0]}; going on from the checkpoint before, of round {state.round}"
                sys.stderr.write(f"anyrank: {told}\n")
        for name in (METRICS, CLIENTS):
            logs.cut_to(self.path / name, marks[name])
        self._logs, self._ledger = {}, marks.get(LEDGER)
        return state

    def _stored(self, path: Path) -> tuple[ServerState, dict[str, Mark]]:
        """The state in a checkpoint, and the marks of the logs, which fit them. Raises `_Unusable` where one is damaged."""
        from anyrank.runs import checkpoint

        try:
            stored = checkpoint.load(path)
            marks = dict(stored.marks or {})
            for name in (METRICS, CLIENTS):
                marks[name] = marks.get(name) or logs.mark_of_rounds(self.path / name, stored.state.round)
                logs.check(self.path / name, marks[name])
        except checkpoint.OtherVersion:
            raise
        except RunError as error:
            raise _Unusable(str(error)) from None
        return stored.state, marks

    def commit(self, state: ServerState, metrics: Mapping[str, Any], clients: Iterable[Mapping[str, Any]]) -> None:
        """Log the round that led to `state`, then make `state` the checkpoint."""
        from anyrank.runs import checkpoint

        self._append(CLIENTS, clients)
        self._append(METRICS, [metrics])
        marks = {name: self._log(name).mark() for name in (METRICS, CLIENTS, LEDGER) if (self.path / name).exists()}
        folder = self.path / CHECKPOINT
        files.make_folder(folder)
        checkpoint.save_state(state, folder / STATE, marks, folder / BEFORE)

    def finish(self, adapters: Mapping[str, Adapter], summary: Mapping[str, Any]) -> None:
        """Write the adapters by folder name, then the summary, whose presence says that the run is done, and last of all the
        digests of what it left."""
        for name, adapter in adapters.items():
            adapter.save(self.path / name)
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

        Only a last line that a kill cut off goes: whom it would have charged had not begun to train.
        """
        path = self.path / LEDGER
        rows = read_lines(path)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            files.cut(path, path.read_bytes().rfind(b"\n") + 1)
        return rows

    def check_charges(self) -> None:
        """Raise `RunError` where the ledger does not begin as it was at the checkpoint that the run goes on from."""
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

    def _sweep(self) -> None:
        """Remove temporary files that a killed process left behind, in the folder and in those of its adapters."""
        for leftover in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
            if files.is_temporary(leftover) and not leftover.is_dir():
                files.remove(leftover)


class _Unusable(Exception):
    """A checkpoint that cannot be gone on from; its text says why."""


def _is_start(entry: Path) -> bool:
    """Whether a killed process may have left it before there was a run: a lock, a temporary file, or what a run depends on."""
    return entry.name.startswith(".") or entry.name == IDENTITY
