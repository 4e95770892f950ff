"""The final figures of a run, from its metrics."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from anyrank.federation import sites
from anyrank.federation.cohort import count_ranks
from anyrank.runs.scored import by_state, started_with

if TYPE_CHECKING:
    from anyrank.federation.federation import Federation
    from anyrank.federation.standing import Standing


LAST = 5  # number of scored rounds in the mean that is reported next to the final and the best figure


def summarize(federation: Federation, start: Standing, end: Standing, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`summary.json`: the run's identity, its final, best and late figures, its traffic, and what it ran on.

    `start`: the standing before round 1, if the server scores; `end`: after the last round. Accuracies are `None` if no answer
    is right or wrong, or if nobody scores. `metrics` has the final values and those before round 1, but no best round, because
    it is not known whether a high or a low value is better.
    """
    config, method, population = federation.config, federation.method, federation.population
    last = end.figures()
    accuracies = [row["accuracy"] for row in by_state(metrics, last) if row["accuracy"] is not None]
    before = started_with(metrics) or {"accuracy": start.accuracy, "loss": start.loss}
    sizes = np.array([federation.counted(int(size)) for size in population.sizes])
    return {
        "name": config.run.name,
        "label": config.run.label or label(method.name, config.clients.ranks, population),
        "method": method.name,
        "paper": method.paper,
        "options": vars(method),
        "seed": config.run.seed,
        "rounds": config.run.rounds,
        "accuracy": last["accuracy"],
        "best_accuracy": max(accuracies, default=None),
        "last_accuracy": float(np.mean(accuracies[-LAST:])) if accuracies else None,
        "loss": last["loss"],
        "worst_client_accuracy": last["worst_client_accuracy"],
        "client_accuracy_std": last["client_accuracy_std"],
        "client_accuracy": dict(end.clients) or None,
        **sites.final(federation, end),
        "start_accuracy": before["accuracy"],
        "start_loss": before["loss"],
        "metrics": dict(end.metrics),
        "start_metrics": dict(start.metrics),
        "collapse": metrics[-1]["collapse"],
        "effective_rank": metrics[-1]["effective_rank"],
        "upload_bytes": sum(row["upload_bytes"] for row in metrics),
        "download_bytes": sum(row["download_bytes"] for row in metrics),
        "seconds": None if federation.privacy else sum(row["seconds"] for row in metrics),
        "clients": len(population),
        "cohort": population.cohort_size,
        "ranks": count_ranks(population.ranks),
        "examples": {"min": int(sizes.min()), "median": float(np.median(sizes)), "max": int(sizes.max())},
        "rejected": sum(row["rejected"] for row in metrics),
        "shortened": sum(row.get("shortened", 0) for row in metrics),
        "idle_rounds": sum(bool(row.get("idle")) for row in metrics),
        **_facts(federation),
        "versions": versions(),
        "platform": platform.platform(),
    }


def _facts(federation: Federation) -> dict[str, Any]:
    """What the task is. The bytes of a private run's examples are those of its longest texts and of their exact number."""
    table = federation.facts.table()
    return {key: value for key, value in table.items() if not (federation.privacy and key in ("inputs_bytes", "inputs_in"))}


def label(method: str, ranks: Sequence[int], population: Any) -> str:
    """The name of the run in tables: the method, with `@rank` if every client has that rank."""
    return f"{method}@{ranks[0]}" if len(set(ranks)) == 1 and len(population) > 1 else method


def versions() -> dict[str, str]:
    """Versions of the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("anyrank", "torch", "numpy", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
