"""The names of a run's files, and its logs line by line. No torch here: reports read run folders without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG, METRICS, CLIENTS, SUMMARY = "config.toml", "metrics.jsonl", "clients.jsonl", "summary.json"
PRIVACY, LEDGER = "privacy.json", "privacy.jsonl"
COMPARISON = "compare.json"
STATE = "state.safetensors"


# How scikit-learn's functions of what is better when it is lower end; all others are better when they are higher.
_LOWER = ("loss", "error", "deviance")


def lower_is_better(metric: str) -> bool:
    """Whether a metric is better the lower it is, by its name: scikit-learn names such functions `..._loss` or `..._error`.

    >>> lower_is_better("log_loss"), lower_is_better("mean_squared_error"), lower_is_better("macro_f1")
    (True, True, False)
    """
    return metric.endswith(_LOWER)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; the last one may have been cut off by a kill."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
