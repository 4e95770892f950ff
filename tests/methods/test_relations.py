"""How the methods relate to each other, and the collapse law that tells them apart."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from anyrank import aggregate
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import spectra
from anyrank.errors import MethodError
from anyrank.messages.records import Client, ClientUpdate, Scaling, ServerState
from anyrank.methods import Method, make
from conformance.world import (
    COUNTS,
    EQUAL,
    MIXED,
    SHAPES,
    TAKE_MIXED,
    World,
    after_one_round,
    applied,
    begin,
    changes,
    contents,
    distance,
    label,
    train,
    updates_of,
)

RULES = pytest.mark.parametrize("rule", ["standard", "constant", "rslora"])


def second_round(method: Method, world: World, drawn: slice = slice(None)) -> ServerState:
    state = after_one_round(method, world)
    return method.aggregate(state, updates_of(method, state, world.clients()[drawn]))


@RULES
@pytest.mark.parametrize("split", ["singular-in-b", "balanced"])
def test_with_equal_ranks_raflora_is_flexlora(rule, split):
    world = World(EQUAL, rule)
    flexlora, raflora = (second_round(make(name, {"split": split}), world) for name in ("flexlora", "raflora"))
    for name in SHAPES:
        torch.testing.assert_close(flexlora.adapter.layers[name].A, raflora.adapter.layers[name].A, rtol=0, atol=1e-9)
        torch.testing.assert_close(flexlora.adapter.layers[name].B, raflora.adapter.layers[name].B, rtol=0, atol=1e-9)


@RULES
@pytest.mark.parametrize("name", ["rbla", "zeropad"])
def test_with_equal_ranks_slice_methods_are_fedavg(rule, name):
    world = World(EQUAL, rule)
    fedavg, other = second_round(make("fedavg"), world), second_round(make(name), world)
    for layer in SHAPES:
        torch.testing.assert_close(fedavg.adapter.layers[layer].A, other.adapter.layers[layer].A, rtol=0, atol=1e-12)
        torch.testing.assert_close(fedavg.adapter.layers[layer].B, other.adapter.layers[layer].B, rtol=0, atol=1e-12)


@RULES
def test_centralized_is_fedavg_of_one(rule):
    world = World(EQUAL, rule)
    for name in ("fedavg", "centralized"):
        method = make(name)
        state = after_one_round(method, world)
        [update] = updates_of(method, state, world.clients()[:1])
        after = method.aggregate(state, [update])
        assert distance(changes(after.adapter), changes(update.adapter)) < 1e-12
    assert make("centralized").pools_data
    assert not make("fedavg").pools_data


@RULES
def test_each_factor_of_zeropads_slice_j_is_its_coverage_times_rblas(rule):
    world = World(MIXED, rule)
    state = after_one_round(make("rbla"), world)  # one state, one set of uploads, two methods
    uploads = updates_of(make("rbla"), state, world.clients())
    rbla, zeropad = (make(name).aggregate(state, uploads).adapter for name in ("rbla", "zeropad"))
    for name in SHAPES:
        ranks = [client.rank_of(name) for client in world.clients()]
        coverage = [sum(n for n, r in zip(COUNTS, ranks, strict=True) if r > j) / sum(COUNTS) for j in range(max(ranks))]
        pi = torch.tensor(coverage, dtype=torch.float64)
        assert coverage[0] == 1.0
        assert coverage[-1] == 5 / 15
        torch.testing.assert_close(zeropad.layers[name].A, pi[:, None] * rbla.layers[name].A, rtol=0, atol=1e-12)
        torch.testing.assert_close(zeropad.layers[name].B, rbla.layers[name].B * pi, rtol=0, atol=1e-12)


# FLoRIST cuts off a share of the energy, even of one client's.
@RULES
@pytest.mark.parametrize("method", [m for m in TAKE_MIXED if m.name not in ("local-only", "florist")], ids=label)
def test_one_client_of_the_top_rank_alone_gets_back_what_it_sent(method, rule):
    world = World((3, 5), rule)  # the last client has rank 4 in the convolution, the server's there
    state = after_one_round(method, world)
    [update] = updates_of(method, state, world.clients()[-1:])
    after = method.aggregate(state, [update])
    back = method.dispatch(after, world.clients()[-1])
    assert distance(changes(back.adapter, back.merged), changes(update.adapter, state.merged)) < 1e-12


# HetLoRA weighs clients by what they learned, not by their examples; a twin of another name is given other slices to train.
@pytest.mark.parametrize(
    "method", [m for m in TAKE_MIXED if m.name != "hetlora" and not getattr(m, "rotate", False)], ids=label
)
def test_two_clients_that_agree_are_one_with_both_their_examples(method):
    world = World((3, 3, 5))
    state = after_one_round(method, world)
    a, _, c = updates_of(method, state, world.clients())
    twin = replace(a, client="twin", num_examples=4)  # 3 + 4 = 7
    apart, together = [a, twin, c], [replace(a, num_examples=7), c]
    found, expected = (applied(method, method.aggregate(state, u), world) for u in (apart, together))
    assert distance(found, expected) < 1e-12


def test_fedavg_refuses_unequal_ranks_and_names_who_takes_them():
    world = World(MIXED)
    fedavg, state = make("fedavg"), begin(make("fedavg"), world)
    with pytest.raises(MethodError) as error:
        fedavg.aggregate(state, updates_of(fedavg, state, world.clients()))
    says = str(error.value)
    assert "fedavg: expected clients of one rank, got ranks 2, 3, 4, 5, 7 in layer body.conv; give all clients one rank" in says
    assert says.endswith("use a method that takes mixed ranks (see `anyrank methods`)")


def test_a_merge_under_fedavg_names_the_methods_that_take_unequal_ranks():
    world = World(MIXED)
    fedavg = make("fedavg")
    with pytest.raises(MethodError) as error:
        aggregate(updates_of(fedavg, begin(fedavg, world), world.clients()), method="fedavg")
    names = str(error.value).partition("mixed ranks:")[2]
    for able in ("ffa_lora", "flexlora", "raflora", "rbla", "zeropad"):
        assert able in names
    assert "centralized" not in names


def test_local_only_keeps_each_client_apart():
    world = World(MIXED)
    method = make("local-only")
    state = begin(method, world)
    uploads = updates_of(method, state, world.clients()[:2])
    after = method.aggregate(state, uploads)
    assert contents(after.adapter) == contents(state.adapter)
    for client, upload in zip(world.clients()[:2], uploads, strict=True):
        assert contents(method.dispatch(after, client).adapter) == contents(upload.adapter)
        assert contents(method.served(after)[client.name]) == contents(upload.adapter)
    # Who was not there starts from the start.
    idle = world.clients()[4]
    assert contents(method.dispatch(after, idle).adapter) == contents(method.dispatch(state, idle).adapter)


# --- FLoRA, FedEx-LoRA and the mean of products ------------------------------------------------------------------------


@RULES
def test_flora_fedex_and_flexlora_with_room_for_all_hold_the_same_weight(rule):
    """Two clients of rank 2 under a server of rank 4: FlexLoRA cuts nothing off, and the other two never do."""
    world = World((2, 2), rule)
    start = replace(begin(make("flexlora"), World((4, 4), rule)), scaling=world.scaling())
    uploads = updates_of(make("flexlora"), start, world.clients())
    ends = {name: make(name).aggregate(start, uploads) for name in ("flora", "fedex", "flexlora")}
    held = {name: changes(state.adapter, state.merged) for name, state in ends.items()}
    assert distance(held["flora"], held["flexlora"]) < 1e-12
    assert distance(held["fedex"], held["flexlora"]) < 1e-12


def test_fedex_is_fedavg_with_a_remainder():
    world = World(EQUAL)
    fedavg, fedex = second_round(make("fedavg"), world), second_round(make("fedex"), world)
    first = after_one_round(make("fedex"), world)
    assert contents(first.adapter) == contents(after_one_round(make("fedavg"), world).adapter)
    assert fedavg.merged is None
    # The residual sum p_k (B_k - B)(A_k - A) of 4 clients of rank 4 has rank (4 - 1) * 4, and never more than the layer.
    assert first.merged.ranks == {"body.conv": 9, "body.fc": 9}
    assert fedex.merged.ranks == {"body.conv": 9, "body.fc": 9}


def test_flora_starts_anew_from_one_a_for_all_that_no_round_repeats():
    world, method = World(MIXED), make("flora")
    states = [begin(method, world), after_one_round(method, world), second_round(method, world)]
    for state in states:
        for client in world.clients():
            for name, layer in method.dispatch(state, client).adapter.layers.items():
                assert not layer.B.any()
                assert torch.equal(layer.A, state.adapter.layers[name].A[: layer.rank])
    first, second, third = (state.adapter.layers["body.fc"].A for state in states)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


# --- RoLoRA, FedSA-LoRA, FedSVD ------------------------------------------------------------------------------------------


@RULES
def test_rolora_moves_b_then_a_and_each_mean_of_a_factor_is_a_mean_of_products(rule):
    world, method = World(EQUAL, rule), make("rolora")
    state = begin(method, world)
    for moved, still in ("BA", "AB", "BA"):
        downloads = [method.dispatch(state, client) for client in world.clients()]
        assert {download.train for download in downloads} == {frozenset(moved)}
        uploads = [train(d, c, state.round) for d, c in zip(downloads, world.clients(), strict=True)]
        after = method.aggregate(state, uploads)
        for name in SHAPES:
            before, layer = state.adapter.layers[name], after.adapter.layers[name]
            assert torch.equal(getattr(layer, still), getattr(before, still))
            mean_product = sum(n / 10 * u.adapter.layers[name].delta() for n, u in zip(COUNTS, uploads, strict=False))
            torch.testing.assert_close(layer.delta(), mean_product, rtol=0, atol=1e-12)
            assert not torch.equal(getattr(layer, moved), getattr(before, moved))
        state = after


def test_fedsa_shares_a_and_nothing_else():
    world, method = World(MIXED), make("fedsa")
    state = begin(method, world)
    uploads = updates_of(method, state, world.clients()[:3])
    after = method.aggregate(state, uploads)
    assert contents(replace(after.adapter, layers={})) == contents(replace(state.adapter, layers={}))  # the head at its start
    for client, upload in zip(world.clients()[:3], uploads, strict=True):
        download = method.dispatch(after, client)
        for name, layer in download.adapter.layers.items():
            assert torch.equal(layer.B, upload.adapter.layers[name].B)
            assert torch.equal(layer.A, after.adapter.layers[name].A[: layer.rank])
        assert torch.equal(download.adapter.tensors["head.bias"], upload.adapter.tensors["head.bias"])
        assert contents(method.served(after)[client.name]) == contents(download.adapter)
        # float64: only A [rank, in] of both layers, either way
        assert download.upload_bytes() == download.download_bytes() == 8 * client.rank * (18 + 9)
    newcomer = method.dispatch(after, world.clients()[4]).adapter
    assert all(np.abs(value).max() == 0 for value in changes(newcomer).values())
    assert torch.equal(newcomer.tensors["head.bias"], state.adapter.tensors["head.bias"])
    assert set(method.served(state)) == {"start"}


@RULES
@pytest.mark.parametrize("ranks", [EQUAL, MIXED], ids=str)
def test_fedsvds_a_is_orthonormal_in_every_round_and_holds_what_ffa_lora_would(rule, ranks):
    world, method = World(ranks, rule), make("fedsvd")
    state = begin(method, world)
    for _ in range(3):
        uploads = updates_of(method, state, world.clients())
        after = method.aggregate(state, uploads)
        ffa = make("ffa_lora").aggregate(state, uploads)
        assert distance(changes(after.adapter), changes(ffa.adapter)) < 1e-12
        for held in (state, after):
            for layer in held.adapter.layers.values():
                torch.testing.assert_close(layer.A @ layer.A.T, torch.eye(layer.rank, dtype=layer.A.dtype), rtol=0, atol=1e-12)
        state = after


def test_fedsvd_fills_slices_that_nobody_learned_at_right_angles():
    """One client of rank 2 under a server of rank 4: the other two slices are zero, and can be learned."""
    method = make("fedsvd")
    state = method.init(World(EQUAL).start(), World(EQUAL).scaling(), 7)
    client = Client("client-0", 2)
    after = method.aggregate(state, [train(method.dispatch(state, client), client)])
    for layer in after.adapter.layers.values():
        assert not layer.B[:, 2:].any()
        torch.testing.assert_close(layer.A @ layer.A.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


# --- FLoRIST, LoRA-FAIR --------------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("ranks", [EQUAL, MIXED], ids=str)
def test_florist_with_all_the_energy_is_flexlora(rule, ranks):
    flexlora = second_round(make("flexlora"), World(ranks, rule))
    florist = second_round(make("florist", {"energy": 1.0}), World(ranks, rule))
    assert distance(changes(florist.adapter), changes(flexlora.adapter)) < 1e-12


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.9])
def test_florist_keeps_the_fewest_values_that_hold_the_energy(energy):
    world = World((9, 9))
    state = begin(make("florist"), world)
    uploads = updates_of(make("florist"), state, world.clients())
    whole = spectra.spectra(make("florist", {"energy": 1.0}).aggregate(state, uploads).adapter)
    found = spectra.spectra(make("florist", {"energy": energy}).aggregate(state, uploads).adapter)
    for name, values in whole.items():
        kept = int((found[name] > 1e-9).sum())
        share = torch.cumsum(values**2, dim=0) / (values**2).sum()
        assert share[kept - 1] >= energy
        assert kept == 1 or share[kept - 2] < energy


@RULES
def test_lora_fair_with_a_large_penalty_is_rbla_and_otherwise_points_nearer_to_the_mean_of_products(rule):
    def cosine(method: Method, state: ServerState, uploads: list[ClientUpdate]) -> float:
        after = changes(make(method.name, vars(method)).aggregate(state, uploads).adapter)["body.fc"]
        ideal = sum(n / 10 * u.adapter.layers["body.fc"].delta().numpy() for n, u in zip(COUNTS, uploads, strict=False))
        return float((after * ideal).sum() / np.linalg.norm(after) / np.linalg.norm(ideal))

    world = World(EQUAL, rule)
    state = after_one_round(make("rbla"), world)
    uploads = updates_of(make("rbla"), state, world.clients())
    stiff, fair, rbla = make("lora_fair", {"penalty": 1e9}), make("lora_fair"), make("rbla")
    found, expected = (changes(method.aggregate(state, uploads).adapter) for method in (stiff, rbla))
    assert distance(found, expected) < 1e-8
    assert cosine(fair, state, uploads) > cosine(rbla, state, uploads) + 0.01


# --- FFA-LoRA ----------------------------------------------------------------------------------------------------------

INITS = ("kaiming", "orthonormal", "gaussian")


@RULES
@pytest.mark.parametrize("init_a", INITS)
def test_ffa_lora_never_moves_a_and_a_mean_of_b_is_a_mean_of_products(init_a, rule):
    world, method = World(EQUAL, rule), make("ffa_lora", {"init_a": init_a})
    start = begin(method, world)
    before = after_one_round(method, world)
    uploads = updates_of(method, before, world.clients())
    after = method.aggregate(before, uploads)
    for name in SHAPES:
        A_0, layer = start.adapter.layers[name].A, after.adapter.layers[name]
        assert torch.equal(before.adapter.layers[name].A, A_0)
        assert torch.equal(layer.A, A_0)
        p = [n / 10 for n in COUNTS[:4]]
        mean_b = sum(p_k * u.adapter.layers[name].B for p_k, u in zip(p, uploads, strict=True))
        mean_product = sum(p_k * u.adapter.layers[name].delta() for p_k, u in zip(p, uploads, strict=True))
        torch.testing.assert_close(layer.B, mean_b, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.delta(), mean_product, rtol=0, atol=1e-12)


def test_ffa_lora_uploads_rank_times_out_and_sends_no_a():
    world, method = World(EQUAL), make("ffa_lora")
    state = after_one_round(method, world)
    bare = replace(state, adapter=replace(state.adapter, tensors={}))
    download = method.dispatch(bare, world.clients()[0])
    assert download.train == download.send == {"B"}
    # float64, rank 4: 8 bytes * 4 * (9 + 11 outputs)
    assert download.upload_bytes() == download.download_bytes() == 8 * 4 * (9 + 11)


@pytest.mark.parametrize("init_a", INITS)
def test_ffa_lora_gives_all_clients_the_same_first_rows_of_a(init_a):
    world, method = World(MIXED), make("ffa_lora", {"init_a": init_a})
    state = after_one_round(method, world)
    for client in world.clients():
        for name, layer in method.dispatch(state, client).adapter.layers.items():
            assert torch.equal(layer.A, state.adapter.layers[name].A[: layer.rank])


def test_ffa_loras_a_comes_from_the_seed_in_the_form_that_was_chosen():
    A = torch.zeros(40, 500, dtype=torch.float64)
    start = Adapter({"layer": LoraLayer(A, torch.zeros(60, 40, dtype=torch.float64), 1.0)})

    def drawn(init_a: str, seed: int = 0) -> torch.Tensor:
        return make("ffa_lora", {"init_a": init_a}).init(start, Scaling(1.0), seed).adapter.layers["layer"].A

    kaiming, orthonormal, gaussian = map(drawn, INITS)
    assert 0.99 / 500**0.5 < kaiming.abs().max() <= 1 / 500**0.5  # uniform, PEFT's start
    torch.testing.assert_close(orthonormal @ orthonormal.T, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(gaussian.std()) == pytest.approx(1 / 40, rel=0.02)
    assert gaussian.abs().max() > 3.5 / 40  # normal, not uniform
    for init_a in INITS:
        assert torch.equal(drawn(init_a), drawn(init_a))
        assert not torch.equal(drawn(init_a, seed=1), drawn(init_a))


def test_orthonormal_rows_beyond_the_width_of_a_layer_are_refused():
    start = Adapter({"narrow": LoraLayer(torch.zeros(6, 5), torch.zeros(9, 6), 1.0)})
    with pytest.raises(MethodError, match="orthonormal A needs a rank of at most 5 in layer narrow, got 6"):
        make("ffa_lora", {"init_a": "orthonormal"}).init(start, Scaling(1.0), 0)


# --- the collapse law ----------------------------------------------------------------------------------------------------

LEVELS = (4, 4, 8, 8, 16, 16)


def ratios(name: str, rounds: int = 12) -> list[float]:
    """`1 - rho` after each round over that before it: nobody trains, ranks 4 to 16, equal n, one 32 x 32 layer."""
    draw = torch.Generator().manual_seed(0)
    A = torch.randn(16, 32, generator=draw, dtype=torch.float64)
    B = torch.randn(32, 16, generator=draw, dtype=torch.float64)
    scaling, method = Scaling(16.0, "standard"), make(name)
    if name in ("flexlora", "raflora"):  # whose slices are singular directions from the first round on
        U, S, A = torch.linalg.svd(B @ A, full_matrices=False)
        A, B = A[:16], (U * S)[:, :16]
    held = Adapter({"layer": LoraLayer(A, B, 1.0)})
    clients = [Client(f"client-{i}", rank) for i, rank in enumerate(LEVELS)]
    state, beyond = ServerState(0, 0, held, scaling), [spectra.energy_beyond(spectra.spectra(held), 4)]
    for _ in range(rounds):
        state = method.aggregate(state, [ClientUpdate(method.dispatch(state, c).adapter, 1, c.name) for c in clients])
        beyond.append(spectra.energy_beyond(spectra.spectra(state.adapter), 4))
    assert beyond[0] > 0.1  # there was something to lose
    return [after / before for before, after in itertools.pairwise(beyond)]


def test_flexlora_collapses_by_the_square_of_the_coverage_each_round():
    # Slices 5 to 8 have 4 of 6 owners: sigma falls by 2/3 a round, its energy by (2/3)^2 = 0.444. What 2 of 6 own is soon gone.
    assert ratios("flexlora")[-1] == pytest.approx((2 / 3) ** 2, abs=0.01)


@pytest.mark.parametrize("name", ["raflora", "rbla", "ffa_lora"])
def test_stationary_methods_do_not_collapse(name):
    np.testing.assert_allclose(ratios(name), 1.0, atol=1e-6)


def test_zeropad_collapses_by_the_square_in_each_factor():
    # Both factors fall by 2/3 a round: sigma by 4/9, its energy by (4/9)^2 = 0.198, once the rest is gone.
    assert ratios("zeropad", rounds=20)[-1] == pytest.approx((4 / 9) ** 2, abs=0.01)
