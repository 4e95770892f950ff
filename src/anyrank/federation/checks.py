"""What a federation is checked for before anything is trained, and its state before it is kept."""

from __future__ import annotations

import torch

from anyrank import methods
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import finite as finite_tensor
from anyrank.config.sections import Config
from anyrank.errors import AdapterError, ConfigError, RunFailed
from anyrank.messages.records import ServerState
from anyrank.methods.registry import REGISTRY, taking_mixed_ranks
from anyrank.privacy.plan import PrivacyPlan


def check_ranks(config: Config, method: methods.Method) -> None:
    ranks = sorted(set(config.clients.ranks))
    if len(ranks) > 1 and not method.traits.mixed_ranks and not method.pools_data:
        raise ConfigError(
            f"method.name: {method.name} needs clients of one rank, clients.ranks has {', '.join(map(str, ranks))}; "
            f"set one rank, or use a method that takes mixed ranks: {taking_mixed_ranks()}"
        )


def check_private(plan: PrivacyPlan, method: methods.Method) -> None:
    """Raise `ConfigError` for a method whose clients' training the plan does not cover."""
    if plan.level == "client" and not plan.central and len(method.train) != 1:
        both = ", ".join(sorted(name for name, kind in REGISTRY.items() if len(kind.train) == 1 and not kind.reference))
        raise ConfigError(
            f"method.name: {method.name} trains A and B together, whose noise would multiply in the product; privacy.level = "
            f"'client' is for methods that train one factor a round: {both}"
        )
    if method.pools_data:
        raise ConfigError(
            f"method.name: {method.name} gathers all examples in one place, where no client could promise anything for its "
            "own; choose a method that federates"
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


def finite(state: ServerState) -> ServerState:
    """`state`, if all its numbers are finite: finite uploads may have a mean that is not. Raises `RunFailed`."""
    for adapter in (state.adapter, *([state.merged] if state.merged else []), *state.extra.values()):
        for name, tensor in _tensors(adapter):
            try:
                finite_tensor(tensor, "state", name)
            except AdapterError:
                raise RunFailed(
                    f"round {state.round}: {name}: the merged update holds NaN or infinite values, though each upload was "
                    "finite, and is not kept; lower train.learning_rate, and see clients.jsonl for whose loss is large"
                ) from None
    return state


def _tensors(adapter: Adapter) -> list[tuple[str, torch.Tensor]]:
    factors = [(f"layer {name}", each) for name, layer in adapter.layers.items() for each in (layer.A, layer.B)]
    return [*factors, *((f"tensor {name}", tensor) for name, tensor in adapter.tensors.items())]
