"""Cases worked by hand: one layer, in = out = 2, scaling 1; client 1 has rank 1 and 3 examples, client 2 rank 2 and 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import Client, ClientUpdate, Scaling, ServerState
from anyrank.methods import make

ONE = LoraLayer(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), 1.0)  # B A = [[2, 0], [0, 0]]
TWO = LoraLayer(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.eye(2), 1.0)  # B A = [[1, 0], [0, 4]]
A_0 = torch.tensor([[3.0, 1.0], [1.0, 2.0]])


def adapter(layer: LoraLayer) -> Adapter:
    return Adapter({"layer": layer})


def update(layer: LoraLayer, num_examples: int, client: str) -> ClientUpdate:
    return ClientUpdate(adapter(layer), num_examples, client)


def server(scaling: Scaling | None = None, A: torch.Tensor = A_0) -> ServerState:
    scaling = scaling or Scaling(1.0, "constant")
    return ServerState(0, 0, adapter(LoraLayer(A, torch.zeros(2, 2), scaling.of("layer", 2))), scaling)


def merged(name: str, *updates: ClientUpdate, **options) -> tuple:
    method = make(name, options)
    return method, method.aggregate(server(), updates or (update(ONE, 3, "1"), update(TWO, 1, "2")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 3/4 [[2, 0], [0, 0]] + 1/4 [[1, 0], [0, 4]]
        ("flexlora", [[1.75, 0], [0, 1]]),
        # slice 1: 3/4 * 2 + 1/4 * 1 = 1.75; slice 2: client 2 alone, with weight 1
        ("raflora", [[1.75, 0], [0, 4]]),
        # slice 1: B = [1.75, 0], A = [1, 0]; slice 2: B = [0, 1], A = [0, 4]
        ("rbla", [[1.75, 0], [0, 4]]),
        # slice 1 as rbla; slice 2: B = [0, 1/4], A = [0, 1]
        ("zeropad", [[1.75, 0], [0, 0.25]]),
    ],
)
def test_what_the_server_holds(name, expected):
    _, state = merged(name)
    np.testing.assert_allclose(state.adapter.layers["layer"].delta(), expected, atol=1e-6)


@pytest.mark.parametrize("split", ["singular-in-b", "balanced"])
@pytest.mark.parametrize("name", ["flexlora", "raflora"])
def test_how_the_singular_value_is_split_does_not_change_the_product(name, split):
    _, state = merged(name, split=split)
    found = state.adapter.layers["layer"].delta()
    np.testing.assert_allclose(found, {"flexlora": [[1.75, 0], [0, 1]], "raflora": [[1.75, 0], [0, 4]]}[name], atol=1e-6)


def test_a_rank_1_client_gets_the_direction_of_4_from_raflora_and_slice_1_from_rbla():
    raflora, held = merged("raflora")
    share = raflora.dispatch(held, Client("1", 1)).adapter.layers["layer"]
    np.testing.assert_allclose(share.delta(), [[0, 0], [0, 4]], atol=1e-6)  # the SVD reorders
    rbla, held = merged("rbla")
    share = rbla.dispatch(held, Client("1", 1)).adapter.layers["layer"]
    np.testing.assert_allclose(share.delta(), [[1.75, 0], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("name", ["flexlora", "raflora"])
@pytest.mark.parametrize(("split", "a", "b"), [("singular-in-b", 1.0, 4.0), ("balanced", 2.0, 2.0)])
def test_where_the_singular_value_4_goes(name, split, a, b):
    # Both clients of rank 2, both with B A = diag(1, 4): U = Vt = the unit vectors, S = 4, 1.
    method, state = merged(name, update(TWO, 1, "1"), update(TWO, 1, "2"), split=split)
    share = method.dispatch(state, Client("1", 1)).adapter.layers["layer"]
    np.testing.assert_allclose(share.A, [[0, a]], atol=1e-6)
    np.testing.assert_allclose(share.B, [[0], [b]], atol=1e-6)


def test_rbla_keeps_the_factors_of_slice_2_as_their_only_owner_sent_them():
    _, state = merged("rbla")
    layer = state.adapter.layers["layer"]
    np.testing.assert_allclose(layer.A, [[1, 0], [0, 4]], atol=1e-6)
    np.testing.assert_allclose(layer.B, [[1.75, 0], [0, 1]], atol=1e-6)


def test_zeropad_divides_both_factors_of_slice_2_by_all_clients():
    _, state = merged("zeropad")
    layer = state.adapter.layers["layer"]
    np.testing.assert_allclose(layer.A, [[1, 0], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(layer.B, [[1.75, 0], [0, 0.25]], atol=1e-6)


def test_fedavg_multiplies_means():
    # A = 3/4 [1, 0] + 1/4 [0, 4] = [3/4, 1]; B = 3/4 [2, 0] + 1/4 [1, 0] = [7/4, 0]; B A = [[21/16, 7/4], [0, 0]].
    other = LoraLayer(torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0], [0.0]]), 1.0)
    state = ServerState(0, 0, adapter(ONE), Scaling(1.0, "constant"))
    after = make("fedavg").aggregate(state, [update(ONE, 3, "1"), update(other, 1, "2")])
    np.testing.assert_allclose(after.adapter.layers["layer"].delta(), [[21 / 16, 7 / 4], [0, 0]], atol=1e-6)


def test_ffa_lora_averages_columns_of_b_over_their_owners():
    # Column 1: 3/4 [2, 0] + 1/4 [1, 0] = [1.75, 0]; column 2: client 2's [0, 1]. B A_0 = [[5.25, 1.75], [1, 2]].
    one = LoraLayer(A_0[:1], ONE.B, 1.0)
    two = LoraLayer(A_0, TWO.B, 1.0)
    after = make("ffa_lora").aggregate(server(), [update(one, 3, "1"), update(two, 1, "2")])
    layer = after.adapter.layers["layer"]
    np.testing.assert_allclose(layer.B, [[1.75, 0], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(layer.delta(), [[5.25, 1.75], [1, 2]], atol=1e-6)
    assert torch.equal(layer.A, A_0)


def test_hetlora_weighs_by_the_norm_of_what_each_client_applies():
    # |[[2, 0], [0, 0]]| = 2, |[[1, 0], [0, 4]]| = sqrt 17: p = 2 / (2 + sqrt 17) and q = 1 - p, whatever the examples.
    # Slice 1: B = [2p + q, 0], A = [p + q, 0] = [1, 0]; slice 2: B = [0, q], A = [0, 4q].
    p = 2 / (2 + math.sqrt(17))
    q = 1 - p
    _, state = merged("hetlora")
    np.testing.assert_allclose(state.adapter.layers["layer"].delta(), [[2 * p + q, 0], [0, 4 * q * q]], atol=1e-6)


def test_hetlora_weighs_by_examples_where_nobody_has_learned_anything():
    # B = 0 for both; A = 3/4 [1, 0] + 1/4 [5, 4] = [2, 1].
    one, two = LoraLayer(ONE.A, 0 * ONE.B, 1.0), LoraLayer(torch.tensor([[5.0, 4.0]]), 0 * ONE.B, 1.0)
    state = ServerState(0, 0, adapter(ONE), Scaling(1.0, "constant"))
    after = make("hetlora").aggregate(state, [update(one, 3, "1"), update(two, 1, "2")])
    np.testing.assert_allclose(after.adapter.layers["layer"].A, [[2, 1]], atol=1e-6)


def test_flora_puts_the_mean_of_products_into_the_base_and_starts_anew():
    # 3/4 [[2, 0], [0, 0]] + 1/4 [[1, 0], [0, 4]]
    _, state = merged("flora")
    np.testing.assert_allclose(state.merged.layers["layer"].delta(), [[1.75, 0], [0, 1]], atol=1e-6)
    np.testing.assert_array_equal(state.adapter.layers["layer"].delta(), 0)


def test_flora_adds_the_next_round_on_top():
    # [[1.75, 0], [0, 1]] from round 1; in round 2 client 1 alone adds [[2, 0], [0, 0]].
    method, state = merged("flora")
    after = method.aggregate(state, [update(ONE, 3, "1")])
    np.testing.assert_allclose(after.merged.layers["layer"].delta(), [[3.75, 0], [0, 1]], atol=1e-6)


def test_fedex_puts_what_the_means_miss_into_the_base():
    # Means as fedavg's: [[21/16, 7/4], [0, 0]]. Products: 3/4 [[2, 0], [0, 0]] + 1/4 [[0, 4], [0, 0]] = [[3/2, 1], [0, 0]].
    other = LoraLayer(torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0], [0.0]]), 1.0)
    state = ServerState(0, 0, adapter(ONE), Scaling(1.0, "constant"))
    after = make("fedex").aggregate(state, [update(ONE, 3, "1"), update(other, 1, "2")])
    np.testing.assert_allclose(after.adapter.layers["layer"].delta(), [[21 / 16, 7 / 4], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(after.merged.layers["layer"].delta(), [[3 / 16, -3 / 4], [0, 0]], atol=1e-6)


FIVE = torch.tensor([[5.0, 4.0], [0.0, 4.0]])


def test_rolora_averages_b_in_round_1_and_a_in_round_2():
    # Round 1 as ffa_lora: B = [[1.75, 0], [0, 1]] over A_0. Round 2: slice 1 of A is 3/4 [1, 0] + 1/4 [5, 4] = [2, 1],
    # slice 2 is client 2's [0, 4]: B A = [[3.5, 1.75], [0, 4]].
    method = make("rolora")
    uploads = [update(LoraLayer(A_0[:1], ONE.B, 1.0), 3, "1"), update(LoraLayer(A_0, TWO.B, 1.0), 1, "2")]
    after = method.aggregate(server(), uploads)
    np.testing.assert_allclose(after.adapter.layers["layer"].delta(), [[5.25, 1.75], [1, 2]], atol=1e-6)
    B = after.adapter.layers["layer"].B
    uploads = [update(LoraLayer(ONE.A, B[:, :1], 1.0), 3, "1"), update(LoraLayer(FIVE, B, 1.0), 1, "2")]
    after = method.aggregate(after, uploads)
    np.testing.assert_allclose(after.adapter.layers["layer"].A, [[2, 1], [0, 4]], atol=1e-6)
    np.testing.assert_allclose(after.adapter.layers["layer"].delta(), [[3.5, 1.75], [0, 4]], atol=1e-6)


def test_fedsa_gives_each_client_the_mean_a_under_its_own_b():
    # A: [2, 1] and [0, 4] as above. Client 1: [2, 0]^T [2, 1] = [[4, 2], [0, 0]]; client 2, whose B is I: A itself.
    _, state = merged("fedsa", update(ONE, 3, "1"), update(LoraLayer(FIVE, TWO.B, 1.0), 1, "2"))
    own = make("fedsa").served(state)
    np.testing.assert_allclose(own["1"].layers["layer"].delta(), [[4, 2], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(own["2"].layers["layer"].delta(), [[2, 1], [0, 4]], atol=1e-6)


@pytest.mark.parametrize(("energy", "corner"), [(0.75, 0.0), (0.76, 1.0)])
def test_florist_keeps_singular_values_up_to_their_share_of_energy(energy, corner):
    # diag(1.75, 1) as flexlora's: 1.75^2 / (1.75^2 + 1) = 0.754.
    _, state = merged("florist", energy=energy)
    np.testing.assert_allclose(state.adapter.layers["layer"].delta(), [[1.75, 0], [0, corner]], atol=1e-6)


def test_lora_fair_turns_b_half_way():
    # in = 1. Client 1: A = 2, B = (1, t); client 2: A = 0, B = (1, -t), t = 2 + sqrt 3 = tan 75. Means: A = 1, B = (1, 0).
    # Mean of products: (1, t), at 75 degrees. C = rho (cos x, sin x) minimises 1 - cos(75 - x) + 1/2 |C - B|^2: rho = cos x,
    # which leaves 1 - cos(75 - x) + 1/2 sin^2 x, whose slope -sin(75 - x) + 1/2 sin 2x is 0 at x = 45: C = (1/2, 1/2).
    t = 2 + math.sqrt(3)
    one = LoraLayer(torch.tensor([[2.0]]), torch.tensor([[1.0], [t]]), 1.0)
    two = LoraLayer(torch.tensor([[0.0]]), torch.tensor([[1.0], [-t]]), 1.0)
    state = ServerState(0, 0, adapter(LoraLayer(torch.ones(1, 1), torch.zeros(2, 1), 1.0)), Scaling(1.0, "constant"))
    after = make("lora_fair", {"penalty": 0.5}).aggregate(state, [update(one, 1, "1"), update(two, 1, "2")])
    np.testing.assert_allclose(after.adapter.layers["layer"].A, [[1]], atol=1e-6)
    np.testing.assert_allclose(after.adapter.layers["layer"].B, [[0.5], [0.5]], atol=1e-6)


def test_fedsvd_turns_the_mean_of_b_into_singular_vectors():
    # Over A = I, as ffa_lora: column 1 is 3/4 [2, 0] + 1/4 [1, 0] = [1.75, 0], column 2 is client 2's [0, 4].
    # The SVD of diag(1.75, 4) puts the 4 first: A = [[0, 1], [1, 0]], B = [[0, 1.75], [4, 0]].
    uploads = [update(LoraLayer(torch.eye(2)[:1], ONE.B, 1.0), 3, "1")]
    uploads += [update(LoraLayer(torch.eye(2), torch.diag(torch.tensor([1.0, 4.0])), 1.0), 1, "2")]
    after = make("fedsvd").aggregate(server(A=torch.eye(2)), uploads).adapter.layers["layer"]
    np.testing.assert_allclose(after.A, [[0, 1], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(after.B, [[0, 1.75], [4, 0]], atol=1e-6)


# --- scalings that differ: alpha = 4 under alpha / r, so s(1) = 4 and s(2) = 2 -----------------------------------------


def scaled(name: str):
    """Client 1 (rank 1, n = 3) applies 4 * [[2, 0], [0, 0]], client 2 (rank 2, n = 1) applies 2 * [[1, 0], [0, 4]]."""
    one, two = LoraLayer(ONE.A, ONE.B, 4.0), LoraLayer(TWO.A, TWO.B, 2.0)
    method = make(name)
    return method, method.aggregate(server(Scaling(4.0, "standard")), [update(one, 3, "1"), update(two, 1, "2")])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 3/4 [[8, 0], [0, 0]] + 1/4 [[2, 0], [0, 8]]
        ("flexlora", [[6.5, 0], [0, 2]]),
        # slice 1: 3/4 * 8 + 1/4 * 2 = 6.5; slice 2: client 2 alone: 8
        ("raflora", [[6.5, 0], [0, 8]]),
        # slice 1: (3/4 * 2 * 1 + 1/4 * sqrt 2 * 1) * (3/4 * 2 * 2 + 1/4 * sqrt 2 * 1), with sqrt(s) = 2 and sqrt 2; slice 2: 8
        ("rbla", [[(1.5 + math.sqrt(2) / 4) * (3 + math.sqrt(2) / 4), 0], [0, 8]]),
    ],
)
def test_clients_count_by_what_they_apply_scaling_included(name, expected):
    _, state = scaled(name)
    assert state.adapter.layers["layer"].scaling == 2.0  # the server's rank is 2
    np.testing.assert_allclose(state.adapter.layers["layer"].delta(), expected, rtol=1e-6, atol=1e-6)


def test_the_factors_of_a_share_are_rescaled_for_its_own_scaling():
    # The server holds diag(6.5, 8) under s = 2; a rank-1 client of raflora gets 8 under s = 4: B = 2 u, A = v.
    raflora, state = scaled("raflora")
    share = raflora.dispatch(state, Client("1", 1)).adapter.layers["layer"]
    assert share.scaling == 4.0
    np.testing.assert_allclose(share.A, [[0, 1]], atol=1e-6)
    np.testing.assert_allclose(share.B, [[0], [2]], atol=1e-6)


# --- a slice that nobody of the round has ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["raflora", "rbla"])
@pytest.mark.parametrize(("empty_slice", "corner"), [("keep", 4.0), ("zero", 0.0)])
def test_an_empty_slice_stays_or_is_dropped(name, empty_slice, corner):
    # The server holds diag(1.75, 4), slice 2 being the 4; only client 1 comes back, with B A = [[2, 0], [0, 0]].
    state = ServerState(3, 0, adapter(LoraLayer(TWO.A, torch.diag(torch.tensor([1.75, 1.0])), 1.0)), Scaling(1.0, "constant"))
    after = make(name, {"empty_slice": empty_slice}).aggregate(state, [update(ONE, 3, "1")])
    np.testing.assert_allclose(after.adapter.layers["layer"].delta(), [[2, 0], [0, corner]], atol=1e-6)


def test_flexlora_loses_what_nobody_of_the_round_has():
    state = ServerState(3, 0, adapter(TWO), Scaling(1.0, "constant"))
    after = make("flexlora").aggregate(state, [update(ONE, 3, "1")])
    np.testing.assert_allclose(after.adapter.layers["layer"].delta(), [[2, 0], [0, 0]], atol=1e-6)
