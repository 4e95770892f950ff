"""One client's training in one round: a pure function of its download, its examples and the run seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from anyrank import keys
from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import TrainConfig
from anyrank.errors import RunFailed
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Download, Pruning
from anyrank.training import precondition
from anyrank.training.lora import LoraModel
from anyrank.training.optimizers import Optimizer


def train(model: LoraModel, client: str, download: Download, examples: np.ndarray, plan: Plan) -> ClientUpdate:
    """The client's update after training on `examples` (indices `[n]` of the task's training set, n >= 1).

    Raises `RunFailed` when the loss stops being finite: the client then sends nothing.
    """
    parameters = model.load(download)
    start = [parameter.detach().clone() for parameter in parameters] if plan.config.proximal_mu else []
    tails = _tails(model, download.pruning)
    inverses = precondition.of_download(download, plan.config, model.device)
    optimizer = Optimizer(parameters, plan.config, plan.learning_rate, inverses)
    losses = []
    for step, index in enumerate(batches(len(examples), plan, client), 1):
        losses.append(_backward(model, torch.from_numpy(examples[index]), plan.config))
        if not math.isfinite(losses[-1]):
            raise RunFailed(diverged(losses[-1], step))
        penalties = [_proximal(parameters, start, plan.config.proximal_mu)] if start else []
        penalties += [download.pruning.penalty * tail for tail in _tails(model, download.pruning).values()]
        if penalties:
            sum(penalties).backward()
        optimizer.step()
    metrics = {"loss": sum(losses) / len(losses), "steps": len(losses)}
    adapter = model.read(download)
    if download.pruning:
        adapter = _prune(adapter, tails, _tails(model, download.pruning), download.pruning)
    return ClientUpdate(adapter, len(examples), client, metrics)


def _backward(model: LoraModel, index: Tensor, config: TrainConfig) -> float:
    """The mean loss of the examples `index` `[b]`; its gradient is added to the trained parameters.

    The examples go through the model in parts of one size (the last may be smaller), each weighted by its number of examples,
    so that the gradient is that of the whole batch. Checkpointed layers must run again unchanged, with the padding.
    """
    total, train = 0.0, model.task.train
    for part in index.split(-(-config.batch_size // config.accumulation_steps)):
        outputs = model.module(**train.inputs.batch(part, equal_lengths=config.gradient_checkpointing))
        loss = model.task.objective.losses(outputs, train.labels[part]).sum() / len(index)
        loss.backward()
        total += float(loss.detach())
    return total


def batches(num_examples: int, plan: Plan, client: str) -> list[np.ndarray]:
    """Positions of each local step's batch. Epochs end with a shorter batch; steps cycle through reshuffled examples."""
    rng, size = keys.rng(plan.seed, "local", plan.round, client), plan.config.batch_size
    if plan.config.local_epochs:
        epochs = [rng.permutation(num_examples) for _ in range(plan.config.local_epochs * plan.step_factor)]
        return [order[at : at + size] for order in epochs for at in range(0, num_examples, size)]
    size = min(size, num_examples)
    steps = plan.config.local_steps * plan.step_factor
    order = np.concatenate([rng.permutation(num_examples) for _ in range(-(-steps * size // num_examples))])
    return [order[step * size : (step + 1) * size] for step in range(steps)]


def diverged(loss: float, step: int) -> str:
    """The reason why a client whose loss is not finite sends nothing."""
    return f"loss is {loss} at local step {step}; lower train.learning_rate"


def _proximal(parameters: list[Tensor], start: list[Tensor], mu: float) -> Tensor:
    """FedProx (Li et al. 2020, equation 2): `mu / 2 * |w - w_global|^2` over everything trained."""
    return mu / 2 * sum(((now - then) ** 2).sum() for now, then in zip(parameters, start, strict=True))


def _tails(model: LoraModel, pruning: Pruning | None) -> dict[str, Tensor]:
    """`{layer: |B[:, tail]| * |A[tail]|}` of the slices that pruning would drop (HetLoRA)."""
    norms = {}
    for name in model.targets if pruning else ():
        A, B = model.factors(name)
        kept = pruning.kept(len(A))
        if kept < len(A):
            norms[name] = torch.linalg.vector_norm(B[:, kept:]) * torch.linalg.vector_norm(A[kept:])
    return norms


def _prune(adapter: Adapter, before: Mapping[str, Tensor], after: Mapping[str, Tensor], pruning: Pruning) -> Adapter:
    """`adapter` without the tails that have become smaller."""
    layers = dict(adapter.layers)
    for name in after:
        if after[name] < before[name]:
            A, B = layers[name].A, layers[name].B
            kept = pruning.kept(len(A))
            layers[name] = layers[name].with_factors(A[:kept], B[:, :kept])
    return replace(adapter, layers=layers)
