"""The geometric median of steps in the place of their mean.

Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing 2022
(arXiv 1912.13445), algorithm 2: Weiszfeld's iteration, smoothed. The median is a weighted mean of the steps, and so are all the
distances that its iteration needs: it runs on their Gram matrix, at a cost that does not depend on the size of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyrank.messages.records import ClientUpdate, Job, ServerState
from anyrank.robust.base import Rule, Screened
from anyrank.robust.steps import finite, gram

_ITERATIONS = 500
_SETTLED = 1e-9  # relative change of every weight at which the iteration ends
_SMOOTHING = 1e-6  # of the median distance: below it, a step counts as the median itself
_FAR = "geometric median: so far from the other updates that it has no weight"
_SCALE = 1 << 50  # weights as whole numbers, which is what the methods weigh clients by; float64 has 53 bits


@dataclass(frozen=True)
class GeometricMedian(Rule):
    """`argmin_z sum_k p_k |step_k - z|`, `p_k` by examples: the method then weighs each client as the median does.

    Up to half of the weight may be hostile, and moves the median by a bounded distance.
    """

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        updates = sorted(updates, key=lambda update: update.client)  # so that rounding does not follow the order of arrival
        if len(updates) < 2:
            return Screened(updates)
        products = gram(jobs, updates)
        some = finite(products)
        counts = torch.tensor([updates[k].num_examples for k in some], dtype=torch.float64)
        if not some:
            return Screened([], dict.fromkeys((update.client for update in updates), _FAR))
        weights = torch.zeros(len(updates), dtype=torch.float64)
        weights[some] = weiszfeld(products[some][:, some], counts / counts.sum())
        return reweighted(updates, weights)


def weiszfeld(gram: Tensor, shares: Tensor) -> Tensor:
    """The weights `[K]`, of sum 1, under which the mean of the steps is their geometric median; `shares` `[K]` of sum 1.

    >>> line = torch.tensor([0.0, 1.0, 100.0], dtype=torch.float64)  # on a line it is the median
    >>> weights = weiszfeld(line[:, None] * line[None, :], torch.full((3,), 1 / 3, dtype=torch.float64))
    >>> round(float(weights @ line), 2)
    1.0
    """
    weights = shares
    for _ in range(_ITERATIONS):
        away = _away(gram, weights)
        floor = _SMOOTHING * float(away.median()) or torch.finfo(torch.float64).tiny
        pulls = shares / away.clamp_min(floor)
        after = pulls / pulls.sum()
        settled = bool(((after - weights).abs() <= _SETTLED * weights).all())  # each by itself: a far step's weight is tiny
        weights = after
        if settled:
            break
    return weights


def _away(gram: Tensor, weights: Tensor) -> Tensor:
    """The distance of each step from the weighted mean, `[K]`."""
    mean = gram @ weights
    return (gram.diagonal() - 2 * mean + weights @ mean).clamp_min(0.0).sqrt()


def reweighted(updates: Sequence[ClientUpdate], weights: Tensor) -> Screened:
    """The updates, each counting by its weight: the largest as 2^50 examples. One that would not count as one is refused."""
    counts = [round(float(weight) / float(weights.max()) * _SCALE) for weight in weights]
    kept = [replace(update, num_examples=n) for update, n in zip(updates, counts, strict=True) if n]
    return Screened(kept, {update.client: _FAR for update, n in zip(updates, counts, strict=True) if not n})
