"""All checks on an upload before it enters a round. A bad upload is rejected without harm to other clients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer, overflow
from anyrank.adapter.lazy import outlined
from anyrank.errors import AnyRankError, shortened
from anyrank.messages import change
from anyrank.messages.records import BOTH, ClientUpdate, Download
from anyrank.messages.spooled import is_kept

_TOLD = 3  # names of which a reason tells
_MOST_METRICS = 100
_LARGEST = 10**100  # of a metric: so many clients' figures still add up to a number


class Rejected(AnyRankError):
    """An upload is rejected; the text of the error is the reason."""


def admit(update: Any, download: Download, client: str, num_examples: int, bound: float = math.inf) -> ClientUpdate:
    """The part of `update` that the server believes: the trained factors, under the server's own name, rank and weight.

    Its tensors are the server's own: plain copies, which nothing that sent them can change, or those in a spool, layer by
    layer. Whatever the download did not ask
    to train is taken from the download itself. Where the download allows pruning, a layer may come back at exactly the rank
    that pruning leaves. Raises `Rejected` for what is no update, an upload from somebody else, other layers or tensors than
    were sent, other shapes or dtypes, values or metrics that are not finite, factors whose change is too large to be stored,
    or a change of a norm above `bound` (`anyrank.messages.change`). A reply that breaks as it is looked at breaks here, too.
    """
    if not isinstance(update, ClientUpdate):
        raise Rejected(f"expected a client's update, got an object of type {_told(type(update).__name__)}")
    if update.client != client:
        raise Rejected(f"expected an update of {client}, got one of {_told(update.client or 'nobody')}")
    if type(update.num_examples) is not int or update.num_examples != num_examples:
        raise Rejected(f"reports {_told(update.num_examples)} examples, but {num_examples} are registered")
    sent, got = download.adapter, update.adapter
    _same_names("layers", sent.layers, got.layers)
    _same_names("tensors", sent.tensors, got.tensors)
    metrics = _metrics(update.metrics)
    believed = (_kept if is_kept(got) else _copied)(download, got)
    if bound < math.inf and not change.norm(download, believed) <= bound:
        raise Rejected(f"its change since the download is larger than the clip norm, {bound:g}")  # by how much is not told
    return ClientUpdate(believed, num_examples, client, metrics)


def _copied(download: Download, got: Adapter) -> Adapter:
    """What was sent, checked, in memory of the server's own."""
    sent = download.adapter
    layers = {name: _layer(name, sent.layers[name], got.layers[name], download, _copy) for name in sorted(sent.layers)}
    tensors = {name: _copy(name, sent.tensors[name], got.tensors[name]) for name in sorted(sent.tensors)}
    return Adapter(layers, tensors, sent.config)


def _kept(download: Download, got: Adapter) -> Adapter:
    """What lies in a file of this server, which nothing that sent it can change: checked there, layer by layer.

    It is compared with the shapes of the download, whose numbers are read only where some of them count as the reply's own.
    """
    sent = download.adapter
    shapes = outlined(sent.layers) if download.train >= BOTH and not download.pruning else sent.layers
    for name in sorted(sent.layers):
        _layer(name, shapes[name], got.layers[name], download, _checked)
    for name in sorted(sent.tensors):
        _checked(name, outlined(sent.tensors)[name], got.tensors[name])
    return Adapter(got.layers, got.tensors, sent.config)


def _same_names(what: str, sent: Mapping[str, Any], got: Any) -> None:
    """`Rejected` where `got` has other names than `sent`. No more of them are asked for than tell it."""
    if not isinstance(got, Mapping):
        raise Rejected(f"{what}: expected a mapping of names, got {_told(type(got).__name__)}")
    names = set(itertools.islice(got, len(sent) + _TOLD))
    lacking, strange = sorted(sent.keys() - names), sorted(map(_told, names - sent.keys()))
    if lacking or strange:
        told = [lacking[:_TOLD] or "none", strange[:_TOLD] or "none"]
        raise Rejected(f"{what} differ from what was sent: missing {told[0]}, unknown {told[1]}")


def _metrics(metrics: Any) -> dict[str, float]:
    """The metrics as plain numbers of moderate size, so that they can be added up and written down."""
    if not isinstance(metrics, Mapping):
        raise Rejected(f"metrics: expected a mapping of numbers by name, got {_told(type(metrics).__name__)}")
    names = list(itertools.islice(metrics, _MOST_METRICS + 1))
    if len(names) > _MOST_METRICS:
        raise Rejected(f"metrics: expected at most {_MOST_METRICS}, got more")
    return {str(name): _number(str(name), metrics[name]) for name in names}


def _number(name: str, value: Any) -> float:
    known = isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.complexfloating))
    if not known or not -_LARGEST < value < _LARGEST:
        raise Rejected(f"metric {_told(name)}: expected a finite number, got {_told(value)}")
    return int(value) if isinstance(value, (int, np.integer)) else float(value)


Take = Callable[[str, Tensor, Any], Tensor]


def _layer(name: str, sent: LoraLayer, got: Any, download: Download, take: Take) -> LoraLayer:
    if not isinstance(got, LoraLayer):
        raise Rejected(f"layer {name}: expected a LoRA layer, got {_told(type(got).__name__)}")
    if not got.scaling == sent.scaling:
        raise Rejected(f"layer {name}: expected scaling {sent.scaling}, got {_told(got.scaling)}")
    if download.pruning and got.rank == (kept := download.pruning.kept(sent.rank)):
        sent = sent.with_factors(sent.A[:kept], sent.B[:, :kept])
    A = take(f"layer {name}, A", sent.A, got.A) if "A" in download.train else sent.A
    B = take(f"layer {name}, B", sent.B, got.B) if "B" in download.train else sent.B
    layer = sent.with_factors(A, B)
    if large := overflow(layer):
        raise Rejected(f"layer {name}: {large} is too large for {sent.A.dtype}; the training that made it diverged")
    return layer


@torch.no_grad()
def _copy(where: str, sent: Tensor, got: Any) -> Tensor:
    """A copy of `got` in memory of its own, in the form of `sent`."""
    _check_form(where, sent, got)
    return _finite(where, torch.empty(sent.shape, dtype=sent.dtype, device=sent.device).copy_(got))


@torch.no_grad()
def _checked(where: str, sent: Tensor, got: Any) -> Tensor:
    """`got` itself, in the form of `sent`."""
    _check_form(where, sent, got)
    return _finite(where, got)


def _check_form(where: str, sent: Tensor, got: Any) -> None:
    if type(got) not in (Tensor, Parameter):  # other kinds compute, or fail, when they are looked at
        raise Rejected(f"{where}: expected a tensor, got {_told(type(got).__name__)}")
    if got.shape != sent.shape or got.dtype != sent.dtype:
        expected, came = (tuple(sent.shape), sent.dtype), (tuple(got.shape), got.dtype)
        raise Rejected(f"{where}: expected {expected[1]} of shape {expected[0]}, got {came[1]} of shape {came[0]}")
    if got.layout is not torch.strided or got.device.type == "meta":
        raise Rejected(f"{where}: expected numbers that lie side by side, got a tensor on {got.device}, {got.layout}")


def _finite(where: str, own: Tensor) -> Tensor:
    # A sum with NaN or infinity in it is not finite, and takes a tenth of the time; that of large numbers may not be, either.
    if own.is_floating_point() and not math.isfinite(own.sum()) and not torch.isfinite(own).all():
        raise Rejected(f"{where}: contains NaN or infinite values")
    return own


def _told(value: Any) -> str:
    """Somebody else's value as a reason may tell it: of a length that a log can bear."""
    if isinstance(value, int) and not -_LARGEST < value < _LARGEST:
        return "a whole number of more than 100 digits"
    return shortened(value if isinstance(value, str) else repr(value), 100)
