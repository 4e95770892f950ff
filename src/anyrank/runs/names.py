"""The names of a run's files, and its logs line by line. No torch here: reports read run folders without it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from anyrank.errors import RunError
from anyrank.files import parse_json, read_bounded

CONFIG, METRICS, CLIENTS, SUMMARY = "config.toml", "metrics.jsonl", "clients.jsonl", "summary.json"
PRIVACY, LEDGER = "privacy.json", "privacy.jsonl"
COMPARISON = "compare.json"
CHECKPOINT, STATE, BEFORE = "checkpoint", "state.safetensors", "state-before.safetensors"
IDENTITY, SEAL = "identity.json", "seal.json"
RESULT = "result.json"  # in what a site keeps of a federation that ended: a run folder without rounds
STATUS = "status.json"  # of a round in progress, see `anyrank.runs.waiting`
SITES, SCORES, LABELS = "sites", "scores.json", "labels.json"
ADAPTER, BASE_UPDATE = "adapter", "base-update"  # folders of adapters, in a run folder and in that of a site
MOST_BYTES = 1 << 30  # of one of these files: a log of a million rounds


# How scikit-learn's functions of what is better when it is lower end; all others are better when they are higher.
_LOWER = ("loss", "error", "deviance")


def lower_is_better(metric: str) -> bool:
    """Whether a metric is better the lower it is, by its name: scikit-learn names such functions `..._loss` or `..._error`.

    >>> lower_is_better("log_loss"), lower_is_better("mean_squared_error"), lower_is_better("macro_f1")
    (True, True, False)
    """
    return metric.endswith(_LOWER)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; the last one may have been cut off by a kill. Raises `RunError` for one that is damaged."""
    if not os.path.lexists(path):
        return []
    lines = []
    try:
        for number, line in enumerate(read_bounded(path, MOST_BYTES).split(b"\n")[:-1], 1):  # noqa: B007 - the message names it
            lines.append(_object(line))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}); correct that, or choose another --out") from None
    except ValueError:
        raise RunError(f"{path}, line {number}: damaged; restore the file, or start the run anew in another --out") from None
    return lines


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `RunError` for a file that is not there, cannot be read or holds something else."""
    try:
        return _object(read_bounded(path, MOST_BYTES))
    except (OSError, ValueError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "damaged"
        raise RunError(f"{path}: cannot be read back ({reason}); restore the file, or choose another --out") from None


def _object(text: bytes) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value
