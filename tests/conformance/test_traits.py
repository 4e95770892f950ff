"""Claims of every registered method, both ways: what is claimed holds, and what is not claimed has a counterexample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.errors import MethodError
from anyrank.messages.records import ClientUpdate
from anyrank.methods import Holds, Method
from conformance.world import (
    EQUAL,
    FULL,
    MIXED,
    VARIANTS,
    Case,
    World,
    after_rounds,
    applied,
    begin,
    cases,
    changes,
    distance,
    label,
    noise,
    stay,
    turns,
    updates_of,
)

HOLDS, SINGLE, FAILS = 1e-9, 2e-5, 1e-3  # rounding of float64, of float32, and what no rounding explains

# Each measure gives how far a method is from having the trait in one case, relative to what is compared.


def exact(method: Method, case: Case) -> float:
    """New effective weight against `sum_k p_k` times what each client's model applied, its merged part included."""
    state = after_rounds(method, case.world, case.rounds)
    updates = updates_of(method, state, case.drawn())
    total = sum(update.num_examples for update in updates)
    expected = {name: 0.0 for name in state.adapter.layers}
    for client, update in zip(case.drawn(), updates, strict=True):
        trained = changes(update.adapter, method.dispatch(state, client).merged)
        expected = {name: expected[name] + update.num_examples / total * trained[name] for name in expected}
    found = applied(method, method.aggregate(state, updates), case.world)
    return distance(found, {name: expected[name.partition("/")[2]] for name in found})


def linear(method: Method, case: Case) -> float:
    """Factors from a mix of two trainings against the same mix of the factors from each."""
    state, t = after_rounds(method, case.world, case.rounds), 0.3
    one, two = updates_of(method, state, case.drawn(), "one"), updates_of(method, state, case.drawn(), "two")
    mixed = [replace(a, adapter=mix(a.adapter, b.adapter, t)) for a, b in zip(one, two, strict=True)]
    first, second, found = (factors(method, method.aggregate(state, u), case.world) for u in (one, two, mixed))
    return distance(found, {name: (1 - t) * first[name] + t * second[name] for name in found})


def gauge_free(method: Method, case: Case) -> float:
    """The result of uploads `(B, A)` against that of `(B G, G^-1 A)`, which apply the same."""
    state = after_rounds(method, case.world, case.rounds)
    updates = updates_of(method, state, case.drawn())
    turned = [replace(update, adapter=turn(update)) for update in updates]
    assert distance(changes(turned[0].adapter), changes(updates[0].adapter)) < SINGLE
    expected, found = (applied(method, method.aggregate(state, u), case.world) for u in (updates, turned))
    return distance(found, expected)


def stationary(method: Method, case: Case) -> float:
    """What users run after a round in which nobody trained, against what they ran before."""
    state = after_rounds(method, case.world, case.rounds)
    updates = [stay(method.dispatch(state, client), client) for client in case.drawn()]
    after = method.aggregate(state, updates)
    return distance(applied(method, after, case.world), applied(method, state, case.world))


def keeps_product(method: Method, case: Case) -> float:
    """What each client trains against the server's product of the slices that the download names."""
    state = after_rounds(method, case.world, case.rounds)
    found, expected = {}, {}
    for client in case.drawn():
        download, served = method.dispatch(state, client), method.served(state)
        held = served.get("global") or served[client.name]
        for name, layer in held.layers.items():
            named = [j for j in download.slices[name] if j < layer.rank]
            kept = replace(held, layers={name: layer.with_factors(layer.A[named], layer.B[:, named])})
            expected[client.name, name] = changes(kept)[name]
            found[client.name, name] = changes(only(download.adapter, name))[name]
    return distance(found, expected)


MEASURES: dict[str, Callable[[Method, Case], float]] = {
    "exact": exact,
    "linear": linear,
    "gauge_free": gauge_free,
    "stationary": stationary,
    "keeps_product": keeps_product,
}


def only(adapter: Adapter, name: str) -> Adapter:
    return replace(adapter, layers={name: adapter.layers[name]})


def mix(one: Adapter, two: Adapter, t: float) -> Adapter:
    def blend(a, b):
        return ((1 - t) * a.double() + t * b.double()).to(a.dtype)

    pairs = {name: (layer, two.layers[name]) for name, layer in one.layers.items()}
    return replace(one, layers={name: a.with_factors(blend(a.A, b.A), blend(a.B, b.B)) for name, (a, b) in pairs.items()})


def turn(update: ClientUpdate) -> Adapter:
    def turned(name: str, layer: LoraLayer) -> LoraLayer:
        G = torch.eye(layer.rank, dtype=torch.float64) + 0.4 * noise((layer.rank, layer.rank), "G", name, update.client)
        return layer.with_factors(torch.linalg.solve(G, layer.A.double()), layer.B.double() @ G)

    return replace(update.adapter, layers={name: turned(name, layer) for name, layer in update.adapter.layers.items()})


def factors(method: Method, state, world: World) -> dict[str, np.ndarray]:
    """The factors of all that users run; what went into the base model counts as the change that it is."""
    found = {}
    for user, adapter in method.served(state).items():
        for name, layer in adapter.layers.items():
            found[f"{user}/{name}/A"], found[f"{user}/{name}/B"] = layer.A.double().numpy(), layer.B.double().numpy()
    return found | ({f"merged/{name}": value for name, value in changes(state.merged).items()} if state.merged else {})


def applicable(method: Method, trait: str, case: Case) -> bool:
    """A method told to drop what nobody has cannot also keep it: a choice of the user, not a claim of the method."""
    return trait != "stationary" or case.reaches_every_slice or getattr(method, "empty_slice", "keep") == "keep"


def deviations(method: Method, trait: str, ranks: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, float]:
    found = [case for case in cases(ranks, dtype, turns(method)) if applicable(method, trait, case)]
    return {str(case): MEASURES[trait](method, case) for case in found}


@pytest.mark.parametrize("trait", MEASURES)
@pytest.mark.parametrize("method", VARIANTS, ids=label)
def test_a_trait_holds_where_it_is_claimed_and_nowhere_else(method, trait):
    claim = getattr(method.traits, trait)
    equal = deviations(method, trait, EQUAL)
    mixed = deviations(method, trait, MIXED) if method.traits.mixed_ranks else {}
    where = f"{label(method)} claims {trait}: {claim.value}"
    if claim is Holds.NEVER:
        assert max(equal.values()) > FAILS, f"{where}, yet it holds for equal ranks"
        return
    assert max(equal.values()) < HOLDS, f"{where}, but: {worst(equal)}"
    if claim is Holds.ALWAYS:
        assert max(mixed.values(), default=0.0) < HOLDS, f"{where}, but: {worst(mixed)}"
    elif mixed:
        assert max(mixed.values()) > FAILS, f"{where}, yet it holds for unequal ranks too"


CLAIMED = [(method, trait) for method in VARIANTS for trait in MEASURES if getattr(method.traits, trait) is not Holds.NEVER]


@pytest.mark.parametrize(("method", "trait"), CLAIMED, ids=[f"{label(method)}-{trait}" for method, trait in CLAIMED])
def test_a_claimed_trait_survives_single_precision(method, trait):
    found = deviations(method, trait, EQUAL, torch.float32)
    if getattr(method.traits, trait) is Holds.ALWAYS and method.traits.mixed_ranks:
        found |= deviations(method, trait, MIXED, torch.float32)
    assert max(found.values()) < SINGLE, worst(found)


def worst(found: dict[str, float]) -> str:
    case = max(found, key=found.__getitem__)
    return f"{case}: off by {found[case]:.2g}"


@pytest.mark.parametrize("method", VARIANTS, ids=label)
def test_unequal_ranks_are_taken_or_refused_as_claimed(method):
    case = Case(World(MIXED), FULL)
    state = begin(method, case.world)
    updates = updates_of(method, state, case.drawn())
    if method.traits.mixed_ranks:
        assert method.aggregate(state, updates).round == 1
        return
    with pytest.raises(
        MethodError, match=rf"{method.name}: expected clients of one rank, got ranks 2, 3, .*see `anyrank methods`"
    ):
        method.aggregate(state, updates)


@pytest.mark.parametrize("method", [m for m in VARIANTS if getattr(m, "empty_slice", None) == "zero"], ids=label)
def test_dropping_what_nobody_has_is_what_the_option_does(method):
    absent = [case for case in cases(MIXED) if not case.reaches_every_slice]
    assert all(stationary(method, case) > FAILS for case in absent)
