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
from anyrank.robust.steps import along, norm, norms

_CLASS = 3  # clients of one rank, from which on the median is theirs alone
_SLACK = (0.0, *(10.0**-digits for digits in range(7, 0, -1)), 0.5, 0.75, 1.0)  # of the share: stored numbers are rounded


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
        found = norms(jobs, updates).tolist()
        by_name = {job.client.name: job for job in jobs}
        ranks = [by_name[update.client].client.rank for update in updates]
        kept, shares = [], {}
        for update, length, rank in zip(updates, found, ranks, strict=True):
            own = [other for other, held in zip(found, ranks, strict=True) if held == rank]
            bound = self.factor * statistics.median(own if len(own) >= _CLASS else found)
            if length > bound:
                update, shares[update.client] = shortened(by_name[update.client], update, bound)
            kept.append(update)
        return Screened(kept, {}, shares)


def shortened(job: Job, update: ClientUpdate, bound: float) -> tuple[ClientUpdate, float]:
    """`update`, moved back towards what `job` sent until its step, as it is stored, is at most `bound` long; and the share of
    the way that counts. Where the length reaches the bound, that is the longest such step, but for rounding. A step that is too
    long to be measured does not count at all, share 0.
    """
    download = job.download
    share = _share(along(download, update.adapter), bound)
    for slack in _SLACK:
        counts = share * (1 - slack)
        moved = _part(download, update.adapter, counts)
        if norm(download, moved) <= bound:
            break
    job.settle()
    return replace(update, adapter=moved), counts


def _share(square: Sequence[float], bound: float) -> float:
    """A share in [0, 1) at which the squared norm, `square[i] t^i` summed, passes `bound^2`, by bisection; near 0 if it is not
    finite."""
    low, high = 0.0, 1.0
    while low < (share := (low + high) / 2) < high:
        length = math.sqrt(max(sum(c * share**power for power, c in enumerate(square)), 0.0))
        low, high = (share, high) if length <= bound else (low, share)  # NaN is not
    return low


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
