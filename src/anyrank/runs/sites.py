"""The folders of named sites in a run folder: what each site takes away."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyrank import files
from anyrank.runs.names import LABELS, SCORES, SITES

if TYPE_CHECKING:
    from anyrank.adapter.adapter import Adapter


def save(folder: Path, adapters: Mapping[str, Adapter | str]) -> None:
    """Save the adapters by folder name, one after the other. A name in the place of an adapter is that of a folder before it:
    hard links to its files are made, so that many sites of one rank take the space of one; copies, on file systems without
    such links."""
    for name in adapters:
        adapter = adapters[name]
        if isinstance(adapter, str):
            _link(folder / adapter, folder / name)
        else:
            adapter.save(folder / name)


def _link(source: Path, folder: Path) -> None:
    """Make `folder` one with the files of `source`."""
    files.make_folder(folder)
    for file in files.contents(source):
        if file.is_file() and not files.is_temporary(file):
            files.write_whole(folder / file.name, lambda path, file=file: _same(file, path))


def _same(file: Path, path: Path) -> None:
    try:
        os.link(file, path)
    except OSError:  # no hard links here, or too many of this file
        shutil.copyfile(file, path)


def write(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `sites/NAME/labels.json`, the labels in the order of the model's outputs, for each site of a run's summary, and
    `scores.json` for those that have scores of their own."""
    for name, row in summary.get("sites", {}).items():
        own = folder / SITES / name
        files.make_folder(own)
        files.sweep(own)  # of what a kill left while it was written
        files.write_whole_text(own / LABELS, json.dumps(summary["label_names"], indent=2) + "\n")
        if row["test_examples"]:
            scores = {"site": name, "round": summary["rounds"], "model": summary["sites_scored"], **row}
            files.write_whole_text(own / SCORES, json.dumps(scores, indent=2) + "\n")
