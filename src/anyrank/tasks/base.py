"""The seam between what is learned and how it is federated: a task is a frozen module, its LoRA targets and its examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn


class Inputs(Protocol):
    """Examples that can be handed to a module batch by batch."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of all examples."""
        ...

    def batch(self, index: Tensor, even: bool = False) -> dict[str, Tensor | bool]:
        """Keyword arguments of the module's `forward` for the examples `index` `[b]`; `even`: of one size for each example."""
        ...


@dataclass(frozen=True, eq=False)
class TensorInputs:
    """Inputs of one shape, held as one tensor `[n, ...]` that the module takes as the argument `name`."""

    values: Tensor
    name: str = "inputs"

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def batch(self, index: Tensor, even: bool = False) -> dict[str, Tensor | bool]:
        return {self.name: self.values[index]}


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with their labels `[n]` (whole numbers from 0)."""

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained and how it is scored; one object a process, shared by all clients, never changed.

    `module(**batch)` gives logits `[b, classes]`. `targets`: full names of the modules that get LoRA; `trained`: full names
    of plain parameters trained beside them (a head). `columns`: other columns of the training data, for partitions.
    `base_model` and `head` say in the adapter's config and in the report what was used.
    """

    name: str
    module: nn.Module
    targets: tuple[str, ...]
    train: Examples
    test: Examples
    label_names: tuple[str, ...]
    head: str
    base_model: str = ""
    trained: tuple[str, ...] = ()
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each example of a batch, `[b]`."""
        return nn.functional.cross_entropy(logits, labels, reduction="none")


def evaluate(task: Task, batch_size: int) -> tuple[float, float]:
    """Accuracy and mean loss of the module, as it stands, on the held-out examples."""
    correct, loss = 0, 0.0
    with torch.inference_mode():
        for index in torch.arange(len(task.test)).split(batch_size):
            logits = task.module(**task.test.inputs.batch(index))
            labels = task.test.labels[index]
            correct += int((logits.argmax(dim=1) == labels).sum())
            loss += float(task.losses(logits, labels).double().sum())
    return correct / len(task.test), loss / len(task.test)


def resolve_targets(module: nn.Module, endings: Sequence[str]) -> tuple[str, ...]:
    """Full names of the submodules that `endings` name, by PEFT's rule: the whole name or a dotted ending of it."""
    names = [name for name, _ in module.named_modules() if name]
    return tuple(name for name in names if any(name == end or name.endswith(f".{end}") for end in endings))
