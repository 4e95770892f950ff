"""What stands between the replies that the guard let in and the state after the round: one shape for defences and for noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from anyrank.messages.records import ClientUpdate, Job, ServerState
from anyrank.methods.base import Method


@dataclass(frozen=True)
class Screened:
    """What a rule lets pass: the updates that go on, and why those of other clients do not, `{client: reason}`."""

    updates: Sequence[ClientUpdate]
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A step beside any method. This one does nothing: every update goes on, and the method aggregates.

    A defence overrides `screen` (whose update counts), or `aggregate` (what becomes of those that do), or both. Both are pure
    functions: the same arguments give the same result, and nothing that is handed in is changed.
    """

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        """`updates` came back from `jobs`, which started from `state`."""
        return Screened(updates)

    def aggregate(self, method: Method, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """The state after the round, from the updates that passed the screen."""
        return method.aggregate(state, updates)
