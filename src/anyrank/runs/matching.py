"""Whether a run folder is of the configuration, and of the privacy plan, that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyrank import files
from anyrank.config.sections import Config
from anyrank.config.tables import elsewhere, from_table, parse_toml, to_table
from anyrank.errors import AnyRankError, RunError, in_a_line
from anyrank.runs.names import CONFIG

_CONFIG_BYTES = 16 << 20  # of a run's configuration, which may name each of many clients


def stored_config(path: Path) -> Config:
    """The configuration in the run folder `path`. Raises `RunError` where it cannot be read."""
    try:
        return from_table(parse_toml(files.read_bounded(path / CONFIG, _CONFIG_BYTES).decode("utf-8")))
    except (AnyRankError, ValueError, TypeError, OSError, RecursionError) as error:
        reason = in_a_line(error)
        raise RunError(f"{path / CONFIG}: cannot be read back ({reason}); choose another --out") from None


def with_stored_ranks(path: Path, config: Config) -> Config:
    """The configuration with the ranks that a run in the folder, if there is one, has for sites whose rank is `auto`."""
    if not config.undecided or not (path / CONFIG).is_file():
        return config
    known = {site.name: site.rank for site in stored_config(path).sites}
    return config.with_ranks({site.name: known[site.name] for site in config.undecided if site.name in known})


def check_config(path: Path, config: Config) -> None:
    """Raise `RunError` that names the first key by which the configuration in the run folder is another one. The run may be
    given more rounds, as `check_grown` has it, and its clients may train elsewhere."""
    stored, rounds = elsewhere(stored_config(path), config), config.run.rounds
    if rounds > stored.run.rounds:
        check_grown(path, stored, rounds)
        stored = stored.replace(run={"rounds": rounds})
    check_same("", path, to_table(stored), to_table(config))


def check_grown(path: Path, stored: Config, rounds: int) -> None:
    """Raise `RunError` if with so many rounds the first ones would not have been those of the configuration `stored`."""
    asked = f"{path}: was started with run.rounds = {stored.run.rounds}, not {rounds}"
    if stored.train.schedule != "constant":
        raise RunError(
            f"{asked}, and its learning rates depend on run.rounds by train.schedule = {stored.train.schedule!r}; "
            "only with 'constant' may rounds be added: choose another --out"
        )
    if stored.privacy.level != "none":
        raise RunError(f"{asked}, and its noise was computed for these rounds; choose another --out")


def check_same(what: str, path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `RunError` that names the first key by which a run's configuration or plan is not the one it began with."""
    theirs, ours = flat(stored, what and f"{what} plan: "), flat(wanted, what and f"{what} plan: ")
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            if key.endswith(".handed_in"):
                raise _handed_in(key, path, theirs.get(key), ours.get(key))
            raise RunError(
                f"{path}: was started with {key} = {theirs.get(key)!r}, not {ours.get(key)!r}; "
                "resume with the configuration in the folder, or choose another --out"
            )


_GIVEN = {"model": "task", "data.partition": "shards", "method": "method"}  # what a program hands in, by the table it is of


def _handed_in(key: str, path: Path, theirs: Any, ours: Any) -> RunError:
    """Which part of what a program handed in is not what the run began with."""
    what = _GIVEN[key.removesuffix(".handed_in")]
    if not theirs or not ours:
        began = f"was started with a {what} that a program handed in, not with" if theirs else "was not started with"
        return RunError(f"{path}: {began} this {what}; continue it in the way it was started, or choose another folder")
    parts = [old.split()[0] for old, new in zip(theirs, ours, strict=False) if old != new] if what == "task" else []
    differs = f" (its {', '.join(parts)})" if parts else ""
    return RunError(
        f"{path}: was started with another {what} than the given one{differs}; pass the one of the run's start, or choose "
        "another folder"
    )


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A table of tables as one, with dotted keys, each with `prefix` before it.

    >>> flat({"run": {"seed": 0}})
    {'run.seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
