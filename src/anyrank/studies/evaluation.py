"""The scores of a finished run for its named sites: each by the adapter of its own folder, on its own rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from anyrank import devices
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.peft import CONFIG_FILE, WEIGHTS_FILE
from anyrank.config.sections import Config
from anyrank.data import sites
from anyrank.errors import DataError
from anyrank.messages.records import Scores
from anyrank.progress import Progress
from anyrank.runs import identity, seal
from anyrank.runs.names import ADAPTER, BASE_UPDATE, SITES
from anyrank.tasks import metrics
from anyrank.tasks.base import Task
from anyrank.tasks.load import load_task
from anyrank.tasks.metrics import Metric
from anyrank.training.lora import LoraModel

_ALWAYS = "macro_f1"


def of_sites(
    folder: Path, config: Config, chosen: Sequence[str], data: str = "", progress: Progress | None = None
) -> dict[str, Any]:
    """The scores of the sites `chosen` of the finished run in `folder`, whose configuration is `config`, as one JSON object.

    Each site is scored on its own held-out rows, or (with one site) on those of `data`, by `sites/NAME/adapter` and, where the
    method has one, `sites/NAME/base-update`. Raises `RunError` for files that have changed since the run, `DataError` for a
    single site without such rows.
    """
    identity.check(folder, config)
    for name in chosen:
        seal.check(folder, _files(folder, name))
    task = load_task(_with_data(config, chosen, data), progress)
    owners = task.test_columns[sites.OWNER]
    rows = {name: np.flatnonzero(owners == name) for name in chosen}
    if len(chosen) == 1 and not len(rows[chosen[0]]):
        raise DataError(f"site {chosen[0]}: has no held-out examples of its own; give rows with labels by --data FILE")
    of = [metrics.as_metric(name, value) for name, value in task.metrics.items()]
    with devices.threads(config.run.threads):
        found = _scored(folder, task, config, of, rows, progress)
    ranks = {site.name: site.rank for site in config.sites}
    return {
        "run": str(folder),
        "name": config.run.name,
        "method": config.method.name,
        "data": data or None,
        "private": config.privacy.level != "none",
        "sites": {name: {"rank": ranks[name], **found[name]} for name in chosen},
    }


def _with_data(config: Config, chosen: Sequence[str], data: str) -> Config:
    """The configuration with `data` as the held-out examples of the one site that is chosen."""
    if not data:
        return config
    listed = (replace(site, test_source=data) if site.name == chosen[0] else site for site in config.sites)
    return replace(config, sites=tuple(listed))


def _files(folder: Path, site: str) -> list[str]:
    """The files of a site's model, below the run folder."""
    parts = [ADAPTER, *([BASE_UPDATE] if _adds_to_base(folder, site) else [])]
    return [f"{SITES}/{site}/{part}/{file}" for part in parts for file in (CONFIG_FILE, WEIGHTS_FILE)]


def _adds_to_base(folder: Path, site: str) -> bool:
    """Whether the run left the site an update of its base model: what lies in the folder by now does not decide it."""
    return seal.has(folder, f"{SITES}/{site}/{BASE_UPDATE}/{WEIGHTS_FILE}")


def _scored(
    folder: Path,
    task: Task,
    config: Config,
    of: Sequence[Metric],
    rows: Mapping[str, np.ndarray],
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    """Each site's scores. Sites whose adapters are one file are scored in one pass over all held-out rows."""
    models: dict[tuple[int, int], list[str]] = {}
    for name in rows:
        status = os.stat(folder / SITES / name / ADAPTER / WEIGHTS_FILE)
        models.setdefault((status.st_dev, status.st_ino), []).append(name)
    found, model = {}, LoraModel(task)
    try:
        for done, names in enumerate(models.values()):
            if progress is not None:
                progress(done, len(models))
            model.apply(*_adapters(folder, names[0]))
            needed = frozenset(metric.of for metric in of)
            scores = task.objective.score(task.module, task.test, config.eval.batch_size, needed)
            found |= {name: _figures(scores.of_rows(rows[name]), task, of) for name in names}
    finally:
        model.close()
    if progress is not None:
        progress(len(models), len(models))
    return found


def _adapters(folder: Path, site: str) -> tuple[Adapter, Adapter | None]:
    """What a site runs: its adapter, and the update of its base model."""
    own = folder / SITES / site
    return Adapter.load(own / ADAPTER), Adapter.load(own / BASE_UPDATE) if _adds_to_base(folder, site) else None


def _figures(scores: Scores, task: Task, of: Sequence[Metric]) -> dict[str, Any]:
    """Number of examples, accuracy, loss, metrics and labels; `None` for what these rows do not give."""
    if not len(scores.losses):
        return {"test_examples": 0, "accuracy": None, "loss": None, "macro_f1": None, "metrics": {}, "labels": {}}
    classes = scores.correct is not None and scores.predictions is not None
    f1 = metrics.attempted([metrics.REGISTRY[_ALWAYS]], scores, task.label_names) if classes else {_ALWAYS: None}
    return {
        "test_examples": len(scores.losses),
        "accuracy": scores.accuracy,
        "loss": scores.loss,
        **f1,
        "metrics": metrics.attempted([metric for metric in of if metric.name != _ALWAYS], scores, task.label_names),
        "labels": _by_label(scores, task.label_names),
    }


def _by_label(scores: Scores, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The number of examples and the accuracy of each label that occurs."""
    if scores.correct is None:
        return {}
    rows = {label: scores.correct[scores.labels == label] for label in np.unique(scores.labels).tolist()}
    return {str(names[label]): {"test_examples": len(own), "accuracy": float(own.mean())} for label, own in rows.items()}
