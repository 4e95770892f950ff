"""How far a merge is from the mean of the clients' products: what a cut to a rank took, and what a method does otherwise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import lowrank
from anyrank.messages.records import ClientUpdate


class Missed:
    """`|mean - merged| / |mean|` of Frobenius norms over all layers, for each folder of a merge.

    The mean of a layer is `sum_k p_k s_k B_k A_k` over the clients that have it, `p_k` the client's share of their examples.
    The products are never formed: all inner products come from Gram matrices of the factors, in float64, so that a distance
    below about 1e-8 of the mean reads as 0.
    """

    def __init__(self) -> None:
        self._mean = 0.0
        self._squares: dict[str, float] = defaultdict(float)

    def add(
        self, sent: Mapping[str, LoraLayer], updates: Sequence[ClientUpdate], merged: Mapping[str, Sequence[LoraLayer]]
    ) -> None:
        """One layer: `sent` by the clients, and `merged` `{folder: the layers that its users apply together}`."""
        counts = {update.client: update.num_examples for update in updates if update.client in sent}
        total = sum(counts.values())
        mean = lowrank.stack([lowrank.of_layer(sent[client], count / total) for client, count in counts.items() if count])
        square = lowrank.inner(mean, mean)
        self._mean += square
        for folder, layers in merged.items():
            found = lowrank.stack([lowrank.of_layer(layer) for layer in layers])
            self._squares[folder] += square - 2 * lowrank.inner(mean, found) + lowrank.inner(found, found)

    def shares(self) -> dict[str, float]:
        """`{folder: share of the mean}`; empty where the clients' products add up to nothing."""
        if not self._mean or not math.isfinite(self._mean):
            return {}
        found = {folder: math.sqrt(max(0.0, square) / self._mean) for folder, square in self._squares.items()}
        return {folder: share if share > _LEAST else 0.0 for folder, share in found.items()}


_LEAST = 3e-8  # the square root of float64's rounding: differences below it are noise
