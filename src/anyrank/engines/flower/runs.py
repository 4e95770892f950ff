"""The folders of runs on the server, and how a run stands. No torch, no flwr.

runs/NAME/submitted.toml    the configuration that was submitted; a name is used for one configuration
runs/NAME/standing.json     how the run stands
runs/NAME/run               an ordinary run folder
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from anyrank.engines.flower.settings import RUNS, STATE
from anyrank.errors import ConfigError
from anyrank.files import write_whole_text
from anyrank.remote.kits import check_run

NAME = "run"  # the one key of a run's configuration in Flower: its name
SUBMITTED, STANDING, RUN = "submitted.toml", "standing.json", "run"
SERVERAPP, CLIENTAPP = "anyrank.engines.flower.serverapp:app", "anyrank.engines.flower.clientapp:app"


@dataclass
class Standing:
    """`state`: submitted, running, done or failed; with the kind of error and its text, which stay on the server. `number`: of
    the run in Flower, 0 before it has begun."""

    run: str
    number: int = 0
    state: str = "running"
    code: str = ""
    text: str = ""
    round: int = 0
    rounds: int = 0


def folder_of(server: Path, run: Any) -> Path:
    """The folder of a run whose configuration has been submitted. Raises `ConfigError`."""
    check_run(run)
    folder = server / RUNS / run
    if not (folder / SUBMITTED).exists():
        raise ConfigError(f"run {run}: nothing was submitted under this name; submit it on the server's machine")
    return folder


def say(folder: Path, standing: Standing, round: int = -1, rounds: int = 0, **changed: str) -> None:
    """Write down how a run stands."""
    if round >= 0:
        standing.round, standing.rounds = round, rounds
    for key, value in changed.items():
        setattr(standing, key, value)
    write_whole_text(folder / STANDING, json.dumps(asdict(standing)) + "\n")


def said(folder: Path) -> dict[str, Any]:
    """How a run stands; empty if nothing is known."""
    try:
        found = json.loads((folder / STANDING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(server: Path, run: str, config: dict[str, Any]) -> Path:
    """Keep the table of a configuration as that of the run `run`; its folder. Raises `ConfigError` if the name is taken."""
    check_run(run)
    folder, text = server / RUNS / run, tomli_w.dumps(config)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / SUBMITTED
    if not path.exists():
        write_whole_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"run {run}: another configuration was submitted under this name; use another run.name")
    return folder


def app_of(server: Path, run: str) -> Path:
    """The folder of the app that Flower gets for a run: its name, and where the installed package has its parts. No code."""
    folder = server.absolute() / STATE / "apps" / run
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"serverapp": SERVERAPP, "clientapp": CLIENTAPP}
    table = {
        "project": {"name": "anyrank-run", "version": "1.0.0", "description": "A run of anyrank", "license": "Apache-2.0"},
        "tool": {"flwr": {"app": {"publisher": "anyrank", "components": parts, "config": {NAME: run}}}},
    }
    write_whole_text(folder / "pyproject.toml", tomli_w.dumps(table))
    return folder
