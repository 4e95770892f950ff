"""Steps of clients, and their geometry: norms and inner products of what uploads change, from factors alone.

A client's step is the change of its effective weight, `s' B' A' - s B A`, over all layers, and of its plain tensors. Norms and
inner products of it do not depend on how a product is written as factors, so that nobody gains by `(B G, G^-1 A)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import lowrank
from anyrank.algebra.lowrank import Product
from anyrank.messages.records import ClientUpdate, Download, Job


@dataclass(frozen=True, eq=False)
class Step:
    """What one client changed: a product for each layer, and a difference for each plain tensor (float64)."""

    layers: Mapping[str, Product]
    tensors: Mapping[str, Tensor]


def steps(jobs: Sequence[Job], updates: Sequence[ClientUpdate], common: bool = False) -> list[Step]:
    """The step of each update, in their order. `common`: only of the slices that every client of `updates` was sent,
    layer by layer, where there are any.
    """
    by_name = {job.client.name: job for job in jobs}
    sent = []
    for update in updates:
        job = by_name[update.client]
        sent.append(job.download)
        job.settle()
    kept = _common(sent) if common else {}
    return [_step(download, update, kept) for download, update in zip(sent, updates, strict=True)]


def gram(steps: Sequence[Step]) -> Tensor:
    """`g_kl = <step_k, step_l>` `[K, K]` (float64): `tr((B_k^T B_l)(A_l A_k^T))` summed over layers, and over plain tensors."""
    found = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for row, one in enumerate(steps):
        for column, other in enumerate(steps[: row + 1]):
            total = sum(lowrank.inner(one.layers[name], other.layers[name]) for name in one.layers)
            total += sum(float((one.tensors[name] * other.tensors[name]).sum()) for name in one.tensors)
            found[row, column] = found[column, row] = total
    return found


def distances(gram: Tensor) -> Tensor:
    """Squared distances between steps `[K, K]`, from their Gram matrix; never below zero."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0.0)


def _common(sent: Sequence[Download]) -> dict[str, frozenset[int]]:
    """The server's slices of each layer that all downloads have; of a layer with none, all of them."""
    names = sent[0].adapter.layers
    common = {name: frozenset.intersection(*(frozenset(each.slices[name]) for each in sent)) for name in names}
    return {name: slices or frozenset(j for each in sent for j in each.slices[name]) for name, slices in common.items()}


def _step(download: Download, update: ClientUpdate, kept: Mapping[str, frozenset[int]]) -> Step:
    before, after = download.adapter, update.adapter
    layers = {}
    for name, layer in before.layers.items():
        mask = [float(not kept or j in kept[name]) for j in download.slices[name]]
        layers[name] = lowrank.difference(_masked(after.layers[name], mask), _masked(layer, mask))
    tensors = {name: after.tensors[name].double() - tensor.double() for name, tensor in before.tensors.items()}
    return Step(layers, tensors)


def _masked(layer: LoraLayer, mask: Sequence[float]) -> Product:
    """The product of the slices that `mask` keeps; a pruned layer has fewer than were sent."""
    return lowrank.of_layer(layer, torch.tensor(mask[: layer.rank], dtype=torch.float64))
