"""The names of a run's files, and its logs line by line. No torch here: reports read run folders without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG, METRICS, CLIENTS, SUMMARY = "config.toml", "metrics.jsonl", "clients.jsonl", "summary.json"
PRIVACY, LEDGER = "privacy.json", "privacy.jsonl"
COMPARISON = "compare.json"
STATE = "state.safetensors"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; the last one may have been cut off by a kill."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
