"""A worker process of a grid, from its first moment on: bound to its parent before it imports anything that takes long."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

from anyrank import stopping


def serve(connection: Connection) -> None:
    """Run the cells that come over `connection`, until the grid ends this process, or ends itself."""
    stopping.end_with(multiprocessing.parent_process())
    stopping.on_signals()
    from anyrank.studies import grid  # with torch

    grid.work(connection)
