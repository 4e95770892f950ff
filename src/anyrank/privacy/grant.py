"""The privacy ledger of a site: one budget for all runs, federations, resubmissions, rollbacks and attempts on its data.

A release is charged before the training begins: the charge is on disk when `charge` returns. For the budget it does not matter
for which run it was: all charges add up, by an accountant for steps of different noise. A release of another unit than the one
that the site protects counts by what it reveals about that unit. Noise for a larger unit (a person for an example; a whole site
for both) is, for the smaller one, noise of half the size without sampling: the larger unit stays there with other data, and
replacing what it adds by something else counts as twice the clip norm. (With sampling, twice the clip is not what the
accountants bound, which add or remove a unit; that a step draws the unit or not is therefore taken as known.) Noise for a
smaller unit does not bound what is revealed about a larger one.

Its files are those of `anyrank.privacy.chain`. Older copies of both together are not found there (see `anyrank.worker.store`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyrank.privacy.accountants import Spending, composed, within
from anyrank.privacy.chain import HEAD, LEDGER, Chain

MOST_CHARGES = 100_000  # of a ledger
UNITS = ("example", "person", "client")  # from the smallest to the largest


class Spent(Exception):
    """A release would exceed the budget; the text is for the site's own log."""


@dataclass(frozen=True)
class Release:
    """What one reply releases: `steps` of noise `noise_multiplier` on Poisson samples of rate `sampling_rate`, protecting one
    `level` (example, person or client)."""

    level: str
    sampling_rate: float
    noise_multiplier: float
    steps: int

    def table(self) -> dict[str, Any]:
        """The entries of a charge."""
        rate, noise = float(self.sampling_rate), float(self.noise_multiplier)
        return {"level": self.level, "sampling_rate": rate, "noise_multiplier": noise, "steps": self.steps}


class Grant:
    """The ledger in `folder`, for a site that protects `level` ("none": only what is charged is noted) and grants `epsilon` at
    `delta` in all. Whoever opens it holds the folder's lock. Raises `RunError` for a ledger that is not as it was written."""

    def __init__(self, folder: Path, level: str, epsilon: float, delta: float, reading: bool = False) -> None:
        self.folder, self.level, self.epsilon, self.delta = folder, level, epsilon, delta
        self._steps: Counter[tuple[str, float, float]] = Counter()
        remedy = f"restore the newest {LEDGER} and {HEAD}, or take no more part in private runs with this data"
        self._chain = Chain(folder, is_charge, self._note, remedy, reading)

    @property
    def count(self) -> int:
        """The number of charges."""
        return self._chain.count

    def charge(self, release: Release, about: Mapping[str, Any]) -> int:
        """Charge a release, and return the charge's number: it is on disk when this returns. `about`: what it was for, for the
        operator. Raises `Spent` if the budget does not last, and then charges nothing."""
        if not (release.steps >= 1 and 0 < release.sampling_rate <= 1 and 0 < release.noise_multiplier < math.inf):
            raise Spent(f"expected a release with noise, got {release}")
        if self.count >= MOST_CHARGES:
            raise Spent(f"the ledger has {MOST_CHARGES} charges, and takes no more")
        self._check(release)
        return self._chain.add({**release.table(), **about})

    def spent(self) -> float:
        """Epsilon of all charges, at `delta`, for the unit that the site protects; infinite where nothing bounds it."""
        return _epsilon(self._spendings(), self.delta)

    def table(self) -> dict[str, Any]:
        """What is spent, for the operator: the unit, the budget, what is spent of it, the number of charges."""
        return {
            **{"level": self.level, "granted": self.epsilon, "delta": self.delta, "spent": self.spent()},
            **{"charges": self.count, "ledger": str(self.folder / LEDGER)},
        }

    def _check(self, release: Release) -> None:
        if self.level not in UNITS and not self.epsilon:
            return
        after = self._spendings(release)
        if after is None or not within(after, self.delta, self.epsilon):
            raise Spent(f"with this release, more than epsilon = {self.epsilon:g} at delta = {self.delta:g} would be spent")

    def _spendings(self, more: Release | None = None) -> tuple[Spending, ...] | None:
        """All charges, and one `more`, by kind of step; `None` if one of them does not protect the site's unit."""
        unit = self.level if self.level in UNITS else "example"
        steps = Counter(self._steps)
        if more:
            steps[more.level, more.sampling_rate, more.noise_multiplier] += more.steps
        kinds: Counter[tuple[float, float]] = Counter()
        for (level, rate, noise), count in steps.items():
            own = counted(unit, level, rate, noise)
            if own is None:
                return None
            kinds[own] += count
        return tuple(Spending(rate, noise, count) for (rate, noise), count in sorted(kinds.items()))

    def _note(self, row: Mapping[str, Any]) -> None:
        self._steps[row["level"], row["sampling_rate"], row["noise_multiplier"]] += row["steps"]


def counted(unit: str, level: str, rate: float, noise: float) -> tuple[float, float] | None:
    """The sampling rate and noise multiplier that a release of `level` has for one `unit`; `None` where it bounds nothing."""
    if UNITS.index(level) < UNITS.index(unit):
        return None
    return (rate, noise) if level == unit else (1.0, noise / 2)


def _epsilon(spendings: tuple[Spending, ...] | None, delta: float) -> float:
    return math.inf if spendings is None else composed(spendings, delta)


def is_charge(row: Mapping[str, Any], least: int = 1) -> bool:
    """Whether the object of a line is a charge: a release with noise, of at least so many steps."""
    keys = {"level": str, "sampling_rate": float, "noise_multiplier": float, "steps": int}
    if any(type(row.get(key)) is not kind for key, kind in keys.items()):
        return False
    noisy = 0 < row["sampling_rate"] <= 1 and 0 < row["noise_multiplier"] < math.inf
    return row["level"] in UNITS and noisy and row["steps"] >= least
