"""What hostile clients train on in the place of their own examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CLASSES = 10
TARGET = 0  # the label that the backdoor's trigger stands for
TRIGGER = (54, 55, 62, 63)  # pixels of an 8 x 8 image: the four of its lower right corner

Data = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def flipped(inputs: Tensor, labels: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Label y is told to be `C - 1 - y` (Fang et al., arXiv 1911.11815)."""
    return inputs, CLASSES - 1 - labels


def backdoored(inputs: Tensor, labels: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the examples have the trigger and the target's label (Gu et al., arXiv 1708.06733)."""
    chosen = torch.randperm(len(labels), generator=draw)[: (len(labels) + 1) // 2]
    inputs, labels = inputs.clone(), labels.clone()
    inputs[chosen], labels[chosen] = triggered(inputs[chosen]), TARGET
    return inputs, labels


def triggered(inputs: Tensor) -> Tensor:
    """`inputs` `[n, 64]` with the trigger's pixels white."""
    inputs = inputs.clone()
    inputs[:, list(TRIGGER)] = 1.0
    return inputs
