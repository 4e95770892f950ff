"""The seam between what is learned and how it is federated: a task is a frozen module, its LoRA targets and its examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from anyrank.config.sections import EvalConfig
from anyrank.messages.records import Scores
from anyrank.tasks import metrics
from anyrank.tasks.metrics import Metric

NOTHING: frozenset[str] = frozenset()


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
    """Inputs with their labels `[n]`: whole numbers from 0 for classes, or floats `[n, ...]` where a loss wants those."""

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Objective(Protocol):
    """What a task's outputs mean: the loss that is trained, and the score that is told. `gives`: what it has for metrics, of
    `metrics.OF`."""

    @property
    def gives(self) -> frozenset[str]: ...

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each example of a batch, `[b]`, from the module's `outputs`; no example's depends on another's."""
        ...

    def score(self, module: nn.Module, examples: Examples, batch_size: int, of: Set[str] = NOTHING) -> Scores:
        """How `module` as it stands does on `examples`; `of`: what metrics are going to ask for, of `metrics.OF`."""
        ...

    def under(self, config: EvalConfig) -> Objective:
        """This objective, scored as `[eval]` says. Raises `ConfigError` for what it cannot do."""
        ...


@dataclass(frozen=True)
class Classification:
    """Outputs are logits `[b, classes]`: cross-entropy, and the share of examples whose label has the largest logit."""

    gives: ClassVar[frozenset[str]] = frozenset(metrics.OF)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    def score(self, module: nn.Module, examples: Examples, batch_size: int, of: Set[str] = NOTHING) -> Scores:
        return read(self, module, examples, batch_size, of)

    def under(self, config: EvalConfig) -> Classification:
        return self


@dataclass(frozen=True)
class OwnLoss:
    """A loss of one's own, `function(outputs, labels) -> [b]`, no example's depending on another's.

    Labels that are whole numbers `[n]`, with outputs `[b, classes]`, are classes: accuracy is told as in `Classification`.
    Otherwise nothing is right or wrong: the loss is told, and the metrics, whose predictions are the outputs.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    gives: ClassVar[frozenset[str]] = frozenset(metrics.OF)  # scores only of classes: which they are, outputs tell

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.function(outputs, labels)

    def score(self, module: nn.Module, examples: Examples, batch_size: int, of: Set[str] = NOTHING) -> Scores:
        return read(self, module, examples, batch_size, of)

    def under(self, config: EvalConfig) -> OwnLoss:
        return self


@torch.inference_mode()
def read(objective: Objective, module: nn.Module, examples: Examples, batch_size: int, of: Set[str]) -> Scores:
    """The scores of a module with one output for each example, as it stands.

    Classes are whole-number labels `[n]` with outputs `[b, classes]`: predictions are the likeliest of them. Without classes
    they are the outputs themselves, kept where `of` has predictions.
    """
    losses, predictions, scores = [], [], []
    classes = True
    for index in torch.arange(len(examples)).split(batch_size):
        outputs, labels = module(**examples.inputs.batch(index)), examples.labels[index]
        losses.append(objective.losses(outputs, labels).double().cpu())
        classes = labels.ndim == 1 and not labels.is_floating_point() and outputs.ndim == 2 and outputs.shape[1] > 1
        if classes:
            predictions.append(outputs.argmax(dim=1).cpu())
            scores += [outputs.float().softmax(dim=1).cpu()] if "scores" in of else []
        elif "predictions" in of:
            alone = outputs.ndim == labels.ndim + 1 and outputs.shape[-1] == 1  # [b, 1] beside labels [b]
            predictions.append((outputs.squeeze(-1) if alone else outputs).float().cpu())
    labels = examples.labels.cpu().numpy()
    told = torch.cat(predictions).numpy() if predictions else None
    correct = told == labels if classes else None
    return Scores(correct, torch.cat(losses).numpy(), labels, told, torch.cat(scores).numpy() if scores else None)


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained and how it is scored; one object a process, shared by all clients, never changed.

    `module(**batch)` gives what `objective` reads, for a classifier logits `[b, classes]`. `targets`: full names of the modules
    that get LoRA; `trained`: full names of plain parameters trained beside them (a head). Labels of examples say to partitions
    and to per-client scores what kind of example each is. `columns`: other columns of the training data, for partitions.
    `base_model` and `head` say in the adapter's config and in the report what was used; `peft` are further entries of that
    config, such as PEFT's task type, by which its `AutoPeftModel...` classes know what to load. `metrics`: figures of its own
    beside accuracy and loss, by name: functions `metric(labels, predictions)`, or `Metric`s; always computed.
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
    metrics: Mapping[str, Callable[..., Any] | Metric] = field(default_factory=dict)


def judged(task: Task, config: EvalConfig) -> Task:
    """`task`, scored as `[eval]` says, with the metrics that it adds. Raises `ConfigError` for what the task cannot tell."""
    objective = task.objective.under(config)
    return replace(task, objective=objective, metrics=metrics.choose(task.metrics, config, objective.gives))


def score(task: Task, batch_size: int) -> Scores:
    """How the task's module as it stands does on its held-out examples, its metrics reckoned.

    Probabilities are let go with it: they are the one thing here that grows with examples times classes. Raises `ConfigError`
    for a metric that fails, or whose value is no finite number.
    """
    chosen = [metrics.as_metric(name, value) for name, value in task.metrics.items()]
    found = task.objective.score(task.module, task.test, batch_size, frozenset(metric.of for metric in chosen))
    return replace(found, scores=None, figures=metrics.compute(chosen, found, task.label_names))


def resolve_targets(module: nn.Module, endings: Sequence[str]) -> tuple[str, ...]:
    """Full names of the submodules that `endings` name, by PEFT's rule: the whole name or a dotted ending of it."""
    names = [name for name, _ in module.named_modules() if name]
    return tuple(name for name in names if any(name == end or name.endswith(f".{end}") for end in endings))
