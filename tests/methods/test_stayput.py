"""Staying put: by hand, against the methods at the ends of its range, and what true point, rotation and momentum add."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from anyrank import aggregate
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.errors import MethodError
from anyrank.messages.records import Client, ClientUpdate, Scaling, ServerState
from anyrank.methods import Method, make
from conformance.world import (
    COUNTS,
    EQUAL,
    MIXED,
    SHAPES,
    World,
    after_one_round,
    after_rounds,
    begin,
    cases,
    changes,
    contents,
    distance,
    everything,
    stay,
    updates_of,
)

TAUS = pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
RULES = pytest.mark.parametrize("rule", ["standard", "constant", "rslora"])
PLAIN, WHOLE = {"true_point": False, "rotate": False}, {"true_point": True, "rotate": True}
BOTH = pytest.mark.parametrize("options", [PLAIN, WHOLE], ids=["plain", "true point, rotation"])


def plain(**options) -> Method:
    return make("stayput", {**PLAIN, **options})


def adapter(*diagonal: float, columns: tuple[int, ...] = (0, 1)) -> Adapter:
    """One layer, in = out = 2, scaling 1: slice j is `diagonal[j]` at the place `columns[j]` of the diagonal."""
    A = torch.eye(2, dtype=torch.float64)[list(columns[: len(diagonal)])]
    return Adapter({"layer": LoraLayer(A, A.T * torch.tensor(diagonal), 1.0)})


def holding(*diagonal: float, round: int = 0) -> ServerState:
    return ServerState(round, 0, adapter(*diagonal), Scaling(1.0, "constant"))


def held(state: ServerState) -> np.ndarray:
    return state.adapter.layers["layer"].delta().numpy()


# --- by hand: the server holds diag(3, 2); client 1 has rank 1 and 3 examples, client 2 rank 2 and 1 ------------------


@pytest.mark.parametrize(
    ("tau", "corner"),
    [
        # Slice 2 is client 2's alone, a quarter of all examples: 2 + (1/4)^(1 - tau) * (4 - 2).
        (1.0, 4.0),
        (0.5, 3.0),
        (0.0, 2.5),
    ],
)
@pytest.mark.parametrize("split", ["singular-in-b", "balanced"])
def test_a_slice_moves_by_a_power_of_its_coverage(tau, corner, split):
    # Slice 1, which both have: 3 + 3/4 (2 - 3) + 1/4 (1 - 3) = 1.75 for every tau.
    updates = [ClientUpdate(adapter(2.0), 3, "1"), ClientUpdate(adapter(1.0, 4.0), 1, "2")]
    after = plain(tau=tau, split=split).aggregate(holding(3.0, 2.0), updates)
    np.testing.assert_allclose(held(after), np.diag([1.75, corner]), atol=1e-12)


def test_a_slice_that_nobody_sent_stays():
    for tau in (0.0, 0.5, 1.0):
        after = plain(tau=tau).aggregate(holding(3.0, 2.0), [ClientUpdate(adapter(1.0), 3, "1")])
        np.testing.assert_allclose(held(after), np.diag([1.0, 2.0]), atol=1e-12)


def test_rotation_gives_one_client_one_slice_or_the_other_and_counts_what_comes_back_for_that_one():
    method, one, seen = plain(tau=0.0, rotate=True), Client("1", 1), set()
    for round in range(12):
        state = holding(3.0, 2.0, round=round)
        download = method.dispatch(state, one)
        (j,) = download.slices["layer"]
        seen.add(j)
        np.testing.assert_allclose(download.adapter.layers["layer"].delta(), np.diag([[3, 0], [0, 2]][j]), atol=1e-12)
        back = [ClientUpdate(adapter(6.0, columns=(j,)), 3, "1"), ClientUpdate(adapter(1.0, 4.0), 1, "2")]
        # Slice 1 from client 1: 3 + 3/4 (6 - 3) + 1/4 (1 - 3) = 4.75 beside 2 + 1/4 (4 - 2) = 2.5.
        # Slice 2 from client 1: 3 + 1/4 (1 - 3) = 2.5 beside 2 + 3/4 (6 - 2) + 1/4 (4 - 2) = 5.5.
        np.testing.assert_allclose(held(method.aggregate(state, back)), np.diag([[4.75, 2.5], [2.5, 5.5]][j]), atol=1e-12)
    assert seen == {0, 1}


def test_the_true_point_is_the_servers_whole_product_and_is_counted_in_bytes():
    method, state = plain(true_point=True), holding(3.0, 2.0)
    small, large = (method.dispatch(state, client) for client in (Client("1", 1), Client("2", 2)))
    np.testing.assert_allclose(small.adapter.layers["layer"].delta(), np.diag([3, 0]), atol=1e-12)
    np.testing.assert_allclose(small.merged.layers["layer"].delta(), np.diag([0, 2]), atol=1e-12)
    assert large.merged is None
    # One more slice of 2 + 2 numbers in float64; nothing more comes back.
    assert small.download_bytes() == plain().dispatch(state, Client("1", 1)).download_bytes() + 8 * 4
    assert small.upload_bytes() == plain().dispatch(state, Client("1", 1)).upload_bytes()
    assert method.dispatch(holding(3.0, 0.0), Client("1", 1)).merged is None, "a slice that applies nothing need not travel"


def test_momentum_makes_half_of_the_last_step_again():
    # From diag(3, 2) to diag(5, 2); then nobody trains, and the first entry goes on by 1, 1/2, ...
    method, state = plain(momentum=0.5), holding(3.0, 2.0)
    state = method.aggregate(state, [ClientUpdate(adapter(5.0, 2.0), 1, "2")])
    np.testing.assert_allclose(held(state), np.diag([5, 2]), atol=1e-12)
    for expected in (6.0, 6.5, 6.75):
        waiting = method.aggregate(state, [])
        assert everything(replace(waiting, round=state.round)) == everything(state)  # a round without clients is no round
        state = method.aggregate(waiting, [stay(method.dispatch(state, Client("client-0", 2)), Client("client-0", 2))])
        np.testing.assert_allclose(held(state), np.diag([expected, 2]), atol=1e-12)
    assert state.extra["before"].ranks == {"layer": 2}, "the memory does not grow"
    assert plain().aggregate(state, [ClientUpdate(adapter(5.0, 2.0), 1, "2")]).extra == state.extra


# --- against other methods --------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("split", ["singular-in-b", "balanced"])
@pytest.mark.parametrize("drawn", [slice(None), slice(0, 3)], ids=["all", "nobody of the top rank"])
def test_with_tau_1_it_is_raflora(rule, split, drawn):
    world, raflora = World(MIXED, rule), make("raflora", {"split": split})
    state = after_one_round(raflora, world)
    uploads = updates_of(raflora, state, world.clients()[drawn])
    expected, found = (m.aggregate(state, uploads) for m in (raflora, plain(tau=1.0, split=split)))
    for name in SHAPES:
        torch.testing.assert_close(found.adapter.layers[name].A, expected.adapter.layers[name].A, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.adapter.layers[name].B, expected.adapter.layers[name].B, rtol=0, atol=1e-9)
    sent, told = (m.dispatch(state, Client("x", 3)) for m in (raflora, plain(tau=1.0, split=split)))
    assert contents(sent.adapter) == contents(told.adapter)
    assert sent.slices == told.slices


@RULES
@TAUS
def test_with_equal_ranks_it_is_flexlora(rule, tau):
    world, flexlora = World(EQUAL, rule), make("flexlora")
    state = after_one_round(flexlora, world)
    uploads = updates_of(flexlora, state, world.clients())
    expected = changes(flexlora.aggregate(state, uploads).adapter)
    for options in (PLAIN, WHOLE):  # with nothing left to freeze and all slices drawn, these change nothing
        found = make("stayput", {"tau": tau, **options})
        assert distance(changes(found.aggregate(state, uploads).adapter), expected) < 1e-12
        for client in world.clients():
            assert found.dispatch(state, client).merged is None


def run_by(client: Client, update: ClientUpdate, method: Method, state: ServerState) -> dict[str, np.ndarray]:
    """The change of each weight in the model that the client has trained, its frozen part included."""
    return changes(update.adapter, method.dispatch(state, client).merged)


@RULES
@pytest.mark.parametrize("rotate", [False, True])
def test_at_the_true_point_tau_0_is_the_mean_of_the_clients_models(rule, rotate):
    world, method = World(MIXED, rule), make("stayput", {"tau": 0.0, "true_point": True, "rotate": rotate})
    state = after_one_round(method, world)
    updates = updates_of(method, state, world.clients())
    models = [run_by(client, update, method, state) for client, update in zip(world.clients(), updates, strict=True)]
    found = changes(method.aggregate(state, updates).adapter)
    for name in SHAPES:
        U, S, Vt = np.linalg.svd(sum(n / sum(COUNTS) * model[name] for n, model in zip(COUNTS, models, strict=True)))
        rank = state.adapter.layers[name].rank
        best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
        assert S[rank] > 1e-3 * S[0], "the mean is of a higher rank than the server holds"
        np.testing.assert_allclose(found[name], best, atol=1e-12 * S[0])


@RULES
def test_with_tau_0_only_products_matter_whatever_the_ranks(rule):
    """Uploads `(B G, G^-1 A)` for `(B, A)`: every slice of a client weighs the same, so only their sum counts."""
    world = World(MIXED, rule)
    for options in (PLAIN, WHOLE):
        method = make("stayput", {"tau": 0.0, **options})
        state = after_one_round(method, world)
        updates = updates_of(method, state, world.clients())
        turned = [replace(u, adapter=mixed_within(u.adapter)) for u in updates]
        assert distance(changes(turned[2].adapter), changes(updates[2].adapter)) < 1e-12
        expected, found = (changes(method.aggregate(state, sent).adapter) for sent in (updates, turned))
        assert distance(found, expected) < 1e-9


def mixed_within(adapter: Adapter) -> Adapter:
    layers = {}
    for name, layer in adapter.layers.items():
        G = torch.eye(layer.rank, dtype=torch.float64) + 0.5 * torch.ones(layer.rank, layer.rank, dtype=torch.float64).tril(-1)
        layers[name] = layer.with_factors(torch.linalg.solve(G, layer.A), layer.B @ G)
    return replace(adapter, layers=layers)


# --- for every tau -----------------------------------------------------------------------------------------------------


@TAUS
@BOTH
def test_a_round_without_training_changes_nothing_whoever_is_there(tau, options):
    method = make("stayput", {"tau": tau, **options})
    for case in cases(MIXED):
        state = after_rounds(method, case.world, 1)
        after = method.aggregate(state, [stay(method.dispatch(state, c), c) for c in case.drawn()])
        assert distance(changes(after.adapter), changes(state.adapter)) < 1e-12, case


@RULES
@TAUS
def test_a_step_on_a_thinly_owned_slice_is_scaled_by_coverage_to_the_power_of_1_minus_tau(rule, tau):
    """All come back untouched but the one client (5 of 15 examples) that has the last slice, and moves only that."""
    world, method = World(MIXED, rule), plain(tau=tau)
    state = after_one_round(method, world)
    *others, top = [stay(method.dispatch(state, client), client) for client in world.clients()]
    moved = {name: layer.with_factors(layer.A, layer.B * last_only(layer.rank)) for name, layer in top.adapter.layers.items()}
    after = method.aggregate(state, [*others, replace(top, adapter=replace(top.adapter, layers=moved))])
    for name, now in changes(after.adapter).items():
        before = changes(state.adapter)[name]
        step = moved[name].delta().numpy() - before
        np.testing.assert_allclose(now - before, (5 / 15) ** (1 - tau) * step, atol=1e-12 * np.abs(before).max())


def last_only(rank: int) -> torch.Tensor:
    return torch.cat([torch.ones(rank - 1), torch.tensor([1.5])]).double()


# --- which slices, and what others get ---------------------------------------------------------------------------------


def test_slices_are_drawn_evenly_anew_each_round_and_by_name_alone():
    method, drawn = plain(rotate=True), Counter()
    state = after_one_round(method, World(MIXED))
    rounds = [replace(state, round=round) for round in range(400)]
    for later in rounds:
        slices = method.dispatch(later, Client("client-1", 3)).slices
        assert slices == method.dispatch(later, Client("client-1", 3)).slices
        for name, held in state.adapter.layers.items():
            assert len(set(slices[name])) == 3
            assert list(slices[name]) == sorted(slices[name])
            drawn.update((name, j) for j in slices[name] if j in range(held.rank))
    for name, held in state.adapter.layers.items():  # 400 draws of probability 3 / R: within five standard deviations
        p = 3 / held.rank
        for j in range(held.rank):
            assert abs(drawn[name, j] / 400 - p) < 5 * (p * (1 - p) / 400) ** 0.5
    ours, theirs = (method.dispatch(rounds[5], Client(name, 3)).slices for name in ("client-1", "client-2"))
    assert ours != theirs
    assert method.dispatch(state, Client("client-4", 8)).slices["body.fc"] == tuple(range(8))


@BOTH
def test_who_takes_no_part_in_rounds_gets_the_best_approximation_of_its_rank(options):
    method = make("stayput", options)
    state = after_one_round(method, World(MIXED))
    share = method.share(state, Client("user", 3))
    for name, value in changes(state.adapter).items():
        U, S, Vt = np.linalg.svd(value)
        np.testing.assert_allclose(changes(share)[name], (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-12 * S[0])


@RULES
def test_a_server_of_a_higher_rank_than_its_clients_fills_it(rule):
    method, world = make("stayput", {"server_rank": 9, **WHOLE}), World((2, 3), rule)
    state = begin(method, world)
    assert {name: np.abs(value).max() for name, value in changes(state.adapter).items()} == dict.fromkeys(SHAPES, 0.0)
    for number in range(1, 4):
        assert state.adapter.ranks == dict.fromkeys(SHAPES, 9)
        assert all(layer.scaling == world.scaling().of(name, 9) for name, layer in state.adapter.layers.items())
        for client in world.clients():
            assert method.dispatch(state, client).adapter.ranks == {name: client.rank_of(name) for name in SHAPES}
        state = method.aggregate(state, updates_of(method, state, world.clients(), number))
    for value in changes(state.adapter).values():
        assert np.linalg.matrix_rank(value) > 3


def test_a_layer_holds_no_more_than_it_can_carry():
    state = begin(make("stayput", {"server_rank": 64}), World(EQUAL))
    assert state.adapter.ranks == {"body.conv": 9, "body.fc": 9}  # [9, 18] and [11, 9]
    assert begin(make("stayput", {"server_rank": 2}), World(EQUAL)).adapter.ranks == {"body.conv": 4, "body.fc": 4}


# --- outside of runs, and wrong options ----------------------------------------------------------------------------------


def test_a_merge_of_adapters_is_one_of_shares_which_are_the_first_slices():
    updates = [ClientUpdate(adapter(2.0), 3, "1"), ClientUpdate(adapter(1.0, 4.0), 1, "2")]
    for options in (PLAIN, WHOLE):
        merged = aggregate(updates, method="stayput", previous=adapter(3.0, 2.0), tau=0.0, **options)
        np.testing.assert_allclose(merged.adapter.layers["layer"].delta(), np.diag([1.75, 2.5]), atol=1e-12)
        np.testing.assert_allclose(merged.share(1).layers["layer"].delta(), np.diag([0, 2.5]), atol=1e-12)


@pytest.mark.parametrize("options", [{"tau": -0.1}, {"tau": 1.1}, {"momentum": 1.0}, {"momentum": -0.1}, {"server_rank": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(MethodError, match="stayput: expected tau from 0 to 1, momentum from 0 to below 1, server_rank from 0"):
        make("stayput", options)
