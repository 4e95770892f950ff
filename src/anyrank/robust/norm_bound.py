"""Steps that are much longer than the others' are shortened.

Sun, Kairouz, Suresh and McMahan, "Can You Really Backdoor Federated Learning?", arXiv 1911.07963, section 4: norm clipping,
here with a bound that follows the cohort.

Two lengths are bounded. The step of the effective weights does not depend on how a product is written as factors. The change of
the factors does, and methods that average factors depend on it: `(1e6 B, 1e-6 A)` is the same product as `(B, A)`, and its mean
with other clients' factors is not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from anyrank import devices
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.change import between, units
from anyrank.messages.records import ClientUpdate, Download, Job, ServerState
from anyrank.messages.spooled import is_kept, rebuilt
from anyrank.robust.base import Rule, Screened
from anyrank.robust.steps import along, distance, square, total

FEWEST = 3  # updates that have a median: of a round, or of one rank
_SLACK = (0.0, *(10.0**-digits for digits in range(7, 0, -1)), 0.5, 0.75, 1.0)  # of the share: stored numbers are rounded


class Lengths(NamedTuple):
    """Of one update: the norm of its step (0 if a part of the product stays with the client), and of the change of the factors
    and tensors that it sends, in the units of `anyrank.messages.change`."""

    step: float
    change: float

    def within(self, bounds: Lengths) -> bool:
        return self.step <= bounds.step and self.change <= bounds.change

    def times(self, factor: float) -> Lengths:
        return Lengths(factor * self.step, factor * self.change)


@dataclass(frozen=True)
class NormBound(Rule):
    """An update with a length of more than `factor` times the median is shortened to that length, and one of more than `far`
    times the median is rejected (0: no limit).

    An update that is shortened keeps its weight and holds the mean back; one that is rejected has none. Medians are taken of
    the clients of one rank where three or more of the round hold it, since larger ranks take longer steps, else of the whole
    round. A client whose honest update may be longer than the median one (`reach`, in any unit, by its number of examples: it
    takes more local steps, or adds more noise) may move so much further. Updates are shortened by moving their factors back
    towards the download. What stays with a client (`Download.private`) is neither measured nor moved.
    """

    factor: float = 3.0
    far: float = 0.0
    reach: Callable[[int], float] = field(default=lambda num_examples: 1.0, repr=False)

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        if len(updates) < FEWEST:
            return Screened(updates)  # of two steps, neither is the outlier
        by_name = {job.client.name: job for job in jobs}
        own = [by_name[update.client] for update in updates]
        found = [_measured(job, update) for job, update in zip(own, updates, strict=True)]
        reaches = [self.reach(update.num_examples) for update in updates]
        usual_reach = statistics.median(reaches)
        usual_of, usual_of_all = _medians_by_rank([job.client.rank for job in own], found), _medians(found)
        kept, shares, rejected = [], {}, {}
        for update, job, lengths, reach in zip(updates, own, found, reaches, strict=True):
            usual = usual_of.get(job.client.rank, usual_of_all).times(max(1.0, reach / usual_reach))
            if self.far and not lengths.within(usual.times(self.far)):
                rejected[update.client] = f"its step is more than {self.far:g} times as long as the median (guard.far)"
                continue
            if self.factor and not lengths.within(bounds := usual.times(self.factor)):
                update, shares[update.client] = shortened(job, update, lengths, bounds)
            kept.append(update)
        return Screened(kept, {}, rejected, shares)


def _medians_by_rank(ranks: Sequence[int], lengths: Sequence[Lengths]) -> dict[int, Lengths]:
    """Of each rank that has enough updates."""
    of_rank: dict[int, list[Lengths]] = {}
    for rank, each in zip(ranks, lengths, strict=True):
        of_rank.setdefault(rank, []).append(each)
    return {rank: _medians(peers) for rank, peers in of_rank.items() if len(peers) >= FEWEST}


def _medians(lengths: Sequence[Lengths]) -> Lengths:
    return Lengths(*(statistics.median(column) for column in zip(*lengths, strict=True)))


def _measured(job: Job, update: ClientUpdate) -> Lengths:
    lengths = measure(job.download, update.adapter)
    job.settle()
    if is_kept(update.adapter):
        devices.trim()
    return lengths


def measure(download: Download, trained: Adapter) -> Lengths:
    """The lengths of the way from `download` to `trained`; infinite if their squares are not finite numbers."""
    changes, squares = [0.0], []
    for name, before in download.adapter.layers.items():
        after, unit = trained.layers[name], units(before, download.rescale)
        for factor in download.train - download.private:
            start, end = getattr(before, factor), getattr(after, factor)
            changes.append(unit[factor] * distance(start[: after.rank] if factor == "A" else start[:, : after.rank], end))
        if not download.private:
            squares.append(square(before, after))
    tensors = {} if "tensors" in download.private else download.adapter.tensors
    changes += [distance(tensor, trained.tensors[name]) for name, tensor in tensors.items()]
    return Lengths(0.0 if download.private else total(squares, download, trained), math.hypot(*changes))


def shortened(job: Job, update: ClientUpdate, lengths: Lengths, bounds: Lengths) -> tuple[ClientUpdate, float]:
    """`update`, of these `lengths`, moved back towards what `job` sent until it is within `bounds` as it is stored; and the
    share of the way that counts. Apart from rounding, that is the longest such update. One that is too long to be measured
    does not count at all, share 0.
    """
    download = job.download
    share = min(1.0, bounds.change / lengths.change) if lengths.change else 1.0
    if lengths.step > bounds.step:
        share = min(share, _share(along(download, update.adapter), bounds.step))
    for slack in _SLACK:
        counts = share * (1 - slack)
        moved = _part(download, update.adapter, counts)
        if measure(download, moved).within(bounds):
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
    """`share` of the way from the download to `trained`, in each factor and tensor that the client sends."""
    moves = download.train - download.private

    def moved(name: str) -> LoraLayer:
        before, after = download.adapter.layers[name], trained.layers[name]
        A = between(before.A[: after.rank], after.A, share) if "A" in moves else after.A
        B = between(before.B[:, : after.rank], after.B, share) if "B" in moves else after.B
        return after.with_factors(A, B)

    layers = rebuilt(trained, moved)
    if "tensors" in download.private:
        return replace(trained, layers=layers)
    tensors = {name: between(tensor, trained.tensors[name], share) for name, tensor in download.adapter.tensors.items()}
    return replace(trained, layers=layers, tensors=tensors)
