"""`[robust]`: defences against hostile clients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from anyrank.config.describe import LATER, NATURAL, key
from anyrank.config.sections.values import expect, one_of

RULES = ("none", "norm-bound", "geometric-median", "krum", "multi-krum")


@dataclass(frozen=True)
class RobustConfig:
    """`[robust]`: a defence between the uploads of a round and the method's aggregate, beside any method."""

    rule: str = key(
        "none",
        "The defence: steps much longer than the others are shortened (norm-bound), the geometric median of the steps takes "
        "the place of their mean (geometric-median), or only the uploads nearest to the others count (krum, multi-krum).",
        RULES,
        metadata=LATER,
    )
    factor: float = key(
        3.0,
        "For norm-bound: the longest step, in multiples of the median of the round, taken among clients of one rank.",
        "a number of at least 1",
        metadata=LATER,
    )
    hostile: int = key(1, "For krum and multi-krum: how many clients of a round may be hostile.", NATURAL, metadata=LATER)
    keep: int = key(0, "For multi-krum: how many uploads count. 0: all but the hostile ones.", NATURAL, metadata=LATER)

    def __post_init__(self) -> None:
        one_of(self.rule, RULES, "robust.rule")
        expect(1 <= self.factor < math.inf, "robust.factor", "a number of at least 1", self.factor)
        expect(self.hostile >= 0, "robust.hostile", NATURAL, self.hostile)
        expect(self.keep >= 0, "robust.keep", NATURAL, self.keep)
