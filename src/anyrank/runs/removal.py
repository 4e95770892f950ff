"""Delete a folder of runs: only what a comparison wrote, file by file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from anyrank import files
from anyrank.errors import RunError
from anyrank.runs.names import (
    BEFORE,
    CHECKPOINT,
    CLIENTS,
    COMPARISON,
    CONFIG,
    IDENTITY,
    LEDGER,
    METRICS,
    PRIVACY,
    SEAL,
    STATE,
    SUMMARY,
)

# What a comparison, or the demo, leaves beside the folders of its runs.
_COMPARED = (COMPARISON, "report.html", "figure.png", "demo.toml")


def remove_run(path: Path) -> None:
    """Delete a folder of runs as a comparison leaves it, or an empty one; `RunError` where anything else lies in it too.

    Each file goes by its name, and no link is followed, so that nothing goes that a run does not write.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise RunError(f"{path}: expected a folder of runs, or no such folder, got a file; choose another --out")
    found = sorted(path.rglob("*"), reverse=True)  # what is in a folder stands before it
    marked = not found or (path / COMPARISON).is_file()
    strangers = [entry for entry in found if not (marked and _of_comparison(entry, entry.relative_to(path).parts))]
    if strangers:
        first = min(strangers, key=lambda entry: (entry.is_dir(), len(entry.parts), entry))  # a file says most
        raise RunError(
            f"{path}: expected a folder with nothing but runs, got {first.relative_to(path)} in it, which is not deleted; "
            "choose another --out"
        )
    with files.naming(path):
        for entry in found:
            entry.rmdir() if entry.is_dir() else entry.unlink()
        path.rmdir()


# What a comparison leaves, by depth below its folder: METHOD/SEED are runs, in which adapters have folders of their own.
_IN_RUN = {CONFIG, METRICS, CLIENTS, SUMMARY, PRIVACY, LEDGER, IDENTITY, SEAL, "report.html", "labels.json", ".lock"}
_IN_ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "labels.json", "README.md"}
_FOLDER = re.compile(rf"{CHECKPOINT}|adapter(-[\w-]+)?|base-update")


def _of_comparison(entry: Path, parts: tuple[str, ...]) -> bool:
    """Whether a comparison made what lies at `parts` below its folder."""
    *above, name = parts
    if entry.is_symlink():
        return False
    if entry.is_dir():
        runs = [entry] if len(parts) == 2 else list(entry.iterdir()) if len(parts) == 1 else []
        begun = runs and all((run / CONFIG).is_file() for run in runs)
        return bool(begun) or (len(parts) == 3 and bool(_FOLDER.fullmatch(name)))
    known = {0: set(_COMPARED), 2: _IN_RUN, 3: {STATE, BEFORE} if CHECKPOINT in above else _IN_ADAPTER}
    return files.is_temporary(entry) or name in known.get(len(above), ())
