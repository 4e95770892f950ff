"""Checks of a user's module on a few of its own examples before anyone trains."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from anyrank import keys
from anyrank.config.sections import TrainConfig
from anyrank.errors import ModelError, in_a_line
from anyrank.messages.plan import Plan
from anyrank.messages.records import Client, ClientUpdate, Download, Job, Scaling
from anyrank.training import local, stacked
from anyrank.training.lora import LoraModel

_EXAMPLES, _RANK = 3, 2
_TOLERANCE = 1e-3  # share of a step's size: float32's rounding stays below it


def check(model: LoraModel) -> None:
    """Raise `ModelError`, in one line, for a task that LoRA cannot train or whose scores would not show the training.

    The forward pass must use every target, in training and in scoring; the loss must be one finite number per example, and must
    change with the trained parameters.
    """
    task = model.task
    index = torch.arange(min(_EXAMPLES, len(task.train)))
    parameters = model.load(_download(model, "check"))
    reached, outputs = _reached(model, index)
    with torch.inference_mode():
        scored, _ = _reached(model, index)
    missed = sorted(model.targets.keys() - (reached & scored))
    if missed:
        raise ModelError(
            f"target {missed[0]}: the forward pass of {type(task.module).__name__} never calls it (it reads its weights, or "
            "leaves it out), so LoRA on it would do nothing; choose other targets"
        )
    losses = task.objective.losses(outputs, task.train.labels[index])
    if not torch.isfinite(losses).all():
        raise ModelError(f"loss: expected finite numbers from the untrained module, got {losses.detach().tolist()}")
    if not losses.requires_grad:
        raise ModelError(
            "loss: does not depend on the trained parameters; expected it to be computed from the module's outputs by torch"
        )
    gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    if all(gradient is None or not gradient.any() for gradient in gradients):
        raise ModelError("loss: training changes nothing in it; choose other targets, or another loss")


def stacks(model: LoraModel) -> bool:
    """Whether clients can be stacked in one batch with the same results as alone.

    They cannot if the module mixes the examples of a batch, or if the batch is not the first dimension everywhere.
    """
    if not (stacked.worthwhile(model) and model.can_stack()):
        return False
    plan = Plan(TrainConfig(optimizer="sgd", learning_rate=1.0, batch_size=_EXAMPLES, local_steps=1), 1.0, round=1, seed=0)
    size = len(model.task.train)
    shards = [np.unique(np.arange(k, k + _EXAMPLES) % size) for k in (0, size // 2)]
    sent = [_download(model, f"stack {k}") for k in range(len(shards))]
    jobs = [Job(Client(f"probe-{k}", _RANK), len(own), lambda k=k: sent[k]) for k, own in enumerate(shards)]
    try:
        together = {reply.client: reply for reply in stacked.train(model, jobs, shards, plan)}
    except (RuntimeError, IndexError, ValueError, TypeError):
        model.leave_stack()
        return False
    for job, own in zip(jobs, shards, strict=True):
        alone = local.train(model, job.client.name, job.download, own, plan)
        if not _agree(job.download, alone, together[job.client.name]):
            return False
    return True


def _reached(model: LoraModel, index: Tensor) -> tuple[set[str], object]:
    """The targets that a forward pass over examples calls, and its output."""
    called: set[str] = set()
    hooks = [target.module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
             for name, target in model.targets.items()]  # fmt: skip
    try:
        outputs = model.module(**model.task.train.inputs.batch(index))
    except Exception as error:
        raise ModelError(
            f"{type(model.module).__name__}: its forward pass over {len(index)} training examples raised {in_a_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return called, outputs


def _agree(download: Download, alone: ClientUpdate, together: object) -> bool:
    if not isinstance(together, ClientUpdate):
        return False
    for name, layer in download.adapter.layers.items():
        for factor in sorted(download.train):
            before = getattr(layer, factor)
            one, other = (getattr(reply.adapter.layers[name], factor) - before for reply in (alone, together))
            if not float((one - other).norm()) <= _TOLERANCE * max(float(one.norm()), 1e-12):
                return False
    return True


def _download(model: LoraModel, what: str) -> Download:
    """Random factors of a small rank, so that every part of a layer has a gradient."""
    draw = keys.generator(0, "probe", what)
    rank = min(_RANK, *(min(target.out, target.width) for target in model.targets.values()))
    start = model.start(rank, Scaling(1.0, "constant"), seed=0)
    layers = {
        name: layer.with_factors(
            *(torch.randn(f.shape, generator=draw).to(f) / math.sqrt(f.shape[1]) for f in (layer.A, layer.B))
        )
        for name, layer in start.layers.items()
    }
    return Download(replace(start, layers=layers), {name: tuple(range(layer.rank)) for name, layer in layers.items()})
