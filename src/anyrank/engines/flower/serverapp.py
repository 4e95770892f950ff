"""The ServerApp: the round loop of a run, over the sites whose nodes are connected. No torch at import.

A run brings its name and nothing else: what it does stands in the server's own folder, `runs/NAME`, where its state and its
checkpoint are, too. They outlive the run, so that the same name, submitted again, goes on.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from anyrank.engines.flower import mail, settings
from anyrank.engines.flower.carrier import Carrier
from anyrank.engines.flower.launch import FOLDER, ROUNDS
from anyrank.engines.flower.runs import NAME, Standing, folder_of, say
from anyrank.errors import AnyRankError, in_a_line
from anyrank.worker import memory

log = logging.getLogger(__name__)

app = ServerApp()


class Rounds(Protocol):
    """What runs the rounds: made anew for each run."""

    def serve(self, job: Job) -> None: ...


@dataclass(frozen=True)
class Job:
    """What `Rounds` has to work with. `folder`: the run's own folder on the server. `reply`: bytes of a reply at most.
    `worker`: makes the worker of a site; it takes the other arguments of `RemoteWorker`. `told`: takes (round, rounds) after
    each round."""

    run: str
    folder: Path
    reply: int
    worker: Callable[..., Any]
    told: Callable[[int, int], None]


@app.main()
def main(grid: Grid, context: Context) -> None:
    run = context.run_config.get(NAME)
    server = Path(os.environ[FOLDER])
    folder = folder_of(server, run)
    standing = Standing(run, context.run_id)
    say(folder, standing)
    try:
        known = settings.load(settings.Server, server)
        _limit(known)
        carrier = Carrier(grid, mail, known.names == "claimed").start()
        try:
            _rounds().serve(Job(run, folder, known.reply, carrier.worker, lambda done, of: say(folder, standing, done, of)))
            say(folder, standing, state="done")
        finally:
            carrier.close()
    except AnyRankError as error:
        log.error("run %s: %s", run, in_a_line(error))
        say(folder, standing, state="failed", code=type(error).__name__, text=str(error))
        raise
    except Exception as error:
        say(folder, standing, state="failed", code=type(error).__name__)
        raise


def _rounds() -> Rounds:
    """What the server's own environment names: no run has a say in it."""
    module, _, name = os.environ[ROUNDS].partition(":")
    return getattr(importlib.import_module(module), name)()


def _limit(known: settings.Server) -> None:
    if known.memory_gb and not memory.limit(0, int(known.memory_gb * 1e9)):
        log.error("memory_gb: this system cannot limit the memory of a process; it is not limited")
