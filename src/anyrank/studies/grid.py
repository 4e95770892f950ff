"""A grid of runs over the cores: each cell costs itself alone when it fails, whatever fails in it.

With one job the cells run in this process, one after another: what ends the process, such as a fault in a library, ends the
grid. With more each cell runs in a process of its own while it lasts, and what ends that process costs the cell.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from anyrank import simulation, stopping
from anyrank.errors import AnyRankError, RunFailed, in_a_line
from anyrank.runs.finding import is_done
from anyrank.studies import worker
from anyrank.studies.variants import Cell

OnRound = Callable[[str, int, Mapping[str, Any]], None]
_PATIENCE = 5.0  # seconds from the end of a worker's connection to the end of its process


def run_cells(cells: Sequence[Cell], jobs: int, on_round: OnRound | None = None) -> list[dict[str, Any]]:
    """Run the cells, `jobs` at a time; each goes on where it stopped. Returns those that failed, as `Results.failures`."""
    run = _run_in_turn if jobs == 1 or len(cells) <= 1 else _run_parallel
    reasons = run(cells, jobs, on_round)
    failed = [
        (cell, reason) for cell, reason in zip(cells, reasons, strict=True) if reason and not is_done(cell.out, cell.config)
    ]
    return [{"label": cell.label, "seed": cell.config.run.seed, "reason": reason} for cell, reason in failed]


def finished(cells: Sequence[Cell], failures: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The cells that have ended well; `RunFailed` where none has."""
    left = [cell for cell in cells if is_done(cell.out, cell.config)]
    if not left:
        raise RunFailed(f"all {len(cells)} runs failed; {failed(failures[0])}")
    return left


def failed(failure: Mapping[str, Any]) -> str:
    """One failure in a line."""
    return f"{failure['label']} seed {failure['seed']}: {failure['reason']}"


def _run_in_turn(cells: Sequence[Cell], jobs: int, on_round: OnRound | None) -> list[str]:
    return [_run(cell, on_round) for cell in cells]


def _run(cell: Cell, on_round: OnRound | None) -> str:
    """Why the run cannot go on; empty when it has ended well."""
    tell = (lambda metrics: on_round(cell.label, cell.config.run.seed, metrics)) if on_round else None
    try:
        simulation.execute(cell.config, cell.out, resume=True, on_round=tell)
    except AnyRankError as error:  # what was wrong with the request came to light in `check`, before anything was trained
        return str(error)
    except (Exception, SystemExit) as error:  # memory, a disk, somebody's module, a fault of ours: it costs this run
        return in_a_line(error)
    return ""


# --- over several processes --------------------------------------------------------------------------------------------


def work(connection: Connection) -> None:
    """In a worker: run the cells that come, one after another; tell their rounds, and how each has ended."""
    tell = lambda *event: connection.send(("round", event))  # noqa: E731
    with contextlib.suppress(EOFError):  # the grid has closed it
        while True:
            cell = connection.recv()
            connection.send(("ended", _run(cell, tell)))


class _Worker:
    """A process that runs one cell at a time; `place`: which one."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=worker.serve, args=(theirs,))
        with stopping.starting_a_child():
            self.process.start()
        theirs.close()  # with the process its end is closed for good: that is how its death is noticed
        self.place = -1

    def begin(self, place: int, cell: Cell) -> None:
        self.place = place
        with contextlib.suppress(OSError):  # it is dead: `read` tells
            self.connection.send(cell)

    def read(self, on_round: OnRound | None) -> str | None:
        """What there is to read: hand on a round (`None`), or tell how the cell has ended, as `_run` does."""
        try:
            kind, what = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(_PATIENCE)
            stopping.stop_all([self.process])
            return _death(self.process.exitcode)
        if kind == "ended":
            return what
        if on_round:
            on_round(*what)
        return None

    def is_alive(self) -> bool:
        return self.process.is_alive()


def _death(code: int | None) -> str:
    how = f"by signal {-code}, from outside or for want of memory" if code and code < 0 else f"with status {code}"
    return f"its process ended {how}; go on by --resume, with fewer --jobs where memory is short"


def _run_parallel(cells: Sequence[Cell], jobs: int, on_round: OnRound | None) -> list[str]:
    """Spread the cells over worker processes, and hand on their rounds as they end. A process that dies is replaced."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    left, reasons = deque(range(len(cells))), [""] * len(cells)
    idle: list[_Worker] = []
    busy: dict[Connection, _Worker] = {}
    try:
        while left or busy:
            while left and len(busy) < jobs:
                chosen = idle.pop() if idle and idle[-1].is_alive() else _Worker()
                busy[chosen.connection] = chosen
                chosen.begin(left[0], cells[left.popleft()])
            for connection in wait(list(busy)):
                reason = busy[connection].read(on_round)
                if reason is not None:
                    ended = busy.pop(connection)
                    reasons[ended.place] = reason
                    idle.append(ended)
        return reasons
    finally:
        stopping.stop_all([each.process for each in (*idle, *busy.values())])
