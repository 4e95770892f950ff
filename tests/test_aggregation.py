"""Merging adapters without training: from records, from PEFT folders, with whatever scalings they carry."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank import Adapter, ClientUpdate, LoraLayer, aggregate
from anyrank.aggregation import infer_scaling
from anyrank.errors import AdapterError, MethodError
from anyrank.methods import base
from anyrank.records import Scaling, ServerState


def random_adapter(rank: int, seed: int, scaling: float, layers: tuple[str, ...] = ("a.q", "a.v")) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    return Adapter({name: LoraLayer(make(rank, 12), make(10, rank), scaling) for name in layers})


def test_folders_and_records_merge_alike(tmp_path: Path) -> None:
    adapters = [random_adapter(rank, seed, 16 / rank) for seed, rank in enumerate((2, 4, 8))]
    folders = [adapter.save(tmp_path / f"site-{i}") for i, adapter in enumerate(adapters)]
    from_folders = aggregate(folders, method="raflora")
    from_records = aggregate([ClientUpdate(a, 1, f"site-{i}") for i, a in enumerate(adapters)], method="raflora")
    for name in ("a.q", "a.v"):
        assert torch.equal(from_folders.adapter.layers[name].delta(), from_records.adapter.layers[name].delta())


def test_shares_are_the_best_approximation_of_their_rank() -> None:
    """What a client of rank r applies is the top-r part of the dense sum: the residual is what SVD says it must be."""
    updates = [ClientUpdate(random_adapter(rank, rank, 16 / rank), rank, f"c{rank}") for rank in (2, 4, 8)]
    result = aggregate(updates, method="flexlora")
    for name in ("a.q", "a.v"):
        dense = sum(u.num_examples / 14 * u.adapter.layers[name].delta() for u in updates)
        U, S, Vt = torch.linalg.svd(dense)
        for rank in (1, 2, 4, 8):
            best = U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]
            share = result.share(rank).layers[name]
            assert share.scaling == pytest.approx(16 / rank)
            torch.testing.assert_close(share.delta(), best)
        torch.testing.assert_close(result.spectrum()[name], S[:8])


@pytest.mark.parametrize(
    ("scalings", "rule", "at_four"),
    [
        ({2: 8.0, 8: 2.0}, "standard", 4.0),  # alpha 16: 16/2, 16/8 -> 16/4
        ({4: 8.0, 16: 4.0}, "rslora", 8.0),  # alpha 16: 16/sqrt(4), 16/sqrt(16)
        ({2: 2.0, 8: 2.0}, "constant", 2.0),
        ({2: 1.0, 8: 3.0}, "constant", 2.0),  # explained by no rule: the mean, with the product kept right
    ],
)
def test_the_scaling_rule_is_read_off_the_clients(scalings: dict[int, float], rule: str, at_four: float) -> None:
    clients = {f"c{rank}": random_adapter(rank, rank, scaling) for rank, scaling in scalings.items()}
    found = infer_scaling(clients)
    assert (found.rule, found.of("a.q", 4)) == (rule, pytest.approx(at_four))
    updates = [ClientUpdate(adapter, 1, name) for name, adapter in clients.items()]
    dense = sum(adapter.layers["a.q"].delta() for adapter in clients.values()) / 2
    torch.testing.assert_close(
        aggregate(updates, method="flexlora").share(12).layers["a.q"].delta(), rank_part(dense, max(scalings))
    )


def rank_part(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]


def test_previous_fills_the_slices_that_nobody_has() -> None:
    """Three rounds' worth of one rank-4 server; only a rank-2 client came back: slices 3 and 4 stay as they were."""
    previous, small = random_adapter(4, 0, 1.0), random_adapter(2, 1, 1.0)
    merged = aggregate([ClientUpdate(small, 5, "small")], method="rbla", previous=previous)
    layer, held, sent = merged.adapter.layers["a.q"], previous.layers["a.q"], small.layers["a.q"]
    torch.testing.assert_close(layer.delta(), sent.delta() + held.B[:, 2:] @ held.A[2:])


def test_ffa_lora_needs_one_a_for_all() -> None:
    common = random_adapter(4, 0, 2.0)
    half = Adapter({name: LoraLayer(layer.A[:2], layer.B[:, :2] * 3, 2.0) for name, layer in common.layers.items()})
    merged = aggregate([ClientUpdate(common, 1, "a"), ClientUpdate(half, 1, "b")], method="ffa_lora")
    layer = merged.adapter.layers["a.q"]
    assert torch.equal(layer.A, common.layers["a.q"].A)
    torch.testing.assert_close(layer.B[:, :2], 2 * common.layers["a.q"].B[:, :2])  # (1 + 3) / 2
    torch.testing.assert_close(layer.B[:, 2:], common.layers["a.q"].B[:, 2:])  # the one owner's
    with pytest.raises(MethodError, match="needs one A for all clients, but b's A differs in layer a.q"):
        aggregate([ClientUpdate(common, 1, "a"), ClientUpdate(random_adapter(2, 9, 2.0), 1, "b")], method="ffa_lora")


def test_clients_that_do_not_fit_together_are_named() -> None:
    one = ClientUpdate(random_adapter(2, 0, 1.0), 1, "clinic")
    lacking = ClientUpdate(random_adapter(2, 0, 1.0, layers=("a.q",)), 1, "bank")
    with pytest.raises(AdapterError, match=r"layer a.v: clinic has it, bank does not"):
        aggregate([one, lacking], method="rbla")
    other = ClientUpdate(
        Adapter({n: LoraLayer(torch.ones(2, 9).double(), torch.ones(10, 2).double(), 1.0) for n in ("a.q", "a.v")}), 1, "bank"
    )
    with pytest.raises(AdapterError, match=r"layer a.q: clinic has linear \[out, in\] \[10, 12\], bank has linear \[10, 9\]"):
        aggregate([one, other], method="rbla")
    with pytest.raises(AdapterError, match="client clinic is named twice"):
        aggregate([one, one], method="rbla")
    with pytest.raises(AdapterError, match="at least one client"):
        aggregate([], method="rbla")
    with pytest.raises(MethodError, match=r"fedavg: expected clients of one rank, got ranks 2, 4 in layer a.q"):
        aggregate([one, ClientUpdate(random_adapter(4, 0, 1.0), 1, "bank")], method="fedavg")
    with pytest.raises(AdapterError, match="share: expected a rank of at least 1, got 0"):
        aggregate([one], method="rbla").share(0)


def test_unequal_layers_of_one_client_have_their_own_ranks() -> None:
    """Ranks may differ by layer (rank_pattern): each layer's server rank is the largest among its own."""

    def adapter(q: int, v: int) -> Adapter:
        return Adapter({"q": random_adapter(q, 1, 1.0).layers["a.q"], "v": random_adapter(v, 2, 1.0).layers["a.v"]})

    result = aggregate([ClientUpdate(adapter(2, 8), 1, "a"), ClientUpdate(adapter(4, 1), 1, "b")], method="rbla")
    assert result.adapter.ranks == {"q": 4, "v": 8}


# --- averages by blocks, on any device ---------------------------------------------------------------------------------


def parts(ranks: tuple[int, ...], out: int, width: int, device: str = "cpu") -> list[base.Part]:
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw).to(device)  # noqa: E731
    return [base.Part(LoraLayer(make(r, width), make(out, r), 16 / r), 1 + i) for i, r in enumerate(ranks)]


@pytest.mark.parametrize(("out", "width"), [(3, 5), (7000, 9000), (5, 200_000)])
def test_averages_do_not_depend_on_the_blocks_they_are_summed_in(out: int, width: int) -> None:
    """Sides within one block, of several blocks, and a row longer than a block; the sum over owners, written out."""
    sent = parts((2, 12, 5), out, width)
    weights = base.slice_weights(sent, 12)
    A, B = base.average_slices(sent, weights)
    for j in (0, 3, 11):
        owners = [(part, w[j]) for part, w in zip(sent, weights, strict=True) if part.layer.rank > j]
        expected = [sum(w * p.layer.scaling**0.5 * f for p, w, f in rows) for rows in (
            [(p, w, p.layer.A[j].double()) for p, w in owners], [(p, w, p.layer.B[:, j].double()) for p, w in owners]
        )]  # fmt: skip
        torch.testing.assert_close(A[j], expected[0], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(B[:, j], expected[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_averages_are_made_where_the_factors_are(device: str) -> None:
    """Weights are drawn up in main memory: they go to the factors, not the other way."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    sent = parts((2, 4), 6, 7, device)
    largest = sent[1].layer
    state = ServerState(0, 0, Adapter({"layer": largest}), Scaling(16))
    weights = base.slice_weights(sent, 4)
    made = [*base.average_slices(sent, weights, empty=largest), base.mean_a(state, "layer", sent)]
    made += [base.mean_b(state, "layer", sent), base.average_layer(state, "layer", sent, weights).A]
    assert [tuple(tensor.shape) for tensor in made] == [(4, 7), (6, 4), (4, 7), (6, 4), (4, 7)]
    assert {tensor.device.type for tensor in made} == {device}


def test_a_merge_on_a_gpu_is_the_merge_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    updates = [ClientUpdate(random_adapter(rank, rank, 16 / rank), rank, f"c{rank}") for rank in (2, 4, 8)]
    moved = [
        replace(
            u, adapter=Adapter({n: layer.with_factors(layer.A.cuda(), layer.B.cuda()) for n, layer in u.adapter.layers.items()})
        )
        for u in updates
    ]
    for method in ("rbla", "raflora", "flexlora"):
        here, there = aggregate(updates, method), aggregate(moved, method)
        for name in ("a.q", "a.v"):
            assert there.adapter.layers[name].A.is_cuda
            torch.testing.assert_close(here.adapter.layers[name].delta(), there.adapter.layers[name].delta().cpu())


# --- any shapes, ranks, number types, scalings and weights, against the definitions in dense float64 -------------------


@st.composite
def federations(draw: st.DrawFn) -> list[ClientUpdate]:
    """Clients of one layer, mixed in everything that a client chooses for itself."""
    out, width, seed = draw(st.integers(1, 30)), draw(st.integers(1, 30)), draw(st.integers(0, 9999))
    updates = []
    for k in range(draw(st.integers(1, 5))):
        rank, dtype = draw(st.integers(1, 9)), draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        generator = torch.Generator().manual_seed(seed + k)
        A, B = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
        layer = LoraLayer(A.to(dtype), B.to(dtype), draw(st.sampled_from([0.1, 1.0, 16 / rank, 16 / rank**0.5])))
        updates.append(ClientUpdate(Adapter({"layer": layer}), draw(st.integers(1, 1000)), f"client-{k}"))
    return updates


def slices(update: ClientUpdate) -> list[torch.Tensor]:
    layer = update.adapter.layers["layer"]
    return [layer.scaling * torch.outer(layer.B[:, j].double(), layer.A[j].double()) for j in range(layer.rank)]


def defined(updates: list[ClientUpdate], method: str) -> torch.Tensor:
    """`sum_k p_k s_k B_k A_k`, or each slice's mean over its owners."""
    total = sum(update.num_examples for update in updates)
    if method == "flexlora":
        return sum(update.num_examples / total * sum(slices(update)) for update in updates)
    found = 0.0
    for j in range(max(update.adapter.layers["layer"].rank for update in updates)):
        owners = [update for update in updates if update.adapter.layers["layer"].rank > j]
        examples = sum(update.num_examples for update in owners)
        found = found + sum(update.num_examples / examples * slices(update)[j] for update in owners)
    return found


@settings(max_examples=60)
@given(federations(), st.sampled_from(["flexlora", "raflora"]), st.sampled_from(["auto", "qr", "gram"]), st.integers(1, 12))
def test_shares_are_the_truncated_definition(updates: list[ClientUpdate], method: str, algebra: str, rank: int) -> None:
    """Its distance to the definition is that of the best approximation of its rank, to the rounding of the widest type."""
    result = aggregate(updates, method, algebra=algebra)
    M, share = defined(updates, method), result.share(rank).layers["layer"]
    size = sum(float(part.norm()) for update in updates for part in slices(update))
    largest = max(update.adapter.layers["layer"].rank for update in updates)
    left_out = float(torch.linalg.svdvals(M)[min(rank, largest) :].norm())
    dtype = functools.reduce(torch.promote_types, [update.adapter.layers["layer"].A.dtype for update in updates])
    assert share.A.dtype == dtype
    assert share.rank == rank
    exact = LoraLayer(share.A.double(), share.B.double(), share.scaling).delta()
    assert float((M - exact).norm()) <= left_out + 30 * torch.finfo(dtype).eps * size
    assert set(result.work.paths) <= {algebra} or algebra == "auto" or result.work.paths == {"qr": 1}


def test_the_spectrum_counts_what_went_into_the_base_model() -> None:
    """FLoRA's own adapter starts anew, at zero: its update is all in the base, and is the mean of the products."""
    updates = [ClientUpdate(random_adapter(rank, rank, 1.0), 1, f"c{rank}") for rank in (2, 4)]
    dense = sum(update.adapter.layers["a.q"].delta() for update in updates) / 2
    found = aggregate(updates, method="flora").spectrum()["a.q"]
    torch.testing.assert_close(found[:6], torch.linalg.svdvals(dense)[:6])
