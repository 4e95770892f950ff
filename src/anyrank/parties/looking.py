"""What the server's own run folders say of its runs, whether the server runs or not. No NVFlare, and no torch, here."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyrank.config.tables import read_toml
from anyrank.errors import AnyRankError, DeployError, in_a_line
from anyrank.parties import kits, starting
from anyrank.parties.kits import Kit
from anyrank.parties.policies import RUNS, SERVER
from anyrank.runs.names import CONFIG, METRICS, SUMMARY, read_lines, read_object

RUN = "run"  # the run folder, below a folder of the run's name
_MOST_RUNS = 10_000
_SHOWN = ("accuracy", "loss", "epsilon")


def server_kit(kit: Kit) -> Kit | None:
    """The kit of the same federation's server, if it is `kit` or lies beside it, as on the machine that provisioned both."""
    if kit.role == SERVER:
        return kit
    with contextlib.suppress(DeployError):
        found = kits.open_kit(kit.folder.absolute().parent / SERVER, (SERVER,))
        return found if (found.federation, found.host, found.port) == (kit.federation, kit.host, kit.port) else None
    return None


def status(kit: Kit) -> dict[str, Any]:
    """The status of a federation as the run folders of its server's `kit` have it: in the form of `commanding.status`, with
    nobody seen. `running`: whether the server is started on this machine."""
    runs = kit.state / RUNS
    try:
        names = sorted(each.name for each, _ in zip(os.scandir(runs), range(_MOST_RUNS), strict=False))
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise DeployError(f"{runs}: cannot be looked into ({error.strerror or in_a_line(error)})") from None
    rows = [_row(runs / name / RUN, name) for name in names if (runs / name / RUN / CONFIG).is_file()]
    sites = [{"name": name, "seen_s": None} for name in kit.sites]
    return {
        **{"federation": kit.federation, "server": f"{kit.host}:{kit.port}", "sites": sites, "runs": rows},
        "from": str(runs),
        "running": starting.running(kit) is not None,
    }


def _row(folder: Path, run: str) -> dict[str, Any]:
    """How far a run has come. `state`: done, or unfinished: whether anything works at it is not in its folder."""
    try:
        config, rounds = read_toml(folder / CONFIG, "configuration"), read_lines(folder / METRICS)
        row = {"run": run, "round": len(rounds), "rounds": int(config["run"]["rounds"]), "state": "unfinished"}
        row |= {key: rounds[-1][key] for key in _SHOWN if rounds and rounds[-1].get(key) is not None}
        if rounds:
            row["age_s"] = round(max(0.0, time.time() - (folder / METRICS).stat().st_mtime), 1)
        if (folder / SUMMARY).exists():
            summary = read_object(folder / SUMMARY)
            row |= {"state": "done"} | {key: summary[key] for key in _SHOWN if summary.get(key) is not None}
        return row
    except (AnyRankError, OSError, KeyError, TypeError, ValueError) as error:
        return {"run": run, "state": "unreadable", "reason": in_a_line(error)}


def in_words(table: Mapping[str, Any]) -> list[str]:
    """The lines of such a status."""
    runs = "is started; ask it with an owner's kit" if table["running"] else "is not started on this machine"
    head = f"{table['federation']} at {table['server']}: the server {runs}. Its run folders in {table['from']}:"
    nothing = "no run has begun its rounds yet" if table["running"] else "no runs yet"
    return [head, *(f"  {_words(row)}" for row in table["runs"])] + ([] if table["runs"] else [f"  {nothing}"])


def _words(row: Mapping[str, Any]) -> str:
    if row["state"] == "unreadable":
        return f"{row['run']}: cannot be read ({row['reason']})"
    told = f"{row['run']}: {row['state']}, round {row['round']} of {row['rounds']}"
    told += "".join(f", {key} {row[key]:.3f}" for key in _SHOWN if isinstance(row.get(key), (int, float)))
    return told + (f", last round {age(row['age_s'])} ago" if "age_s" in row else "")


def age(seconds: float) -> str:
    """A duration, for people.

    >>> age(42.0), age(600.0), age(7200.0), age(200_000.0)
    ('42 s', '10 min', '2 h', '2 days')
    """
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size or (size < 86_400 and seconds >= size):
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def following(table: Mapping[str, Any], kit: Kit) -> str:
    """What to type next, after such a status."""
    if not table["running"]:
        return f"anyrank deploy start {kit.folder}"
    return "anyrank deploy status --kit KIT, with an owner's or a viewer's kit"
