"""The updates that are nearest to the others.

Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS
2017, section 4 (Krum) and section 5 (Multi-Krum). Distances are between steps, on the slices that all clients have: clients of
larger ranks would else seem far away from all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from anyrank.messages.records import ClientUpdate, Job, ServerState
from anyrank.robust.base import Rule, Screened, TooFew
from anyrank.robust.steps import distances, finite, gram


@dataclass(frozen=True)
class Krum(Rule):
    """Keeps the `keep` updates of the least score, the sum of squared distances to the `K - hostile - 2` nearest others.

    `hostile`: how many clients of a round may be hostile; `keep` 0: all but the hostile ones (Multi-Krum), 1: Krum. Raises
    `TooFew` for a round of fewer than `2 hostile + 3` updates, for which the rule promises nothing.
    """

    hostile: int = 1
    keep: int = 0

    @property
    def least(self) -> int:
        return 2 * self.hostile + 3

    def without(self, hostile: int) -> Krum:
        return replace(self, hostile=max(0, self.hostile - hostile))

    def screen(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> Screened:
        if len(updates) < self.least:
            raise TooFew(
                f"robust.rule: krum with robust.hostile = {self.hostile} needs {self.least} updates a round, got "
                f"{len(updates)}; raise clients.participation, or lower robust.hostile"
            )
        updates = sorted(updates, key=lambda update: update.client)  # so that rounding does not follow the order of arrival
        products = gram(jobs, updates, common=True)
        found = scores(products, len(updates) - self.hostile - 2).tolist()
        order = sorted(finite(products), key=lambda k: (found[k], updates[k].client))
        kept = set(order[: self.keep or len(updates) - self.hostile])
        reason = "krum: farther from the other updates than those that were kept"
        refused = {update.client: reason for k, update in enumerate(updates) if k not in kept}
        return Screened([update for k, update in enumerate(updates) if k in kept], refused)


def scores(gram: Tensor, nearest: int) -> Tensor:
    """`[K]`: the sum of squared distances of each step to its `nearest` others; a step that is too long is infinitely far."""
    away = distances(gram).nan_to_num(nan=math.inf, posinf=math.inf).fill_diagonal_(math.inf)
    return away.sort(dim=1).values[:, :nearest].sum(dim=1)
