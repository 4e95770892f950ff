"""What a private run has spent, from its folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyrank.config.tables import to_table
from anyrank.errors import RunError
from anyrank.privacy.accountants import Spending as Steps
from anyrank.privacy.accountants import composed
from anyrank.privacy.statement import Facts, Spending, of_summary
from anyrank.privacy.worst import merged
from anyrank.runs.matching import stored_config
from anyrank.runs.names import CONFIG, LEDGER, METRICS, PRIVACY, SUMMARY, read_lines, read_object


def facts(path: Path) -> Facts:
    """The facts of the statement of the private run in `path`: of one that is not finished, by all that it was charged.

    Raises `RunError` for a folder without a private run.
    """
    if not (path / CONFIG).is_file():
        raise RunError(f"{path}: no {CONFIG} in it; expected the folder of a run")
    config = to_table(stored_config(path))
    if not (path / PRIVACY).is_file():
        raise RunError(f"{path}: expected a private run, got one without {PRIVACY}; a run has it if privacy.level is set")
    found = of_summary(config, read_object(path / SUMMARY)) if (path / SUMMARY).is_file() else _begun(path, config)
    if found is None:
        raise RunError(f"{path}: its plan, or what it spent, cannot be read; restore {PRIVACY} and {SUMMARY}")
    return found


def _begun(path: Path, config: Mapping[str, Any]) -> Facts | None:
    plan, rows = read_object(path / PRIVACY).get("plan"), read_lines(path / LEDGER)
    try:
        by_client = _by_client(rows, float(plan["delta"]), bool(plan["secure"]))
        spent = Spending(max(by_client.values(), default=0.0), by_client, len(read_lines(path / METRICS)), finished=False)
    except (KeyError, TypeError, ValueError):
        return None
    return Facts(config, plan, spent)


def _by_client(rows: Sequence[Mapping[str, Any]], delta: float, secure: bool) -> dict[str, float]:
    """Epsilon of each client by its charges: each round once, or every attempt with noise of the system's source."""
    charged: dict[str, dict[Any, Steps]] = defaultdict(dict)
    for number, row in enumerate(rows):
        steps = Steps(float(row["sampling_rate"]), float(row["noise_multiplier"]), int(row["steps"]))
        charged[str(row["client"])][number if secure else row["round"]] = steps
    return {name: composed(merged(own.values()), delta) for name, own in sorted(charged.items())}
