"""The step between the accepted uploads and the state after the round: one interface for defences and for noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from anyrank.errors import AnyRankError
from anyrank.messages.records import ClientUpdate, Job, ServerState
from anyrank.methods.base import Method


class TooFew(AnyRankError):
    """A round has fewer updates than a rule needs."""


@dataclass(frozen=True)
class Screened:
    """The result of a screen: the updates that pass; the reasons why others do not, `{client: reason}`; and the updates that
    pass with a shorter step, `{client: share of its step that counts}`.

    What is `rejected` cannot be honest, and counts as an offence; what is `refused` may be.
    """

    updates: Sequence[ClientUpdate]
    refused: Mapping[str, str] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    shortened: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A step that works with any method. This one does nothing: every update passes, and the method aggregates.

    A defence overrides `screen` (which updates count), or `aggregate` (how they are merged), or both. Both are pure functions:
    the same arguments give the same result, and no argument is changed.
    """

    @property
    def least(self) -> int:
        """The number of updates that the rule needs."""
        return 0

    def without(self, hostile: int) -> Rule:
        """The rule for a round from which so many hostile clients were kept out already."""
        return self

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        """`updates` came back from `jobs`, which started from `state`."""
        return Screened(updates)

    def aggregate(self, method: Method, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """The state after the round, from the updates that passed the screen."""
        return method.aggregate(state, updates)


@dataclass(frozen=True)
class Chain(Rule):
    """Rules one after another: each screens what the one before let pass, and the last one aggregates."""

    rules: tuple[Rule, ...]

    def without(self, hostile: int) -> Chain:
        return Chain(tuple(rule.without(hostile) for rule in self.rules))

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        refused: dict[str, str] = {}
        rejected: dict[str, str] = {}
        shortened: dict[str, float] = {}
        for rule in self.rules:
            found = rule.without(len(rejected)).screen(state, jobs, updates)
            updates = found.updates
            refused |= found.refused
            rejected |= found.rejected
            for client, share in found.shortened.items():
                shortened[client] = shortened.get(client, 1.0) * share
        return Screened(updates, refused, rejected, {name: share for name, share in shortened.items() if name not in refused})

    def aggregate(self, method: Method, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        return self.rules[-1].aggregate(method, state, updates) if self.rules else super().aggregate(method, state, updates)
