"""Private training of a whole cohort at once, for experiments of thousands of runs: the library's numbers, without its copies.

The library keeps one copy of the factors for each example and trains private clients one by one. Here the clients of a round
are stacked, and where a target is a linear map of one vector per example, the gradient of an example is an outer product: its
norm follows from two vectors, and the clipped sum from one product of matrices. Samples and noise are those of the library,
draw by draw, without the rounding of `anyrank.privacy.grid` (2^-24 of the noise): `tests/test_experiments_quick.py` compares
the two. Not for releases: sums are taken in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Job
from anyrank.privacy.grid import Gaussian
from anyrank.privacy.noise import Mechanism
from anyrank.training import precondition
from anyrank.training.lora import LoraModel
from anyrank.training.optimizers import Optimizer
from anyrank.training.trainer import ExamplesOf


@dataclass(frozen=True)
class _Layer:
    """A target of the stack: A `[clients, rank, in]`, B `[clients, out, rank]`."""

    A: Tensor
    B: Tensor
    scaling: float


def train(model: LoraModel, jobs: Sequence[Job], shards: ExamplesOf, plan: Plan, mechanism: Mechanism) -> list[ClientUpdate]:
    """The replies to `jobs`, as `private_examples.train` gives them one by one. Clients have one rank and no sum in the base;
    every target is a linear map that gets `[examples, in]`, and nothing else is trained."""
    downloads = [job.download for job in jobs]
    like, kinds = downloads[0], sorted(downloads[0].train)
    if model.trained or any(each.merged for each in downloads):
        raise ValueError("quick: expected downloads of A and B alone, got a trained head or a sum in the base")
    layers = {name: stacked([each.adapter.layers[name] for each in downloads], kinds) for name in like.adapter.layers}
    trained = [getattr(layer, kind) for layer in layers.values() for kind in kinds]
    optimizer = Optimizer(trained, plan.config, plan.learning_rate, _inverses(layers, like.train, plan))
    privacy, rows = mechanism.plan, [shards[job.client.name] for job in jobs]
    draws = [mechanism.draws(plan.round, job.client.name) for job in jobs]
    rates = [privacy.sampling_rate(job.num_examples) for job in jobs]
    numbers = sum(parameter[0].numel() for parameter in trained)
    size = [Gaussian(privacy.noise[job.num_examples], privacy.clip_norm, numbers).deviation for job in jobs]
    for _ in range(privacy.local_steps):
        chosen = [own[draw.random(len(own)) < rate] for own, draw, rate in zip(rows, draws, rates, strict=True)]
        sums = _clipped(model, layers, chosen, privacy.clip_norm, like.train)
        noise = np.stack([draw.standard_normal(numbers) * each for draw, each in zip(draws, size, strict=True)])
        parts = torch.from_numpy(noise).float().split([parameter[0].numel() for parameter in trained], dim=1)
        for parameter, total, own in zip(trained, sums, parts, strict=True):
            parameter.grad = (total + own.reshape(total.shape)) / privacy.batch_size
        optimizer.step()
    return [_reply(job, layers, place) for place, job in enumerate(jobs)]


def stacked(layers: Sequence, kinds: Sequence[str]) -> _Layer:
    A, B = (torch.stack([getattr(layer, factor) for layer in layers]).requires_grad_(factor in kinds) for factor in "AB")
    return _Layer(A, B, layers[0].scaling)


def _inverses(layers: dict[str, _Layer], train: frozenset[str], plan: Plan) -> list[precondition.Inverse]:
    if not plan.config.precondition:
        return []
    return [precondition.inverse(layer.A, layer.B, layer.scaling, train) for layer in layers.values()]


def _clipped(
    model: LoraModel, layers: dict[str, _Layer], chosen: Sequence[np.ndarray], clip: float, train: frozenset[str]
) -> list[Tensor]:
    """For each trained factor `[clients, ...]`, the sum over each client's examples of their gradients, each clipped.

    The gradient of an example for B is `s g (A x)^T`, and for A `s (B^T g) x^T`: `x` is the layer's input, `g` the gradient of
    the loss by its output.
    """
    index, present = _padded(chosen)
    inputs, outputs = through(model, layers, index.flatten())
    shape = (*index.shape, -1)
    factors, squares = [], torch.zeros(index.shape)
    for (x, y, g), layer in zip(_rows(inputs, outputs, shape), layers.values(), strict=True):
        del y
        u, v = layer.scaling * x @ layer.A.detach().mT, layer.scaling * g @ layer.B.detach()
        pairs = [(v, x)] * ("A" in train) + [(g, u)] * ("B" in train)
        squares += sum(left.square().sum(-1) * right.square().sum(-1) for left, right in pairs)
        factors += pairs
    weights = (present * clip / squares.sqrt().clamp_min(clip))[..., None]
    return [(left * weights).mT @ right for left, right in factors]


def _padded(chosen: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The clients' examples `[clients, b]`, padded with example 0, and where there is one."""
    longest = max(1, *map(len, chosen))
    index = np.stack([np.pad(own, (0, longest - len(own))) for own in chosen])
    return torch.from_numpy(index), torch.from_numpy(np.stack([np.arange(longest) < len(own) for own in chosen]))


def through(model: LoraModel, layers: dict[str, _Layer], index: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The inputs of the layers for the examples `index`, and their outputs with the gradients of the summed loss by these."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, layer in layers.items():
        model.set_stack(name, [(layer.A, layer.B, layer.scaling)])
        keep = lambda module, given, output, name=name: seen.__setitem__(name, (given[0].detach(), output))  # noqa: E731
        hooks.append(model.targets[name].module.register_forward_hook(keep))
    task = model.task
    try:
        losses = task.objective.losses(
            model.module(**task.train.inputs.batch(index, equal_lengths=True)), task.train.labels[index]
        )
    finally:
        for hook in hooks:
            hook.remove()
    outputs = [seen[name][1] for name in layers]
    return [seen[name][0] for name in layers], list(zip(outputs, torch.autograd.grad(losses.sum(), outputs), strict=True))


def _rows(inputs, outputs, shape):
    for x, (y, g) in zip(inputs, outputs, strict=True):
        if x.ndim != 2:
            raise ValueError(f"quick: expected a layer's input [examples, in], got {list(x.shape)}")
        yield x.reshape(shape), y.detach().reshape(shape), g.reshape(shape)


def _reply(job: Job, layers: dict[str, _Layer], place: int) -> ClientUpdate:
    held = job.download.adapter
    changed = {
        name: layer.with_factors(layers[name].A[place].detach().clone(), layers[name].B[place].detach().clone())
        for name, layer in held.layers.items()
    }
    return ClientUpdate(type(held)(changed, held.tensors, held.config), job.num_examples, job.client.name)
