"""A grid of runs over the cores: each cell costs itself alone when it fails, whatever fails in it.

With one job the cells run in this process, one after another: what ends the process, such as a fault in a library, ends the
grid. With more, each cell runs in a worker process, and what ends that process costs the cell.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from anyrank import simulation, stopping
from anyrank.errors import AnyRankError, RunFailed, in_a_line
from anyrank.runs.finding import is_done
from anyrank.studies import worker
from anyrank.studies.variants import Cell

OnRound = Callable[[str, int, Mapping[str, Any]], None]
_PATIENCE = 5.0  # seconds from the end of a worker's connection to the end of its process


def run_cells(cells: Sequence[Cell], jobs: int, on_round: OnRound | None = None) -> list[dict[str, Any]]:
    """Run the cells, `jobs` at a time; each continues where it stopped. Returns those that failed, as `Results.failures`."""
    run = _run_in_turn if jobs == 1 or len(cells) <= 1 else _run_parallel
    reasons = [_why_not_done(cell, end) for cell, end in zip(cells, run(cells, jobs, on_round), strict=True)]
    failed = [(cell, reason) for cell, reason in zip(cells, reasons, strict=True) if reason]
    return [{"label": cell.label, "seed": cell.config.run.seed, "reason": reason} for cell, reason in failed]


def finished(cells: Sequence[Cell], failures: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The cells that are not among the failures. Raises `RunFailed` if there are none."""
    lost = {(failure["label"], failure["seed"]) for failure in failures}
    left = [cell for cell in cells if (cell.label, cell.config.run.seed) not in lost]
    if not left:
        raise RunFailed(f"all {len(cells)} runs failed; {failed(failures[0])}")
    return left


def _why_not_done(cell: Cell, end: _End) -> str:
    """Why a cell has no results; empty if it has them. A process may be killed after its run has ended, and a file of the run
    may be changed while others train: what the folder holds decides. An error that the run reported stands."""
    if end.reason and not end.died:
        return end.reason
    if is_done(cell.out, cell.config):
        return ""
    changed = "its files, or those that its configuration names, were changed since it ended; go on by --resume"
    return end.reason or f"{cell.out}: {changed}"


def failed(failure: Mapping[str, Any]) -> str:
    """One failure in a line."""
    return f"{failure['label']} seed {failure['seed']}: {failure['reason']}"


class _End(NamedTuple):
    """How a cell ended: the `reason` why it failed, empty if it did not; whether its process `died`."""

    reason: str
    died: bool = False


def _run_in_turn(cells: Sequence[Cell], jobs: int, on_round: OnRound | None) -> list[_End]:
    return [_End(_run(cell, on_round)) for cell in cells]


def _run(cell: Cell, on_round: OnRound | None) -> str:
    """Run a cell. Returns why it failed; empty if it ended well. A program's Ctrl-C passes: it ends the whole grid."""
    each = (lambda metrics: on_round(cell.label, cell.config.run.seed, metrics)) if on_round else None
    try:
        simulation.execute(cell.config, cell.out, resume=True, on_round=each)
    except BaseException as error:  # memory, a disk, an exit in somebody's module, a fault of ours: it costs this run
        if isinstance(error, KeyboardInterrupt) and not stopping.handled():
            raise
        return _reason(error)
    return ""


def _reason(error: BaseException) -> str:
    try:
        return str(error) if isinstance(error, AnyRankError) else in_a_line(error)
    except Exception:  # the error is of somebody's class, and may not even have a text
        return type(error).__name__


# --- over several processes --------------------------------------------------------------------------------------------


def work(connection: Connection) -> None:
    """In a worker: run the cells that come, one after another; report their rounds, and how each ended."""
    report = lambda *event: connection.send(("round", event))  # noqa: E731
    with contextlib.suppress(EOFError):  # the grid closed its end
        while True:
            cell = connection.recv()
            connection.send(("ended", _run(cell, report)))


class _Worker:
    """A process that runs one cell at a time; `place`: the cell's index. Raises `OSError` if the system starts no process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=worker.serve, args=(theirs,))
        try:
            with stopping.starting_a_child():
                self.process.start()
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()  # when the process ends, its copy is closed too: that is how its death is noticed
        self.place = -1

    def begin(self, place: int, cell: Cell) -> None:
        self.place = place
        with contextlib.suppress(OSError):  # the process is dead: `read` reports it
            self.connection.send(cell)

    def read(self, on_round: OnRound | None) -> _End | None:
        """Read what the process sent: pass a round on (`None`), or return how the cell ended."""
        try:
            kind, what = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(_PATIENCE)
            stopping.stop_all([self.process])
            return _End(_death(self.process.exitcode), died=True)
        if kind == "ended":
            return _End(what)
        if on_round:
            on_round(*what)
        return None

    def is_alive(self) -> bool:
        return self.process.is_alive()


def _death(code: int | None) -> str:
    how = f"by signal {-code}, from outside or because memory was short" if code and code < 0 else f"with status {code}"
    return f"its process ended {how}; go on by --resume, with fewer --jobs where memory is short"


def _run_parallel(cells: Sequence[Cell], jobs: int, on_round: OnRound | None) -> list[_End]:
    """Spread the cells over worker processes, and pass their rounds on as they end. A process that dies is replaced. Where the
    system starts no further process, those that run do the rest.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    left, ends = deque(range(len(cells))), [_End("")] * len(cells)
    idle: list[_Worker] = []
    busy: dict[Connection, _Worker] = {}
    try:
        while left or busy:
            while left and len(busy) < jobs:
                try:
                    chosen = idle.pop() if idle and idle[-1].is_alive() else _Worker()
                except OSError as error:
                    if busy:
                        break
                    ends[left.popleft()] = _End(f"no process can be started for it ({in_a_line(error)}); go on by --resume")
                    continue
                busy[chosen.connection] = chosen
                chosen.begin(left[0], cells[left.popleft()])
            for connection in wait(list(busy)) if busy else ():  # without any, it would wait for ever
                end = busy[connection].read(on_round)
                if end is not None:
                    ended = busy.pop(connection)
                    ends[ended.place] = end
                    idle.append(ended)
        return ends
    finally:
        stopping.stop_all([each.process for each in (*idle, *busy.values())])
