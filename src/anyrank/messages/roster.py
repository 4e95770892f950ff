"""What a server knows of the clients and their task before round 1, when it has neither data nor model itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anyrank.messages.records import Facts

# Largest number of clients that are reported separately. For more, the label shares of all of them would have to be drawn.
MOST_CLIENTS = 1_000


@dataclass(frozen=True, eq=False)
class Roster:
    """`names`: the clients' own names (empty: client-0 and so on), `in_order` if ranks are theirs in the order of the names;
    `sizes` `[clients]` int64: numbers of training examples; `pooled`: how many different examples these are; `facts` about
    the task.

    `by_label` `[clients, labels]` int64: numbers of training examples by label; `owners` `[m]` int64: whose each held-out
    example is, -1 for nobody's. `None` where it is not known, where there are no classes, or for more than `MOST_CLIENTS`.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    pooled: int
    facts: Facts
    in_order: bool = False
    by_label: np.ndarray | None = None
    owners: np.ndarray | None = None
