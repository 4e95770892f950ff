"""The seam between what is learned and how it is federated: a task is a frozen module, its LoRA targets and its examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from anyrank.config.sections import EvalConfig
from anyrank.messages.records import Scores


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


class Objective(Protocol):
    """What a task's outputs mean: the loss that is trained, and the score that is told."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each example of a batch, `[b]`, from the module's `outputs`; no example's depends on another's."""
        ...

    def score(self, module: nn.Module, examples: Examples, batch_size: int) -> Scores:
        """How `module` as it stands does on `examples`."""
        ...

    def under(self, config: EvalConfig) -> Objective:
        """This objective, scored as `[eval]` says. Raises `ConfigError` for what it cannot do."""
        ...


@dataclass(frozen=True)
class Classification:
    """Outputs are logits `[b, classes]`: cross-entropy, and the share of examples whose label has the largest logit."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    def score(self, module: nn.Module, examples: Examples, batch_size: int) -> Scores:
        correct, losses = [], []
        with torch.inference_mode():
            for index in torch.arange(len(examples)).split(batch_size):
                logits, labels = module(**examples.inputs.batch(index)), examples.labels[index]
                correct.append(logits.argmax(dim=1) == labels)
                losses.append(self.losses(logits, labels).double())
        return Scores(torch.cat(correct).cpu().numpy(), torch.cat(losses).cpu().numpy(), examples.labels.cpu().numpy())

    def under(self, config: EvalConfig) -> Classification:
        return self


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained and how it is scored; one object a process, shared by all clients, never changed.

    `module(**batch)` gives what `objective` reads, for a classifier logits `[b, classes]`. `targets`: full names of the modules
    that get LoRA; `trained`: full names of plain parameters trained beside them (a head). Labels of examples say to partitions
    and to per-client scores what kind of example each is. `columns`: other columns of the training data, for partitions.
    `base_model` and `head` say in the adapter's config and in the report what was used; `peft` are further entries of that
    config, such as PEFT's task type, by which its `AutoPeftModel...` classes know what to load.
    """

    name: str
    module: nn.Module
    targets: tuple[str, ...]
    train: Examples
    test: Examples
    label_names: tuple[str, ...]
    head: str
    base_model: str = ""
    peft: Mapping[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    objective: Objective = field(default_factory=Classification)


def resolve_targets(module: nn.Module, endings: Sequence[str]) -> tuple[str, ...]:
    """Full names of the submodules that `endings` name, by PEFT's rule: the whole name or a dotted ending of it."""
    names = [name for name, _ in module.named_modules() if name]
    return tuple(name for name in names if any(name == end or name.endswith(f".{end}") for end in endings))
