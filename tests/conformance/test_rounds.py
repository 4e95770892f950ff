"""What every method does in a round, whatever it computes: pure, repeatable, in the client's form, and counted in bytes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.errors import AnyRankError
from anyrank.messages.records import Client, Scaling
from anyrank.methods import Method
from conformance.world import (
    CONV,
    COUNTS,
    EQUAL,
    FC,
    HEAD,
    MIXED,
    SHAPES,
    TAKE_MIXED,
    VARIANTS,
    Case,
    World,
    after_one_round,
    applied,
    begin,
    change,
    contents,
    distance,
    everything,
    label,
    noise,
    stay,
    train,
    turns,
    updates_of,
)

every_method = pytest.mark.parametrize("method", VARIANTS, ids=label)


def worlds(method: Method, **how) -> list[World]:
    return [World(ranks, **how) for ranks in (EQUAL, MIXED) if ranks == EQUAL or method.traits.mixed_ranks]


def shares_a_model(method: Method) -> bool:
    """Whether there is one global model, and not one for each client."""
    return "global" in method.served(begin(method, World(EQUAL)))


# --- pure ------------------------------------------------------------------------------------------------------------


@every_method
def test_nothing_that_goes_in_is_changed(method):
    for world in worlds(method):
        state = after_one_round(method, world)
        before = everything(state)
        downloads = [method.dispatch(state, client) for client in world.clients()]
        sent = [contents(download.adapter) for download in downloads]
        updates = [train(d, c) for d, c in zip(downloads, world.clients(), strict=True)]
        uploaded = [contents(update.adapter) for update in updates]
        method.aggregate(state, updates)
        assert everything(state) == before
        assert [contents(download.adapter) for download in downloads] == sent
        assert [contents(update.adapter) for update in updates] == uploaded


@every_method
def test_the_order_in_which_updates_come_back_does_not_matter(method):
    for world in worlds(method):
        state = after_one_round(method, world)
        updates = updates_of(method, state, world.clients())
        expected = everything(method.aggregate(state, updates))
        for order in itertools.islice(itertools.permutations(updates), 1, None, 17):
            assert everything(method.aggregate(state, order)) == expected


@every_method
def test_the_same_rounds_give_the_same_bytes(method):
    def two_rounds(world: World) -> list:
        state = begin(method, world)
        for _ in range(2):
            state = method.aggregate(state, updates_of(method, state, world.clients()))
        return everything(state), [contents(method.dispatch(state, client).adapter) for client in world.clients()]

    for world in worlds(method):
        assert two_rounds(world) == two_rounds(world)


@every_method
def test_a_round_in_which_nobody_came_back_changes_only_the_round(method):
    for world in worlds(method):
        state = after_one_round(method, world)
        assert state.round == 1
        after = method.aggregate(state, [])
        assert after.round == 2
        assert everything(replace(after, round=1)) == everything(state)


@every_method
def test_only_the_proportions_of_the_example_counts_matter(method):
    for world in worlds(method):
        state = after_one_round(method, world)
        updates = updates_of(method, state, world.clients())
        tenfold = [replace(update, num_examples=10 * update.num_examples) for update in updates]
        found, expected = (applied(method, method.aggregate(state, u), world) for u in (tenfold, updates))
        assert distance(found, expected) < 1e-12


# --- in the client's form --------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("rule", ["constant", "standard", "rslora"])
def test_a_download_has_the_clients_rank_and_scaling_in_each_layer(method, rule):
    for world in worlds(method, rule=rule):
        state = after_one_round(method, world)
        for client in world.clients():
            download = method.dispatch(state, client)
            assert download.train <= {"A", "B"}
            for name, (out, width) in SHAPES.items():
                layer, rank = download.adapter.layers[name], client.rank_of(name)
                alpha = {CONV: 3.0, FC: 4.0}[name]
                assert (tuple(layer.A.shape), tuple(layer.B.shape)) == ((rank, width), (out, rank))
                assert layer.scaling == pytest.approx(alpha / {"constant": 1, "standard": rank, "rslora": rank**0.5}[rule])
                assert len(set(download.slices[name])) == rank
            assert (download.adapter.layers[CONV].kind, download.adapter.layers[CONV].kernel) == ("conv2d", (2, 3))
            assert {name: tuple(t.shape) for name, t in download.adapter.tensors.items()} == HEAD


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_results_have_the_adapters_dtype(method, dtype):
    for world in worlds(method, dtype=dtype):
        state = after_one_round(method, world)
        for adapter in (state.adapter, *(method.dispatch(state, client).adapter for client in world.clients())):
            assert {layer.A.dtype for layer in adapter.layers.values()} == {dtype}
            assert {tensor.dtype for tensor in adapter.tensors.values()} == {dtype}


@every_method
def test_the_servers_layers_keep_their_form(method):
    for world in worlds(method):
        start, after = begin(method, world).adapter, after_one_round(method, world).adapter
        for name, layer in start.layers.items():
            now = after.layers[name]
            assert (now.rank, now.shape, now.kind, now.kernel) == (layer.rank, layer.shape, layer.kind, layer.kernel)
            assert now.scaling == layer.scaling


@every_method
@pytest.mark.parametrize("rule", ["constant", "standard", "rslora"])
def test_a_rank_above_the_servers_gets_slices_that_change_nothing_yet_and_can_learn(method, rule):
    world = World(EQUAL, rule)
    state = after_one_round(method, world)
    download = method.dispatch(state, Client("newcomer", 7))
    for name, held in state.adapter.layers.items():
        layer = download.adapter.layers[name]
        np.testing.assert_allclose(change(layer), change(held), atol=1e-12)
        assert layer.rank == 7
        assert layer.B[:, 4:].abs().max() == 0
        fresh, bound = layer.A[4:], 1 / held.shape[1] ** 0.5
        assert (fresh.abs().amax(dim=1) > 0.1 * bound).all()  # no row is dead
        assert fresh.abs().max() <= bound  # PEFT's own start
        assert torch.linalg.matrix_rank(layer.A[3:]) == 4  # and they are directions of their own


@pytest.mark.parametrize("method", [m for m in TAKE_MIXED if shares_a_model(m)], ids=label)
@pytest.mark.parametrize("held", [1, 3])
def test_an_upload_of_a_rank_above_the_servers_is_refused_not_broadcast(method, held):
    small, large = World((held, held)), World((5, 5))
    state = begin(method, small)
    updates = updates_of(method, begin(method, large), large.clients())
    with pytest.raises(AnyRankError, match=rf"{method.name}: layer {CONV}: expected a rank of at most {held}, .* got 5"):
        method.aggregate(state, updates)


@every_method
def test_a_layer_in_which_nobody_learned_can_still_learn(method):
    """From the start of a run, an embedding's among them (A zero, B random): both factors zero would be a dead layer."""
    world = World(EQUAL)
    start = world.start()
    table = LoraLayer(torch.zeros(4, 13, dtype=torch.float64), noise((6, 4), "table"), 1.0, "embedding")
    state = method.init(replace(start, layers={**start.layers, "table": table}), Scaling(4.0), 7)
    after = method.aggregate(state, [stay(method.dispatch(state, c), c) for c in world.clients()])
    for client in world.clients():
        for layer in method.dispatch(after, client).adapter.layers.values():
            assert np.abs(change(layer)).max() == 0
            alive = (layer.A.abs().amax(dim=1) > 0) | (layer.B.abs().amax(dim=0) > 0)
            assert alive.all()


# --- plain tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in VARIANTS if shares_a_model(m)], ids=label)
def test_plain_tensors_are_the_mean_over_those_who_sent_them(method):
    world = World(EQUAL)
    state = after_one_round(method, world)
    updates = updates_of(method, state, world.clients())
    # client-2 (n = 4) sends no bias; nobody sends the rest: 3, 1, 2 of 6 and 3, 1, 4, 2 of 10.
    without = {name: tensor for name, tensor in updates[2].adapter.tensors.items() if name != "head.bias"}
    updates[2] = replace(updates[2], adapter=replace(updates[2].adapter, tensors=without))
    after = method.aggregate(state, updates).adapter.tensors
    weight = sum(n / 10 * u.adapter.tensors["head.weight"] for n, u in zip((3, 1, 4, 2), updates, strict=True))
    bias = sum(n / 6 * updates[i].adapter.tensors["head.bias"] for i, n in ((0, 3), (1, 1), (3, 2)))
    torch.testing.assert_close(after["head.weight"], weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(after["head.bias"], bias, rtol=0, atol=1e-12)
    nobody = [replace(u, adapter=replace(u.adapter, tensors={})) for u in updates]
    assert torch.equal(method.aggregate(state, nobody).adapter.tensors["head.bias"], state.adapter.tensors["head.bias"])


@pytest.mark.parametrize("method", [m for m in VARIANTS if shares_a_model(m)], ids=label)
def test_a_whole_number_that_all_clients_share_stays(method):
    world = World(EQUAL)
    state = begin(method, world)
    counters = {"norm.num_batches_tracked": torch.arange(50)}
    state = replace(state, adapter=replace(state.adapter, tensors=counters))
    updates = [stay(method.dispatch(state, client), client) for client in world.clients()]
    after = method.aggregate(state, updates).adapter.tensors["norm.num_batches_tracked"]
    assert torch.equal(after, torch.arange(50))


# --- bytes -----------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_bytes_are_those_of_the_factors_that_travel_and_of_the_head(method, dtype, width):
    for world in worlds(method, dtype=dtype):
        state = after_one_round(method, world)
        for client in world.clients():
            conv, fc = client.rank_of(CONV), client.rank_of(FC)
            numbers = {"A": conv * 18 + fc * 9, "B": 9 * conv + 11 * fc}
            head = 0 if "tensors" in method.private else 4 * 11 + 4
            download = method.dispatch(state, client)
            merged = 0
            for layer in download.merged.layers.values() if download.merged else ():
                merged += layer.rank * sum(layer.shape)
            up, down = (sum(numbers[f] for f in way - method.private) for way in (download.train, method.send))
            assert download.upload_bytes() == width * (up + head)
            assert download.download_bytes() == width * (down + head + merged)
            trained = train(download, client).adapter
            moved = {
                factor: not torch.equal(getattr(trained.layers[FC], factor), getattr(download.adapter.layers[FC], factor))
                for factor in "AB"
            }
            assert {factor for factor in "AB" if moved[factor]} == set(download.train)
            assert download.train == method.train or turns(method) == (1, 2)


def test_the_worlds_are_what_the_tests_take_them_for():
    assert [c.rank_of(CONV) for c in World(MIXED).clients()] == [2, 3, 5, 4, 7]
    assert len(set(COUNTS)) == 5
    start: Adapter = World(MIXED).start()
    assert start.ranks == {CONV: 7, FC: 8}
    assert {name: layer.kind for name, layer in start.layers.items()} == {CONV: "conv2d", FC: "linear"}
    assert Case(World(MIXED), "only the top").reaches_every_slice
    assert not Case(World(MIXED), "nobody of the top rank").reaches_every_slice
