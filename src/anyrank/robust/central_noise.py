"""The server's mean of a round with client-level privacy and central noise: uploads arrive without noise, noise is added once.

Neighbours: two runs, one in which a client's training changes its upload and one in which that client uploads no change. All
public values are the same in both: cohorts, ranks, scalings, declared counts. A client that fails or is rejected counts as
unchanged, so that weights depend on public values only.

The bound. In the coordinates of `anyrank.messages.change`, slice j of the server's new factor is `c_j + sum_k w_kj u_kj`: `u_k`
is client k's change, of norm at most C over all layers and tensors, `w_kj` its weight on the slice, and `c_j` the value without
any change. Let `m_j = max_k w_kj`. Divide each slice by its `m_j`: any client k then changes the result by
`sqrt(sum_j (w_kj / m_j)^2 |u_kj|^2) <= |u_k| <= C`. Noise of standard deviation `sigma C` on every divided coordinate is
therefore the Gaussian mechanism with noise multiplier sigma for every client of the cohort. Multiplying by `m_j` again leaves
noise of `sigma C m_j` on slice j. In a mean over owners, the only owner of a slice has weight 1 on it. A slice without owners
(`m_j = 0`) is the same for neighbours and gets no noise. A plain tensor is one more slice, with weights `p_k`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.lazy import Lazy, outlined
from anyrank.errors import ConfigError
from anyrank.messages.change import units
from anyrank.messages.records import Client, ClientUpdate, Download, Job, ServerState
from anyrank.messages.spool import Spool
from anyrank.messages.spooled import rebuilt, shelved, spool_of
from anyrank.methods.base import Holds, Method
from anyrank.methods.parts import Part
from anyrank.methods.registry import REGISTRY
from anyrank.privacy.grid import Gaussian
from anyrank.privacy.noise import Draws, Mechanism
from anyrank.robust.base import Rule, Screened

_T = TypeVar("_T")


@dataclass(frozen=True)
class Reach:
    """The most that a change of norm 1 of one client moves the server's numbers: `{layer: {factor: tensor}}`, each of a shape
    that broadcasts over the factor, and one number for all plain tensors."""

    factors: Mapping[str, Mapping[str, Tensor]]
    tensors: float


def check(method: Method, ranks: Sequence[int]) -> None:
    """Raise `ConfigError` for a method whose aggregate does not bound the effect of one client, for these `ranks`."""
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

    A client that sent nothing counts as unchanged. Only factors and tensors with noise leave such a round.
    """

    mechanism: Mechanism

    def usable(self, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> int:
        return len(jobs)  # whether a round counts must not depend on what was uploaded

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        return Screened(complete(jobs, updates))

    def aggregate(self, method: Method, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        if not updates:
            return method.aggregate(state, updates)
        plan, round = self.mechanism.plan, state.round + 1
        mean = method.aggregate(_wide(state), [_wide_update(update) for update in updates]).adapter
        sent = method.dispatch(state, Client(updates[0].client, 1))  # of a round, all downloads have the same factors to train
        far = reach(method, mean, updates, sent)
        largest = max(plan.noise.values())  # one source for all: nothing here is sampled
        noise = Gaussian(largest, plan.clip_norm, _numbers(mean, far))
        noisy = cover(mean, far, noise, self.mechanism.draws(round, "server"))
        return replace(state, round=round, adapter=_typed(noisy, state.adapter))


def _wide(state: ServerState) -> ServerState:
    """`state` in float64, of which the mean has the type: rounded to a narrower one before the noise, a small change of one
    client would now and then become a whole unit in the last place, which is more than the noise covers."""
    layers = _read_as(state.adapter.layers, lambda layer: _in_type(layer, torch.float64))
    return replace(state, adapter=replace(state.adapter, layers=layers, tensors=_wide_tensors(state.adapter.tensors)))


def _wide_update(update: ClientUpdate) -> ClientUpdate:
    """`update` with its plain tensors in float64; its factors are summed in float64 whatever they are."""
    return replace(update, adapter=replace(update.adapter, tensors=_wide_tensors(update.adapter.tensors)))


def _wide_tensors(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return _read_as(tensors, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _read_as(values: Mapping[str, _T], change: Callable[[_T], _T]) -> Mapping[str, _T]:
    """`values`, each changed when it is read, so that memory has no second copy of all of them."""
    return Lazy(outlined(values), lambda name: change(values[name]))


def _typed(adapter: Adapter, like: Adapter) -> Adapter:
    """`adapter` in the types of `like`: rounded once."""
    types, tensors = outlined(like.layers), outlined(like.tensors)
    names = sorted(adapter.layers)
    layers = rebuilt(adapter, lambda name: _in_type(adapter.layers[name], types[name].A.dtype), names)
    rounded = {name: tensor.to(tensors[name].dtype) for name, tensor in adapter.tensors.items()}
    return replace(adapter, layers=layers, tensors=rounded)


def _in_type(layer: LoraLayer, dtype: torch.dtype) -> LoraLayer:
    return LoraLayer(layer.A.to(dtype), layer.B.to(dtype), layer.scaling, layer.kind, layer.kernel)


def complete(jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """One update for each job; a client without an update counts as unchanged."""
    sent, spool = {update.client: update for update in updates}, spool_of(updates)
    return [sent.get(job.client.name) or _unchanged(job, spool) for job in jobs]


def _unchanged(job: Job, spool: Spool | None) -> ClientUpdate:
    adapter = shelved(job.download.adapter, spool)
    job.settle()
    return ClientUpdate(adapter, job.num_examples, job.client.name)


def reach(method: Method, mean: Adapter, updates: Sequence[ClientUpdate], download: Download) -> Reach:
    """The largest weight on each slice of `mean` and on plain tensors, in the server's own numbers.

    `download`: any download of the round; all train the same factors.
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


def cover(mean: Adapter, reach: Reach, noise: Gaussian, draws: Draws) -> Adapter:
    """`mean` with `noise`, times each number's value in `reach`."""
    layers = rebuilt(mean, lambda name: _covered(mean.layers[name], reach.factors[name], noise, draws), sorted(mean.layers))
    tensors = {name: _noisy(tensor, reach.tensors, noise, draws) for name, tensor in sorted(mean.tensors.items())}
    return replace(mean, layers=layers, tensors=tensors)


def _covered(layer: LoraLayer, reach: Mapping[str, Tensor], noise: Gaussian, draws: Draws) -> LoraLayer:
    noisy = {name: _noisy(getattr(layer, name), far, noise, draws) for name, far in sorted(reach.items())}
    return layer.with_factors(noisy.get("A", layer.A), noisy.get("B", layer.B))


def _noisy(tensor: Tensor, reach: Tensor | float, noise: Gaussian, draws: Draws) -> Tensor:
    far = reach.cpu().numpy() if isinstance(reach, Tensor) else reach
    noisy = noise.added(tensor.cpu().double().numpy(), draws, far)
    return torch.from_numpy(noisy).to(tensor.dtype).to(tensor.device)  # rounded once


def _numbers(mean: Adapter, reach: Reach) -> int:
    """How many numbers get noise, at most."""
    layers = outlined(mean.layers)
    factors = sum(getattr(layers[name], factor).numel() for name, far in reach.factors.items() for factor in far)
    return factors + sum(tensor.numel() for tensor in outlined(mean.tensors).values())
