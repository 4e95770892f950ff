"""The plan of local training in one round. A plan is public and is sent; the privacy mechanism is passed separately."""

from __future__ import annotations

import math
from dataclasses import dataclass

from anyrank.config.sections import TrainConfig


@dataclass(frozen=True)
class Plan:
    """How clients train in one round: the configuration, the round's learning rate, the run's `seed`, and a factor on the local
    steps.
    """

    config: TrainConfig
    learning_rate: float
    round: int
    seed: int
    step_factor: int = 1


def local_steps(config: TrainConfig, num_examples: int) -> int:
    """The steps that a client with `num_examples` takes in a round, before any factor.

    >>> local_steps(TrainConfig(local_epochs=2, batch_size=16), 40), local_steps(TrainConfig(local_steps=7), 40)
    (6, 7)
    """
    return config.local_epochs * math.ceil(num_examples / config.batch_size) or config.local_steps


def plan_round(config: TrainConfig, round: int, rounds: int, seed: int, step_factor: int = 1) -> Plan:
    """The plan of `round` (from 1): the learning rate falls over the rounds by the schedule, from the first to the last."""
    progress = (round - 1) / max(rounds - 1, 1)
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.schedule]
    rate = config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * left
    return Plan(config, rate, round, seed, step_factor)
