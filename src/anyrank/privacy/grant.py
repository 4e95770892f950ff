"""The privacy ledger of a site: one budget for all runs, federations, resubmissions, rollbacks and attempts on its data.

A release is charged before the training begins: the charge is on disk when `charge` returns. For the budget it does not matter
for which run it was: all charges add up, by an accountant for steps of different noise. A release of another unit than the one
that the site protects counts by what it reveals about that unit. Noise for a larger unit (a person for an example; a whole site
for both) is, for the smaller one, noise of half the size without sampling: the larger unit stays there with other data, and
replacing what it adds by something else counts as twice the clip norm. (With sampling, twice the clip is not what the
accountants bound, which add or remove a unit; that a step draws the unit or not is therefore taken as known.) Noise for a
smaller unit does not bound what is revealed about a larger one.

`ledger.jsonl` has a line for each charge, with the digest of the line before it, and `ledger.json` the number of charges and
the last digest. A line that was changed, removed or cut, and an older copy of one of the two files, are found when the ledger
is opened: it is then refused. Older copies of both files together are not found here (see `anyrank.worker.store`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyrank.errors import RunError
from anyrank.files import append, cut, parse_json, read_bounded, write_whole_text
from anyrank.privacy.accountants import Spending, composed, within

LEDGER, HEAD = "ledger.jsonl", "ledger.json"
MOST_CHARGES = 100_000  # of a ledger
_MOST_BYTES = 1 << 27
_LEVELS = ("example", "person", "client")  # units, from the smallest to the largest
_FIRST = "0" * 64  # what stands for the digest of the line before the first one


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
        self.folder, self.level, self.epsilon, self.delta, self._reading = folder, level, epsilon, delta, reading
        self._steps: Counter[tuple[str, float, float]] = Counter()
        self.count, self._last, self._head = 0, _FIRST, 0
        self._open()

    def charge(self, release: Release, about: Mapping[str, Any]) -> int:
        """Charge a release, and return the charge's number: it is on disk when this returns. `about`: what it was for, for the
        operator. Raises `Spent` if the budget does not last, and then charges nothing."""
        if not (release.steps >= 1 and 0 < release.sampling_rate <= 1 and 0 < release.noise_multiplier < math.inf):
            raise Spent(f"expected a release with noise, got {release}")
        if self.count >= MOST_CHARGES:
            raise Spent(f"the ledger has {MOST_CHARGES} charges, and takes no more")
        self._check(release)
        if self._head < self.count:  # a failed write: a second one would look like damage
            self._write_head()
        row = {"number": self.count + 1, "before": self._last, **release.table(), **about}
        line = json.dumps(row, sort_keys=True)
        append(self.folder / LEDGER, line.encode() + b"\n")
        self._note(row, line)
        self._write_head()
        return self.count

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
        if self.level not in _LEVELS and not self.epsilon:
            return
        after = self._spendings(release)
        if after is None or not within(after, self.delta, self.epsilon):
            raise Spent(f"with this release, more than epsilon = {self.epsilon:g} at delta = {self.delta:g} would be spent")

    def _spendings(self, more: Release | None = None) -> tuple[Spending, ...] | None:
        """All charges, and one `more`, by kind of step; `None` if one of them does not protect the site's unit."""
        unit = self.level if self.level in _LEVELS else "example"
        steps = Counter(self._steps)
        if more:
            steps[more.level, more.sampling_rate, more.noise_multiplier] += more.steps
        kinds: Counter[tuple[float, float]] = Counter()
        for (level, rate, noise), count in steps.items():
            if _LEVELS.index(level) < _LEVELS.index(unit):
                return None
            kinds[(rate, noise) if level == unit else (1.0, noise / 2)] += count
        return tuple(Spending(rate, noise, count) for (rate, noise), count in sorted(kinds.items()))

    # --- files ---

    def _open(self) -> None:
        lines, torn = self._lines()
        head = self._read_head()
        self._head = head["charges"]
        digests = [_FIRST]
        for number, line in enumerate(lines, 1):
            row = _row(line)
            if row is None or row["number"] != number or row["before"] != digests[-1]:
                raise self._damaged(f"line {number} is not the one that was written")
            digests.append(_digest(line))
            self._note(row, line)
        if not 0 <= head["charges"] <= len(lines) or len(lines) - head["charges"] > 1:
            raise self._damaged(f"it has {len(lines)} charges, {HEAD} says {head['charges']}")
        if digests[head["charges"]] != head["last"]:
            raise self._damaged(f"charge {head['charges']} is not the one that {HEAD} names")
        if self._reading:
            return
        if torn is not None:
            cut(self.folder / LEDGER, torn)
        if head["charges"] < len(lines):  # the worker was ended between the two writes
            self._write_head()

    def _lines(self) -> tuple[list[str], int | None]:
        """The whole lines, and the length of the file without a last line that was not finished (`None`: all were)."""
        data = self._bytes(LEDGER)
        if data is None:
            return [], None
        whole = data.rfind(b"\n") + 1
        try:
            lines = data[:whole].decode().split("\n")[:-1]
        except UnicodeDecodeError:
            raise self._damaged("it is no text") from None
        return lines, whole if whole < len(data) else None

    def _read_head(self) -> Mapping[str, Any]:
        data = self._bytes(HEAD)
        if data is None:
            return {"charges": 0, "last": _FIRST}
        try:
            table = parse_json(data)
        except ValueError:
            table = None
        if not isinstance(table, dict) or type(table.get("charges")) is not int or not isinstance(table.get("last"), str):
            raise self._damaged(f"{HEAD} cannot be read")
        return table

    def _bytes(self, name: str) -> bytes | None:
        try:
            return read_bounded(self.folder / name, _MOST_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._damaged(f"{name} cannot be read ({error.strerror or error})") from None

    def _note(self, row: Mapping[str, Any], line: str) -> None:
        self._steps[row["level"], row["sampling_rate"], row["noise_multiplier"]] += row["steps"]
        self.count, self._last = row["number"], _digest(line)

    def _write_head(self) -> None:
        write_whole_text(self.folder / HEAD, json.dumps({"charges": self.count, "last": self._last}) + "\n")
        self._head = self.count

    def _damaged(self, what: str) -> RunError:
        return RunError(
            f"{self.folder / LEDGER}: {what}, so that what was spent is not known; restore the newest {LEDGER} and {HEAD}, "
            "or take no more part in private runs with this data"
        )


def _epsilon(spendings: tuple[Spending, ...] | None, delta: float) -> float:
    return math.inf if spendings is None else composed(spendings, delta)


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def _row(line: str) -> Mapping[str, Any] | None:
    """The charge of a line; `None` for what is none."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    keys = {"number": int, "before": str, "level": str, "sampling_rate": float, "noise_multiplier": float, "steps": int}
    if not isinstance(row, dict) or any(type(row.get(key)) is not kind for key, kind in keys.items()):
        return None
    right = row["level"] in _LEVELS and 0 < row["sampling_rate"] <= 1 and 0 < row["noise_multiplier"] < math.inf
    return row if right and row["steps"] >= 1 else None
