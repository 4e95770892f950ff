"""The registered clients, and the cohort of each round: drawn by key, so that all methods of a comparison have the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anyrank import keys
from anyrank.config.sections import ClientsConfig
from anyrank.messages.records import Client
from anyrank.messages.roster import POOLED, Names


@dataclass(frozen=True, eq=False)
class Population:
    """All registered clients as arrays; a `Client` is created when it is drawn, so that 10,000 clients cost as much as 20.

    `ranks` `[count]`; `sizes` `[count]`: numbers of examples; `cohort_size`: clients drawn each round; `names`: their names
    (empty: client-0 and so on). The engine knows which examples a client has.
    """

    ranks: np.ndarray
    sizes: np.ndarray
    cohort_size: int
    seed: int
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ranks)

    def name(self, index: int) -> str:
        return self._naming[index]

    def index(self, name: str) -> int:
        """The position of the client called `name`; `KeyError` for a name that no client has."""
        return self._naming.index(name)

    @functools.cached_property
    def _naming(self) -> Names:
        return Names(len(self), self.names)

    def client(self, index: int) -> Client:
        return Client(self.name(index), int(self.ranks[index]))

    def draw(self, round: int) -> list[int]:
        """The indices of the round's cohort, sorted."""
        if self.cohort_size == len(self):
            return list(range(len(self)))
        chosen = keys.rng(self.seed, "cohort", round).choice(len(self), self.cohort_size, replace=False, shuffle=False)
        return sorted(int(index) for index in chosen)

    def levels(self) -> list[int]:
        """The distinct ranks of the federation, in ascending order."""
        return np.unique(self.ranks).tolist()

    def pooled(self, size: int) -> Population:
        """One client of the largest rank that has all `size` examples."""
        return Population(np.array([self.ranks.max()]), np.array([size]), 1, self.seed, (POOLED,))


def populate(config: ClientsConfig, sizes: np.ndarray, seed: int) -> Population:
    """The population that a configuration describes: ranks repeated over the clients, in the configured order.

    `sizes` `[count]`: examples of each client.
    """
    cohort_size = max(1, round(config.participation * config.count))
    return Population(assign_ranks(config, seed), sizes, cohort_size, seed, config.names)


def assign_ranks(config: ClientsConfig, seed: int) -> np.ndarray:
    """Each client's rank, `[count]`."""
    ranks = np.resize(np.array(config.ranks, dtype=np.int64), config.count)
    if config.rank_order == "rising":
        return np.sort(ranks)
    return keys.rng(seed, "ranks").permutation(ranks) if config.rank_order == "shuffled" else ranks


def count_ranks(ranks: Sequence[int] | np.ndarray) -> dict[str, int]:
    """`{rank: number of clients}` in ascending order, with text keys for JSON."""
    levels, counts = np.unique(np.asarray(ranks), return_counts=True)
    return {str(level): int(count) for level, count in zip(levels, counts, strict=True)}
