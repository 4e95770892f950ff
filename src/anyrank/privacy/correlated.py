"""Noise that is correlated over a client's steps, so that it partly cancels in the sum of all steps (DP-FTRL).

Training adds up steps, so that the noise in the sum matters, not the noise in one step. Let `x` be a client's clipped gradient
sums, one row for each of its steps, in the order in which it takes them over all rounds. The Gaussian mechanism releases
`C x + Z` with independent rows of Z; `x + C^-1 Z` follows from it and is what the client adds to its weights. C is the lower
triangular Toeplitz matrix whose first `bands` coefficients are those of the square root of the matrix of all ones below the
diagonal, `1, 1/2, 3/8, ...` (Fichtenberger, Henzinger and Upadhyay, ICML 2023), and whose others are 0 (Kalinin and Lampert,
NeurIPS 2024, "Banded Square Root Matrix Factorization"). With one band, C is the identity: plain DP-SGD.

Privacy is amplified by sampling as in Choquette-Choo et al. (NeurIPS 2023, "(Amplified) Banded Matrix Factorization", section
on sampling). Each example belongs to one of `bands` groups, drawn for it alone, and only the group `step % bands` is sampled in
a step, at `bands` times the rate. What an example changes in the rows `t, ..., t + bands - 1` of `C x` is then decided by one
draw, at step t, and is `c g` with its clipped gradient g, of norm at most `|c|` times the clip norm. Its steps t are `bands`
apart, so that these blocks of rows have nothing in common. The whole run is therefore the composition of one sampled Gaussian
mechanism for each of the example's steps, `ceil(steps / bands)` of them: of rate `bands * q`, whose noise multiplier is the
standard deviation of Z over `|c|` times the clip norm.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np


@functools.lru_cache(maxsize=256)
def _coefficients(bands: int) -> tuple[float, ...]:
    found = [1.0]
    for place in range(1, bands):
        found.append(found[-1] * (2 * place - 1) / (2 * place))
    return tuple(found)


def coefficients(bands: int) -> np.ndarray:
    """The first column of C, `[bands]`: the binomial `(2i over i) / 4^i`.

    >>> coefficients(4)
    array([1.    , 0.5   , 0.375 , 0.3125])
    """
    return np.array(_coefficients(bands))


def norm(bands: int) -> float:
    """`|c|`, the norm of a column of C: how far one example of clip norm 1 moves `C x` by one of its draws.

    >>> norm(1), round(norm(2) ** 2, 6)
    (1.0, 1.25)
    """
    return math.sqrt(math.fsum(each * each for each in _coefficients(bands)))


def draws(bands: int, steps: int) -> int:
    """How often an example can be drawn, at most, in the first `steps` of a client's steps."""
    return -(-steps // bands)


@functools.lru_cache(maxsize=4096)
def error(bands: int, steps: int) -> float:
    """The root mean square of the noise in the sums of the first t steps, over t up to `steps`, if the accountant's noise
    multiplier and the clip norm are 1. Independent noise has `sqrt((steps + 1) / 2)`.

    >>> round(error(1, 100) ** 2, 6), round(error(8, 100), 2)
    (50.5, 3.24)
    """
    sums = np.cumsum(inverse(bands, steps))  # the first column of the sums of rows of C^-1
    return norm(bands) * float(np.sqrt(np.mean(np.cumsum(sums**2))))


def inverse(bands: int, steps: int) -> np.ndarray:
    """The first column of `C^-1`, `[steps]`, itself a lower triangular Toeplitz matrix."""
    unit = (np.array([float(step == 0)]) for step in range(steps))
    return np.concatenate(list(combined(lambda _: next(unit), bands, 0, steps)))


def choices(most: int) -> list[int]:
    """Numbers of bands to choose from: the powers of two up to `most`, and `most`.

    >>> choices(1), choices(12)
    ([1], [1, 2, 4, 8, 12])
    """
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def combined(fresh: Callable[[int], np.ndarray], bands: int, first: int, steps: int) -> Iterator[np.ndarray]:
    """The rows `first, ..., first + steps - 1` of `C^-1 Z`, read-only; row t of Z is `fresh(t)`, asked for once, in order.

    Nothing is kept from one call to the next: all rows from 0 on are computed again, of which `bands` are held at a time.
    """
    rest, recent = _coefficients(bands)[1:], deque[np.ndarray](maxlen=bands - 1)
    for step in range(first + steps):
        noise = np.array(fresh(step), dtype=np.float64)
        for coefficient, earlier in zip(rest, recent, strict=False):  # fewer at the beginning
            noise -= coefficient * earlier
        noise.flags.writeable = False
        recent.appendleft(noise)
        if step >= first:
            yield noise
