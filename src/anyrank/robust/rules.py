"""Which rules a run goes by. A defence of your own: one file with a `Rule`, and one line in `_BUILT_IN`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from anyrank.config.sections import Config, RobustConfig
from anyrank.errors import ConfigError
from anyrank.messages.plan import local_steps
from anyrank.methods.base import Method
from anyrank.privacy.noise import Mechanism
from anyrank.robust.base import Chain, Rule
from anyrank.robust.central_noise import CentralNoise
from anyrank.robust.coordinates import Median, TrimmedMean, suitable, suits
from anyrank.robust.geometric_median import GeometricMedian
from anyrank.robust.krum import Krum
from anyrank.robust.norm_bound import NormBound
from anyrank.robust.owners import SingleOwner

_BUILT_IN: Mapping[str, Callable[[RobustConfig], tuple[Rule, ...]]] = {
    "none": lambda config: (),
    "geometric-median": lambda config: (GeometricMedian(),),
    "krum": lambda config: (Krum(config.hostile, keep=1),),
    "multi-krum": lambda config: (Krum(config.hostile, config.keep),),
    "trimmed-mean": lambda config: (TrimmedMean(config.trim),),
    "median": lambda config: (Median(),),
}
_BY_COORDINATES = ("trimmed-mean", "median")


def rule_of(config: Config, method: Method, mechanism: Mechanism | None) -> Rule:
    """The rules of a run: the guard's, then the one of `[robust]`. `mechanism`: the privacy plan with its key, or `None`.

    Noise at the server is computed for public weights, and each upload is already limited by the clip norm: there, the noise
    is the only rule. Where a part of each adapter stays with its client, the norm bound is; where nothing is merged, none is.
    """
    if mechanism and mechanism.plan.central:
        return CentralNoise(mechanism)
    guard = config.guard
    bound = NormBound(guard.norm, guard.far, partial(_reach, config, mechanism))
    rules: list[Rule] = [bound] if guard.norm or guard.far else []
    if method.pools_data or not method.train - method.private:
        return Chain(())
    if method.private:
        return Chain(tuple(rules))
    rules += _BUILT_IN[config.robust.rule](config.robust)
    if guard.owner < 1:
        rules.insert(len(rules) - bool(rules and overrides_aggregate(rules[-1])), SingleOwner(guard.owner, method.lone_weight))
    return Chain(tuple(rules))


def _reach(config: Config, mechanism: Mechanism | None, num_examples: int) -> float:
    """How far an honest client of so many examples may move, relative to others: by its local steps, and by its noise, of which
    a client with fewer examples adds more."""
    noise = mechanism.plan.noise.get(num_examples, 1.0) if mechanism else 1.0
    return local_steps(config.train, num_examples) * noise


def overrides_aggregate(rule: Rule) -> bool:
    """Whether the rule merges by itself, so that it has to be the last one."""
    return type(rule).aggregate is not Rule.aggregate


def check(config: RobustConfig, method: Method, central: bool, cohort: int) -> None:
    """Raise `ConfigError` for a rule that this method, or the server's noise, would make void, or that needs more updates than
    a round of `cohort` clients can have."""
    if config.rule == "none":
        return
    if central:
        raise ConfigError(
            "robust.rule: the noise of privacy.noise_at = 'server' is computed for public weights; a rule would change "
            "them by what was uploaded; leave one of the two out"
        )
    if method.private or method.pools_data:
        raise ConfigError(f"robust.rule: {method.name} makes no mean of uploads that a rule could protect; leave it out")
    if config.rule == "geometric-median" and not method.by_examples:
        raise ConfigError(
            f"robust.rule: the geometric median weighs clients by example counts, which {method.name} does not use; choose "
            "multi-krum"
        )
    if config.rule in _BY_COORDINATES and not suits(method):
        raise ConfigError(
            f"robust.rule: the {config.rule} is taken of single numbers of the factors, which {method.name} does not average; "
            f"it is for {suitable()}; choose geometric-median or multi-krum"
        )
    least = max((rule.least for rule in _BUILT_IN[config.rule](config)), default=0)
    if cohort < least:
        raise ConfigError(
            f"robust.rule: {config.rule} with robust.hostile = {config.hostile} needs {least} updates a round, but {cohort} "
            f"{'client is' if cohort == 1 else 'clients are'} asked; raise clients.participation, or lower robust.hostile"
        )
