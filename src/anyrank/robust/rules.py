"""Which rule a run goes by. A defence of your own: one file with a `Rule`, and one line in `_BUILT_IN`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from anyrank.config.sections import RobustConfig
from anyrank.errors import ConfigError
from anyrank.methods.base import Method
from anyrank.privacy.noise import Mechanism
from anyrank.robust.base import Rule
from anyrank.robust.central_noise import CentralNoise
from anyrank.robust.geometric_median import GeometricMedian
from anyrank.robust.krum import Krum
from anyrank.robust.norm_bound import NormBound

_BUILT_IN: Mapping[str, Callable[[RobustConfig], Rule]] = {
    "none": lambda config: Rule(),
    "norm-bound": lambda config: NormBound(config.factor),
    "geometric-median": lambda config: GeometricMedian(),
    "krum": lambda config: Krum(config.hostile, keep=1),
    "multi-krum": lambda config: Krum(config.hostile, config.keep),
}


def rule_of(config: RobustConfig, mechanism: Mechanism | None) -> Rule:
    """The rule of a run; `mechanism`: the privacy plan with its key, or `None`."""
    return CentralNoise(mechanism) if mechanism and mechanism.plan.central else _BUILT_IN[config.rule](config)


def check(config: RobustConfig, method: Method, central: bool) -> None:
    """Raise `ConfigError` for a rule that this method, or the server's noise, would make void."""
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
            "norm-bound or multi-krum"
        )
