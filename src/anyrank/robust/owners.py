"""A limit on the weight of a client on slices that no other client of the round has.

A method that averages a slice over its owners gives a single owner all of the weight on it. A hostile client that registers the
largest rank would then decide on these slices alone (rank inflation).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from anyrank.adapter.layer import LoraLayer
from anyrank.messages.change import between
from anyrank.messages.records import ClientUpdate, Download, Job, ServerState
from anyrank.messages.spooled import rebuilt
from anyrank.robust.base import Rule, Screened


@dataclass(frozen=True)
class SingleOwner(Rule):
    """On a slice that only one client of the round has, that client has at most the weight `most`, and the server's own slice
    has the rest.

    `weight(p)`: the method's weight of a client on such a slice, if it has the share `p` of the round's examples
    (`Method.lone_weight`). Both factors of the slice are moved back towards the download until only `most / weight(p)` of
    their change is left. For factors that are averaged, this is exactly the stated mean of both. For products `B A`, it is that
    mean to first order; the term of second order, `dB dA`, counts with the square of the share. A round of one client is left
    as it is: there is nobody to compare it with.
    """

    most: float
    weight: Callable[[float], float] = field(repr=False)

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        if len(updates) < 2:
            return Screened(updates)
        by_name = {job.client.name: job for job in jobs}
        held = {update.client: _slices(by_name[update.client], update) for update in updates}
        owners = {
            name: Counter(j for slices in held.values() for j in slices[name]) for name in updates[0].adapter.layers
        }  # {layer: {slice: how many clients have it}}
        total = sum(update.num_examples for update in updates)
        kept = []
        for update in updates:
            share = self.most / self.weight(update.num_examples / total)
            alone = {name: [owners[name][j] == 1 for j in slices] for name, slices in held[update.client].items()}
            kept.append(_part(by_name[update.client], update, alone, share) if share < 1 else update)
        return Screened(kept)


def _slices(job: Job, update: ClientUpdate) -> dict[str, tuple[int, ...]]:
    """The server's slices that came back, layer by layer; a pruned layer has fewer than were sent."""
    slices = job.download.slices
    job.settle()
    return {name: slices[name][:rank] for name, rank in update.adapter.ranks.items()}


def _part(job: Job, update: ClientUpdate, alone: dict[str, list[bool]], share: float) -> ClientUpdate:
    """`update` with `share` of its change in the slices that are `alone`."""
    if not any(map(any, alone.values())):
        return update
    download = job.download
    trained = update.adapter
    layers = rebuilt(trained, lambda name: _shortened(download, name, trained.layers[name], alone[name], share))
    job.settle()
    return replace(update, adapter=replace(trained, layers=layers))


def _shortened(download: Download, name: str, after: LoraLayer, alone: list[bool], share: float) -> LoraLayer:
    if not any(alone):
        return after
    before, rows = download.adapter.layers[name], torch.tensor(alone).nonzero().squeeze(1)
    A, B = after.A.clone(), after.B.clone()
    A[rows] = between(before.A[rows], A[rows], share)
    B[:, rows] = between(before.B[:, rows], B[:, rows], share)
    return after.with_factors(A, B)
