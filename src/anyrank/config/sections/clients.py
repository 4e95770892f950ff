"""`[clients]`: the registered clients."""

from __future__ import annotations

from dataclasses import dataclass

from anyrank.config.describe import COUNT, LATER, key
from anyrank.config.sections.values import expect, one_of

RANK_ORDERS = ("shuffled", "cycled", "rising")


@dataclass(frozen=True)
class ClientsConfig:
    """`[clients]`: how many clients there are, how many take part in a round, and at which ranks."""

    count: int = key(
        20, "Number of registered clients.", COUNT, {"Flower": "num_supernodes, num_clients", "flwr-datasets": "num_partitions"}
    )
    participation: float = key(
        0.25,
        "Share of the clients that are drawn each round. With [[sites]], all of them, unless the configuration has this key.",
        "a share above 0, at most 1",
        {"Flower": "fraction_fit, fraction_train"},
    )
    ranks: tuple[int, ...] = key(
        (2, 4, 8, 16, 32),
        "Ranks of the clients' adapters: the list is repeated over the clients, in the order of clients.rank_order.",
        "ranks of at least 1",
        {"PEFT": "r"},
    )
    rank_order: str = key(
        "shuffled",
        "How the repeated ranks are assigned to clients: shuffled by the seed, in order (cycled) or sorted (rising). Not "
        "shuffled if clients are named by data.partition.column: ranks are then in the order of names.",
        RANK_ORDERS,
    )
    names: tuple[str, ...] = key(
        (),
        "Names of the clients. Empty: client-0 and so on, or the values of data.partition.column, if each client has one.",
        "different names, one per client",
        metadata=LATER,
    )

    dropout: float = key(
        0.0,
        "Share of the clients asked in a round that send nothing, drawn at random: simulated failures.",
        "a share of at least 0, below 1",
        metadata=LATER,
    )
    late: float = key(
        0.0,
        "Share of the clients asked in a round whose replies arrive one round late, drawn at random; rounds.late says what "
        "becomes of them.",
        "a share of at least 0, below 1",
        metadata=LATER,
    )

    def __post_init__(self) -> None:
        expect(self.count >= 1, "clients.count", COUNT, self.count)
        expect(0 < self.participation <= 1, "clients.participation", "a share above 0, at most 1", self.participation)
        expect(len(self.ranks) > 0, "clients.ranks", "at least one rank", list(self.ranks))
        for rank in self.ranks:
            expect(rank >= 1, "clients.ranks", "ranks of at least 1", rank)
        expect(0 <= self.dropout < 1, "clients.dropout", "a share of at least 0, below 1", self.dropout)
        expect(0 <= self.late < 1, "clients.late", "a share of at least 0, below 1", self.late)
        one_of(self.rank_order, RANK_ORDERS, "clients.rank_order")
        if self.names:
            different = len(set(self.names)) == len(self.names) == self.count and all(self.names)
            expect("\x1f" not in "".join(self.names), "clients.names", "names without the character \\x1f", list(self.names))
            expect(different, "clients.names", f"{self.count} different names, one per client", list(self.names))
