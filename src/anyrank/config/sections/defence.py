"""`[guard]` and `[robust]`: defences against faulty and hostile clients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from anyrank.config.describe import LATER, NATURAL, key
from anyrank.config.sections.values import expect, one_of
from anyrank.errors import ConfigError

RULES = ("none", "geometric-median", "krum", "multi-krum", "trimmed-mean", "median")

_READ_BY = {"hostile": ("krum", "multi-krum"), "keep": ("multi-krum",), "trim": ("trimmed-mean",)}  # others ignore the key


@dataclass(frozen=True)
class GuardConfig:
    """`[guard]`: limits on the effect of one client. They are on by default; each can be switched off."""

    norm: float = key(
        3.0,
        "Longest step of a client, in multiples of the median step of the round; a longer step is shortened to it. Clients of "
        "one rank are compared with each other where three or more take part. 0: no limit.",
        "a number of at least 1, or 0",
        {"Flower": "clipping_norm"},
        metadata=LATER,
    )
    far: float = key(
        4.0,
        "Length in the same multiples from which an update is not shortened but rejected. 0: none is.",
        "a number of at least guard.norm, or 0",
        metadata=LATER,
    )
    owner: float = key(
        0.5,
        "Largest weight of a client on slices that no other client of the round has; for the rest, these slices stay as the "
        "server holds them. 1: no limit.",
        "a share above 0, at most 1",
        metadata=LATER,
    )
    rollback: bool = key(
        True,
        "Whether a merge that is not finite is dropped, so that the state before the round stays. false: the run ends.",
        metadata=LATER,
    )
    offences: int = key(3, "Number of rejected uploads after which a client rests. 0: never.", NATURAL, metadata=LATER)
    rest: int = key(5, "Number of rounds that such a client rests.", NATURAL, metadata=LATER)

    def __post_init__(self) -> None:
        limit = self.norm == 0 or 1 <= self.norm < math.inf
        expect(limit, "guard.norm", "a number of at least 1, or 0 for no limit", self.norm)
        far = self.far == 0 or max(1, self.norm) <= self.far < math.inf
        expect(far, "guard.far", f"a number of at least 1 and guard.norm = {self.norm:g}, or 0 to reject none", self.far)
        expect(0 < self.owner <= 1, "guard.owner", "a share above 0, at most 1", self.owner)
        expect(self.offences >= 0, "guard.offences", NATURAL, self.offences)
        expect(self.rest >= 0, "guard.rest", NATURAL, self.rest)


@dataclass(frozen=True)
class RobustConfig:
    """`[robust]`: a defence between the uploads of a round and the method's aggregate, beside any method."""

    rule: str = key(
        "none",
        "The defence: the geometric median of the steps takes the place of their mean (geometric-median), only the uploads "
        "nearest to the others count (krum, multi-krum), or each number is averaged without its extremes (trimmed-mean) or is "
        "the median of the clients' numbers (median).",
        RULES,
        {"elsewhere": "byzantine, defense, attack, malicious"},
        metadata=LATER,
    )
    hostile: int = key(1, "For krum and multi-krum: how many clients of a round may be hostile.", NATURAL, metadata=LATER)
    keep: int = key(0, "For multi-krum: how many uploads count. 0: all but the hostile ones.", NATURAL, metadata=LATER)
    trim: float = key(
        0.1,
        "For trimmed-mean: share of the clients whose numbers are left out at each end.",
        "a share of at least 0, below 0.5",
        metadata=LATER,
    )

    def __post_init__(self) -> None:
        if self.rule == "norm-bound":
            raise ConfigError("robust.rule: the norm bound is part of the guard and on by default; set guard.norm instead")
        one_of(self.rule, RULES, "robust.rule")
        expect(self.hostile >= 0, "robust.hostile", NATURAL, self.hostile)
        expect(self.keep >= 0, "robust.keep", NATURAL, self.keep)
        expect(0 <= self.trim < 0.5, "robust.trim", "a share of at least 0, below 0.5", self.trim)
        for name, rules in _READ_BY.items():
            value, usual = getattr(self, name), type(self).__dataclass_fields__[name].default
            users = f"no value, because this key is only for {' and '.join(rules)}"
            expect(value == usual or self.rule in rules, f"robust.{name}", users, value)
