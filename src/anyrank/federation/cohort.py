"""Who is registered, and who takes part in a round: drawn by key, so that every method of a comparison sees the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from anyrank import keys
from anyrank.config.sections import ClientsConfig
from anyrank.messages.records import Client

POOLED = "all-data"


class Shards(Protocol):
    """The examples of each client: `shards[i]` are client i's indices, sorted; made when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, client: int) -> np.ndarray: ...

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, `[clients]`."""
        ...


@dataclass(frozen=True, eq=False)
class Whole:
    """The shards of a single client that holds `examples`."""

    examples: np.ndarray

    def __len__(self) -> int:
        return 1

    def __getitem__(self, client: int) -> np.ndarray:
        return self.examples

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(self.examples)])


@dataclass(frozen=True, eq=False)
class Population:
    """All registered clients as arrays; a `Client` is made when one is drawn, so that 10,000 cost what 20 do.

    `ranks` `[count]`; `shards[i]`: client i's example indices; `cohort_size`: clients drawn each round.
    """

    ranks: np.ndarray
    shards: Shards
    cohort_size: int
    seed: int
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ranks)

    def name(self, index: int) -> str:
        return self.names[index] if self.names else f"client-{index:0{len(str(len(self) - 1))}d}"

    def client(self, index: int) -> Client:
        return Client(self.name(index), int(self.ranks[index]))

    def draw(self, round: int) -> list[int]:
        """The indices of the round's cohort, sorted."""
        if self.cohort_size == len(self):
            return list(range(len(self)))
        chosen = keys.rng(self.seed, "cohort", round).choice(len(self), self.cohort_size, replace=False, shuffle=False)
        return sorted(int(index) for index in chosen)

    def levels(self) -> list[int]:
        """The distinct ranks of the federation, rising."""
        return np.unique(self.ranks).tolist()

    def pooled(self) -> Population:
        """One client of the largest rank that has everybody's examples."""
        everything = np.unique(np.concatenate([self.shards[i] for i in range(len(self))]))
        return Population(np.array([self.ranks.max()]), Whole(everything), 1, self.seed, (POOLED,))


def populate(config: ClientsConfig, shards: Shards, seed: int) -> Population:
    """The population that a configuration describes: ranks repeated over the clients, in the order it asks for."""
    return Population(assign_ranks(config, seed), shards, max(1, round(config.participation * config.count)), seed)


def assign_ranks(config: ClientsConfig, seed: int) -> np.ndarray:
    """Each client's rank, `[count]`."""
    ranks = np.resize(np.array(config.ranks, dtype=np.int64), config.count)
    if config.rank_order == "rising":
        return np.sort(ranks)
    return keys.rng(seed, "ranks").permutation(ranks) if config.rank_order == "shuffled" else ranks


def count_ranks(ranks: Sequence[int] | np.ndarray) -> dict[str, int]:
    """`{rank: how many clients hold it}`, rising, with text keys as JSON wants them."""
    levels, counts = np.unique(np.asarray(ranks), return_counts=True)
    return {str(level): int(count) for level, count in zip(levels, counts, strict=True)}
