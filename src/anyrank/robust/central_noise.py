"""The server's mean of a round under client-level privacy with central noise: uploads in the clear, noise added once.

Neighbours: a run in which a client's training moved its upload, and one in which that client uploads no change, everything
that is public being the same: who is in each cohort, ranks, scalings, declared counts. Who fails or is rejected counts as
unchanged, so that weights follow from what is public alone.

The bound. In the coordinates of `anyrank.bounded`, slice j of the server's new factor is `c_j + sum_k w_kj u_kj`: `u_k` is
client k's change, of norm at most C over all layers and tensors, `w_kj` its weight on the slice, and `c_j` what comes of no
change at all. Let `m_j = max_k w_kj`. Divided by `m_j`, slice by slice, the result moves with client k by
`sqrt(sum_j (w_kj / m_j)^2 |u_kj|^2) <= |u_k| <= C`, whoever k is. So noise of standard deviation `sigma C` on every divided
coordinate is the Gaussian mechanism with noise multiplier sigma for every client of the cohort, and multiplying by `m_j` again
leaves noise of `sigma C m_j` on slice j. In an average over owners, a client that has a slice alone has weight 1 on it. A slice
that nobody has (`m_j = 0`) is the same for neighbours, and gets none. A plain tensor is one more slice, of weights `p_k`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.errors import ConfigError
from anyrank.messages.change import units
from anyrank.messages.records import Client, ClientUpdate, Download, Job, ServerState
from anyrank.methods.base import Holds, Method
from anyrank.methods.parts import Part
from anyrank.methods.registry import REGISTRY
from anyrank.privacy.noise import Draws, Mechanism
from anyrank.robust.base import Rule, Screened


@dataclass(frozen=True)
class Reach:
    """The most that a change of norm 1 of one client moves the server's numbers: `{layer: {factor: tensor}}`, each of a shape
    that broadcasts over the factor, and one number for all plain tensors."""

    factors: Mapping[str, Mapping[str, Tensor]]
    tensors: float


def check(method: Method, ranks: Sequence[int]) -> None:
    """Raise `ConfigError` for a method in whose aggregate nothing bounds what one client of these `ranks` moves."""
    if not method.traits.linear.covers(ranks):
        raise ConfigError(
            f"method.name: {method.name}'s new factors are not affine in the uploads (products, SVDs or weights by norms come "
            "between), so that a clip does not bound what one client moves; privacy.noise_at = 'server' is for "
            f"{_supported()}"
        )
    if method.weights is None:
        raise ConfigError(
            f"method.name: {method.name} does not say what weight a client has on each slice (Method.weights), from which the "
            f"server's noise would follow; privacy.noise_at = 'server' is for {_supported()}"
        )


def _supported() -> str:
    kinds = [kind for _, kind in sorted(REGISTRY.items()) if kind.weights and not kind.reference and not kind.private]
    linear = [(kind.name, kind.traits.linear) for kind in kinds if kind.traits.linear is not Holds.NEVER]
    return ", ".join(name if holds is Holds.ALWAYS else f"{name} ({holds.value})" for name, holds in linear)


@dataclass(frozen=True)
class CentralNoise(Rule):
    """The server's noise on a round's mean, from the plan and the key of `mechanism`.

    Whoever sent nothing counts as one who changed nothing. Nothing but the factors and tensors that got their noise goes on
    from such a round.
    """

    mechanism: Mechanism

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        return Screened(complete(jobs, updates))

    def aggregate(self, method: Method, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        if not updates:
            return method.aggregate(state, updates)
        plan, round = self.mechanism.plan, state.round + 1
        mean = method.aggregate(state, updates).adapter
        sent = method.dispatch(state, Client(updates[0].client, 1))  # of a round, all downloads have the same factors to train
        deviation = plan.clip_norm * max(plan.noise.values())  # all the same: nothing here is sampled
        far = reach(method, mean, updates, sent)
        return replace(state, round=round, adapter=cover(mean, far, deviation, self.mechanism.draws(round, "server")))


def complete(jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """One update for each job: no change from those of whom there is none."""
    sent = {update.client: update for update in updates}
    return [sent.get(job.client.name) or _unchanged(job) for job in jobs]


def _unchanged(job: Job) -> ClientUpdate:
    adapter = job.download.adapter
    job.settle()
    return ClientUpdate(adapter, job.num_examples, job.client.name)


def reach(method: Method, mean: Adapter, updates: Sequence[ClientUpdate], download: Download) -> Reach:
    """The largest weight on each slice of `mean` and on plain tensors, in the server's own numbers.

    `download`: any of the round's, which agree in what is trained.
    """
    factors = {}
    for name, layer in mean.layers.items():
        parts = [Part(update.adapter.layers[name], update.num_examples, update.client) for update in updates]
        largest = method.weights(parts, layer.rank).max(dim=0).values.to(layer.A.device)
        unit = units(layer, download.rescale)
        along = {"A": largest[:, None] / unit["A"], "B": largest[None, :] / unit["B"]}
        factors[name] = {factor: along[factor] for factor in download.train}
    counts = [update.num_examples for update in updates]
    return Reach(factors, max(counts) / sum(counts))


def cover(mean: Adapter, reach: Reach, deviation: float, draws: Draws) -> Adapter:
    """`mean` with Gaussian noise of `deviation` times what `reach` says of each number."""
    layers = {name: _covered(layer, reach.factors[name], deviation, draws) for name, layer in sorted(mean.layers.items())}
    tensors = {name: _noisy(tensor, reach.tensors * deviation, draws) for name, tensor in sorted(mean.tensors.items())}
    return replace(mean, layers=layers, tensors=tensors)


def _covered(layer: LoraLayer, reach: Mapping[str, Tensor], deviation: float, draws: Draws) -> LoraLayer:
    noisy = {name: _noisy(getattr(layer, name), deviation * far, draws) for name, far in sorted(reach.items())}
    return layer.with_factors(noisy.get("A", layer.A), noisy.get("B", layer.B))


def _noisy(tensor: Tensor, deviation: Tensor | float, draws: Draws) -> Tensor:
    normal = torch.from_numpy(draws.standard_normal(math.prod(tensor.shape))).view(tensor.shape).to(tensor.device)
    return (tensor.double() + deviation * normal).to(tensor.dtype)
