"""Compose releases of which an example is in one alternative only, whichever that is.

A run with several clients releases something about each of them, and one example is with one client: only that client's
releases count for it. Which client has it is not known here, and may be another one in the next run, so the worst choice is
taken.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from anyrank.privacy.accountants import ORDERS, Spending, composed, renyi

Alternatives = Sequence[Sequence[Spending]]  # the releases of one group of runs: those of each client that may have an example
_MOST_CHOICES = 12  # that are composed one by one, each of which may take a second


def worst(groups: Sequence[Alternatives], delta: float) -> float:
    """An upper bound of epsilon at `delta` for any choice of one alternative in each group, all chosen releases together.

    With many choices it is the Rényi bound, which takes the worst alternative of each group at each order.

    >>> one = [Spending(0.05, 1.0, 400)]
    >>> worst([[one]], 1e-5) == composed(tuple(one), 1e-5)
    True
    """
    groups = [kept for group in groups if (kept := _different(group))]
    if not groups:
        return 0.0
    if math.prod(map(len, groups)) <= _MOST_CHOICES:
        return max(composed(merged(itertools.chain(*choice)), delta) for choice in itertools.product(*groups))
    return bound(groups, delta)


def bound(groups: Sequence[Alternatives], delta: float) -> float:
    """The Rényi bound of `worst`, which is quick and larger."""
    groups = [kept for group in groups if (kept := _different(group))]
    return min(_of_order(groups, delta, order) for order in ORDERS) if groups else 0.0


def within(groups: Sequence[Alternatives], delta: float, target: float) -> bool:
    """Whether `worst` is at most `target`. The finer bound is computed only where the quick one does not decide it."""
    return bound(groups, delta) <= target or worst(groups, delta) <= target


def merged(spendings: Iterable[Spending]) -> tuple[Spending, ...]:
    """The same steps, each kind of step once."""
    steps: Counter[tuple[float, float]] = Counter()
    for each in spendings:
        steps[each.sampling_rate, each.noise_multiplier] += each.steps
    return tuple(Spending(rate, noise, count) for (rate, noise), count in sorted(steps.items()) if count)


def _different(group: Alternatives) -> list[tuple[Spending, ...]]:
    """The alternatives of a group without those that are there twice, or release nothing."""
    return sorted({steps for alternative in group if (steps := merged(alternative))}, key=repr)


def _of_order(groups: Sequence[Sequence[tuple[Spending, ...]]], delta: float, order: int) -> float:
    chosen = [max(group, key=lambda alternative: renyi(alternative, delta, order)) for group in groups]
    return renyi(itertools.chain(*chosen), delta, order)
