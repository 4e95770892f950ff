"""One client's training in one round: a pure function of its download, its examples and the run seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from anyrank import keys
from anyrank.config import TrainConfig
from anyrank.errors import RunFailed
from anyrank.models import LoraModel
from anyrank.records import ClientUpdate, Download


@dataclass(frozen=True)
class Plan:
    """How clients train in one round: the configuration, the round's learning rate, and a factor on the local steps."""

    config: TrainConfig
    learning_rate: float
    round: int
    seed: int
    step_factor: int = 1


def plan_round(config: TrainConfig, round: int, rounds: int, seed: int, step_factor: int = 1) -> Plan:
    """The plan of `round` (from 1): the learning rate falls over the rounds by the schedule, from the first to the last."""
    progress = (round - 1) / max(rounds - 1, 1)
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.schedule]
    rate = config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * left
    return Plan(config, rate, round, seed, step_factor)


def train(model: LoraModel, client: str, download: Download, examples: np.ndarray, plan: Plan) -> ClientUpdate:
    """The client's update after training on `examples` (indices `[n]` of the task's training set, n >= 1).

    Raises `RunFailed` when the loss stops being finite: the client then sends nothing.
    """
    parameters = model.load(download)
    start = [parameter.detach().clone() for parameter in parameters] if plan.config.proximal_mu else []
    optimizer = make_optimizer(parameters, plan)
    losses = []
    for step, index in enumerate(batches(len(examples), plan, client), 1):
        index = torch.from_numpy(examples[index])
        logits = model.module(**model.task.train.inputs.batch(index))
        loss = model.task.losses(logits, model.task.train.labels[index]).mean()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RunFailed(diverged(losses[-1], step))
        (loss + _proximal(parameters, start, plan.config.proximal_mu) if start else loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    metrics = {"loss": sum(losses) / len(losses), "steps": len(losses)}
    return ClientUpdate(model.read(download), len(examples), client, metrics)


def batches(num_examples: int, plan: Plan, client: str) -> list[np.ndarray]:
    """Positions of each local step's batch. Epochs end in a shorter batch; steps go round the examples, shuffled anew."""
    rng, size = keys.rng(plan.seed, "local", plan.round, client), plan.config.batch_size
    if plan.config.local_epochs:
        epochs = [rng.permutation(num_examples) for _ in range(plan.config.local_epochs * plan.step_factor)]
        return [order[at : at + size] for order in epochs for at in range(0, num_examples, size)]
    size = min(size, num_examples)
    steps = plan.config.local_steps * plan.step_factor
    order = np.concatenate([rng.permutation(num_examples) for _ in range(-(-steps * size // num_examples))])
    return [order[step * size : (step + 1) * size] for step in range(steps)]


def diverged(loss: float, step: int) -> str:
    """Why a client whose loss is no number any more sends nothing."""
    return f"loss is {loss} at local step {step}; lower train.learning_rate"


def make_optimizer(parameters: list[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    config = plan.config
    fused = parameters[0].device.type in ("cpu", "cuda")
    common = {"lr": plan.learning_rate, "weight_decay": config.weight_decay, "fused": fused}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, **common)
    return torch.optim.AdamW(parameters, **common)


def _proximal(parameters: list[nn.Parameter], start: list[Tensor], mu: float) -> Tensor:
    """FedProx (Li et al. 2020, equation 2): `mu / 2 * |w - w_global|^2` over everything trained."""
    return mu / 2 * sum(((now - then) ** 2).sum() for now, then in zip(parameters, start, strict=True))
