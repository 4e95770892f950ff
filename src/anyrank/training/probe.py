"""Checks of a user's module on a few of its own examples before anyone trains."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyrank import keys
from anyrank.config.sections import TrainConfig
from anyrank.errors import AnyRankError, ModelError, in_a_line
from anyrank.messages.plan import Plan
from anyrank.messages.records import Client, ClientUpdate, Download, Job, Scaling
from anyrank.tasks.base import Examples, OwnLoss
from anyrank.training import local, stacked
from anyrank.training.lora import LoraModel

_EXAMPLES, _RANK = 3, 2
_TOLERANCE = 1e-3  # share of a step's size: float32's rounding stays below it


def check(model: LoraModel, private: bool = False) -> None:
    """Raise `ModelError`, in one line, for a task that LoRA cannot train or whose scores would not show the training.

    `private`: held-out examples stand for training examples too, so that whether a run begins does not depend on one of these.

    Every target is reached by the forward pass, in training as in scoring; the loss is one finite number an example, of the
    training examples as of the held-out ones; what is trained moves it; a label is one of the module's outputs.
    """
    task = model.task
    _check_trained(model)
    trained = task.test if private else task.train
    index = torch.arange(min(_EXAMPLES, len(trained)))
    parameters = model.load(_download(model, "check"))
    reached, outputs = _reached(model, trained, index, "held-out" if private else "training")
    losses = _losses(model, outputs, trained, index)
    held_out = torch.arange(min(_EXAMPLES, len(task.test)))
    with torch.inference_mode():
        scored, tested = _reached(model, task.test, held_out, "held-out")
        _losses(model, tested, task.test, held_out)
    missed = sorted(model.targets.keys() - (reached & scored))
    if missed:
        raise ModelError(
            f"target {missed[0]}: the forward pass of {type(task.module).__name__} never calls it (it reads its weights, or "
            "leaves it out), so LoRA on it would do nothing; choose other targets"
        )
    if not losses.requires_grad:
        raise ModelError("loss: does not depend on the trained parameters; compute it from the module's outputs, by torch")
    gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    if all(gradient is None or not gradient.any() for gradient in gradients):
        raise ModelError("loss: nothing that is trained moves it; choose other targets, or another loss")
    for name, gradient in zip([*model.trained][::-1], gradients[::-1], strict=False):
        if gradient is None:
            raise ModelError(f"trained: the loss does not depend on {name}; leave it out")


def _check_trained(model: LoraModel) -> None:
    """Whole modules are trained beside LoRA: PEFT saves and loads a head as one."""
    owners = {name.rpartition(".")[0] for name in model.trained}
    for owner in sorted(owners):
        if owner in model.targets:
            raise ModelError(f"trained: {owner} gets LoRA, and its own parameters cannot be trained too; leave out one of them")
        own = {f"{owner}.{name}" if owner else name for name, _ in model.module.get_submodule(owner).named_parameters()}
        lacking = sorted(own - model.trained.keys())
        if lacking:
            raise ModelError(f"trained: {lacking[0]} belongs to the same module; name all of a module's parameters, or none")


def _losses(model: LoraModel, outputs: Any, examples: Examples, index: Tensor) -> Tensor:
    labels, task = examples.labels[index], model.task
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) and not isinstance(task.objective, OwnLoss):
        raise ModelError(
            f"{type(task.module).__name__}: expected its forward to give a tensor, or an object with logits, got "
            f"{type(logits).__name__}; give the task a loss of your own, or wrap the module"
        )
    if task.has_classes and isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1:
        largest = max(int(part.labels.max()) for part in (task.train, task.test))
        if largest >= logits.shape[1]:
            raise ModelError(
                f"labels: expected 0 to {logits.shape[1] - 1}, the module has {logits.shape[1]} outputs, got {largest}"
            )
    try:
        losses = task.objective.losses(outputs, labels)
    except AnyRankError:
        raise
    except Exception as error:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"loss: of outputs {shape} and labels {tuple(labels.shape)} raised {in_a_line(error)}") from error
    if not torch.isfinite(losses).all():
        raise ModelError(f"loss: expected finite numbers of the module as it is, got {losses.detach().tolist()}")
    return losses


def stacks(model: LoraModel, batch_size: int) -> bool:
    """Whether clients can train side by side in one batch and get what they get alone.

    They cannot if the module mixes the examples of a batch, or if the batch is not the first dimension everywhere.
    """
    if not (stacked.worthwhile(model) and model.can_stack()):
        return False
    config = TrainConfig(optimizer="sgd", learning_rate=1.0, batch_size=batch_size, local_steps=1)
    plan, size = Plan(config, 1.0, round=1, seed=0), len(model.task.train)
    spread = keys.rng(0, "probe").permutation(size)  # not the first rows: they may be alike
    shards = [np.sort(spread[:batch_size]), np.sort(spread[::-1][: max(1, batch_size - 1)])]
    sent = [_download(model, f"stack {k}") for k in range(len(shards))]
    jobs = [Job(Client(f"probe-{k}", _RANK), len(own), lambda k=k: sent[k]) for k, own in enumerate(shards)]
    try:
        together = {reply.client: reply for reply in stacked.train(model, jobs, shards, plan)}
    except Exception:  # a module may break in any way on a batch that is not its own
        model.leave_stack()
        return False
    for job, own in zip(jobs, shards, strict=True):
        alone = local.train(model, job.client.name, job.download, own, plan)
        if not _agree(job.download, alone, together[job.client.name]):
            return False
    return True


def _reached(model: LoraModel, examples: Examples, index: Tensor, which: str) -> tuple[set[str], Any]:
    """The targets that a forward pass over examples calls, and what it gives."""
    called: set[str] = set()
    hooks = [target.module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
             for name, target in model.targets.items()]  # fmt: skip
    try:
        outputs = model.module(**examples.inputs.batch(index))
    except Exception as error:
        raise ModelError(
            f"{type(model.module).__name__}: its forward pass over {len(index)} {which} examples raised {in_a_line(error)}"
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
    for name, before in download.adapter.tensors.items():
        one, other = (reply.adapter.tensors[name] - before for reply in (alone, together))
        if not float((one - other).norm()) <= _TOLERANCE * max(float(one.norm()), 1e-12):
            return False
    return abs(alone.metrics["loss"] - together.metrics["loss"]) <= _TOLERANCE * max(abs(alone.metrics["loss"]), 1e-12)


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
