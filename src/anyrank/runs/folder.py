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
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from anyrank import files
from anyrank.config.sections import Config
from anyrank.config.tables import from_table, parse_toml, to_table
from anyrank.errors import AnyRankError, RunError, in_a_line
from anyrank.runs import identity, logs, seal, sites
from anyrank.runs.logs import Log, Mark
from anyrank.runs.names import (
    BEFORE,
    CHECKPOINT,
    CLIENTS,
    COMPARISON,
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

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns where it has no lock of the system: `RunDir` says what follows
    from filelock import FileLock, SoftFileLock, Timeout

if TYPE_CHECKING:
    from anyrank.adapter.adapter import Adapter
    from anyrank.messages.records import ServerState

_CONFIG_BYTES = 16 << 20  # of a run's configuration, which may name each of many clients
# What a comparison, or the demo, leaves beside the folders of its runs.
_COMPARED = (COMPARISON, "report.html", "figure.png", "demo.toml")


class RunDir:
    """One run's folder, locked while it is open, so that two processes never write one run.

    The lock is the system's (`fcntl`, `msvcrt`), which frees it when the process ends, however it ends. Where the system or
    the folder's file system has none, the lock is the file itself: it stays when the process is killed. It names its process,
    and newer versions of filelock take it over where that process is gone from this machine; else the error says to delete it.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self._logs: dict[str, Log] = {}
        self._ledger: Mark | None = None  # as the checkpoint has it that the run went on from
        self._lock = FileLock(path / ".lock", thread_local=False)
        of_the_system = not isinstance(self._lock, SoftFileLock)
        with files.naming(path / ".lock"):
            files.reached("lock", path / ".lock")
            free = self._take(0 if of_the_system else 0.5)
        if not free:
            left = "" if of_the_system else f"; if there is none, it was killed: delete {path / '.lock'}"
            raise RunError(f"{path}: another process is writing this run; wait for it, or choose another --out{left}")

    def _take(self, timeout_s: float) -> bool:
        """Take the lock, unless another process has it. What a killed process left is cleared by one attempt and taken by the
        next."""
        try:
            self._lock.acquire(timeout=timeout_s)
        except Timeout:  # an `OSError`, which says nothing of the disk
            return False
        return True

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
        if (self.path / CONFIG).exists() and _stored_config(self.path).run.rounds != self.config.run.rounds:
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
            _same_config(path, config)
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
        """Write the adapters by folder name and the scores of named sites, then the summary, whose presence says that the run
        is done, and last of all the digests of what it left."""
        for name, adapter in adapters.items():
            adapter.save(self.path / name)
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
        _same("privacy", path, stored["plan"], plan)
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


def is_finished(path: Path) -> bool:
    """Whether the run in the folder came to its end."""
    return (path / SUMMARY).is_file()


def find_runs(folder: Path) -> list[Path]:
    """The folder if it holds a run, else the runs below it: in a comparison's own order, or sorted, at most two levels down."""
    if (folder / CONFIG).is_file():
        return [folder]
    if (folder / COMPARISON).is_file():
        listed = read_object(folder / COMPARISON).get("runs")
        if not isinstance(listed, list) or not all(isinstance(run, str) for run in listed):
            raise RunError(f"{folder / COMPARISON}: expected a list of runs in it; name the run folders one by one")
        return [folder / run for run in listed if (folder / run / CONFIG).is_file()]
    found = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG}"))
    if not found:
        raise RunError(f"{folder}: expected a run folder or a folder of runs ({CONFIG} in it), found none")
    return found


def is_done(path: Path, config: Config) -> bool:
    """Whether the run in the folder came to its end by this configuration, and its files are what it left.

    Raises what `RunDir.check` raises for a run that cannot be gone on with.
    """
    if not is_finished(path):
        return False
    RunDir.check(path, config, resume=True)
    return _stored_config(path).run.rounds == config.run.rounds and seal.fits(path)


def remove_run(path: Path) -> None:
    """Delete a folder of runs as a comparison leaves it, or an empty one; `RunError` where anything else lies in it too.

    Each file goes by its name, and no link is followed, so that nothing goes that a run does not write.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise RunError(f"{path}: expected a folder of runs, or no such folder, got a file; choose another --out")
    found = sorted(path.rglob("*"), reverse=True)  # what is in a folder stands before it
    marked = not found or (path / COMPARISON).is_file()
    strangers = [entry for entry in found if not (marked and _of_comparison(entry, entry.relative_to(path).parts))]
    if strangers:
        first = min(strangers, key=lambda entry: (entry.is_dir(), len(entry.parts), entry))  # a file says most
        raise RunError(
            f"{path}: expected a folder with nothing but runs, got {first.relative_to(path)} in it, which is not deleted; "
            "choose another --out"
        )
    with files.naming(path):
        for entry in found:
            entry.rmdir() if entry.is_dir() else entry.unlink()
        path.rmdir()


# What a comparison leaves, by depth below its folder: METHOD/SEED are runs, in which adapters have folders of their own.
_IN_RUN = {CONFIG, METRICS, CLIENTS, SUMMARY, PRIVACY, LEDGER, IDENTITY, SEAL, "report.html", "labels.json", ".lock"}
_IN_ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "labels.json", "README.md"}
_FOLDER = re.compile(rf"{CHECKPOINT}|adapter(-[\w-]+)?|base-update")


def _of_comparison(entry: Path, parts: tuple[str, ...]) -> bool:
    """Whether a comparison made what lies at `parts` below its folder."""
    *above, name = parts
    if entry.is_symlink():
        return False
    if entry.is_dir():
        runs = [entry] if len(parts) == 2 else list(entry.iterdir()) if len(parts) == 1 else []
        begun = runs and all((run / CONFIG).is_file() for run in runs)
        return bool(begun) or (len(parts) == 3 and bool(_FOLDER.fullmatch(name)))
    known = {0: set(_COMPARED), 2: _IN_RUN, 3: {STATE, BEFORE} if CHECKPOINT in above else _IN_ADAPTER}
    return files.is_temporary(entry) or name in known.get(len(above), ())


def _stored_config(path: Path) -> Config:
    try:
        return from_table(parse_toml(files.read_bounded(path / CONFIG, _CONFIG_BYTES).decode("utf-8")))
    except (AnyRankError, ValueError, TypeError, OSError, RecursionError) as error:
        reason = in_a_line(error)
        raise RunError(f"{path / CONFIG}: cannot be read back ({reason}); choose another --out") from None


def _same_config(path: Path, config: Config) -> None:
    _same("", path, to_table(_grown(path, _stored_config(path), config.run.rounds)), to_table(config))


def _grown(path: Path, stored: Config, rounds: int) -> Config:
    """`stored` with more rounds, where its first rounds would have been the same with so many."""
    if rounds <= stored.run.rounds:
        return stored
    asked = f"{path}: was started with run.rounds = {stored.run.rounds}, not {rounds}"
    if stored.train.schedule != "constant":
        raise RunError(
            f"{asked}, and its learning rates depend on run.rounds by train.schedule = {stored.train.schedule!r}; "
            "only with 'constant' may rounds be added: choose another --out"
        )
    if stored.privacy.level != "none":
        raise RunError(f"{asked}, and its noise was worked out for these rounds; choose another --out")
    return stored.replace(run={"rounds": rounds})


def _same(what: str, path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `RunError` that names the first key by which a run's configuration or plan is not the one it began with."""
    theirs, ours = _flat(stored, what and f"{what} plan: "), _flat(wanted, what and f"{what} plan: ")
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            if key.endswith(".handed_in"):
                raise _handed_in(key, path, theirs.get(key), ours.get(key))
            raise RunError(
                f"{path}: was started with {key} = {theirs.get(key)!r}, not {ours.get(key)!r}; "
                "resume with the configuration in the folder, or choose another --out"
            )


_GIVEN = {"model": "task", "data.partition": "shards", "method": "method"}  # what a program hands in, by the table it is of


def _handed_in(key: str, path: Path, theirs: Any, ours: Any) -> RunError:
    """Which part of what a program handed in is not what the run began with."""
    what = _GIVEN[key.removesuffix(".handed_in")]
    if not theirs or not ours:
        began = f"was started with a {what} that a program handed in, not with" if theirs else "was not started with"
        return RunError(f"{path}: {began} this {what}; continue it in the way it was started, or choose another folder")
    parts = [old.split()[0] for old, new in zip(theirs, ours, strict=False) if old != new] if what == "task" else []
    differs = f" (its {', '.join(parts)})" if parts else ""
    return RunError(
        f"{path}: was started with another {what} than the given one{differs}; pass the one of the run's start, or choose "
        "another folder"
    )


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
