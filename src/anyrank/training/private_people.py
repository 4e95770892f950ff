"""One client's private training in one round where a person is protected: user-level DP-SGD over what is trained.

Each step draws every person of the client with the plan's sampling rate, whatever the number of their examples (McMahan et al.,
ICLR 2018, "Learning differentially private recurrent language models", algorithm 1, with one step in the place of local
training; Charles et al. 2024, "Fine-tuning large language models with user-level differential privacy", DP-SGD-ULS). A drawn
person's gradient is the mean over their examples, or over `examples_per_person` of them, which are drawn anew in each step from
the mechanism's own numbers. It is clipped as one, over all that is trained together; the rest is as for single examples
(`private_examples`). Adding or removing a person changes the sum by at most the clip norm, whichever of their examples are
used, so that the accountant needs no other term for that draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from anyrank.errors import DataError
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Download
from anyrank.privacy.noise import Draws, Mechanism
from anyrank.training import private_examples
from anyrank.training.lora import LoraModel
from anyrank.training.private_examples import PerExample

_AT_ONCE = 32  # examples that go through the model together, also where a step draws few persons: fewer are slow


def train(
    model: LoraModel, client: str, download: Download, declared: int, examples: np.ndarray, plan: Plan, mechanism: Mechanism
) -> ClientUpdate:
    """The client's update after training on `examples` (indices `[n]` of the task's training set), under `mechanism`.

    It reports no losses, and only the number of persons that the plan declares.
    """
    if model.people is None:
        raise DataError("data.person: the model was opened without it, so that nobody knows whose each example is")
    privacy, parts = mechanism.plan, plan.config.accumulation_steps
    people = by_person(examples, model.people[examples])

    def clipped_sum(sums: PerExample, draws: Draws, rate: float, turn: np.ndarray) -> list[Tensor]:
        drawn = [people[place] for place in np.flatnonzero(turn & (draws.random(len(people)) < rate))]
        used = [torch.from_numpy(bounded(own, privacy.examples_per_person, draws)) for own in drawn]
        return clipped(sums, used, privacy.clip_norm, parts, -(-max(privacy.batch_size, _AT_ONCE) // parts))

    return private_examples.descend(model, client, download, declared, plan, mechanism, len(people), clipped_sum)


def by_person(examples: np.ndarray, owners: np.ndarray) -> list[np.ndarray]:
    """The examples of each person, in the order of their first ones; `owners` `[n]`: whose each of `examples` `[n]` is.

    >>> [own.tolist() for own in by_person(np.array([3, 5, 8]), np.array([7, 2, 7]))]
    [[3, 8], [5]]
    """
    _, first, place = np.unique(owners, return_index=True, return_inverse=True)
    order = np.argsort(place, kind="stable")
    groups = np.split(examples[order], np.cumsum(np.bincount(place))[:-1])
    return [groups[person] for person in np.argsort(first, kind="stable")]


def bounded(examples: np.ndarray, most: int, draws: Draws) -> np.ndarray:
    """`most` of a person's examples, drawn uniformly without replacement, in their order; all of them if they are no more, or
    if `most` is 0."""
    if not most or len(examples) <= most:
        return examples
    return examples[np.sort(np.argsort(draws.random(len(examples)), kind="stable")[:most])]


def clipped(sums: PerExample, people: Sequence[Tensor], clip_norm: float, parts: int, most: int) -> list[Tensor]:
    """The sum over `people`, indices `[n]` of the examples of each, of their mean gradients, each scaled down to `clip_norm`
    over all tensors; in float64.

    People go through the model in `parts` parts, and the examples of a part `most` at a time, or as many as it has people, so
    that memory does not grow with what one person has. A person with a gradient that is not finite counts as zero.
    """
    totals = [private_examples.wide(torch.zeros_like(parameter)) for parameter in sums.parameters]
    size = -(-len(people) // parts)
    for start in range(0, len(people), size or 1):
        means = _means(sums, people[start : start + size], max(size, most))
        for total, own in zip(totals, private_examples.clipped_sum(means, clip_norm), strict=True):
            total.add_(own)
    return totals


def _means(sums: PerExample, people: Sequence[Tensor], most: int) -> list[Tensor]:
    """The mean gradient of each person, `[people, ...]` for each parameter."""
    examples = torch.cat(list(people))
    if len(examples) == len(people):
        return sums.each(examples)
    counts = torch.tensor([len(own) for own in people])
    owners = torch.arange(len(people)).repeat_interleave(counts)
    means = [parameter.new_zeros(len(people), *parameter.shape) for parameter in sums.parameters]
    for place in torch.arange(len(examples)).split(most):
        whose, each = owners[place].unique_consecutive(return_counts=True)
        gradients = sums.each(examples[place])
        for mean, gradient in zip(means, gradients, strict=True):
            for person, own in zip(whose.tolist(), gradient.split(each.tolist()), strict=True):
                mean[person] += own.sum(dim=0) / counts[person]
    return means
