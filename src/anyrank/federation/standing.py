"""The quality of the federation's models: over all held-out examples, and for each client by its own label shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anyrank.messages.records import Scores

# Largest number of clients that are reported separately. For more, the label shares of all of them would have to be drawn.
MOST_CLIENTS = 1_000


@dataclass(frozen=True, eq=False)
class Labels:
    """The label shares of clients: `shares` `[clients, labels]`, each row summing to 1, of clients `names`."""

    names: tuple[str, ...]
    shares: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], shards: Sequence[np.ndarray], labels: np.ndarray) -> Labels:
        """From each client's example indices and the `labels` `[n]` of the training examples; empty clients are left out."""
        held = [(name, labels[own]) for name, own in zip(names, shards, strict=True) if len(own)]
        counts = np.array([np.bincount(own, minlength=int(labels.max()) + 1) for _, own in held], dtype=np.float64)
        return cls(tuple(name for name, _ in held), counts / counts.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Standing:
    """Accuracy (`None` if no answer is right or wrong), loss and the task's metrics over all held-out examples, and each
    client's accuracy on examples like its own (empty: not reported)."""

    accuracy: float | None
    loss: float
    clients: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """The entries of a round's metrics; `None` for values that are not reported."""
        own = np.array(list(self.clients.values()))
        spread = {"worst_client_accuracy": float(own.min()), "client_accuracy_std": float(own.std())} if len(own) else NOT_TOLD
        return {"accuracy": self.accuracy, "loss": self.loss, **spread, **self.metrics}


NOT_TOLD = {"worst_client_accuracy": None, "client_accuracy_std": None}
UNSCORED = {"accuracy": None, "loss": None, **NOT_TOLD}  # a round that is not scored


def of_global(scores: Scores, labels: Labels | None) -> Standing:
    """The standing of one model for all clients."""
    return Standing(scores.accuracy, scores.loss, _by_client(scores, labels, labels.names) if labels else {}, scores.figures)


def of_personal(scores: Mapping[str, Scores], labels: Labels | None) -> Standing:
    """The standing of personal models, `scores` by client: means over the models, and each client's model on its own labels."""
    accuracies = [own.accuracy for own in scores.values()]
    accuracy = None if None in accuracies else float(np.mean(accuracies))
    loss = float(np.mean([own.loss for own in scores.values()]))
    clients = {}
    for name, own in scores.items():
        clients |= _by_client(own, labels, [name]) if labels and name in labels.names else {}
    return Standing(accuracy, loss, clients, _mean([own.figures for own in scores.values()]))


def _mean(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over the models that have it; of a mapping, entry by entry."""
    means = {}
    for name in dict.fromkeys(name for each in figures for name in each):
        values = [each[name] for each in figures if name in each]
        means[name] = _mean(values) if isinstance(values[0], Mapping) else float(np.mean(values))
    return means


def _by_client(scores: Scores, labels: Labels, names: Sequence[str]) -> dict[str, float]:
    """`sum_c share_kc accuracy_c / sum_c share_kc` over the labels c that have held-out examples: client k's expected accuracy
    on held-out examples with its own label proportions, computed from all held-out examples instead of a few. Empty if no
    answer is right or wrong.
    """
    if scores.correct is None:
        return {}
    width = labels.shares.shape[1]
    seen = np.bincount(scores.labels, minlength=width)[:width].astype(np.float64)
    right = np.bincount(scores.labels, weights=scores.correct, minlength=width)[:width]
    accuracy = np.divide(right, seen, out=np.zeros(width), where=seen > 0)
    rows = labels.shares[[labels.names.index(name) for name in names]] * (seen > 0)
    totals = rows.sum(axis=1)
    return {name: float(row @ accuracy / total) for name, row, total in zip(names, rows, totals, strict=True) if total > 0}
