"""Checks of a federation before anything is trained."""

from __future__ import annotations

from anyrank import methods
from anyrank.config.sections import Config
from anyrank.errors import ConfigError
from anyrank.methods.registry import REGISTRY, needs_one_rank, taking_mixed_ranks
from anyrank.privacy.plan import PrivacyPlan


def check_ranks(config: Config, method: methods.Method) -> None:
    ranks = config.clients.ranks
    if len(set(ranks)) > 1 and not method.traits.mixed_ranks and not method.pools_data:
        raise needs_one_rank(method.name, ranks, taking_mixed_ranks())


def check_private(plan: PrivacyPlan, method: methods.Method) -> None:
    """Raise `ConfigError` for a method whose local training the privacy plan does not cover."""
    if plan.level == "client" and not plan.central and len(method.train) != 1:
        both = ", ".join(sorted(name for name, kind in REGISTRY.items() if len(kind.train) == 1 and not kind.reference))
        raise ConfigError(
            f"method.name: {method.name} trains A and B together, so that noise would be multiplied; privacy.level = "
            f"'client' is for methods that train one factor per round: {both}"
        )
    if method.pools_data:
        raise ConfigError(
            f"method.name: {method.name} gathers all examples in one place, so there is no client to protect; choose a method "
            "that federates"
        )
    if method.private:
        raise ConfigError(
            f"method.name: with {method.name}, {' and '.join(sorted(method.private))} stay with each client and are scored one "
            "by one; private training covers methods whose clients keep nothing: choose another"
        )
    if method.prunes:
        raise ConfigError(
            f"method.prune: {method.name} would prune ranks by norms that are mostly noise; set method.prune=false, or choose "
            "another method"
        )
