"""`anyrank evaluate`: which sites are asked for, and the tables of their scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from anyrank.cli.console import shown
from anyrank.cli.folding import folded
from anyrank.config.sections import Config
from anyrank.config.sections.sites import AT_THE_SITE
from anyrank.errors import ConfigError, DataError, nearest


def chosen(folder: Path, config: Config, site: str, data: str) -> list[str]:
    """The names of the sites that are scored: `site`, or else all of the run. Raises `ConfigError`, without torch."""
    known = [each.name for each in config.sites]
    if not known:
        raise ConfigError(f"{folder}: the run has no named sites; expected a run with [[sites]], see docs/sites.md")
    if site and site not in known:
        if len(known) == 1:  # as a site's own result: a hint at the name of another site would be wrong
            raise ConfigError(f"--site {shown(site)}: this folder is of {known[0]} only")
        raise ConfigError(f"--site {shown(site)}: the run has no such site; {nearest(site, known)}")
    if any(each.source == AT_THE_SITE for each in config.sites):
        raise ConfigError(
            f"{folder}: rows and base model are at the sites; score there what a site was handed, by anyrank evaluate "
            "STORE/results/RUN (docs/evaluate.md)"
        )
    if data and not site and len(known) > 1:
        raise ConfigError(f"--data {shown(data)}: whose rows are these? give --site NAME too; known: {', '.join(known)}")
    if data and not Path(data).exists():
        raise DataError(f"--data {shown(data)}: no such file")
    return [site] if site else known


def tables(found: Mapping[str, Any]) -> list[Table]:
    """A row for each site; of a single site, a row for each of its labels too."""
    sites = found["sites"]
    rows = list(sites.values())
    names = dict.fromkeys(name for row in rows for name, value in row["metrics"].items() if not isinstance(value, Mapping))
    cells = {
        "rank": [str(row["rank"]) for row in rows],
        "examples": [f"{row['test_examples']:,}" for row in rows],
        "accuracy": [_number(row["accuracy"]) for row in rows],
        "macro F1": [_number(row["macro_f1"]) for row in rows],
        "loss": [_number(row["loss"]) for row in rows],
        **{shown(name): [_number(row["metrics"].get(name)) for row in rows] for name in names},
    }
    on = f"the rows of {Path(found['data']).name}" if found["data"] else "their own held-out rows"
    title = f"{found['name']} ({found['method']}): sites on {on}"
    made = folded(title, "site", [shown(name) for name in sites], cells)
    return made + (_of_labels(rows[0]["labels"]) if len(rows) == 1 else [])


def _of_labels(labels: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    cells = {
        "examples": [f"{row['test_examples']:,}" for row in labels.values()],
        "accuracy": [_number(row["accuracy"]) for row in labels.values()],
    }
    return folded("by label", "label", [shown(name) for name in labels], cells) if labels else []


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
