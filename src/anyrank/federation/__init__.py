"""The round loop: cohort, dispatch, training by an engine, guard, aggregate, scores, run folder."""

from anyrank.federation.asking import dispatch
from anyrank.federation.federation import Federation
from anyrank.federation.loop import run, start

__all__ = ["Federation", "dispatch", "run", "start"]
