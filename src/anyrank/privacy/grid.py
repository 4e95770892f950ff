"""Gaussian noise whose floating-point numbers reveal nothing about the value that it is added to.

Mironov, "On Significance of the Least Significant Bits For Differential Privacy" (CCS 2012): a sum `x + noise` of floats has
values that are possible for one `x` and impossible for another, so that a single release can reveal `x`, whatever the noise.
Here value and noise are whole numbers of one step, and whole numbers are added without rounding: the possible sums are the same
for every value.

The step is a power of two, at most 2^-24 of the noise's standard deviation and of the clip norm `C`: it depends on public
numbers only. The value is rounded to it, a Gaussian number that was drawn in float64 is rounded to it, and both are added. To
round the noise is to round the sum, since the value is on the grid already: what is released is a function of the Gaussian
mechanism's output, and has its guarantee. Rounding moves a value by at most half a step in each coordinate. Two neighbours'
values that are at most `C` apart in `d` coordinates are then at most `C + step sqrt(d)` apart, and the noise is larger by that
share. The step grows with the noise: with `step <= deviation 2^-bits`, a deviation of `m C / (1 - m sqrt(d) 2^-bits)` is `m`
times that distance.

A value may be far above the noise: weights, to whose mean the server's noise is added. Beyond 2^53 steps float64 has no room
for each whole number. Both terms are exact whole numbers there too, so that their sum in float64 is their exact sum, rounded
once: a function of that sum alone.

This is the Gaussian of the accountants, rounded. The discrete Gaussian (Canonne, Kamath and Steinke, NeurIPS 2020) is another
distribution, sampled exactly; it needs integers of any size, and many draws for each number. What remains here is the float64
precision of the normal numbers themselves, 2^-53 of a uniform number, far below the probabilities in any delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from anyrank.privacy.noise import Draws

_BITS = 24
_LARGEST = 2.0**900  # steps: leaves room below the largest float64 for the sum, and for its product with the step


@dataclass(frozen=True)
class Gaussian:
    """The noise of one release. `multiplier`: its standard deviation over `clip_norm`, as the accountants have it;
    `dimensions`: the numbers that are released together, at most."""

    multiplier: float
    clip_norm: float
    dimensions: int

    @property
    def bits(self) -> int:
        """The step of the grid is at most the standard deviation divided by two to this power."""
        return _BITS + max(0, math.ceil(math.log2(self.multiplier))) if self.multiplier > 0 else _BITS

    @property
    def deviation(self) -> float:
        """The standard deviation, which makes up for rounding values to the grid."""
        return self.multiplier * self.clip_norm / (1 - self.multiplier * math.sqrt(self.dimensions) * 2.0**-self.bits)

    def added(self, values: np.ndarray, draws: Draws, reach: np.ndarray | float = 1.0) -> np.ndarray:
        """`values` plus noise of `deviation` times `reach`, on the grid; float64, of the shape of `values`.

        `reach`: the most that a change of norm 1 moves each number, public; it broadcasts over `values`. Where it is 0, the
        value comes back as it is. A value that is not a number counts as zero; one of more than 2^900 steps counts as that.
        """
        values = np.asarray(values, dtype=np.float64)
        normal = draws.standard_normal(values.size).reshape(values.shape)
        deviation = np.broadcast_to(self.deviation * np.asarray(reach, dtype=np.float64), values.shape)
        _, exponent = np.frexp(deviation)  # deviation = fraction x 2^exponent, with a fraction of at least 0.5, below 1
        step = np.maximum(np.ldexp(1.0, exponent - 1 - self.bits), np.finfo(np.float64).tiny)
        with np.errstate(over="ignore"):  # more than fits in a float64 is more than the largest number of steps
            steps = np.nan_to_num(values, nan=0.0) / step
        whole = np.rint(np.clip(steps, -_LARGEST, _LARGEST))
        sums = (whole + np.rint(normal * (deviation / step))) * step
        return np.where(deviation > 0, sums, values)
