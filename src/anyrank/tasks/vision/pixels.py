"""Pictures as inputs of a module: stored as bytes, a quarter of the size of floats, and scaled batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anyrank.tasks.inputs import TensorInputs


@dataclass(frozen=True)
class Scale:
    """The scaling of pixels for a model: `(value · factor - mean) / std`, with one mean and std per channel, or for all."""

    factor: float = 1 / 255
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __call__(self, values: Tensor) -> Tensor:
        """uint8 `[b, channels, h, w]` as float32."""
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.mean, self.std))
        return (values.float() * self.factor - mean) / std


@dataclass(frozen=True, eq=False, kw_only=True)
class PixelInputs(TensorInputs):
    """Pictures `values` uint8 `[n, channels, h, w]`; a batch is `inputs` `[b, channels, h, w]` float32."""

    scale: Scale

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor | bool]:
        return {self.name: self.scale(self.values[index])}


@dataclass(frozen=True, eq=False)
class HiddenInputs(TensorInputs):
    """What a frozen part gave for each example, `values` `[n, …]` float32 or bfloat16; a batch is `inputs` `[b, …]` float32."""

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor | bool]:
        return {self.name: self.values[index].float()}


def turned(values: np.ndarray, degrees: int) -> np.ndarray:
    """Pictures `[..., h, w]` rotated counterclockwise by `degrees`, a multiple of 90."""
    return np.ascontiguousarray(np.rot90(values, degrees // 90, axes=(-2, -1)))
