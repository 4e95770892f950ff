"""Rounds that end without a new state: too few usable uploads, or a merge that cannot be kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anyrank.config.sections import RoundsConfig
from anyrank.errors import RunFailed


@dataclass(frozen=True)
class Quorum:
    """How many usable uploads a round needs: `least`, and the share `share` of the clients that were asked."""

    least: int = 1
    share: float = 0.0

    def needed(self, asked: int) -> int:
        """Of `asked` clients; none where nobody was asked, since nobody could have answered.

        >>> Quorum(2, 0.5).needed(10), Quorum(2, 0.5).needed(3), Quorum(2).needed(1), Quorum(2).needed(0)
        (5, 2, 2, 0)
        """
        return max(self.least, math.ceil(self.share * asked)) if asked else 0

    def lacking(self, usable: int, asked: int, rows: Sequence[Mapping[str, Any]]) -> str:
        """Why a round of `usable` uploads is idle; empty if it is not. `rows`: what became of each client."""
        if usable >= self.needed(asked):
            return ""
        worst = next((row for row in rows if row["status"] in ("failed", "rejected", "excluded")), None)
        cause = f"; {worst['client']}: {worst['reason']}" if worst else ""
        if not usable:
            return f"no client sent a usable update{cause}"
        return f"{usable} of {asked} clients sent a usable update, {self.needed(asked)} are needed{cause}"


@dataclass(frozen=True)
class Patience:
    """Counts idle rounds in a row, and ends the run when there are `most` of them."""

    most: int
    idle: int = 0

    @classmethod
    def of(cls, config: RoundsConfig, rounds: int, log: Iterable[Mapping[str, Any]] = ()) -> Patience:
        """For a run of `rounds` rounds with the metrics `log` so far. A run in which every round is idle fails, however few
        rounds it has."""
        patience = cls(min(config.patience, rounds))
        for row in log:
            patience = replace(patience, idle=patience.idle + 1 if row.get("idle") else 0)
        return patience

    def after(self, round: int, idle: str) -> Patience:
        """After a round that was idle for the reason `idle`, or was not (empty). Raises `RunFailed` when patience is over."""
        now = replace(self, idle=self.idle + 1 if idle else 0)
        now.check(round, idle)
        return now

    def check(self, round: int, idle: str) -> None:
        """Raise `RunFailed` if patience is over after `round`, which was idle for the reason `idle`."""
        if self.idle >= self.most:
            times = f" ({self.idle} rounds in a row were idle)" if self.idle > 1 else ""
            raise RunFailed(f"round {round}: {idle}{times}")
