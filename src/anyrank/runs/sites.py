"""The folders of named sites in a run folder: what each site takes away."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyrank import files
from anyrank.runs.names import SCORES, SITES


def write(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `sites/NAME/scores.json` for each site of a run's summary that has scores of its own."""
    for name, row in summary.get("sites", {}).items():
        if row["test_examples"]:
            files.make_folder(folder / SITES / name)
            files.sweep(folder / SITES / name)  # of what a kill left while it was written
            scores = {"site": name, "round": summary["rounds"], **row}
            files.write_whole_text(folder / SITES / name / SCORES, json.dumps(scores, indent=2) + "\n")
