"""Clients' contributions to a layer, and the weights that they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import ClientUpdate


class Part(NamedTuple):
    """One client's contribution to one layer: its trained `layer`, the `num_examples` that weigh it, and its `client` name."""

    layer: LoraLayer
    num_examples: int
    client: str = ""


# --- weights ---------------------------------------------------------------------------------------------------------


def client_weights(parts: Sequence[Part]) -> Tensor:
    """`p_k = n_k / sum n`, `[K]`."""
    counts = torch.tensor([part.num_examples for part in parts], dtype=torch.float64)
    return counts / counts.sum()


def ownership(parts: Sequence[Part], rank: int) -> Tensor:
    """1 if client k has slice j (`r_k >= j`), else 0: `[K, rank]`."""
    ranks = torch.tensor([part.layer.rank for part in parts])
    return (torch.arange(rank) < ranks[:, None]).double()


def slice_weights(parts: Sequence[Part], rank: int) -> Tensor:
    """`q_kj = n_k / sum of n over the clients that have slice j`, `[K, rank]`; zero if client k lacks it."""
    owned = client_weights(parts)[:, None] * ownership(parts, rank)
    return owned / owned.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)


def padded_weights(parts: Sequence[Part], rank: int) -> Tensor:
    """`p_k` if client k has slice j, else 0, `[K, rank]`: a client without the slice counts as zero in it."""
    return client_weights(parts)[:, None] * ownership(parts, rank)


# --- plain tensors ---------------------------------------------------------------------------------------------------


def mean_tensors(previous: Mapping[str, Tensor], updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Each plain tensor's mean over the clients that sent it, weighted by examples; `previous` if no client did."""
    tensors = dict(previous)
    for name in sorted({name for update in updates for name in update.adapter.tensors}):
        senders = [update for update in updates if name in update.adapter.tensors]
        total = sum(update.num_examples for update in senders)
        mean = sum(update.adapter.tensors[name].double() * (update.num_examples / total) for update in senders)
        dtype = senders[0].adapter.tensors[name].dtype
        tensors[name] = (mean if dtype.is_floating_point else mean.round()).to(dtype)  # a counter is a whole number
    return tensors
