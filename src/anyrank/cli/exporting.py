"""`anyrank export`: what is exported, checked before torch is loaded, and the table of the result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from anyrank.cli.console import shown
from anyrank.errors import AdapterError, ConfigError, RunError
from anyrank.runs.names import ADAPTER, BASE_UPDATE, CONFIG

FORMATS = {"peft": "one PEFT adapter", "vllm": "one PEFT adapter of one rank and one scaling", "merged": "a whole model"}
_ADAPTER_CONFIG = "adapter_config.json"


def parts(source: Path, base_update: Path | None, base: str, format: str) -> tuple[Path, Path | None, str]:
    """The folders of the adapter and of the part for the base model, and the base model's name, of a run or an adapter."""
    if (source / _ADAPTER_CONFIG).exists():
        return source, base_update or _beside(source), base
    if (source / "global" / _ADAPTER_CONFIG).exists():
        raise RunError(f"{shown(source)}: is a merge of adapters; name one of its folders, such as {shown(source)}/global")
    if not (source / CONFIG).exists():
        raise RunError(f"{shown(source)}: is neither a run folder ({CONFIG}) nor a PEFT adapter folder ({_ADAPTER_CONFIG})")
    from anyrank.runs.finding import finished

    config = finished(source)
    if format == "merged" and not (base or config.model.path):
        raise ConfigError(
            f"--format merged: the run's model ({shown(config.model.name)}) is not one of transformers; export it as peft, "
            "or name a model's folder with --base"
        )
    if not (source / ADAPTER / _ADAPTER_CONFIG).exists():
        raise RunError(
            f"{shown(source)}: the run has no adapter for all; with private parts at the clients, export one of its sites' "
            f"folders: anyrank export {shown(source)}/sites/NAME/adapter --base-update …"
        )
    return source / ADAPTER, base_update or _beside(source / ADAPTER), base or config.model.path


def _beside(adapter: Path) -> Path | None:
    """The base update that a merge, or a run, wrote with this adapter: without it, the adapter is not the whole update."""
    found = adapter.absolute().parent / BASE_UPDATE
    return found if adapter.name != BASE_UPDATE and (found / _ADAPTER_CONFIG).exists() else None


def check(out: Path, format: str, rank: int) -> None:
    """Raise `ConfigError` or `RunError` for options that cannot be met."""
    if format not in FORMATS:
        raise ConfigError(f"--format: expected one of {', '.join(FORMATS)}, got {shown(format)}")
    if rank < 0 or (rank and format == "merged"):
        raise ConfigError(f"--rank: expected a rank of at least 1, for an adapter, got {rank} with --format {format}")
    if os.path.lexists(out):
        raise RunError(f"{shown(out)}: exists already; name a new folder, or remove this one")
    if not out.parent.exists():
        raise AdapterError(f"{shown(out)}: the folder {shown(out.parent)} is not there; make it first")


def table(done: Mapping[str, Any]) -> Table:
    """What was written."""
    found = Table(title=f"{FORMATS[done['format']]}", title_justify="left", show_header=False)
    found.add_column(style="dim")
    found.add_column(overflow="fold")
    found.add_row("layers", str(done["layers"]))
    if done["base_update"]:
        found.add_row("with the base update", shown(done["base_update"]))
    if "ranks" in done:
        found.add_row("ranks", ", ".join(map(str, done["ranks"])))
        lost = f"{done['missed']:.2%} of its norm" if done["missed"] > 1e-6 else "nothing beyond rounding"
        found.add_row("lost of the update", lost)
    else:
        found.add_row("base model", shown(done["base"]))
        found.add_row("class", done["model"])
    found.add_row("written", shown(done["out"]))
    return found
