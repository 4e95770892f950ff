"""The trimmed mean and the median of each number, in the place of its mean.

Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018
(arXiv 1803.01498), definitions 1 and 2, here of factors instead of gradients, and slice by slice over the clients that have it.

For methods whose new factors are weighted sums of the clients' factors (`Method.weights`). In the coordinates of
`anyrank.messages.change`, in which all updates have the scaling 1, the method's number x of slice j is
`x = sum_k w_kj x_k = W_j * mean(x_k over owners)`, `W_j = sum_k w_kj`. The rule replaces that mean:

    x = W_j * T(x_k over the m owners of slice j),   T = (x_(c+1) + ... + x_(m-c)) / (m - 2c),   x_(1) <= ... <= x_(m)

with `c = ceil(trim m)`, at most `(m - 1) // 2`, for the trimmed mean, and the largest c for the median: the middle number, or
the mean of the two. `W_j` is 1 for means over owners. Where a client without a slice counts as zero in it (zeropad), `W_j` is
the owners' share of the examples: the slice is smaller, as the method wants it, and no zero stands in for a client in T. The
median would else be zero wherever less than half of the clients have a slice.

Clients count equally in T, whatever their numbers of examples: an order of numbers has no weights. Up to c owners of a slice
may be hostile, and T lies between the numbers of honest ones. With one owner or two, nothing is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyrank.adapter.layer import LoraLayer
from anyrank.messages.change import units
from anyrank.messages.records import Client, ClientUpdate, Download, ServerState
from anyrank.messages.spooled import rebuilt
from anyrank.methods.base import Method
from anyrank.methods.parts import Part
from anyrank.methods.registry import REGISTRY
from anyrank.robust.base import Rule

_NUMBERS = 1 << 18  # float64 numbers of all owners that are sorted at a time: 2 MB
_ROUNDING = 1e-9  # 0.07 of 100 clients are 7, though 0.07 * 100 is more than 7


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """Each number's mean without the share `trim` of the clients at each end, but one at least where three or more have it and
    `trim` is not 0."""

    trim: float = 0.1

    def cut(self, count: int) -> int:
        """How many of `count` numbers are left out at each end."""
        return min(math.ceil(self.trim * count - _ROUNDING), (count - 1) // 2)

    def aggregate(self, method: Method, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        after = method.aggregate(state, updates)  # what has no owner, and what is not trained, stays as the method has it
        if not updates:
            return after
        updates = sorted(updates, key=lambda update: update.client)
        sent = method.dispatch(state, Client(updates[0].client, 1))  # of a round, all downloads have the same factors to train
        adapter = after.adapter
        layers = rebuilt(adapter, lambda name: self._layer(method, sent, name, adapter.layers[name], updates))
        return replace(after, adapter=replace(adapter, layers=layers, tensors=self._tensors(adapter.tensors, updates)))

    def _layer(self, method: Method, sent: Download, name: str, layer: LoraLayer, updates: Sequence[ClientUpdate]) -> LoraLayer:
        """`layer` with each trained number of a slice that has owners by this rule."""
        parts = [Part(update.adapter.layers[name], update.num_examples, update.client) for update in updates]
        weights = method.weights(parts, layer.rank)
        own = units(layer, sent.rescale)
        A, B = layer.A.clone(), layer.B.clone()
        for slices, owners in _owned(weights):
            held = [parts[k].layer for k in owners]
            total = weights[:, slices].sum(dim=0)
            total = torch.where((total - 1).abs() < _ROUNDING, 1.0, total)  # shares of a whole, which rounding divided
            for factor, into in (("A", A.T), ("B", B)):
                if factor in sent.train:
                    ratios = [units(each, sent.rescale)[factor] / own[factor] for each in held]
                    columns = [(each.A.T if factor == "A" else each.B)[:, slices] for each in held]
                    self._fill(into[:, slices], columns, ratios, total)
        return layer.with_factors(A, B)

    def _tensors(self, before: Mapping[str, Tensor], updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
        tensors = dict(before)
        for name in before:
            held = [update.adapter.tensors[name] for update in updates if name in update.adapter.tensors]
            if held:
                tensors[name] = torch.empty(held[0].shape, dtype=held[0].dtype, device=held[0].device)
                columns = [tensor.reshape(-1, 1) for tensor in held]
                self._fill(tensors[name].view(-1, 1), columns, [1.0] * len(held), torch.ones(1, dtype=torch.float64))
        return tensors

    def _fill(self, into: Tensor, columns: Sequence[Tensor], ratios: Sequence[float], total: Tensor) -> None:
        """`into[i, j] = total[j] * T(ratios[k] columns[k][i, j] over k)`, some rows at a time."""
        step = max(1, _NUMBERS // (len(columns) * into.shape[1]))
        for start in range(0, len(into), step):
            rows = slice(start, start + step)
            numbers = torch.stack([column[rows].cpu().double() for column in columns], dim=-1)
            numbers *= torch.tensor(ratios, dtype=torch.float64)
            found = total * self.centre(numbers)
            into[rows] = found if into.is_floating_point() else found.round()  # a counter is a whole number

    def centre(self, numbers: Tensor) -> Tensor:
        """T over the last dimension of `numbers`, float64, which are sorted in place.

        >>> TrimmedMean(0.2).centre(torch.tensor([1e30, 1.0, 2.0, 6.0, -5.0], dtype=torch.float64)).item()  # (1 + 2 + 6) / 3
        3.0
        """
        numbers.numpy().sort(axis=-1)  # NumPy sorts several times as fast as torch
        count = numbers.shape[-1]
        cut = self.cut(count)
        kept = numbers[..., cut : count - cut]
        mean = (kept / kept.shape[-1]).sum(dim=-1)  # divided first: no sum is larger than its largest number
        return mean.clamp(kept[..., 0], kept[..., -1]).add_(0.0)  # no zero is negative: which of two was kept is chance


@dataclass(frozen=True)
class Median(TrimmedMean):
    """Each number's median: the middle one, or the mean of the two in the middle."""

    trim: float = 0.5


def _owned(weights: Tensor) -> list[tuple[slice, list[int]]]:
    """The slices that have owners, in runs of slices with the same owners: which slices, and which clients (rows)."""
    owners = weights.gt(0).T.tolist()
    runs: list[tuple[slice, list[int]]] = []
    for j, having in enumerate(owners):
        if runs and owners[j - 1] == having:
            runs[-1] = slice(runs[-1][0].start, j + 1), runs[-1][1]
        else:
            runs.append((slice(j, j + 1), [k for k, has in enumerate(having) if has]))
    return [(slices, clients) for slices, clients in runs if clients]


def suits(method: type[Method] | Method) -> bool:
    """Whether the method's new factors are weighted sums of the clients' factors."""
    return method.weights is not None


def suitable() -> str:
    """The names of the methods that these rules are for."""
    return ", ".join(name for name, kind in sorted(REGISTRY.items()) if suits(kind) and not kind.reference)
