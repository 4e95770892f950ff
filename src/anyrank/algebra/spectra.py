"""Rank collapse, measured (raFLoRA, arXiv 2602.13486, section 3): where the energy of the global update lies.

All figures come from the factors' spectra; the update itself is never formed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.algebra import lowrank

Spectra = Mapping[str, Tensor]


def spectra(adapter: Adapter, merged: Adapter | None = None) -> dict[str, Tensor]:
    """`{layer: singular values of scaling * B @ A}`, each `[min(rank, in, out)]`, falling, float64.

    `merged`: what has gone into the base model counts along with it, since users run the sum.
    """
    found = {}
    for name in sorted(adapter.layers):
        layer = adapter.layers[name]
        into_base = [merged.layers[name]] if merged and name in merged.layers else []
        found[name] = lowrank.spectrum(lowrank.stack([lowrank.of_layer(part) for part in (layer, *into_base)]))
    return found


def energy(values: Tensor) -> float:
    """`sum of sigma_i^2`."""
    return float((values.double() ** 2).sum())


def energy_beyond(spectra: Spectra, rank: int) -> float:
    """`1 - rho`: the share of all layers' energy that lies past singular value `rank`; 0 where there is no energy at all.

    With `rank` the smallest of the federation, rank collapse is this share falling towards 0 over the rounds.

    >>> energy_beyond({"layer": torch.tensor([2.0, 1.0])}, rank=1)
    0.2
    """
    total = sum(energy(values) for values in spectra.values())
    return sum(energy(values[rank:]) for values in spectra.values()) / total if total else 0.0


def partition_energy(spectra: Spectra, levels: Sequence[int]) -> list[float]:
    """The share of energy in each partition `(h_{i-1}, h_i]` between the federation's rank levels; zeros without energy."""
    edges = [0, *sorted(set(levels))]
    total = sum(energy(values) for values in spectra.values())
    parts = [sum(energy(v[low:high]) for v in spectra.values()) for low, high in itertools.pairwise(edges)]
    return [part / total if total else 0.0 for part in parts]


def effective_rank(spectra: Spectra) -> float:
    """`exp(H(sigma^2 / sum sigma^2))`, averaged over layers by their energy: 1 for one direction, n for n equal ones.

    >>> round(effective_rank({"layer": torch.ones(4)}), 9)
    4.0
    """
    total = sum(energy(values) for values in spectra.values())
    if not total:
        return 0.0
    weighted = 0.0
    for values in spectra.values():
        share = values.double() ** 2 / max(energy(values), torch.finfo(torch.float64).tiny)
        entropy = float(torch.special.entr(share).sum())
        weighted += energy(values) / total * math.exp(entropy)
    return weighted
