"""The reference lines of every comparison: all data in one place, and no federation at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import EVERYTHING, Client, ClientUpdate, Download, ServerState
from anyrank.methods.base import Holds, Method, Part, Traits
from anyrank.methods.fedavg import FedAvg
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class Centralized(FedAvg):
    """All examples with one client of the largest rank: the upper reference. Its rounds have a whole cohort's steps."""

    name = "centralized"
    summary = "all data in one place, one adapter"
    paper = "reference line"
    pools_data = True
    reference = True


@register
@dataclass(frozen=True)
class LocalOnly(Method):
    """Each client trains by itself and nothing is merged: the lower reference, scored as the mean over clients.

    The server keeps each client's adapter as it was returned, from its first round on.
    """

    name = "local-only"
    summary = "no federation: every client keeps its own adapter"
    paper = "reference line"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.ALWAYS, gauge_free=Holds.ALWAYS, stationary=Holds.ALWAYS)
    private = EVERYTHING
    reference = True

    def dispatch(self, state: ServerState, client: Client) -> Download:
        download = super().dispatch(state, client)
        return replace(download, adapter=state.extra.get(client.name, download.adapter))

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        own = {update.client: update.adapter for update in updates}
        return replace(state, round=state.round + 1, extra={**state.extra, **own})

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        return state.adapter.layers[name]

    def served(self, state: ServerState) -> Mapping[str, Adapter]:
        return state.extra or {"start": state.adapter}
