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
from anyrank.aggregation import aggregates as aggregation
from anyrank.aggregation import merge
from anyrank.aggregation.aggregates import aggregate_folders
from anyrank.aggregation.merge import infer_scaling
from anyrank.algebra import names
from anyrank.errors import AdapterError, AnyRankError, MethodError
from anyrank.messages.records import Scaling, ServerState
from anyrank.methods.averages import average_layer, average_slices, mean_a, mean_b
from anyrank.methods.parts import Part, slice_weights


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
    with pytest.raises(AdapterError, match="client clinic occurs twice"):
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


def parts(ranks: tuple[int, ...], out: int, width: int, device: str = "cpu") -> list[Part]:
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw).to(device)  # noqa: E731
    return [Part(LoraLayer(make(r, width), make(out, r), 16 / r), 1 + i) for i, r in enumerate(ranks)]


@pytest.mark.parametrize(("out", "width"), [(3, 5), (7000, 9000), (5, 200_000)])
def test_averages_do_not_depend_on_the_blocks_they_are_summed_in(out: int, width: int) -> None:
    """Sides within one block, of several blocks, and a row longer than a block; the sum over owners, written out."""
    sent = parts((2, 12, 5), out, width)
    weights = slice_weights(sent, 12)
    A, B = average_slices(sent, weights)
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
    weights = slice_weights(sent, 4)
    made = [*average_slices(sent, weights, empty=largest), mean_a(state, "layer", sent)]
    made += [mean_b(state, "layer", sent), average_layer(state, "layer", sent, weights).A]
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


# --- many layers side by side ----------------------------------------------------------------------------------------


def clients_of_many_layers(count: int = 3) -> list[Adapter]:
    """Five layers of one shape and one of another, float32; nobody learned anything in the second."""
    found = []
    for i in range(count):
        draw = torch.Generator().manual_seed(i)
        layers = {}
        for name in ("a", "b", "c", "d", "e", "wide"):
            rank, width = 2 * 2**i, 60 if name == "wide" else 40
            B = torch.randn(50, rank, generator=draw)
            layers[name] = LoraLayer(torch.randn(rank, width, generator=draw), 0 * B if name == "b" else B, 16 / rank)
        found.append(Adapter(layers))
    return found


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch):
    """Layers in batches, as on a GPU, of `batch_bytes`, here on the CPU."""

    def force(batch_bytes: int) -> None:
        monkeypatch.setattr(aggregation, "_place", lambda device: (torch.device("cpu"), batch_bytes))

    return force


@pytest.mark.parametrize("method", ["flexlora", "raflora", "stayput", "florist", "fedex", "flora", "rbla"])
@pytest.mark.parametrize("algebra", ["auto", "gram"])
def test_layers_side_by_side_merge_as_one_by_one(method: str, algebra: str, side_by_side) -> None:
    adapters = clients_of_many_layers()
    adapters = [adapters[1]] * 3 if method == "fedex" else adapters
    updates = [ClientUpdate(adapter, i + 1, f"c{i}") for i, adapter in enumerate(adapters)]
    one_by_one = aggregate(updates, method=method, algebra=algebra)
    side_by_side(1 << 30)
    together = aggregate(updates, method=method, algebra=algebra)
    assert together.work.paths == one_by_one.work.paths
    for name, layer in one_by_one.adapter.layers.items():
        expected, found = layer.delta(), together.adapter.layers[name].delta()
        assert float((found - expected).norm()) <= 1e-6 * max(1.0, float(expected.norm())), name
    for name, layer in (one_by_one.base_update.layers if one_by_one.base_update else {}).items():
        torch.testing.assert_close(together.base_update.layers[name].delta(), layer.delta())


def test_folders_are_filled_in_the_same_order_whatever_is_side_by_side(tmp_path: Path, side_by_side) -> None:
    """The files' headers, with the place of every tensor, are equal byte for byte."""
    folders = [adapter.save(tmp_path / f"site-{i}") for i, adapter in enumerate(clients_of_many_layers())]
    written = {}
    for batch_bytes in (0, 30_000, 1 << 30):
        side_by_side(batch_bytes)
        steps = []
        out = tmp_path / f"out-{batch_bytes}"
        aggregate_folders(folders, "raflora", out, ranks=[2], progress=lambda *step, steps=steps: steps.append(step))
        assert steps == [(done, 6) for done in range(1, 7)]
        weights = [out / folder / "adapter_model.safetensors" for folder in ("global", "rank-2")]
        written[batch_bytes] = [file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")] for file in weights]
    assert written[0] == written[30_000] == written[1 << 30]


@pytest.mark.parametrize(("batch_bytes", "sizes"), [(0, [1] * 6), (11_000, [2, 2, 1, 1]), (1 << 30, [6])])
def test_a_batch_holds_no_more_than_its_bytes_or_one_layer(batch_bytes: int, sizes: list[int]) -> None:
    """A client of rank 2 holds 2 x (50 + 40) float32 numbers of a layer, ranks 2, 4 and 8 together 5040 bytes."""
    updates = [ClientUpdate(adapter, 1, f"c{i}") for i, adapter in enumerate(clients_of_many_layers())]
    planned = merge.prepare(updates, "raflora", None, 0, None, False, {})
    batches = list(planned.batches(batch_bytes))
    assert [name for batch in batches for name in batch] == ["a", "b", "c", "d", "e", "wide"]
    assert [len(batch) for batch in batches] == sizes


def test_a_number_that_is_none_is_laid_at_its_clients_door_in_a_batch_too(tmp_path: Path, side_by_side) -> None:
    adapters = clients_of_many_layers()
    adapters[1].layers["d"].B[3, 1] = float("nan")
    folders = [adapter.save(tmp_path / f"site-{i}") for i, adapter in enumerate(adapters)]
    side_by_side(1 << 30)
    for method in ("raflora", "rbla"):
        with pytest.raises(AdapterError, match="site-1.*d"):
            aggregate(folders, method=method)


def test_the_cpu_by_name_is_the_default_byte_for_byte() -> None:
    updates = [ClientUpdate(adapter, i + 1, f"c{i}") for i, adapter in enumerate(clients_of_many_layers())]
    default, named = aggregate(updates, method="raflora"), aggregate(updates, method="raflora", device="cpu")
    for name, layer in default.adapter.layers.items():
        assert torch.equal(layer.A, named.adapter.layers[name].A)
        assert torch.equal(layer.B, named.adapter.layers[name].B)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_one_line() -> None:
    updates = [ClientUpdate(adapter, 1, f"c{i}") for i, adapter in enumerate(clients_of_many_layers())]
    with pytest.raises(AnyRankError, match="device = 'cuda': torch .* sees no such device; .* set device to 'cpu' or 'auto'"):
        aggregate(updates, method="raflora", device="cuda")
    assert torch.equal(
        aggregate(updates, method="raflora", device="auto").adapter.layers["a"].A,
        aggregate(updates, method="raflora").adapter.layers["a"].A,
    )


@pytest.mark.parametrize(("device", "answer"), [("cudda", "did you mean 'cuda'"), ("mps", "known: auto, cpu, cuda")])
def test_a_device_that_merges_cannot_use_is_one_line(device: str, answer: str) -> None:
    updates = [ClientUpdate(adapter, 1, f"c{i}") for i, adapter in enumerate(clients_of_many_layers())]
    with pytest.raises(MethodError, match=f"device '{device}': expected one that merges can use; {answer}"):
        aggregate(updates, method="raflora", device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")
@pytest.mark.parametrize("algebra", names.ALGEBRAS)
def test_a_gpu_merges_as_the_cpu_does(algebra: str) -> None:
    updates = [ClientUpdate(adapter, i + 1, f"c{i}") for i, adapter in enumerate(clients_of_many_layers())]
    here, there = (aggregate(updates, method="raflora", algebra=algebra, device=device) for device in ("cpu", "cuda"))
    for name, layer in here.adapter.layers.items():
        found = there.adapter.layers[name]
        assert found.A.device.type == "cpu"
        assert float((found.delta() - layer.delta()).norm()) <= 3e-6 * max(1.0, float(layer.delta().norm()))
