"""Which examples are held out, and the order of labels."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from anyrank import keys

# The held-out examples of a file are the same for every run seed: runs that differ only in their seed are scored on the same
# examples, so that comparisons over seeds are paired.
_SPLIT_SEED = 0


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct names in order: by value if all are whole numbers of at most 18 digits, else alphabetical.

    >>> ordered(["10", "9", "9"]), ordered(["b", "a", "10"])
    (('9', '10'), ('10', 'a', 'b'))
    """
    distinct = set(names)
    whole = all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in distinct)
    return tuple(sorted(distinct, key=lambda name: (int(name), name) if whole else name))


def _indices(names: Iterable[str], label_names: tuple[str, ...]) -> np.ndarray:
    index = {name: i for i, name in enumerate(label_names)}
    return np.array([index[name] for name in names], dtype=np.int64)


def held_out(labels: np.ndarray, fraction: float, *of: str) -> np.ndarray:
    """A mask `[n]` bool of the held-out rows: `fraction` of them, stratified by label; `of`: whose rows they are, for the key.

    Of each label, the share is rounded down; the rows that are then missing from the total go to the labels with the largest
    remainders. The mask is the same for every run seed, and every label keeps at least one row that is not held out.
    """
    counts = np.bincount(labels)
    exact = counts * fraction
    take = np.floor(exact).astype(np.int64)
    missing = round(len(labels) * fraction) - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:missing]] += 1
    take = np.minimum(take, counts - 1)
    rng, chosen = keys.rng(_SPLIT_SEED, "test-split", *of), np.zeros(len(labels), dtype=bool)
    groups = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])  # the rows of each label, in their order
    for rows, number in zip(groups, take, strict=True):
        chosen[rng.permutation(rows)[:number]] = True
    return chosen
