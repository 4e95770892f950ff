"""Compute the privacy cost of steps of the sampled Gaussian mechanism, and the noise that a budget needs.

The figures come from accountants of established libraries: `pld` and `rdp` from dp-accounting, `prv` from Opacus. All are upper
bounds for adding or removing one example, with Poisson sampling. Only the search for the noise is implemented here. Both
libraries are imported when they are first needed, because each takes seconds to load.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from anyrank.errors import ConfigError

_PLD_GRIDS = (1e-3, 1e-4)  # of the privacy loss, for an epsilon above 1 and below; rounding is upwards, about 0.1 % of epsilon
ORDERS = (*range(2, 64), 96, 128, 192, 256, 512, 1024)  # whole orders of RDP have a closed form that always converges
_BEYOND = 1000.0  # an epsilon above this gives no protection: RDP's bound is reported, and no finer figure is computed
_MOST_NOISE, _LEAST_NOISE = 1e5, 1e-2
_MOST_KINDS = 32  # kinds of steps whose privacy loss distributions are composed; each takes up to seconds


@dataclass(frozen=True)
class Spending:
    """`steps` of noise `noise_multiplier` (of the clip norm), each on a Poisson sample of rate `sampling_rate`."""

    sampling_rate: float
    noise_multiplier: float
    steps: int


@functools.lru_cache(maxsize=65536)
def epsilon(accountant: str, spending: Spending, delta: float) -> float:
    """An upper bound of epsilon at `delta` for the steps of a `Spending`; 0 for no steps.

    >>> round(epsilon("pld", Spending(0.05, 1.0, 400), 1e-5), 2)
    6.7
    """
    if not spending.steps:
        return 0.0
    bound = _rdp(spending, delta)
    return bound if bound > _BEYOND else ACCOUNTANTS[accountant](spending, delta)


@functools.lru_cache(maxsize=4096)
def composed(spendings: tuple[Spending, ...], delta: float) -> float:
    """An upper bound of epsilon at `delta` for the steps of all `spendings` together, whatever the noise of each.

    Each kind of step stands in `spendings` once. The smaller of two bounds: the Rényi bound, and the privacy loss distribution
    where there are at most `_MOST_KINDS` kinds of steps.

    >>> composed((Spending(0.05, 1.0, 400),), 1e-5) == epsilon("pld", Spending(0.05, 1.0, 400), 1e-5)
    True
    """
    taken = [each for each in spendings if each.steps]
    if not taken:
        return 0.0
    bound = _rdp_of_all(taken, delta)
    if bound > _BEYOND or len(taken) > _MOST_KINDS:
        return bound
    grid = _PLD_GRIDS[0 if bound > 1 else 1]
    steps = [_pld_of_a_step(each.sampling_rate, each.noise_multiplier, grid).self_compose(each.steps) for each in taken]
    return min(bound, float(functools.reduce(lambda one, other: one.compose(other), steps).get_epsilon_for_delta(delta)))


def renyi(spendings: Iterable[Spending], delta: float, order: int) -> float:
    """The upper bound of epsilon at `delta` that Rényi differential privacy of one `order` gives for all `spendings`."""
    return _rdp_of_all(spendings, delta, (order,))


def within(spendings: tuple[Spending, ...], delta: float, target: float) -> bool:
    """Whether `composed` is at most `target`. The finer bound is computed only where the quick one does not decide it."""
    taken = [each for each in spendings if each.steps]
    return not taken or _rdp_of_all(taken, delta) <= target or composed(spendings, delta) <= target


@functools.lru_cache(maxsize=4096)
def noise_for(accountant: str, target: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The least noise multiplier, in four digits, whose epsilon at `delta` after `steps` is at most `target`.

    Raises `ConfigError` if no noise is enough.

    >>> noise_for("pld", 6.7, 1e-5, 0.05, 400)
    1.001
    """
    from scipy.optimize import brentq

    def excess(log_noise: float, by: str = accountant) -> float:
        spent = epsilon(by, Spending(sampling_rate, math.exp(log_noise), steps), delta)
        return math.log(max(spent, sys.float_info.min) / target)  # it is 0 if delta covers everything

    high = 0.0
    while excess(high, "rdp") > 0:  # RDP is quick, and not much larger
        high += math.log(2)
        if high > math.log(_MOST_NOISE):
            raise ConfigError(
                f"privacy.epsilon: no noise multiplier up to {_MOST_NOISE:g} reaches epsilon = {target} at delta = {delta} "
                f"over {steps} steps of sampling rate {sampling_rate:.3g}; raise epsilon, or take fewer steps"
            )
    low = high
    while excess(low) <= 0:
        low -= math.log(2)
        if low < math.log(_LEAST_NOISE):
            return _LEAST_NOISE
    noise = _four_digits_up(math.exp(brentq(excess, low, high, xtol=1e-5) if excess(high) < 0 else high))
    while excess(math.log(noise)) > 0:
        noise = _four_digits_up(noise * 1.0005)
    return noise


def _four_digits_up(value: float) -> float:
    digits = 3 - math.floor(math.log10(value))
    return round(math.ceil(round(value * 10**digits, 6)) / 10**digits, max(digits, 0))


# --- the libraries' accountants ---------------------------------------------------------------------------------------


def _pld(spending: Spending, delta: float) -> float:
    """Privacy loss distributions, discretised so that epsilon is never understated (Doroshenko et al., PoPETs 2022)."""
    grid = _PLD_GRIDS[0 if _rdp(spending, delta) > 1 else 1]
    step = _pld_of_a_step(spending.sampling_rate, spending.noise_multiplier, grid)
    return float(step.self_compose(spending.steps).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=64)
def _pld_of_a_step(sampling_rate: float, noise_multiplier: float, grid: float) -> Any:
    _library("dp_accounting", "dp-accounting")
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=grid, use_connect_dots=True
    )


@functools.lru_cache(maxsize=4096)
def _rdp(spending: Spending, delta: float) -> float:
    return _rdp_of_all([spending], delta)


def _rdp_of_all(spendings: Iterable[Spending], delta: float, orders: Sequence[int] = ORDERS) -> float:
    """Rényi differential privacy (Mironov et al. 2019), turned into epsilon after Canonne, Kamath and Steinke (2020)."""
    dp = _library("dp_accounting", "dp-accounting")
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders)
    for each in spendings:
        step = dp.PoissonSampledDpEvent(each.sampling_rate, dp.GaussianDpEvent(each.noise_multiplier))
        accountant.compose(step, each.steps)
    return float(accountant.get_epsilon(delta))


def _prv(spending: Spending, delta: float) -> float:
    """Privacy random variables (Gopi et al., NeurIPS 2021), with their error added to the result."""
    import warnings

    _library("opacus", "opacus")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the logarithms of zero that it expects, and what torch says when Opacus is loaded
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(spending.noise_multiplier, spending.sampling_rate, spending.steps)]
        error = 0.01 * min(1.0, _rdp(spending, delta))
        return float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta / 1000))


ACCOUNTANTS: Mapping[str, Callable[[Spending, float], float]] = {"pld": _pld, "prv": _prv, "rdp": _rdp}


def _library(module: str, package: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"[privacy]: needs the package {package}; install it with: pip install 'anyrank[privacy]'") from None
