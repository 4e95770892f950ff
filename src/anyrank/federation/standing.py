"""The quality of the federation's models: over all held-out examples, and for each client by its own held-out examples, or else
by its own label shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anyrank.messages.records import Scores


@dataclass(frozen=True, eq=False)
class Labels:
    """The label shares of clients: `shares` `[clients, labels]`, each row summing to 1, of clients `names`."""

    names: tuple[str, ...]
    shares: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], shards: Sequence[np.ndarray], labels: np.ndarray) -> Labels:
        """From each client's example indices and the `labels` `[n]` of the training examples."""
        width = int(labels.max()) + 1
        return cls.counted(names, np.array([np.bincount(labels[own], minlength=width) for own in shards]))

    @classmethod
    def counted(cls, names: Sequence[str], counts: np.ndarray) -> Labels:
        """From each client's numbers of examples by label, `[clients, labels]`; empty clients are left out."""
        held = [(name, row) for name, row in zip(names, counts.astype(np.float64), strict=True) if row.any()]
        shares = np.array([row / row.sum() for _, row in held])
        return cls(tuple(name for name, _ in held), shares)


@dataclass(frozen=True, eq=False)
class Sites:
    """Clients that have held-out examples of their own: `owners` `[m]` int64 has the index in `names` of the owner of each
    held-out example, -1 for an example of no client. `ranks`, `sizes` `[clients]`: their ranks, and their numbers of training
    examples.
    """

    names: tuple[str, ...]
    owners: np.ndarray
    ranks: np.ndarray
    sizes: np.ndarray

    def scores(self, scores: Scores, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Accuracy (`None` if no answer is right or wrong), loss and number of the held-out examples of each of `names` that
        has any, from the model's results on all held-out examples; and its `metrics`, if there are any."""
        found = {}
        for name in names:
            own = np.flatnonzero(self.owners == self.names.index(name))
            if len(own):
                accuracy = None if scores.correct is None else float(scores.correct[own].mean())
                found[name] = {"accuracy": accuracy, "loss": float(scores.losses[own].mean()), "test_examples": len(own)}
                found[name] |= {"metrics": dict(scores.sites[name])} if name in scores.sites else {}
        return found


Clients = Labels | Sites


@dataclass(frozen=True)
class Standing:
    """Accuracy (`None` if no answer is right or wrong), loss (`None` if clients report one that is not finite, or if nobody
    scores) and the task's metrics over all held-out examples, and each client's accuracy on its own held-out examples, or on
    examples like its own (empty: not reported). `sites`: accuracy, loss and number of the held-out examples of each client that
    has its own."""

    accuracy: float | None
    loss: float | None
    clients: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """The entries of a round's metrics; `None` for values that are not reported."""
        own = np.array(list(self.clients.values()))
        spread = {"worst_client_accuracy": float(own.min()), "client_accuracy_std": float(own.std())} if len(own) else NOT_TOLD
        sites = {"sites": dict(self.sites)} if self.sites else {}
        return {"accuracy": self.accuracy, "loss": self.loss, **spread, **sites, **self.metrics}

    @property
    def worst(self) -> str | None:
        """The client whose accuracy is the lowest, the first by name of several; `None` if none is reported."""
        return min(sorted(self.clients), key=lambda name: self.clients[name], default=None)


NOT_TOLD = {"worst_client_accuracy": None, "client_accuracy_std": None}
UNSCORED = {"accuracy": None, "loss": None, **NOT_TOLD}  # a round that is not scored


def of_global(scores: Scores, of: Clients | None) -> Standing:
    """The standing of one model for all clients."""
    clients, sites = _by_client(scores, of, of.names) if of else ({}, {})
    return Standing(scores.accuracy, scores.loss, clients, scores.figures, sites)


def of_personal(scores: Mapping[str, Scores], of: Clients | None) -> Standing:
    """The standing of personal models, `scores` by client: means over the models, and each client's model on its own examples,
    or labels."""
    accuracies = [own.accuracy for own in scores.values()]
    accuracy = None if None in accuracies else float(np.mean(accuracies))
    loss = float(np.mean([own.loss for own in scores.values()]))
    clients: dict[str, float] = {}
    sites: dict[str, dict[str, Any]] = {}
    for name, own in scores.items():
        found = _by_client(own, of, [name]) if of and name in of.names else ({}, {})
        clients, sites = clients | found[0], sites | found[1]
    return Standing(accuracy, loss, clients, _mean([own.figures for own in scores.values()]), sites)


def _mean(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over the models that have it; of a mapping, entry by entry."""
    means = {}
    for name in dict.fromkeys(name for each in figures for name in each):
        values = [each[name] for each in figures if name in each]
        means[name] = _mean(values) if isinstance(values[0], Mapping) else float(np.mean(values))
    return means


def _by_client(scores: Scores, of: Clients, names: Sequence[str]) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """The accuracy of each of `names`, and what `Sites.scores` has of it."""
    if isinstance(of, Labels):
        return _by_label(scores, of, names), {}
    sites = of.scores(scores, names)
    return {name: own["accuracy"] for name, own in sites.items() if own["accuracy"] is not None}, sites


def _by_label(scores: Scores, labels: Labels, names: Sequence[str]) -> dict[str, float]:
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
