"""FedSA-LoRA: A is shared, B stays with its client (Guo et al., ICLR 2025, arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import Client, ClientUpdate, Download, ServerState
from anyrank.methods.base import Holds, Method, Part, Traits, mean_a
from anyrank.methods.registry import register


@register
@dataclass(frozen=True)
class FedSA(Method):
    """`A[j] = sum over owners of q_kj A_k[j]`; B and the head are trained too, but each client keeps its own. Personalised.

    `state.extra` holds each client's B and head from its first round on: in a simulation, the server replaces the clients' own
    stores, and none of it counts as traffic. A client that never took part has the common A with its initial B, which changes
    nothing; scores are the mean over the clients that have trained. Mixed ranks are our extension.
    """

    name = "fedsa"
    summary = "mean of A, slice by slice over owners; every client keeps its own B and head"
    paper = "FedSA-LoRA, arXiv 2410.01463"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.ALWAYS, gauge_free=Holds.NEVER, stationary=Holds.ALWAYS)
    by_owners = True
    private = frozenset({"B", "tensors"})

    def dispatch(self, state: ServerState, client: Client) -> Download:
        download = super().dispatch(state, client)
        if client.name not in state.extra:
            return download
        return replace(download, adapter=_with_own(download.adapter, state.extra[client.name]))

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        own = {update.client: update.adapter for update in updates}
        public = [replace(update, adapter=replace(update.adapter, tensors={})) for update in updates]
        return replace(super().aggregate(state, public), extra={**state.extra, **own})

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        layer = state.adapter.layers[name]
        return layer.with_factors(mean_a(state, name, parts), layer.B)

    def served(self, state: ServerState) -> Mapping[str, Adapter]:
        clients = {name: Client(name, 0, own.ranks) for name, own in state.extra.items()}
        return {name: self.dispatch(state, client).adapter for name, client in clients.items()} or {"start": state.adapter}


def _with_own(common: Adapter, own: Adapter) -> Adapter:
    """The common A with the client's own B and plain tensors."""
    layers = {name: layer.with_factors(layer.A, own.layers[name].B) for name, layer in common.layers.items()}
    return replace(common, layers=layers, tensors=own.tensors)
