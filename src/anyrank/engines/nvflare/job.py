"""A job for NVFlare: a folder of three JSON files, without code. No torch here."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyrank.errors import ConfigError
from anyrank.remote import kits

CONTROLLER = "anyrank.engines.nvflare.controller.AnyRankController"
EXECUTOR = "anyrank.engines.nvflare.executor.AnyRankExecutor"
_ROUNDS = "rounds"
_INTERVAL_S = 0.2  # between two questions of a site whether there is a task; NVFlare's own default is 2
SILENCE_S = 30.0  # after which a site asks again, whose connection may have broken; the transfer of arrays has no such limit


def write(
    folder: Path,
    run: str,
    sites: Sequence[str],
    least: int,
    rounds: str,
    arguments: Mapping[str, Any],
    executor: str = EXECUTOR,
) -> Path:
    """Write the job of a run into `folder`, which must not be there.

    `sites`: the names of those that are to take part; `least`: as many of them must be there for it to begin. `rounds` and
    `arguments`: class of the component that runs the rounds, and what it is made with, which JSON must be able to hold.
    """
    kits.check_run(run)
    if not sites or len(set(sites)) != len(sites) or not 1 <= least <= len(sites):
        raise ConfigError(f"job: expected at least one site, each once, and 1 to {len(sites)} of them at least, got {least}")
    server = {
        "format_version": 2,
        "server": {"task_request_interval": _INTERVAL_S, "heart_beat_timeout": 600},
        "workflows": [{"id": "anyrank", "path": CONTROLLER, "args": {"run": run, "rounds": _ROUNDS}}],
        "components": [{"id": _ROUNDS, "path": rounds, "args": dict(arguments)}],
    }
    client = {
        "format_version": 2,
        "get_task_timeout": SILENCE_S,
        "submit_task_result_timeout": SILENCE_S,
        "executors": [{"tasks": ["anyrank"], "executor": {"path": executor, "args": {}}}],
        "components": [],
    }
    meta = {
        **{"name": run, "resource_spec": {}, "min_clients": least, "mandatory_clients": []},
        "deploy_map": {"app": ["server", *sorted(sites)]},
    }
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    _json(folder / "meta.json", meta)
    _json(config / "config_fed_server.json", server)
    _json(config / "config_fed_client.json", client)
    return folder


def enclosed(text: str) -> str:
    """Text as an argument of a component: NVFlare fills in what stands in braces in a job's texts."""
    return base64.b64encode(text.encode()).decode()


def opened(argument: Any) -> str:
    """What `enclosed` was given. Raises `ConfigError` for anything else."""
    try:
        return base64.b64decode(argument, validate=True).decode()
    except (ValueError, TypeError, binascii.Error):
        raise ConfigError(
            "job: expected an enclosed text, got something else; write jobs with `anyrank deploy submit`"
        ) from None


def _json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, allow_nan=False) + "\n", encoding="utf-8")
