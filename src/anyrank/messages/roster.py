"""What a server knows of the clients and their task before round 1, when it has neither data nor model itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from anyrank.messages.records import Facts

# Largest number of clients that are reported separately. For more, the label shares of all of them would have to be drawn.
MOST_CLIENTS = 1_000
POOLED = "all-data"  # the client of a method that gathers all examples in one place
_UNNAMED = "client-"


@dataclass(frozen=True)
class Names:
    """The names of `count` clients: those that are `given`, or else client-0 and so on, all of one length.

    >>> Names(12)[3], Names(12).index("client-11"), Names(2, ("north", "south")).index("south")
    ('client-03', 11, 1)
    """

    count: int
    given: tuple[str, ...] = ()

    def __getitem__(self, index: int) -> str:
        return self.given[index] if self.given else f"{_UNNAMED}{index:0{len(str(self.count - 1))}d}"

    def index(self, name: str) -> int:
        """The position of the client called `name`; `KeyError` for a name that no client has."""
        if self.given:
            return self._places[name]
        digits = name.removeprefix(_UNNAMED)
        if digits.isascii() and digits.isdigit() and int(digits) < self.count and name == self[int(digits)]:
            return int(digits)
        raise KeyError(name)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.given)}


@dataclass(frozen=True, eq=False)
class Roster:
    """`names`: the clients' own names (empty: client-0 and so on), `in_order` if ranks are theirs in the order of the names;
    `sizes` `[clients]` int64: numbers of training examples, or of persons where these are protected; `pooled`: how many
    different examples these are; `facts` about the task.

    `by_label` `[clients, labels]` int64: numbers of training examples by label; `owners` `[m]` int64: whose each held-out
    example is, -1 for nobody's; `held_out` `[clients]` int64: how many held-out examples each client has of its own. `None`
    where it is not known, where there are no classes, or for more than `MOST_CLIENTS`.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    pooled: int
    facts: Facts
    in_order: bool = False
    by_label: np.ndarray | None = None
    owners: np.ndarray | None = None
    held_out: np.ndarray | None = None
