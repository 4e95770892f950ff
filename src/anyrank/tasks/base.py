"""The task interface between model and federation: a task is a frozen module, its LoRA targets and its examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from anyrank.config.sections import EvalConfig
from anyrank.data.sites import OWNER
from anyrank.errors import DataError, ModelError, nearest
from anyrank.messages.records import Facts, Scores
from anyrank.tasks import metrics
from anyrank.tasks.inputs import Inputs, TensorInputs, fitted, inputs_of, labels_of, split_items
from anyrank.tasks.metrics import Metric

__all__ = [
    "Classification",
    "Examples",
    "Inputs",
    "Objective",
    "OwnLoss",
    "Task",
    "TensorInputs",
    "resolve_targets",
]

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with their labels `[n]`: whole numbers from 0 for classes, any numbers for a custom loss.

    `inputs`: a tensor or array `[n, ...]`, a mapping of the module's arguments to these, a data set with `len()` and `[i]`, or
    an `Inputs` object. Without `labels`, the items of a data set have both: pairs, or mappings with `labels` or `label`.
    Raises `DataError` if the numbers of labels and inputs differ, if there are none, or if values are not finite.

    >>> len(Examples(np.zeros((3, 4)), [0, 1, 0]))
    3
    """

    inputs: Inputs
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        inputs, labels = split_items(self.inputs) if self.labels is None else (inputs_of(self.inputs), labels_of(self.labels))
        if len(inputs) != len(labels) or not len(labels):
            raise DataError(f"Examples: expected as many labels as inputs, at least one, got {len(labels)} and {len(inputs)}")
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.labels)


class Objective(Protocol):
    """The meaning of a task's outputs: the loss that is trained, and the score that is reported. `gives`: the inputs that it
    has
    for metrics, of `metrics.OF`."""

    @property
    def gives(self) -> frozenset[str]: ...

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each example of a batch, `[b]`, from the module's `outputs`; it must not depend on other examples."""
        ...

    def score(self, module: nn.Module, examples: Examples, batch_size: int, of: Set[str] = NOTHING) -> Scores:
        """The scores of `module` in its current state on `examples`; `of`: the inputs that metrics need, of `metrics.OF`."""
        ...

    def under(self, config: EvalConfig) -> Objective:
        """This objective, scored as set in `[eval]`. Raises `ConfigError` for settings that it does not support."""
        ...


@dataclass(frozen=True)
class Classification:
    """Outputs are logits `[b, classes]`: cross-entropy, and the share of examples whose label has the largest logit."""

    gives: ClassVar[frozenset[str]] = frozenset(metrics.OF)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(_tensor_of(outputs), labels, reduction="none")

    def score(self, module: nn.Module, examples: Examples, batch_size: int, of: Set[str] = NOTHING) -> Scores:
        return read(self, module, examples, batch_size, of)

    def under(self, config: EvalConfig) -> Classification:
        return self


@dataclass(frozen=True)
class OwnLoss:
    """A custom loss, `function(outputs, labels) -> [b]`; an example's loss must not depend on other examples.

    Labels that are whole numbers `[n]`, with outputs `[b, classes]`, are classes: accuracy is reported as in `Classification`.
    Otherwise no answer is right or wrong: the loss is reported, and the metrics, whose predictions are the outputs.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    gives: ClassVar[frozenset[str]] = frozenset(metrics.OF)  # scores only for classes, which the outputs show

    def losses(self, outputs: Any, labels: Tensor) -> Tensor:
        losses = self.function(_tensor_of(outputs), labels)
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        if shape != (len(labels),):
            raise ModelError(
                f"loss: expected one value per example, [{len(labels)}], got {shape if shape != () else 'a single number'}; a "
                "loss of torch.nn gives that with reduction='none', one of more numbers an example is to be averaged over them"
            )
        return losses

    def score(self, module: nn.Module, examples: Examples, batch_size: int, of: Set[str] = NOTHING) -> Scores:
        return read(self, module, examples, batch_size, of)

    def under(self, config: EvalConfig) -> OwnLoss:
        return self


@torch.inference_mode()
def read(objective: Objective, module: nn.Module, examples: Examples, batch_size: int, of: Set[str]) -> Scores:
    """The scores of a module with one output for each example, in its current state.

    Classes are whole-number labels `[n]` with outputs `[b, classes]`: predictions are the most likely classes. Without classes,
    predictions are the outputs themselves, kept if `of` has predictions.
    """
    losses, predictions, scores = [], [], []
    classes = True
    for index in torch.arange(len(examples)).split(batch_size):
        outputs, labels = _tensor_of(module(**examples.inputs.batch(index))), examples.labels[index]
        losses.append(objective.losses(outputs, labels).double().cpu())
        classes = _are_classes(labels) and outputs.ndim == 2 and outputs.shape[1] > 1
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


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """The squared error of each example, `[b]`, the mean over its outputs: the loss where labels are no whole numbers."""
    outputs, labels = outputs.reshape(len(labels), -1), labels.reshape(len(labels), -1)
    if outputs.shape != labels.shape:
        raise ModelError(
            f"loss: expected as many outputs an example as labels, got {outputs.shape[1]} and {labels.shape[1]}; give "
            "labels of classes as whole numbers [n], or a loss of your own"
        )
    return ((outputs - labels) ** 2).mean(dim=1)


def _tensor_of(outputs: Any) -> Any:
    """The logits in the output of a transformers model; other outputs unchanged."""
    return getattr(outputs, "logits", outputs)


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """What is trained and how it is scored; one object per process, shared by all clients, never changed.

    `module(**batch)` gives the input of `objective`, for a classifier logits `[b, classes]`. `targets`: the modules that get
    LoRA, by full name or, as in PEFT, by a dotted ending; `trained`: full names of plain parameters that are trained too (a
    head). `train`, `test`: `Examples`, or the arguments for them. `loss(outputs, labels) -> [b]`: a custom loss, instead of
    cross-entropy for whole-number labels and the squared error for others. `label_names`: the names of labels from 0. The
    labels give the class of each example to partitions and per-client scores. `columns`: other columns of the training data,
    for partitions; `test_columns`: those of the held-out data, by which a column says whose each held-out example is.
    `note`: what was done to the examples, in words that may depend on them; a private run leaves it out, and has `name` alone.
    `base_model` and `head`: descriptions for the adapter's config and the report; `peft`: further entries of that config, such
    as PEFT's task type, by which its `AutoPeftModel...` classes choose the model class. `metrics`: further figures in addition
    to accuracy and loss, by name: functions `metric(labels, predictions)`, or `Metric`s; always computed.

    Raises `ModelError` for targets and parameters that the module does not have, `DataError` for invalid examples.
    """

    module: nn.Module
    targets: tuple[str, ...]
    train: Examples
    test: Examples
    name: str = "a task of one's own"
    note: str = ""
    label_names: tuple[str, ...] = ()
    head: str = ""
    base_model: str = ""
    peft: Mapping[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    test_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    loss: Callable[[Any, Tensor], Tensor] | None = None
    objective: Objective | None = None
    metrics: Mapping[str, Callable[..., Any] | Metric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise ModelError(f"module: expected a torch.nn.Module, got {type(self.module).__name__}")
        put = functools.partial(object.__setattr__, self)
        put("targets", find_targets(self.module, (self.targets,) if isinstance(self.targets, str) else self.targets))
        put("trained", _parameters(self.module, (self.trained,) if isinstance(self.trained, str) else self.trained))
        if self.loss is not None and not callable(self.loss):
            raise ModelError(f"loss: expected a function loss(outputs, labels), got {self.loss!r}")
        put("label_names", tuple(self.label_names))
        put("metrics", dict(self.metrics))
        for part in ("train", "test"):
            put(part, _examples(getattr(self, part), self.module, part))
        put("columns", _columns("columns", self.columns, len(self.train), "training"))
        put("test_columns", _columns("test_columns", self.test_columns, len(self.test), "held-out"))
        if self.objective is None:
            put("objective", _objective(self.loss, self.train.labels))
        if not self.label_names and _are_classes(self.train.labels):
            put("label_names", tuple(str(label) for label in range(int(self.train.labels.max()) + 1)))

    @property
    def has_classes(self) -> bool:
        """Whether the labels are whole numbers from 0, that is classes."""
        return _are_classes(self.train.labels)

    def facts(self, bare: bool = False) -> Facts:
        """The facts about the task for those who do not have it. `bare`: without what depends on the examples, but for their
        number and the names of labels."""
        inputs = () if bare else (self.train.inputs, self.test.inputs)
        return Facts(
            task=self.name + (f", {self.note}" if self.note and not bare else ""),
            head=self.head,
            base_model=self.base_model,
            label_names=self.label_names,
            train_examples=len(self.train),
            test_examples=len(self.test),
            inputs_bytes=sum(getattr(part, "nbytes", 0) for part in inputs),
            inputs_on_disk=any(getattr(part, "on_disk", False) for part in inputs),
            model_bytes=sum(tensor.nbytes for tensor in self.module.state_dict().values()),
        )


def judged(task: Task, config: EvalConfig) -> Task:
    """`task`, scored as set in `[eval]`, with its metrics. Raises `ConfigError` for metrics that the task does not support."""
    objective = task.objective.under(config)
    return replace(task, objective=objective, metrics=metrics.choose(task.metrics, config, objective.gives))


def score(task: Task, batch_size: int) -> Scores:
    """The scores of the task's module in its current state on the held-out examples, with metrics.

    Probabilities are released afterwards, because only they grow with examples times classes. Raises `ConfigError` for a metric
    that fails, or whose value is not a finite number.
    """
    chosen = [metrics.as_metric(name, value) for name, value in task.metrics.items()]
    found = task.objective.score(task.module, task.test, batch_size, frozenset(metric.of for metric in chosen))
    figures = metrics.compute(chosen, found, task.label_names)
    return replace(found, scores=None, figures=figures, sites=_by_site(task, chosen, found) if chosen else {})


def _by_site(task: Task, chosen: Sequence[Metric], found: Scores) -> dict[str, dict[str, Any]]:
    """The metrics of each named site on its own held-out examples."""
    owners = task.test_columns.get(OWNER, np.zeros(0, dtype=object))
    rows = {str(name): np.flatnonzero(owners == name) for name in dict.fromkeys(owners.tolist()) if name}
    return {name: metrics.attempted(chosen, found.of_rows(own), task.label_names) for name, own in rows.items()}


def _are_classes(labels: Tensor) -> bool:
    return labels.ndim == 1 and not labels.is_floating_point() and int(labels.min()) >= 0


def _examples(given: Any, module: nn.Module, part: str) -> Examples:
    try:
        if not isinstance(given, Examples):
            given = Examples(*given) if isinstance(given, tuple) and len(given) == 2 else Examples(given)
    except DataError as error:
        raise DataError(f"{part}: {error}") from None
    inputs = fitted(given.inputs, module)
    return given if inputs is given.inputs else Examples(inputs, given.labels)


def _columns(key: str, given: Any, size: int, kind: str) -> dict[str, np.ndarray]:
    if not isinstance(given, Mapping):
        raise DataError(f"{key}: expected a mapping of name to values [n], got {type(given).__name__}")
    for name, values in given.items():
        if len(values) != size:
            raise DataError(f"{key}: {name}: expected {size} values, one a {kind} example, got {len(values)}")
    return {name: np.asarray(values) for name, values in given.items()}


def _objective(loss: Callable[[Any, Tensor], Tensor] | None, labels: Tensor) -> Objective:
    if loss is not None:
        return OwnLoss(loss)
    return Classification() if _are_classes(labels) else OwnLoss(squared_error)


def _parameters(module: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    known = {name for name, _ in module.named_parameters()} if names else set()
    for name in names:
        if name not in known:
            raise ModelError(f"trained: {type(module).__name__} has no parameter {name!r}; {nearest(name, known)}")
    return tuple(names)


def find_targets(module: nn.Module, wanted: Sequence[str]) -> tuple[str, ...]:
    """Full names of the modules that `wanted` names, each by its full name or by PEFT's rule of endings.

    Raises `ModelError` for an empty list, and for a name that matches no module.
    """
    known = {name for name, _ in module.named_modules() if name}
    if not wanted:
        raise ModelError(
            f"targets: expected names of modules that get LoRA, got none; {type(module).__name__} has {_some(known)}"
        )
    found: list[str] = []
    for name in wanted:
        fits = [name] if name in known else list(resolve_targets(module, [name]))
        if not fits:
            raise ModelError(f"targets: {type(module).__name__} has no module {name!r}; {nearest(str(name), known)}")
        found += fits
    return tuple(dict.fromkeys(found))


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "no modules of its own"


def resolve_targets(module: nn.Module, endings: Sequence[str]) -> tuple[str, ...]:
    """Full names of the submodules that `endings` name, by PEFT's rule: the whole name or a dotted ending of it."""
    names = [name for name, _ in module.named_modules() if name]
    return tuple(name for name in names if any(name == end or name.endswith(f".{end}") for end in endings))
