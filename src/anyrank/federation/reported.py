"""Scores that clients report of what they download, on their own held-out examples (`eval.where = "sites"`).

Such scores are trusted as they are reported: the server has nothing to compare them with. What it does bound is their weight:
no client counts for more held-out examples than it declared before round 1. A client that reports false numbers within that
changes the accuracy by at most its share of the examples that are counted; the loss by more, since a loss has no bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyrank.config.sections import Config
from anyrank.errors import ConfigError, FrameError
from anyrank.federation.cohort import Population
from anyrank.federation.guard import Rejected
from anyrank.federation.standing import Standing
from anyrank.messages import counts as in_a_frame
from anyrank.messages.records import Counts
from anyrank.messages.roster import POOLED, Roster
from anyrank.privacy.plan import PrivacyPlan

SITES = "sites"
BY_LABEL = "per_label"  # the figure of each label's accuracy, as the metric of that name has it


@dataclass(frozen=True, eq=False)
class Reporting:
    """Who reports scores: the clients `names`, with `held_out` `[clients]` held-out examples of their own. `ranks`, `sizes`
    `[clients]`: their ranks and numbers of training examples; `labels`: the labels by which they report (empty: by none).
    """

    names: tuple[str, ...]
    held_out: np.ndarray
    ranks: np.ndarray
    sizes: np.ndarray
    labels: frozenset[str] = frozenset()

    def most(self, name: str) -> int:
        """How many held-out examples the client declared; 0 for one that is not known."""
        return int(self.held_out[self.names.index(name)]) if name in self.names else 0

    def admit(self, name: str, counts: Any) -> Counts | None:
        """What the server believes of a client's `counts`; `None` if it sent none. Raises `Rejected`."""
        if counts is None:
            return None
        if type(counts) is not Counts:
            raise Rejected(f"counts: expected a client's results, got an object of type {type(counts).__name__[:100]}")
        try:
            in_a_frame.check("counts", counts)
        except FrameError as error:
            raise Rejected(str(error)) from None
        if counts.examples > self.most(name):
            raise Rejected(
                f"counts, examples: reports {counts.examples}, but {self.most(name)} held-out examples are registered"
            )
        unknown = next((label for label in counts.by_label if self.labels and label not in self.labels), None)
        if unknown is not None:
            raise Rejected(f"counts, by_label: expected labels of the task, got {str(unknown)[:100]!r}")
        losses = None if counts.losses is None else float(counts.losses)
        return Counts(counts.examples, losses, counts.correct, dict(counts.by_label) if self.labels else {})

    def standing(self, counts: Mapping[str, Counts]) -> Standing:
        """The figures of all `counts`, `{client: counts}`: sums over clients, in the order of their names, in float64.

        Accuracy is over the clients that report one. The loss is `None` if that of any client is not finite.
        """
        held = [counts[name] for name in sorted(counts)]
        right = [each for each in held if each.correct is not None]
        finite = bool(held) and all(each.losses is not None for each in held)
        sites = {name: _of_one(counts[name]) for name in sorted(counts)}
        return Standing(
            accuracy=_ratio([each.correct for each in right], right),
            loss=_ratio([each.losses for each in held], held) if finite else None,
            clients={name: row["accuracy"] for name, row in sites.items() if row["accuracy"] is not None},
            metrics={BY_LABEL: by_label} if (by_label := _by_label(held)) else {},
            sites=sites,
        )


def reporting_of(config: Config, population: Population, roster: Roster, plan: PrivacyPlan | None) -> Reporting | None:
    """Who reports scores: `None` if the server scores, or if scores are off (`unscored`).

    Raises `ConfigError` if no client has held-out examples of its own.
    """
    if config.eval.where != SITES or plan:
        return None
    held = roster.held_out
    if held is None or not held.sum():
        raise ConfigError(
            "eval.where = 'sites': expected clients with held-out examples of their own, got none; give [[sites]] a "
            "test_source or a data.test_fraction, or use eval.where = 'server'"
        )
    labels = frozenset(roster.facts.label_names) if config.eval.by_label else frozenset()
    names = tuple(population.name(i) for i in range(len(population)))
    if names == (POOLED,):  # the reference line that has the examples of all clients has their held-out examples, too
        held = held.sum(keepdims=True)
    return Reporting(names, held, population.ranks, population.sizes, labels)


def unscored(config: Config, plan: PrivacyPlan | None) -> str:
    """Why no model of the run is scored; empty if they are."""
    if config.eval.where == SITES and plan:
        return (
            f"privacy.level = '{plan.level}': scores of the clients' own examples are not covered by the privacy guarantee "
            "(eval.where = 'sites')"
        )
    return ""


def _of_one(counts: Counts) -> dict[str, Any]:
    accuracy = None if counts.correct is None else counts.correct / counts.examples
    loss = None if counts.losses is None else counts.losses / counts.examples
    return {"accuracy": accuracy, "loss": loss, "test_examples": counts.examples}


def _ratio(values: Sequence[float], of: Sequence[Counts]) -> float | None:
    examples = sum(each.examples for each in of)
    return sum(values) / examples if examples else None


def _by_label(held: Sequence[Counts]) -> dict[str, float]:
    """Each label's accuracy over all clients that report by label."""
    sums: dict[str, list[int]] = {}
    for counts in held:
        for label, pair in counts.by_label.items():
            both = sums.setdefault(label, [0, 0])
            both[0], both[1] = both[0] + pair[0], both[1] + pair[1]
    return {label: right / examples for label, (examples, right) in sorted(sums.items())}
