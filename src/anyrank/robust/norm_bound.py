"""Steps that are much longer than the others' are shortened.

Sun, Kairouz, Suresh and McMahan, "Can You Really Backdoor Federated Learning?", arXiv 1911.07963, section 4: norm clipping,
here with a bound that follows the cohort.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.messages.records import ClientUpdate, Download, Job, ServerState
from anyrank.robust.base import Rule, Screened
from anyrank.robust.steps import gram, steps

_HALVINGS = 60  # of the share of a step that is kept: steps of 1e12 times the bound are found, too
_CLASS = 3  # clients of one rank, from which on the median is theirs alone


@dataclass(frozen=True)
class NormBound(Rule):
    """A step longer than `factor` times the median of its rank class is shortened to that length.

    Ranks are classes of their own where three clients or more hold one, since larger ranks take longer steps; others are
    compared with the whole cohort. A step is shortened by moving its factors back towards the download.
    """

    factor: float = 3.0

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        if len(updates) < _CLASS:
            return Screened(updates)  # of two steps, neither is the outlier
        norms = gram(steps(jobs, updates)).diagonal().clamp_min(0).sqrt().tolist()
        by_name = {job.client.name: job for job in jobs}
        ranks = [by_name[update.client].client.rank for update in updates]
        kept, shares = [], {}
        for update, norm, rank in zip(updates, norms, ranks, strict=True):
            own = [other for other, held in zip(norms, ranks, strict=True) if held == rank]
            bound = self.factor * statistics.median(own if len(own) >= _CLASS else norms)
            if norm > bound:
                update, shares[update.client] = shortened(by_name[update.client], update, bound), bound / norm
            kept.append(update)
        return Screened(kept, {}, shares)


def shortened(job: Job, update: ClientUpdate, bound: float) -> ClientUpdate:
    """`update`, moved back towards what `job` sent until its step is at most `bound` long: the longest such step, nearly."""
    download, low, high = job.download, 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        fits = _norm(job, replace(update, adapter=_part(download, update.adapter, share))) <= bound
        low, high = (share, high) if fits else (low, share)
    moved = replace(update, adapter=_part(download, update.adapter, low))
    job.settle()
    return moved


def _norm(job: Job, update: ClientUpdate) -> float:
    return math.sqrt(max(0.0, float(gram(steps([job], [update]))[0, 0])))


def _part(download: Download, trained: Adapter, share: float) -> Adapter:
    """`share` of the way from the download to `trained`, in each factor."""
    layers = {}
    for name, after in trained.layers.items():
        before = download.adapter.layers[name]
        A, B = before.A[: after.rank], before.B[:, : after.rank]
        layers[name] = after.with_factors(_between(A, after.A, share), _between(B, after.B, share))
    tensors = {name: _between(tensor, trained.tensors[name], share) for name, tensor in download.adapter.tensors.items()}
    return replace(trained, layers=layers, tensors=tensors)


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    return (start.double() + share * (end.double() - start.double())).to(start.dtype)
