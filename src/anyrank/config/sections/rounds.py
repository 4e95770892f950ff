"""`[rounds]`: when a round ends, and what it needs to count."""

from __future__ import annotations

from dataclasses import dataclass

from anyrank.config.describe import COUNT, LATER, NOT_NEGATIVE, key
from anyrank.config.sections.values import expect, one_of

LATE = ("drop", "carry")
_SHORTEST_S, _LONGEST_S = 0.01, 10_000_000


@dataclass(frozen=True)
class RoundsConfig:
    """`[rounds]`: quorum, deadline, and late replies."""

    least: int = key(
        1,
        "Number of usable uploads that a round needs. With fewer, the state stays as it was: the round is idle.",
        COUNT,
        {"Flower": "min_fit_clients, min_train_nodes", "NVFlare": "min_clients", "elsewhere": "quorum"},
        metadata=LATER,
    )
    share: float = key(
        0.0,
        "Share of the clients asked in a round that must send a usable upload; with a smaller share, the round is idle.",
        "a share from 0 to 1",
        metadata=LATER,
    )
    deadline_s: float = key(
        0.0,
        "Seconds that a client has for its training in a round; one that takes longer sends nothing. Clients in a stack share "
        "one limit and train one by one if it is exceeded. 0: no limit. Rounds in which the deadline decides are not "
        "reproducible.",
        NOT_NEGATIVE,
        {"Flower": "round_timeout", "NVFlare": "train_timeout", "elsewhere": "timeout"},
        metadata=LATER,
    )
    late: str = key(
        "drop",
        "What becomes of a reply that arrives after its round: it is left out (drop), or it joins the next round (carry).",
        LATE,
        metadata=LATER,
    )
    patience: int = key(
        3,
        "Number of idle rounds in a row after which the run ends; its last checkpoint stands.",
        COUNT,
        metadata=LATER,
    )

    def __post_init__(self) -> None:
        expect(self.least >= 1, "rounds.least", COUNT, self.least)
        expect(0 <= self.share <= 1, "rounds.share", "a share from 0 to 1", self.share)
        limit = self.deadline_s == 0 or _SHORTEST_S <= self.deadline_s <= _LONGEST_S
        expect(limit, "rounds.deadline_s", f"{_SHORTEST_S:g} to {_LONGEST_S:,} seconds, or 0 for no limit", self.deadline_s)
        one_of(self.late, LATE, "rounds.late")
        expect(self.patience >= 1, "rounds.patience", COUNT, self.patience)
