"""Twins of a private training: the same samples without noise, on the same way, with or without one example.

A twin is a mechanism for `trainer.train`. The first one is the mechanism as it is, and notes what it draws and the noisy
gradients that the optimizer is given. The second replays the samples without noise. It notes its own gradients, and hands the
optimizer the noisy ones: its weights are then those of the first one in every step, with any optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from anyrank.privacy.noise import Draws, Mechanism


@dataclass(frozen=True)
class Loud(Mechanism):
    """The mechanism as it is; `uniform`: the uniform numbers of each draw, `gradients`: the noisy gradients of each step."""

    uniform: list[np.ndarray] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)

    def draws(self, round: int, client: str) -> Draws:
        return _Noted(super().draws(round, client), self.uniform)

    def observe(self, parameters: Sequence[Tensor]) -> None:
        self.gradients.append(_gradients(parameters))


@dataclass(frozen=True)
class Quiet(Mechanism):
    """The silent twin of `loud`; without a noted training, only silent. `without`: the place of an example that is left out;
    `gradients`: its own gradients of each step."""

    loud: Loud | None = None
    without: int | None = None
    gradients: list[list[Tensor]] = field(default_factory=list)

    def draws(self, round: int, client: str) -> Draws:
        return _Again(list(self.loud.uniform) if self.loud else [], self.without)

    def observe(self, parameters: Sequence[Tensor]) -> None:
        noisy = self.loud.gradients[len(self.gradients)]
        self.gradients.append(_gradients(parameters))
        for parameter, gradient in zip(parameters, noisy, strict=True):
            parameter.grad = gradient.clone()


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad.detach().clone() for parameter in parameters]


@dataclass(frozen=True)
class _Noted:
    """Draws whose uniform numbers are noted."""

    source: Draws
    uniform: list[np.ndarray]

    def random(self, size: int) -> np.ndarray:
        self.uniform.append(self.source.random(size))
        return self.uniform[-1]

    def standard_normal(self, size: int) -> np.ndarray:
        return self.source.standard_normal(size)


@dataclass(frozen=True)
class _Again:
    """The same uniform numbers, without those of the example that is left out, and normal numbers of zero."""

    uniform: list[np.ndarray]
    without: int | None

    def random(self, size: int) -> np.ndarray:
        noted = self.uniform.pop(0)
        return noted if self.without is None or size == len(noted) else np.delete(noted, self.without)

    def standard_normal(self, size: int) -> np.ndarray:
        return np.zeros(size)


def most_drawn(uniform: Sequence[np.ndarray], examples: int, rate: float) -> tuple[int, list[bool]] | None:
    """The place of the example that was drawn in most steps, and in which steps it was; `None` if there is none."""
    if not examples or any(len(numbers) != examples for numbers in uniform):
        return None
    drawn = np.array([numbers < rate for numbers in uniform])
    place = int(drawn.sum(axis=0).argmax())
    return place, drawn[:, place].tolist()
