"""What a comparison or a study asks for: its runs, each under a method that a label names, in a folder of its own.

No torch here: what is wrong with a request is told before torch is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyrank import config as configs
from anyrank.config.sections import Config
from anyrank.errors import ConfigError, RunError
from anyrank.methods import catalog
from anyrank.methods.registry import find_file
from anyrank.runs.names import COMPARISON


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    label: str
    config: Config
    out: Path


def make_cells(config: Config, methods: Sequence[str], seeds: int, out: Path) -> list[Cell]:
    """The runs of `methods` x `seeds`, each method as `variant` reads it. Seeds count up from the configuration's."""
    if seeds < 1:
        raise ConfigError(f"--seeds: expected at least 1, got {seeds}")
    if not methods or len(set(methods)) != len(methods):
        raise ConfigError(f"--methods: expected different methods, comma-separated, got {', '.join(methods) or 'none'}")
    _check_folders(methods)
    cells = []
    for label in methods:
        chosen = variant(config, label)
        for seed in range(config.run.seed, config.run.seed + seeds):
            cells.append(Cell(label, chosen.replace(run={"seed": seed}), out / folder(label) / f"seed-{seed}"))
    return cells


def _check_folders(labels: Sequence[str]) -> None:
    """Raise `ConfigError` for labels that differ in case alone: on macOS and Windows their runs would have one folder."""
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(label.casefold(), label)
        if other != label:
            raise ConfigError(
                f"--methods: {other} and {label} differ in case alone, and so would their folders; write one of them"
            )


def folder(label: str, windows: bool = os.name == "nt") -> str:
    """A method's folder: its label; on Windows, whose names take no colon, with %3A and the like for what they do not take.

    >>> folder("raflora:split=balanced", windows=True)
    'raflora%3Asplit=balanced'
    """
    return re.sub(r'[%<>:"\\|?*\x00-\x1f]|[. ]$', lambda found: f"%{ord(found[0]):02X}", label) if windows else label


def variant(config: Config, label: str) -> Config:
    """`config` under the method that `label` names: `METHOD[:KEY=VALUE ...][@RANK]`.

    `fedavg@2`: every client has rank 2. `stayput:tau=0:rotate=true`: with these options. `raflora:train.learning_rate=0.01`:
    with a key of another section. The configuration's own options go to the method that it names, and to no other.
    """
    method, at, rank = label.partition("@")
    name, *settings = method.split(":")
    if not name or "/" in label or (at and not (rank.isascii() and rank.isdigit() and int(rank) > 0)):
        raise ConfigError(f"--methods {label}: expected METHOD[:KEY=VALUE][@RANK], e.g. fedavg@8 or raflora:split=balanced")
    options = config.method.options if name == config.method.name else {}
    chosen = config.replace(method={"name": name, "options": options}, run={"label": label})
    chosen = chosen.at_rank(int(rank)) if at else chosen
    keys = [setting if "." in setting.partition("=")[0] else f"method.{setting}" for setting in settings]
    return configs.override(chosen, keys) if keys else chosen


def check_methods(cells: Sequence[Cell]) -> None:
    """Raise what a run would raise for its method's name, options and ranks, as far as the library's own methods go.

    A method from a file is known when the file has run.
    """
    for cell in {cell.label: cell for cell in reversed(cells)}.values():
        check_method(cell.config)


def check_method(config: Config) -> None:
    """`check_methods` of one configuration."""
    if config.method.file:
        find_file(config.method.file)
    else:
        catalog.check(config.method.name, config.method.options)
        catalog.check_ranks(config.method.name, config.clients.ranks)
        if config.privacy.secure_sum:
            catalog.check_secure_sum(config.method.name)


def check_folder(out: Path, resume: bool) -> None:
    """Raise `RunError` for a folder that a comparison cannot use. What a kill has left unfinished is not in the way."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: expected a folder of runs, got a file; choose another --out")
    held = out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir())
    if held and not (resume and (out / COMPARISON).exists()):
        raise RunError(f"{out}: is not empty; go on with the comparison in it by --resume, or choose another --out")


def disturbances(summaries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Over all runs: updates that were not used, steps that were shortened, and rounds that were idle. Runs of versions that
    did not count them have none.
    """
    return {key: sum(summary.get(key, 0) for summary in summaries) for key in ("rejected", "shortened", "idle_rounds")}
