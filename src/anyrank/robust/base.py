"""The step between the accepted uploads and the state after the round: one interface for defences and for noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from anyrank.messages.records import ClientUpdate, Job, ServerState
from anyrank.methods.base import Method


@dataclass(frozen=True)
class Screened:
    """The result of a screen: the updates that pass, and the reasons why others do not, `{client: reason}`."""

    updates: Sequence[ClientUpdate]
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A step that works with any method. This one does nothing: every update passes, and the method aggregates.

    A defence overrides `screen` (which updates count), or `aggregate` (how they are merged), or both. Both are pure functions:
    the same arguments give the same result, and no argument is changed.
    """

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        """`updates` came back from `jobs`, which started from `state`."""
        return Screened(updates)

    def aggregate(self, method: Method, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """The state after the round, from the updates that passed the screen."""
        return method.aggregate(state, updates)
