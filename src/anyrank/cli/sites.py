"""What the closing table of a run says of named sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from anyrank.cli.console import shown
from anyrank.cli.folding import folded


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """A row for each named site: its rank, examples, and scores on its own held-out examples."""
    sites = summary.get("sites", {})
    if not sites:
        return []
    each = list(sites.values())
    cells = {
        "rank": [str(row["rank"]) for row in each],
        "examples": [f"{row['train_examples']:,}" for row in each],
        "accuracy": ["–" if row["accuracy"] is None else f"{row['accuracy']:.3f}" for row in each],
        "loss": ["–" if row["loss"] is None else f"{row['loss']:.4f}" for row in each],
        **_metrics(each),
        "held out": ["–" if row["test_examples"] is None else f"{row['test_examples']:,}" for row in each],
    }
    of = "each one's own model" if summary.get("sites_scored") == "own" else "the global model"
    return folded(f"sites: {of}, on their held-out examples", "site", [shown(name) for name in sites], cells)


def scores(summary: Mapping[str, Any]) -> dict[str, str]:
    """Who scored, if it was not the server, or why nobody did; and which sites have the result."""
    handed = summary.get("handed_over")
    lacking = sorted(set(summary.get("sites", {})) - set(handed or ()))
    text = f"at {len(handed or ())} sites" + (f"; not at {shown(', '.join(lacking))}" if lacking else "")
    made = {} if handed is None else {"result": text}
    if summary.get("unscored"):
        return {"not scored": shown(summary["unscored"])} | made
    if "scored_of" not in summary:
        return made
    by = f"{summary['scored_by']} of {summary['scored_of']} clients, on their own held-out examples"
    return {"scored by": by} | made


def _metrics(each: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """A column for each metric that is one number."""
    told = [row.get("metrics", {}) for row in each]
    names = dict.fromkeys(name for own in told for name, value in own.items() if not isinstance(value, Mapping))
    number = lambda value: "–" if value is None else f"{value:.4f}"  # noqa: E731
    return {shown(name): [number(own.get(name)) for own in told] for name in names}


def rows(summary: Mapping[str, Any]) -> dict[str, str]:
    """The worst site and the spread over sites, if sites have accuracies of their own."""
    if summary.get("worst_site") is None:
        return {}
    worst, spread = summary["worst_client_accuracy"], summary["client_accuracy_std"]
    return {"worst site": f"{shown(summary['worst_site'])}, {worst:.4f}; standard deviation over sites {spread:.4f}"}
