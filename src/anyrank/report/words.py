"""Format numbers and names for the reader of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def count(n: int, word: str) -> str:
    """
    >>> count(1, "seed"), count(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def share(value: float) -> str:
    """
    >>> share(0.125), share(0.0)
    ('12.5 %', '0.0 %')
    """
    return f"{places(100 * value, 1)} %"


def places(value: float, digits: int) -> str:
    """
    >>> places(12.345, 2), places(0.00012345, 2)
    ('12.35', '0.00012')
    """
    return f"{value:.{decimals(value, digits)}f}"


def decimals(value: float, digits: int) -> int:
    """The number of decimals: `digits`, or as many as a small value needs for two significant figures, so that it is not 0."""
    return max(digits, min(9, 1 - math.floor(math.log10(abs(value))))) if value else digits


def few(names: Sequence[str]) -> str:
    """All of up to four names, else the first three.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def joined(names: Iterable[str]) -> str:
    """
    >>> joined(["a", "b", "c"])
    'a, b and c'
    """
    *most, last = [*names] or [""]
    return f"{', '.join(most)} and {last}" if most else last
