"""A federation in one process: from a configuration, or from a task of one's own."""

from anyrank.simulation.api import Federation, Result, load
from anyrank.simulation.building import Setting, build, execute, in_process

__all__ = ["Federation", "Result", "Setting", "build", "execute", "in_process", "load"]
