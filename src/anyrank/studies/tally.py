"""Statistics of known noise: its size, how well it hides a change, and whether it repeats; all with exact confidence.

Numbers are given over the standard deviation that the plan promises, so that honest noise is standard normal.

* Size: `sum z^2` of n such numbers has a chi-square distribution with n degrees of freedom, which gives an exact interval for
  the ratio of the actual to the promised standard deviation.
* Hiding: a change of `_SHIFT` promised standard deviations along one number is guessed from a threshold half way. The errors
  of both kinds are counted, and bounded by Clopper and Pearson (1934). Under mu-Gaussian differential privacy, the two error
  rates obey `Phi^-1(1 - fpr) + Phi^-1(1 - fnr) <= mu` (Dong, Roth and Su, "Gaussian Differential Privacy", 2022), so that
  their bounds give a lower bound on mu. This is how Nasr et al., "Tight Auditing of Differentially Private Machine Learning"
  (USENIX Security 2023), audit one step. Nothing is assumed about the noise here, but that numbers are drawn independently. A
  change of one example has a norm of at most the clip; the larger one is that of a group, whose mu is the sum of its
  members'.
* Repeats: signs of two independent numbers agree with probability 1/2, which is a binomial test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_SHIFT = 2.5  # in promised standard deviations: both error rates are then about 0.1, where mu is estimated best


@dataclass
class Sizes:
    """Counts of the noise of one group (a tensor, a client, a step): `z` `[n]` is added piece by piece."""

    count: int = 0
    squares: float = 0.0
    above: int = 0  # half the shift: guessed as changed, although it is not
    below: int = 0  # minus half the shift: with the change added, guessed as unchanged

    def add(self, z: np.ndarray) -> None:
        self.count += z.size
        self.squares += float(np.square(z).sum())
        self.above += int((z > _SHIFT / 2).sum())
        self.below += int((z < -_SHIFT / 2).sum())

    @property
    def ratio(self) -> float:
        """The actual standard deviation over the promised one."""
        return math.sqrt(self.squares / self.count)

    def interval(self, alpha: float) -> tuple[float, float]:
        """Bounds of the ratio, wrong with probability `alpha` for normal noise."""
        from scipy.stats import chi2

        least, most = chi2.ppf([alpha / 2, 1 - alpha / 2], self.count)
        return math.sqrt(self.squares / most), math.sqrt(self.squares / least)

    def hides(self, alpha: float) -> float:
        """An upper bound on the ratio, from guesses alone: infinite where they show nothing; wrong with probability `alpha`.

        A mechanism whose noise is the promised one times this hides a change no worse than what was seen.
        """
        from scipy.stats import beta, norm

        most = [beta.ppf(1 - alpha / 2, errors + 1, self.count - errors) for errors in (self.above, self.below)]
        mu = sum(float(norm.isf(min(rate, 1 - 1e-12))) for rate in most)
        return _SHIFT / mu if mu > 0 else math.inf


@dataclass
class Signs:
    """How often the signs of two noises that should be independent agree."""

    count: int = 0
    agree: int = 0

    def add(self, one: np.ndarray, other: np.ndarray) -> None:
        """`one`, `other` `[n]` bool: which numbers are positive."""
        self.count += one.size
        self.agree += int((one == other).sum())

    def p_value(self) -> float:
        from scipy.stats import binomtest

        return float(binomtest(self.agree, self.count).pvalue) if self.count else 1.0


@dataclass
class Tally:
    """All groups of an audit: `sizes` `{group: ...}`, and `signs` of pairs, `{pair of groups: ...}`."""

    sizes: dict[str, Sizes] = field(default_factory=dict)
    signs: dict[str, Signs] = field(default_factory=dict)

    def noise(self, z: np.ndarray, groups: Iterable[str]) -> None:
        for group in groups:
            self.sizes.setdefault(group, Sizes()).add(z)

    def pair(self, name: str, one: np.ndarray, other: np.ndarray) -> None:
        """Two noises that should be independent; of other lengths, as far as the shorter one goes."""
        length = min(one.size, other.size)
        self.signs.setdefault(name, Signs()).add(one[:length], other[:length])

    def alpha(self, confidence: float) -> float:
        """The probability of error of each test, so that all together are wrong with at most `1 - confidence`: each group has
        two tests, each pair one."""
        return (1 - confidence) / max(1, 2 * len(self.sizes) + len(self.signs))

    def rows(self, alpha: float) -> list[dict[str, Any]]:
        """A row for each group: its numbers, the ratio, its interval (`low`, `high`), and the `most` that guesses allow."""
        made = []
        for group, sizes in self.sizes.items():
            low, high = sizes.interval(alpha)
            figures = {"numbers": sizes.count, "noise": sizes.ratio, "low": low, "high": high, "most": sizes.hides(alpha)}
            made.append({"what": group, **figures})
        return made

    def repeats(self, alpha: float) -> list[str]:
        """The pairs whose signs agree, or disagree, too often."""
        return [name for name, signs in self.signs.items() if signs.p_value() < alpha]
