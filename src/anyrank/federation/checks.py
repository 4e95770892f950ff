"""What a federation is checked for before anything is trained, and its state before it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from anyrank import methods
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config
from anyrank.errors import ConfigError, in_a_line
from anyrank.federation.cohort import Population
from anyrank.federation.federation import Federation
from anyrank.federation.standing import Standing
from anyrank.messages.records import ClientUpdate, ServerState
from anyrank.methods.registry import REGISTRY, needs_one_rank, no_secure_sum, taking_mixed_ranks
from anyrank.privacy.plan import PrivacyPlan
from anyrank.robust.base import Rule


def check_ranks(config: Config, method: methods.Method) -> None:
    ranks = config.clients.ranks
    if len(set(ranks)) > 1 and not method.traits.mixed_ranks and not method.pools_data:
        raise needs_one_rank(method.name, ranks, taking_mixed_ranks())


def check_precondition(config: Config, method: methods.Method) -> None:
    """Raise `ConfigError` for `train.precondition = true` with a method that trains A and B together."""
    if config.train.precondition and len(method.train) != 1:
        raise ConfigError(
            f"train.precondition: {method.name} trains A and B together, and B is zero at the start, so that its Gram matrix "
            f"has no inverse; expected a method that trains one factor per round ({_of_one_factor()}), or precondition = false"
        )


def check_secure_sum(config: Config, method: methods.Method) -> None:
    """Raise `ConfigError` for `privacy.secure_sum = true`: uploads are visible to the server in this version."""
    if config.privacy.secure_sum:
        # a mean of the one factor that is trained is a sum too, whatever is made of it (fedsvd's SVD)
        raise no_secure_sum(method.name, method.traits.linear is not methods.Holds.NEVER or len(method.train) == 1)


def check_rounds(config: Config, population: Population, plan: PrivacyPlan | None) -> None:
    """Raise `ConfigError` for a quorum that no round can have, and for late replies where each reply belongs to one round."""
    asked = population.cohort_size
    if config.rounds.least > asked:
        raise ConfigError(
            f"rounds.least: expected at most {asked}, the clients that are asked in a round, got {config.rounds.least}; raise "
            "clients.participation, or lower rounds.least"
        )
    if config.rounds.deadline_s and plan and plan.central and not plan.secure:
        raise ConfigError(
            "rounds.deadline_s: with privacy.noise_at = 'server', a round that is repeated after a stop has the same noise and "
            "must have the same uploads, which a clock does not promise; use 0, or privacy.secure = true"
        )
    if config.rounds.late == "carry" and plan and plan.central:
        raise ConfigError(
            "rounds.late: with privacy.noise_at = 'server', a client's upload counts in the round for which it was charged; "
            "use 'drop'"
        )


def check_private(plan: PrivacyPlan, method: methods.Method) -> None:
    """Raise `ConfigError` for a method whose local training the privacy plan does not cover."""
    if plan.correlated and (method.alternates or method.traits.linear is methods.Holds.NEVER):
        kinds = [kind for _, kind in sorted(REGISTRY.items()) if not (kind.reference or kind.private or kind.alternates)]
        fitting = ", ".join(kind.name for kind in kinds if kind.traits.linear is not methods.Holds.NEVER)
        raise ConfigError(
            f"method.name: {method.name} gives a client other coordinates in other rounds (SVDs, merged products, or factors "
            f"by turns), in which correlated noise would not cancel; privacy.noise = 'correlated' is for {fitting}"
        )
    if plan.level == "client" and not plan.central and len(method.train) != 1:
        raise ConfigError(
            f"method.name: {method.name} trains A and B together, so that noise would be multiplied; privacy.level = "
            f"'client' is for methods that train one factor per round: {_of_one_factor()}"
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


def _of_one_factor() -> str:
    """The names of the methods that train one factor per round."""
    return ", ".join(sorted(name for name, kind in REGISTRY.items() if len(kind.train) == 1 and not kind.reference))


class Unhealthy(Exception):
    """A merge that must not be kept; the text says why."""


def merge(rule: Rule, method: methods.Method, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """The state after the round, all of whose numbers are finite: finite uploads may have a mean that is not.

    Raises `Unhealthy` that names the layer where it can.
    """
    try:
        merged = rule.aggregate(method, state, updates)
    except (ArithmeticError, torch.linalg.LinAlgError) as error:
        raise _overflown(in_a_line(error)) from None
    for adapter in (merged.adapter, *([merged.merged] if merged.merged else []), *merged.extra.values()):
        for name, layer in adapter.layers.items():
            if not math.isfinite(_largest(layer)):
                raise _overflown(f"layer {name}: its change may overflow")
        for name, tensor in adapter.tensors.items():
            if not torch.isfinite(tensor).all():
                raise _overflown(f"tensor {name}: holds NaN or infinite values")
    return merged


def check_loss(federation: Federation, standing: Standing) -> Standing:
    """`standing` of a new state. Raises `Unhealthy` if the one model of all clients has no finite loss: nobody could train on
    from it."""
    if not math.isfinite(standing.loss) and not federation.method.private:
        raise _overflown(f"the loss is {standing.loss:g}")
    return standing


def _largest(layer: LoraLayer) -> float:
    """What no number of the layer's change is above, as its own number type has it: NaN or infinite where one may be so."""
    largest = [torch.maximum(-low, high) for low, high in map(torch.aminmax, (layer.A, layer.B))]
    return float(largest[0] * largest[1] * (layer.rank * layer.scaling))


def _overflown(what: str) -> Unhealthy:
    return Unhealthy(
        f"what finite uploads merge to is not finite ({what}), and is not kept; lower train.learning_rate, or leave out the "
        "client whose training diverges"
    )
