"""Metrics in addition to accuracy and loss: functions of the held-out labels and of the model's outputs, by name.

A metric is a function in scikit-learn's order of arguments, `metric(labels, predictions)`, so that scikit-learn's functions
work unchanged. It returns one finite number, or a mapping of label -> number. One line, `register`, makes a metric known to
`[eval] metrics`; a task may also have its own (`Task.metrics`), which are always computed.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from anyrank import own
from anyrank.config.sections import EvalConfig
from anyrank.errors import ConfigError, in_a_line, nearest

if TYPE_CHECKING:
    from anyrank.messages.records import Scores

OF = ("predictions", "scores", "losses")  # the possible second arguments of a metric
# Names in a round's metrics, a summary and the columns of a study, which a metric must not hide.
TAKEN = frozenset(
    {
        *("round", "accuracy", "loss", "worst_client_accuracy", "client_accuracy_std", "client_accuracy", "train_loss"),
        *("collapse", "effective_rank", "spectrum", "upload_bytes", "download_bytes", "seconds", "clients", "rejected"),
        *("shortened", "idle", "scored_round", "scored_by", "scored_of"),
        *("epsilon", "best_accuracy", "last_accuracy", "start_accuracy", "start_loss", "metrics", "start_metrics"),
        *("worst_client", "upload", "download", "rounds_to_target", "within_budget"),
    }
)
_NAME = re.compile(r"\w[\w@+-]*")
_MEND = "correct the function, or remove it from eval.metrics or from the task"
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Metric:
    """`function(labels, of) -> float | Mapping`; `labels` `[n]`, and `of` names the second argument: `predictions` `[n]` (of a
    task without classes: the model's outputs), `scores` (softmax probabilities `[n, classes]` float32) or `losses` `[n]`.
    """

    name: str
    function: Callable[..., Any]
    of: str = "predictions"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"metric {self.name!r}: expected a name of letters, digits, '_', '-', '@' or '+'; choose such a name"
            )
        if self.name in TAKEN:
            raise ConfigError(f"metric '{self.name}': a run's files use that name already; choose another name")
        if self.of not in OF:
            raise ConfigError(
                f"metric '{self.name}': of: expected one of {', '.join(OF)}, got {self.of!r}; {nearest(str(self.of), OF)}"
            )
        if not callable(self.function):
            raise ConfigError(f"metric '{self.name}': expected a function metric(labels, {self.of}), got {self.function!r}")


REGISTRY: dict[str, Metric] = {}
_of_file: dict[Path, frozenset[str]] = {}  # the names that each file has registered, so that the file may be executed again


def register(name: str, of: str = "predictions") -> Callable[[_F], _F]:
    """Register a function as the metric `name`; the function itself is not changed.

    Use it as a decorator `@register("name")`, or as `register("kappa")(sklearn.metrics.cohen_kappa_score)`. Raises
    `ConfigError` for a name that another function has, or that a run's files use themselves.
    """

    def enter(function: _F) -> _F:
        metric = Metric(name, function, of)
        known = REGISTRY.get(name)
        if known is not None and _origin(known.function) != _origin(function):
            raise ConfigError(f"metric '{name}': is registered already, by {_origin(known.function)[0]}; choose another name")
        REGISTRY[name] = metric
        return function

    return enter


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return getattr(function, "__module__", "") or "", getattr(function, "__qualname__", repr(function))


def load_file(path: str | Path) -> None:
    """Execute a Python file that registers metrics (`[eval] file = "..."`); a second time, it replaces its own metrics.

    Raises `ConfigError`, with the file and the line, if it is missing, fails, or registers no metric.
    """
    path = Path(path)
    for name in _of_file.pop(path.resolve(), ()):
        REGISTRY.pop(name, None)
    others = set(REGISTRY)
    try:
        own.load(path, "eval.file", ConfigError)
    except ConfigError:
        for name in set(REGISTRY) - others:
            del REGISTRY[name]
        raise
    registered = frozenset(REGISTRY) - others
    if not registered:
        raise ConfigError(f'eval.file: {path} registers no metric; put @register("name") of anyrank.metrics above one')
    _of_file[path.resolve()] = registered


# --- choosing --------------------------------------------------------------------------------------------------------


def choose(own: Mapping[str, Any], config: EvalConfig, given: Iterable[str] = OF) -> dict[str, Metric]:
    """The metrics of a task: all of its `own`, then those that `[eval] metrics` adds.

    If both have the same name, the task's own metric is used. Raises `ConfigError` for an unknown name, and for a metric whose
    input the task does not have (`given`: the entries of `OF` that it has).
    """
    if config.file:
        load_file(config.file)
    if not isinstance(own, Mapping):
        raise ConfigError(f"Task.metrics: expected a mapping of name -> metric(labels, predictions), got {own!r}")
    chosen = {name: as_metric(name, value) for name, value in own.items()}
    for name in config.metrics:
        if name not in chosen and name not in REGISTRY:
            raise ConfigError(f"eval.metrics: unknown metric '{name}'; {nearest(name, {*REGISTRY, *chosen})}")
        chosen.setdefault(name, REGISTRY.get(name))
    given = frozenset(given)
    for metric in chosen.values():
        if metric.of not in given:
            raise ConfigError(f"metric '{metric.name}': {_lacking(metric, given)}")
    return chosen


def as_metric(name: str, value: Any) -> Metric:
    """The task's own metric `name`, from a `Metric` or a plain function of predictions."""
    return replace(value, name=name) if isinstance(value, Metric) else Metric(name, value)


def _lacking(metric: Metric, given: Iterable[str]) -> str:
    has = ", ".join(what for what in OF if what in frozenset(given)) or "none"
    hint = "; a language model has predictions where eval.score = 'likelihood'" if metric.of == "predictions" else ""
    return f"is of {metric.of}, and this task has {has}{hint}; take it out of eval.metrics or the task, or choose one of those"


# --- computing -------------------------------------------------------------------------------------------------------


def compute(metrics: Iterable[Metric], scores: Scores, names: Sequence[str] = ()) -> dict[str, float | dict[str, float]]:
    """The value of each metric by its name, from the scores; `names` `[classes]` are the labels' names.

    Raises `ConfigError` for a metric that raises, or whose value is neither a finite number nor a mapping of finite numbers.
    """
    labels = scores.labels if scores.targets is None else scores.targets
    return {metric.name: _figure(metric, labels, scores, scores.names or names) for metric in metrics}


def attempted(metrics: Iterable[Metric], scores: Scores, names: Sequence[str] = ()) -> dict[str, Any]:
    """Like `compute`; `None` for a metric that fails on these examples, as some do on few examples, or on a single label."""
    found: dict[str, Any] = {}
    for metric in metrics:
        try:
            found |= compute([metric], scores, names)
        except ConfigError:
            found[metric.name] = None
    return found


def _figure(metric: Metric, labels: np.ndarray, scores: Scores, names: Sequence[str]) -> float | dict[str, float]:
    second = getattr(scores, metric.of)
    if second is None:
        has = [what for what in OF if getattr(scores, what) is not None]
        raise ConfigError(f"metric '{metric.name}': {_lacking(metric, has)}")
    try:
        value = metric.function(labels.copy(), second.copy())  # copies, because a metric may change its arguments
    except Exception as error:  # whatever a user's metric raises
        what = f"labels {labels.shape} and {metric.of} {second.shape}"
        raise ConfigError(f"metric '{metric.name}': failed on {what}: {in_a_line(error)}; {_MEND}") from None
    if isinstance(value, Mapping):
        if not value:
            raise ConfigError(f"metric '{metric.name}': expected a number for each label, got an empty mapping; {_MEND}")
        return {_key(key, names): _number(metric, item, f" for {key!r}") for key, item in value.items()}
    return _number(metric, value, "")


def _number(metric: Metric, value: Any, where: str) -> float:
    """`value` as a float: a Python number, or an array or tensor of one element and no dimension."""
    shape = getattr(value, "shape", ())
    if len(shape):
        got = f"an array of shape {tuple(shape)}"
        raise ConfigError(
            f"metric '{metric.name}': expected one number{where}, got {got}; return its mean, or a mapping of label -> number"
        )
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        got = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
        raise ConfigError(f"metric '{metric.name}': expected a finite number{where}, got {got}; {_MEND}")
    return float(value)


def _key(key: Any, names: Sequence[str]) -> str:
    """A mapping's key in files: a whole number is a label, and is replaced by the label's name if names are distinct."""
    whole = isinstance(key, numbers.Integral) and not isinstance(key, bool)
    named = whole and 0 <= key < len(names) and len(set(names)) == len(names)
    return str(names[int(key)]) if named else str(int(key)) if whole else str(key)


# --- built in --------------------------------------------------------------------------------------------------------


@register("macro_f1")
def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean over labels of `F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c)`, over those that occur among labels or predictions.

    The mean of F1 scores, not the F1 of means: Opitz and Burst 2019, "Macro F1 and Macro F1", equation 2.

    >>> macro_f1(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))  # (2/3 + 4/5) / 2
    0.7333333333333334
    """
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


@register("balanced_accuracy")
def balanced_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean over the held-out labels of their recall `TP_c / (TP_c + FN_c)`: all labels have equal weight, however rare.

    Brodersen et al. 2010, "The balanced accuracy and its posterior distribution", section 2, for any number of labels.

    >>> balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0]))  # (3/3 + 0/1) / 2
    0.5
    """
    from sklearn.metrics import recall_score

    return float(recall_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0))


@register("auc", of="scores")
def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The area under the ROC curve: the probability that an example of a label has a higher score for it than an example of
    another label, with ties counted as half. With two classes, it is that of class 1; with more, the plain mean of each class
    against the rest, over the classes that have held-out examples (and others too).

    Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve", Radiology 143: the Wilcoxon statistic.

    >>> auc(np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]))  # 3 of 4 pairs in order
    0.75
    """
    from sklearn.metrics import roc_auc_score

    if not np.isfinite(scores).all():
        raise ValueError("the model's scores are not finite")
    classes = scores.shape[1]
    each = [1] if classes == 2 else range(classes)
    areas = [roc_auc_score(labels == c, scores[:, c]) for c in each if 0 < np.count_nonzero(labels == c) < len(labels)]
    if not areas:
        raise ValueError("there are no held-out examples of two different labels")
    return float(np.mean(areas))


@register("per_label")
def per_label(labels: np.ndarray, predictions: np.ndarray) -> dict[int, float]:
    """Each held-out label's recall `TP_c / (TP_c + FN_c)`: the share of its examples that are answered correctly.

    >>> per_label(np.array([0, 0, 2]), np.array([0, 2, 2]))
    {0: 0.5, 2: 1.0}
    """
    from sklearn.metrics import recall_score

    present = np.unique(labels)
    recalls = recall_score(labels, predictions, labels=present, average=None, zero_division=0)
    return {int(label): float(recall) for label, recall in zip(present, recalls, strict=True)}
