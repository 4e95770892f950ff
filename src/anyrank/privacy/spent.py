"""What all private runs on one data set have spent together.

A run is charged here for what it releases before the training of the round begins; the charge is on disk when `Account.charge`
returns. The unit is one example. In one run an example is with one client, so the clients of a run are alternatives, and the
worst one counts (`anyrank.privacy.worst`). Runs add up by sequential composition, whatever their methods. A run under
client-level privacy counts for an example as in `anyrank.privacy.grant`: with half its noise.

A charge has the name of the run's noise key. Rounds that were charged under that name are not charged again: a resumed run, or
a second run with the same secret and configuration, releases the same numbers again. A run with noise from the system's source
has a new name whenever it goes on.
"""

from __future__ import annotations

import copy
import datetime
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyrank.errors import ConfigError, RunFailed
from anyrank.privacy import datasets
from anyrank.privacy.accountants import Spending
from anyrank.privacy.chain import HEAD, LEDGER, Chain
from anyrank.privacy.datasets import SHARED, DataSet, Kept
from anyrank.privacy.grant import MOST_CHARGES, counted, is_charge
from anyrank.privacy.plan import PrivacyPlan
from anyrank.privacy.worst import within, worst

_REMEDY = f"restore the newest {LEDGER} and {HEAD}, or train on this data no more with privacy"
_ABOUT = ("name", "method", "seed", "out", "delta", "noise_at")  # entries of a charge that say what it was for


@dataclass(frozen=True)
class Planned:
    """What a run releases on a data set: `rounds`, `{declared count: the most rounds that a client of it is charged for}`; its
    name `run`; its `group`, as `Source.group`; `about`: entries for whoever reads the ledger."""

    run: str
    group: str
    plan: PrivacyPlan
    rounds: Mapping[int, int]
    about: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, total: Total) -> list[dict[str, Any]]:
        """The charges that `total` lacks."""
        before = {count: total.rounds[self.run, self.group, count] for count in sorted(self.rounds)}
        return [self._row(count, before[count]) for count in before if self.rounds[count] > before[count]]

    def _row(self, count: int, before: int) -> dict[str, Any]:
        """With correlated noise, rounds may share a draw, so that one of them may add no step."""
        spending = self.plan.spending(count, self.rounds[count])
        steps = spending.steps - self.plan.spending(count, before).steps
        release = {name: float(value) for name, value in vars(spending).items()} | {"steps": steps}
        named = {"run": self.run, "group": self.group, "count": count, "rounds": self.rounds[count] - before}
        return {"level": self.plan.level, **release, **named, **self.about}


class Total:
    """What charges add up to."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.rounds: Counter[tuple[str, str, int]] = Counter()  # charged, of a run, a group and a declared count
        self.runs: dict[str, dict[str, Any]] = {}
        self._steps: Counter[tuple[str, str, int, str, float, float]] = Counter()
        for row in rows:
            self.note(row)

    def note(self, row: Mapping[str, Any]) -> None:
        """Add a charge."""
        run, group, count = row["run"], row["group"], row["count"]
        self.rounds[run, group, count] += row["rounds"]
        self._steps[run, group, count, row["level"], row["sampling_rate"], row["noise_multiplier"]] += row["steps"]
        own = self.runs.setdefault(run, {key: row.get(key) for key in _ABOUT} | {"level": row["level"], "charges": 0})
        own["charges"] += 1
        own["last"] = row.get("time")

    def with_all(self, planned: Iterable[Planned]) -> Total:
        """These charges and those that are still to come of planned runs."""
        after = copy.deepcopy(self)
        for each in planned:
            for row in each.rows(after):
                after.note(row)
        return after

    def epsilon(self, delta: float, unit: str = "example", run: str = "") -> float:
        """Epsilon at `delta` of all charges, or of those of one `run`, for one example or one client. Infinite where nothing
        bounds it: for a client, if a charge bounds what is said of an example only, or if another run may give a client other
        examples."""
        groups = self._groups(unit, run)
        if groups is None or (unit == "client" and len(groups) > 1):
            return math.inf
        return worst(groups, delta)

    def within(self, delta: float, target: float) -> bool:
        """Whether `epsilon` is at most `target`, for one example."""
        groups = self._groups("example", "")
        return groups is not None and within(groups, delta, target)

    @property
    def deltas(self) -> list[float]:
        """The deltas of the runs, the smallest first."""
        return sorted({run["delta"] for run in self.runs.values() if isinstance(run["delta"], float)})

    def _groups(self, unit: str, only: str) -> list[list[list[Spending]]] | None:
        """For each group, the releases of each alternative; `None` if one of them bounds nothing for the unit."""
        groups: dict[str, dict[int, list[Spending]]] = defaultdict(lambda: defaultdict(list))
        for (run, group, count, level, rate, noise), steps in sorted(self._steps.items()):
            if only and run != only:
                continue
            own = counted(unit, level, rate, noise)
            if own is None or (unit == "example" and group.startswith(SHARED)):
                return None
            groups[group][count].append(Spending(*own, steps))
        return [list(alternatives.values()) for alternatives in groups.values()]


class Account:
    """One run's place in the ledger of a data set, in the folder `kept.folder`. `clients`: those that have examples of it,
    `None` for all; `ceiling`: the run's own limit for all runs together, at the delta of its plan (0: none)."""

    def __init__(self, kept: Kept, planned: Planned, clients: frozenset[str] | None, ceiling: float = 0.0) -> None:
        self.kept, self.planned, self.clients, self.ceiling = kept, planned, clients, ceiling
        self._total: Total | None = None
        self._chain: Chain | None = None
        self._seen = b""

    def charge(self, rounds: Mapping[int, int]) -> None:
        """Charge the run until each declared count in `rounds` has that many rounds: on disk when this returns.

        Raises `RunFailed` where that is more than a ceiling allows, and then charges nothing.
        """
        wanted = Planned(self.planned.run, self.planned.group, self.planned.plan, rounds, self.planned.about)
        with datasets.locked(self.kept.folder):
            self._read()
            rows = wanted.rows(self._total)
            if not rows:
                return
            if self._chain.count + len(rows) > MOST_CHARGES:
                raise RunFailed(f"{self.kept.folder / LEDGER}: has {MOST_CHARGES:,} charges, and takes no more")
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            for limit in limits(datasets.current(self.kept), self.ceiling, wanted.plan.delta):
                after = self._total.with_all([wanted])
                if not after.within(limit.delta, limit.epsilon):
                    raise RunFailed(f"{_exceeded(self.kept, limit, after, self._total)}; the run keeps its last checkpoint")
            for row in rows:
                self._chain.add(row | {"time": now})
            self._seen = _state(self.kept.folder)

    def _read(self) -> None:
        """The ledger as it is now; read again only if another process has written in it."""
        if self._chain is None or not self._seen or _state(self.kept.folder) != self._seen:
            self._total = Total()
            self._chain = Chain(self.kept.folder, is_entry, self._total.note, _REMEDY, private=True)


@dataclass(frozen=True)
class Limit:
    """A ceiling: `epsilon` at `delta`, and the `key` that says so."""

    epsilon: float
    delta: float
    key: str


def limits(kept: Kept, ceiling: float, delta: float) -> list[Limit]:
    """The ceilings that hold for a run: its own, and the one that is kept for the data set."""
    own = Limit(ceiling, delta, "privacy.ceiling")
    stored = Limit(kept.epsilon, kept.delta, f"the ceiling of the data set {kept.name}")
    return [limit for limit in (own, stored) if limit.epsilon]


def total(kept: Kept) -> Total:
    """What is charged in a ledger. Raises `RunError` for one that is not as it was written."""
    found = Total()
    with datasets.locked(kept.folder):  # two files are read, and another process may be writing them
        Chain(kept.folder, is_entry, found.note, _REMEDY, private=True)
    return found


def check(data: DataSet, planned: Sequence[Planned], ceilings: Mapping[float, float]) -> None:
    """Raise `ConfigError` if planned runs, together with all earlier ones on the data set, would spend more than a ceiling: the
    one of the data set, or one of `ceilings`, `{delta: epsilon}` (0: none)."""
    found = datasets.find(data) or [Kept(Path(), (data,))]
    for kept in found:
        asked = dict.fromkeys(limit for delta in ceilings for limit in limits(kept, ceilings[delta], delta))
        before = total(kept) if kept.folder.name and asked else Total()
        after = before.with_all(planned)
        for limit in asked:
            if not after.within(limit.delta, limit.epsilon):
                raise ConfigError(f"{_exceeded(kept, limit, after, before)}; lower privacy.epsilon, or raise the ceiling")


def _exceeded(kept: Kept, limit: Limit, after: Total, before: Total) -> str:
    spent = f"{before.epsilon(limit.delta):.4g} are spent" if before.runs else "nothing is spent"
    return (
        f"{limit.key}: expected at most epsilon = {limit.epsilon:g} at delta = {limit.delta:g} for all runs on {kept.name} "
        f"together, got {after.epsilon(limit.delta):.4g} with what is planned ({spent} so far"
        f"{f', ledger {kept.folder}' if before.runs else ''})"
    )


def is_entry(row: Mapping[str, Any]) -> bool:
    """Whether the object of a line is a charge of a run."""
    keys = {"run": str, "group": str, "count": int, "rounds": int}
    return is_charge(row, least=0) and all(type(row.get(key)) is kind for key, kind in keys.items()) and row["rounds"] >= 1


def _state(folder: Path) -> bytes:
    """What changes whenever the ledger does."""
    try:
        signs = (folder / LEDGER).stat()
        return (folder / HEAD).read_bytes() + f"{signs.st_size} {signs.st_mtime_ns}".encode()
    except OSError:
        return b""
