"""All checks on an upload before it enters a round. A bad upload is rejected without harm to other clients."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.errors import AnyRankError
from anyrank.messages import change
from anyrank.messages.records import ClientUpdate, Download


class Rejected(AnyRankError):
    """An upload is rejected; the text of the error is the reason."""


def admit(update: ClientUpdate, download: Download, client: str, num_examples: int, bound: float = math.inf) -> ClientUpdate:
    """The part of `update` that the server accepts: the trained factors, with the client's name, rank and weight as registered.

    Everything that the download did not train is taken from the download itself. If the download allows pruning, a layer may
    come back at exactly the rank that pruning leaves. Raises `Rejected` for an upload of another client, with other layers or
    tensors than were sent, with other shapes or dtypes, with values or metrics that are not finite, or with a change whose norm
    is above `bound` (`anyrank.messages.change`).
    """
    if update.client != client:
        raise Rejected(f"expected an update of {client}, got one of {update.client or 'nobody'}")
    if update.num_examples != num_examples:
        raise Rejected(f"reports {update.num_examples} examples, but {num_examples} are registered")
    sent, got = download.adapter, update.adapter
    _same_names("layers", sent.layers, got.layers)
    _same_names("tensors", sent.tensors, got.tensors)
    for key, value in update.metrics.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Rejected(f"metric {key}: expected a finite number, got {value!r}")
    layers = {name: _layer(name, sent.layers[name], got.layers[name], download) for name in sorted(sent.layers)}
    tensors = {name: _tensor(name, sent.tensors[name], got.tensors[name]) for name in sorted(sent.tensors)}
    believed = Adapter(layers, tensors, sent.config)
    if bound < math.inf and change.norm(download, believed) > bound:
        raise Rejected(f"its change since the download is larger than the clip norm, {bound:g}")  # the excess is not reported
    return replace(update, adapter=believed)


def _same_names(what: str, sent, got) -> None:
    lacking, strange = sorted(sent.keys() - got.keys()), sorted(got.keys() - sent.keys())
    if lacking or strange:
        raise Rejected(f"{what} differ from what was sent: missing {lacking[:3] or 'none'}, unknown {strange[:3] or 'none'}")


def _layer(name: str, sent: LoraLayer, got: LoraLayer, download: Download) -> LoraLayer:
    if got.scaling != sent.scaling:
        raise Rejected(f"layer {name}: expected scaling {sent.scaling}, got {got.scaling}")
    if download.pruning and got.rank == (kept := download.pruning.kept(sent.rank)):
        sent = sent.with_factors(sent.A[:kept], sent.B[:, :kept])
    A = _tensor(f"layer {name}, A", sent.A, got.A) if "A" in download.train else sent.A
    B = _tensor(f"layer {name}, B", sent.B, got.B) if "B" in download.train else sent.B
    return sent.with_factors(A, B)


def _tensor(where: str, sent: Tensor, got: Tensor) -> Tensor:
    if got.shape != sent.shape or got.dtype != sent.dtype:
        expected, came = (tuple(sent.shape), sent.dtype), (tuple(got.shape), got.dtype)
        raise Rejected(f"{where}: expected {expected[1]} of shape {expected[0]}, got {came[1]} of shape {came[0]}")
    # A sum with NaN or infinity is not finite, and takes a tenth of the time. A sum of large finite numbers may overflow too.
    if not math.isfinite(got.sum()) and not torch.isfinite(got).all():
        raise Rejected(f"{where}: contains NaN or infinite values")
    return got
