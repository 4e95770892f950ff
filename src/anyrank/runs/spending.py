"""What a private run has spent, from its folder: computed from its plan and its ledger, whatever its summary says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyrank.config.sections import Config
from anyrank.config.tables import to_table
from anyrank.errors import RunError
from anyrank.privacy.plan import PrivacyPlan
from anyrank.privacy.statement import Facts, Spending
from anyrank.runs.matching import stored_config
from anyrank.runs.names import CLIENTS, CONFIG, LEDGER, METRICS, PRIVACY, SUMMARY, read_lines, read_object

_MOST_NOISE = 1e9  # of a noise multiplier: more than any plan has
_CLOSE = 1e-3  # the share by which versions of an accountant may differ

Charges = Mapping[str, tuple[int, Sequence[Mapping[str, Any]]]]  # {client: (declared count, its charges, each counted once)}


def facts(path: Path) -> Facts:
    """The facts of the statement of the private run in `path`: of one that is not finished, by all that it was charged.

    Raises `RunError` for a folder without a private run, and where the plan, the ledger, the logs and the summary are damaged
    or contradict each other.
    """
    if not (path / CONFIG).is_file():
        raise RunError(f"{path}: no {CONFIG} in it; expected the folder of a run")
    config = stored_config(path)
    if config.privacy.level == "none":
        raise RunError(
            f"{path}: expected a private run, got one without privacy; a run is private with privacy.level = 'example', "
            "'person' or 'client'"
        )
    plan, metrics = _plan(path, config), read_lines(path / METRICS)
    charges = _charges(path, plan)
    by_client = _by_client(plan, charges)
    spent = Spending(max(by_client.values(), default=0.0), by_client, len(metrics), (path / SUMMARY).is_file())
    _check_logs(path, plan, charges, metrics)
    if spent.finished:
        _check_summary(path, spent)
    return Facts(to_table(config), plan.table(), spent)


def _plan(path: Path, config: Config) -> PrivacyPlan:
    """The stored plan, which must be one of the configuration."""
    stored = read_object(path / PRIVACY).get("plan")
    try:
        noise = {int(count): float(value) for count, value in stored["noise"].items()}
        bands = {int(count): int(value) for count, value in stored.get("bands", {}).items()}
        plan = PrivacyPlan(**{**stored, "noise": noise, "bands": bands})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise _damaged(path / PRIVACY, "it has no privacy plan") from None
    for key, value in _asked(config).items():
        if getattr(plan, key) != value:
            raise _damaged(path / PRIVACY, f"its {key} is not {value!r}, as in {CONFIG}")
    if not noise or not all(_possible(plan, count) for count in noise):
        raise _damaged(path / PRIVACY, "it has noise that no plan has")
    if bands.keys() != (noise.keys() if config.privacy.noise == "correlated" else set()):
        raise _damaged(path / PRIVACY, f"its bands are not those of {CONFIG}")
    return plan


def _asked(config: Config) -> dict[str, Any]:
    """The part of a plan that the configuration says."""
    asked, train, rounds = config.privacy, config.train, config.run.rounds
    same = ("level", "epsilon", "delta", "accountant", "secure", "counts", "noise_at", "examples_per_person")
    return {key: getattr(asked, key) for key in same} | {
        **{"clip_norm": asked.clip, "batch_size": train.batch_size, "local_steps": train.local_steps, "rounds": rounds},
        **{"max_rounds": min(asked.max_rounds or rounds, rounds), "participation": config.clients.participation},
    }


def _possible(plan: PrivacyPlan, count: int) -> bool:
    """Whether the noise of a declared count can be that of a plan, and takes bounded time to account for."""
    noise, bands = plan.noise[count], plan.bands.get(count, 1)
    most = min(count // plan.batch_size, plan.local_steps * plan.max_rounds) if plan.level != "client" else 1
    return count >= 0 and 0 < noise <= _MOST_NOISE and 1 <= bands <= most


def _charges(path: Path, plan: PrivacyPlan) -> Charges:
    """The charges of each client: each round once, or every attempt with noise of the system's source."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for number, row in enumerate(read_lines(path / LEDGER)):
        kinds = [type(row.get(key)) for key in ("round", "client", "num_examples", "steps")]
        if kinds != [int, str, int, int] or row["num_examples"] not in plan.noise or not 1 <= row["round"] <= plan.rounds:
            raise _damaged(path / LEDGER, f"line {number + 1} is no charge of the plan")
        found.setdefault(row["client"], {})[number if plan.secure else row["round"]] = row
    charges = {name: (next(iter(rows.values()))["num_examples"], list(rows.values())) for name, rows in sorted(found.items())}
    for name, (count, rows) in charges.items():
        whole = plan.spending(count, len(rows))
        kind = {(count, whole.sampling_rate, whole.noise_multiplier)}
        charged = {(row["num_examples"], row.get("sampling_rate"), row.get("noise_multiplier")) for row in rows}
        if charged != kind or sum(row["steps"] for row in rows) != whole.steps:
            raise _damaged(path / LEDGER, f"the charges of {name!r} are not those of the plan")
    return charges


def _by_client(plan: PrivacyPlan, charges: Charges, last: float = math.inf) -> dict[str, float]:
    """Epsilon of each client by its charges up to the round `last`, by the plan's own accountant."""
    taken = {name: (count, sum(row["round"] <= last for row in rows)) for name, (count, rows) in charges.items()}
    return {name: plan.epsilon_after(count, rounds) for name, (count, rounds) in taken.items()}


def _check_logs(path: Path, plan: PrivacyPlan, charges: Charges, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RunError` if the run's logs have releases that the ledger has no charge for."""
    charged = {(name, row["round"]) for name, (_, rows) in charges.items() for row in rows}
    for row in read_lines(path / CLIENTS):
        if row.get("status") == "ok" and (row.get("client"), row.get("round")) not in charged:
            raise _damaged(path / LEDGER, f"it has no charge of {row.get('client')!r} for round {row.get('round')!r}")
    if not metrics:
        return
    reported = metrics[-1].get("epsilon")
    known = max(_by_client(plan, charges, len(metrics)).values(), default=0.0)
    if not _number(reported) or not (known >= reported * (1 - _CLOSE) if plan.secure else _same(known, reported)):
        raise _damaged(path / LEDGER, f"its charges are not those of {METRICS}, whose last round has epsilon = {reported!r}")


def _check_summary(path: Path, spent: Spending) -> None:
    """Raise `RunError` if the summary says something else than what was computed."""
    summary = read_object(path / SUMMARY)
    private = summary.get("privacy")
    private = private if isinstance(private, Mapping) else {}
    told = private.get("epsilon_by_client")
    if not _same(summary.get("epsilon"), spent.epsilon):
        computed = f"{summary.get('epsilon')!r}, and {spent.epsilon!r} follows from {PRIVACY} and {LEDGER}"
        raise _damaged(path / SUMMARY, f"its epsilon is {computed}")
    if not isinstance(told, Mapping) or told.keys() != spent.by_client.keys():
        raise _damaged(path / SUMMARY, f"its epsilon_by_client has not the clients of {LEDGER}")
    for name, epsilon in spent.by_client.items():
        if not _same(told[name], epsilon):
            raise _damaged(path / SUMMARY, f"its epsilon of {name!r} is not the one that follows from {LEDGER}")
    if summary.get("rounds") != spent.rounds:
        raise _damaged(path / SUMMARY, f"its rounds are not the {spent.rounds} of {METRICS}")
    if private.get("plan") != read_object(path / PRIVACY)["plan"]:
        raise _damaged(path / SUMMARY, f"its plan is not that of {PRIVACY}")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0


def _same(one: Any, other: float) -> bool:
    return _number(one) and _number(other) and math.isclose(one, other, rel_tol=_CLOSE)


def _damaged(path: Path, why: str) -> RunError:
    return RunError(f"{path}: damaged, {why}; what was spent is not known: restore the files of the run")
