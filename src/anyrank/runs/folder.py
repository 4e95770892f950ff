"""The run folder: what a run writes, how it is read back, and how a killed run goes on.

Logs are appended first, the checkpoint follows, each in one step that happens or does not. On resume the checkpoint
rules: log lines of rounds it does not know are dropped, since those rounds are run again.

No torch here but for the checkpoint itself, which is loaded where a run goes on: whether a folder may be used, and which
runs lie in it, is answered without.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from anyrank.config.sections import Config
from anyrank.config.tables import from_table, to_table
from anyrank.errors import AnyRankError, RunError
from anyrank.files import write_whole_text
from anyrank.runs.names import CLIENTS, COMPARISON, CONFIG, LEDGER, METRICS, PRIVACY, STATE, SUMMARY, read_lines

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns where it has no lock of the system: `RunDir` says what follows
    from filelock import FileLock, SoftFileLock, Timeout

if TYPE_CHECKING:
    from anyrank.adapter.adapter import Adapter
    from anyrank.messages.records import ServerState

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
        self._lock = FileLock(path / ".lock", thread_local=False)
        of_the_system = not isinstance(self._lock, SoftFileLock)
        try:  # what a killed process left is cleared away by one attempt and taken by the next
            self._lock.acquire(timeout=0 if of_the_system else 0.5)
        except Timeout:
            left = "" if of_the_system else f"; if there is none, it was killed: delete {path / '.lock'}"
            raise RunError(f"{path}: another process is writing this run; wait for it, or choose another --out{left}") from None

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: Config, resume: bool = False) -> RunDir:
        """A new run folder, or (with `resume`) one to go on with; made if there is none yet. Raises what `check` raises."""
        path = Path(path)
        cls.check(path, config, resume)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, config)
        run._sweep()
        write_whole_text(path / CONFIG, tomli_w.dumps(to_table(config)))
        return run

    @staticmethod
    def check(path: Path, config: Config, resume: bool = False) -> None:
        """Raise `RunError` where the folder is of something else, holds a run although `resume` is not asked for, or holds
        one of another configuration. Writes nothing."""
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: expected a folder for the run, got a file; choose another --out")
        if (path / CONFIG).exists():
            if not resume:
                raise RunError(f"{path}: contains a run already; continue it with --resume, or choose another --out")
            _same_config(path, config)
        elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise RunError(f"{path}: expected an empty or new folder, or one with a run in it; choose another --out")

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self) -> ServerState | None:
        """The state after the last whole round, with the logs cut back to it; `None` where no round was finished."""
        from anyrank.runs import checkpoint

        path = self.path / "checkpoint" / STATE
        state = checkpoint.load_state(path) if path.exists() else None
        for name in (METRICS, CLIENTS):
            self._cut(name, state.round if state else 0)
        return state

    def commit(self, state: ServerState, metrics: Mapping[str, Any], clients: Iterable[Mapping[str, Any]]) -> None:
        """Log the round that led to `state`, then make `state` the checkpoint."""
        from anyrank.runs import checkpoint

        self._append(CLIENTS, clients)
        self._append(METRICS, [metrics])
        (self.path / "checkpoint").mkdir(exist_ok=True)
        checkpoint.save_state(state, self.path / "checkpoint" / STATE)

    def finish(self, adapters: Mapping[str, Adapter], summary: Mapping[str, Any]) -> None:
        """Write the adapters by folder name, and last of all the summary: its presence says that the run is done."""
        for name, adapter in adapters.items():
            adapter.save(self.path / name)
        write_whole_text(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

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
        if not path.exists():
            if (self.path / LEDGER).exists():
                raise RunError(f"{path}: is missing, but {LEDGER} exists; start a new run with another --out")
            name = make_key()
            write_whole_text(path, json.dumps({"plan": plan, "key": name}, indent=2) + "\n")
            return name
        stored = json.loads(path.read_text(encoding="utf-8"))
        _same("privacy", path, stored["plan"], plan)
        return stored["key"]

    def charges(self) -> list[dict[str, Any]]:
        """All charges of the privacy ledger. They are never cut back: what was begun may have been released.

        Only a last line that a kill cut off goes: whom it would have charged had not begun to train.
        """
        path = self.path / LEDGER
        rows = read_lines(path)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            write_whole_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def charge(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add to the privacy ledger; on disk when this returns."""
        self._append(LEDGER, rows)

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with open(self.path / name, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _cut(self, name: str, round: int) -> None:
        path = self.path / name
        if path.exists():
            kept = "".join(json.dumps(row) + "\n" for row in read_lines(path) if row["round"] <= round)
            write_whole_text(path, kept)

    def _sweep(self) -> None:
        """Remove temporary files that a killed process left behind."""
        for leftover in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
            leftover.unlink(missing_ok=True)


def is_finished(path: Path) -> bool:
    """Whether the run in the folder came to its end."""
    return (path / SUMMARY).is_file()


def find_runs(folder: Path) -> list[Path]:
    """The folder if it holds a run, else the runs below it: in a comparison's own order, or sorted, at most two levels down."""
    if (folder / CONFIG).is_file():
        return [folder]
    if (folder / COMPARISON).is_file():
        listed = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))["runs"]
        return [folder / run for run in listed if (folder / run / CONFIG).is_file()]
    found = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG}"))
    if not found:
        raise RunError(f"{folder}: expected a run folder or a folder of runs ({CONFIG} in it), found none")
    return found


def remove_run(path: Path) -> None:
    """Delete a folder of runs as a comparison leaves it, or an empty one; `RunError` where anything else lies in it too."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path}: expected a folder of runs, or no such folder, got a file; choose another --out")
    strangers = [entry.name for entry in path.iterdir() if not _of_comparison(entry)]
    if strangers:
        raise RunError(
            f"{path}: expected a folder with nothing but runs, got {min(strangers)} in it, which is not deleted; "
            "choose another --out"
        )
    shutil.rmtree(path)


def _of_comparison(entry: Path) -> bool:
    """Whether a comparison made it: one of its own files, or a folder of runs and of nothing beside them."""
    if not entry.is_dir() or entry.is_symlink():
        return entry.name in _COMPARED
    runs = [inner for inner in entry.iterdir() if inner.is_dir() and (inner / CONFIG).is_file()]
    return len(runs) == len(list(entry.iterdir()))


def _same_config(path: Path, config: Config) -> None:
    try:
        stored = from_table(tomllib.loads((path / CONFIG).read_text(encoding="utf-8")))
    except (AnyRankError, tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RunError(f"{path / CONFIG}: cannot be read ({error}); choose another --out") from None
    _same("", path, to_table(stored), to_table(config))


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
