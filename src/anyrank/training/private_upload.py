"""One client's upload under client-level privacy: its whole change of the round is clipped, and noise is added to it.

Such a method trains one factor per round, and all clients have the same other factor. A client's change of the product is then
linear in its change of the trained factor: with A fixed, it is `s dB A`, whose norm is `|dB M|` with `M = (s^2 A A^T)^(1/2)`,
from the small Gram matrix alone. The mechanism works in these coordinates. Over all layers, together with unchanged plain
tensors, the change is scaled down to the clip norm C, noise of standard deviation `sigma C` is added to every coordinate, and
both are mapped back by the inverse of M. Any client changes these coordinates by at most C compared with a client that changed
nothing; this is the sensitivity of adding or removing it. The noise in the product has the same size for any scaling, A or
rank.

`M` may be singular (slices that are still zero), so a small multiple of the identity is added. This makes the norm slightly
larger, never smaller, so the bound still holds. `M` depends only on the download, which is not secret.

If the server adds the noise, it adds it to factors, and an upload is clipped in their norm instead (`anyrank.messages.change`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages import change
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Download
from anyrank.privacy.grid import Gaussian
from anyrank.privacy.noise import Draws, Mechanism
from anyrank.training import local
from anyrank.training.lora import LoraModel

_RIDGE = 1e-3  # of the mean eigenvalue of the Gram matrix


def train(
    model: LoraModel, client: str, download: Download, declared: int, examples: np.ndarray, plan: Plan, mechanism: Mechanism
) -> ClientUpdate:
    """The client's update after ordinary training on `examples` (indices `[n]`), clipped, with noise unless the server adds it.

    A client whose training fails, in whatever way, uploads no change, in the form of any other upload, because its failure
    would reveal something about its data.
    """
    try:
        adapter = local.train(model, client, download, examples, plan).adapter
    except Exception:  # whatever it is: it would say something about the client's data
        adapter = download.adapter
    return _SENT[mechanism.plan.noise_at](download, ClientUpdate(adapter, declared, client), plan.round, mechanism)


def _noised(download: Download, trained: ClientUpdate, round: int, mechanism: Mechanism) -> ClientUpdate:
    privacy, draws = mechanism.plan, mechanism.draws(round, trained.client)
    noise = privacy.noise[trained.num_examples]
    return replace(trained, adapter=release(download, trained.adapter, privacy.clip_norm, noise, draws))


def _clear(download: Download, trained: ClientUpdate, round: int, mechanism: Mechanism) -> ClientUpdate:
    return replace(trained, adapter=change.clipped(download, trained.adapter, mechanism.plan.upload_bound))


_SENT = {"client": _noised, "server": _clear}  # by who adds the noise


def release(download: Download, trained: Adapter, clip_norm: float, noise_multiplier: float, draws: Draws) -> Adapter:
    """`trained`, its change since `download` scaled down to `clip_norm`, plus noise of `noise_multiplier * clip_norm`."""
    (factor,) = download.train
    before = download.adapter
    metrics = {name: _metric(layer, factor) for name, layer in before.layers.items()}
    changes = {
        **{name: _in(_change(trained, before, name, factor), metric, factor) for name, metric in metrics.items()},
        **{name: tensor.double() - before.tensors[name].double() for name, tensor in trained.tensors.items()},
    }
    noise = Gaussian(noise_multiplier, clip_norm, sum(change.numel() for change in changes.values()))
    noisy = {
        name: torch.from_numpy(noise.added(change.cpu().numpy(), draws)).to(change.device)
        for name, change in sorted(_clipped(changes, clip_norm).items())
    }
    layers = {name: _moved(layer, factor, _out(noisy[name], metrics[name], factor)) for name, layer in before.layers.items()}
    tensors = {name: (tensor.double() + noisy[name]).to(tensor.dtype) for name, tensor in before.tensors.items()}
    return replace(before, layers=layers, tensors=tensors)


def coordinates(download: Download, one: Adapter, other: Adapter) -> dict[str, Tensor]:
    """`{tensor: one - other}` of two uploads of `download`, in the coordinates in which the mechanism works (float64)."""
    (factor,) = download.train
    moved = {
        f"layer {name}, {factor}": _in(_change(one, other, name, factor), _metric(layer, factor), factor)
        for name, layer in download.adapter.layers.items()
    }
    return moved | {f"parameter {name}": tensor.double() - other.tensors[name].double() for name, tensor in one.tensors.items()}


def _change(trained: Adapter, before: Adapter, name: str, factor: str) -> Tensor:
    return getattr(trained.layers[name], factor).double() - getattr(before.layers[name], factor).double()


def _clipped(changes: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """`changes`, scaled down together to a norm of at most `clip_norm`; zeros if their norm is not finite."""
    norm = torch.cat([change.flatten() for change in changes.values()]).norm()
    if not torch.isfinite(norm):
        return {name: torch.zeros_like(change) for name, change in changes.items()}
    return {name: change * (clip_norm / norm.clamp_min(clip_norm)) for name, change in changes.items()}


def _metric(layer: LoraLayer, factor: str) -> Tensor:
    """`M` `[rank, rank]` (float64): the square root of the Gram matrix of the fixed factor, with the scaling."""
    fixed = layer.A.double() if factor == "B" else layer.B.double().T
    gram = layer.scaling**2 * fixed @ fixed.T
    mean = float(gram.diagonal().mean())
    values, vectors = torch.linalg.eigh(gram + (_RIDGE * mean or 1.0) * torch.eye(len(gram), dtype=torch.float64))
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _in(change: Tensor, metric: Tensor, factor: str) -> Tensor:
    return change @ metric if factor == "B" else metric @ change


def _out(moved: Tensor, metric: Tensor, factor: str) -> Tensor:
    return torch.linalg.solve(metric, moved, left=factor == "A")


def _moved(layer: LoraLayer, factor: str, change: Tensor) -> LoraLayer:
    moved = (getattr(layer, factor).double() + change).to(layer.A.dtype)
    return layer.with_factors(layer.A, moved) if factor == "B" else layer.with_factors(moved, layer.B)
