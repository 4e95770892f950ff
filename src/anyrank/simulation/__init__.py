"""A federation in one process: from a configuration, or from a task that is passed from Python."""

from anyrank.simulation.api import Federation, Result, load
from anyrank.simulation.building import Setting, build, execute, in_process

__all__ = ["Federation", "Result", "Setting", "build", "execute", "in_process", "load"]
