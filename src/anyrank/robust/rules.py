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


def bound_of(config: Config, method: Method, mechanism: Mechanism | None) -> Rule:
    """The limit on the length of each update, which is applied to all that arrive in a round. `mechanism`: the privacy plan
    with its key, or `None`.

    With noise at the server, there is none: each upload is limited by the clip norm already, and the noise is computed for
    public weights. Nor is there where nothing is merged.
    """
    guard = config.guard
    if (mechanism and mechanism.plan.central) or not merges(method) or not (guard.norm or guard.far):
        return Rule()
    return NormBound(guard.norm, guard.far, partial(_reach, config, mechanism))


def rule_of(config: Config, method: Method, mechanism: Mechanism | None) -> Rule:
    """The rules between the updates within their length and the method's aggregate: the one of `[robust]`, and the guard's
    limit on single owners. With noise at the server, the noise is the only rule; where a part of each adapter stays with its
    client, there is none.
    """
    if mechanism and mechanism.plan.central:
        return CentralNoise(mechanism)
    if not merges(method) or method.private:
        return Chain(())
    rules = [*_BUILT_IN[config.robust.rule](config.robust)]
    if config.guard.owner < 1:
        owner = SingleOwner(config.guard.owner, method.lone_weight)
        rules.insert(len(rules) - bool(rules and overrides_aggregate(rules[-1])), owner)
    return Chain(tuple(rules))


def merges(method: Method) -> bool:
    """Whether the method makes a mean of anything that clients upload."""
    return not method.pools_data and bool(method.train - method.private)


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
