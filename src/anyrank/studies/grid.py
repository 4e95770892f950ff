"""A grid of runs over the cores: each cell costs itself alone when it fails."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyrank import simulation
from anyrank.config.sections import Config
from anyrank.errors import AnyRankError, RunFailed
from anyrank.runs.folder import is_done

OnRound = Callable[[str, int, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    label: str
    config: Config
    out: Path


def run_cells(cells: Sequence[Cell], jobs: int, on_round: OnRound | None = None) -> list[dict[str, Any]]:
    """Run the cells, `jobs` at a time; each goes on where it stopped. Returns those that failed, as `Results.failures`."""
    run = _run_in_turn if jobs == 1 or len(cells) <= 1 else _run_parallel
    reasons = run(cells, jobs, on_round)
    failed = [(cell, reason) for cell, reason in zip(cells, reasons, strict=True) if reason]
    return [{"label": cell.label, "seed": cell.config.run.seed, "reason": reason} for cell, reason in failed]


def finished(cells: Sequence[Cell], failures: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The cells that have ended well; `RunFailed` where none has."""
    left = [cell for cell in cells if is_done(cell.out, cell.config)]
    if not left:
        raise RunFailed(f"all {len(cells)} runs failed; {told(failures[0])}")
    return left


def told(failure: Mapping[str, Any]) -> str:
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
    return ""


# --- over several processes --------------------------------------------------------------------------------------------

_events: Any = None  # in a worker: where its rounds are told


def _start_worker(events: Any) -> None:
    global _events
    _events = events
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A killed grid must not train on unseen: end this process, at whatever it is, when its parent is gone.

    It waits on the parent's handle, or on a pipe that the parent holds open: on Windows `os.getppid` never changes.
    """
    parent.join()
    os._exit(1)


def _work(cell: Cell) -> str:
    return _run(cell, lambda *event: _events.put(event))


def _run_parallel(cells: Sequence[Cell], jobs: int, on_round: OnRound | None) -> list[str]:
    """Spread the cells over worker processes, and hand on their rounds as they end."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(events,))
    try:
        futures: list[Future] = [pool.submit(_work, cell) for cell in cells]
        running = set(futures)
        while running:
            done, running = wait(running, timeout=0.2)
            _tell(events, on_round)
            for future in done:
                future.result()
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise RunFailed(
            "a worker process was ended from outside, or for want of memory; what is finished is kept: go on by --resume, with "
            "fewer --jobs where memory is short"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _tell(events, on_round)


def _tell(events: Any, on_round: OnRound | None) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            event = events.get_nowait()
            if on_round:
                on_round(*event)
