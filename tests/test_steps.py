"""The geometry of steps: against dense matrices of a wider number type, in any gauge, in bounded memory, for any length."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import Client, ClientUpdate, Download, Job, Scaling, ServerState
from anyrank.robust import steps
from anyrank.robust.geometric_median import GeometricMedian
from anyrank.robust.krum import Krum, scores
from anyrank.robust.norm_bound import Lengths, NormBound, measure, shortened
from anyrank.robust.steps import along, finite, gram, norm, norms

SHAPES = {"first": (7, 5), "second": (4, 6)}
STATE = ServerState(0, 0, Adapter({}), Scaling(1.0, "constant"))
SEEDS = st.integers(0, 10_000)


def adapter(rank: int, seed: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: (size * torch.randn(*shape, generator=draw, dtype=torch.float64)).to(dtype)  # noqa: E731
    layers = {name: LoraLayer(normal(rank, width), normal(out, rank), 0.7) for name, (out, width) in SHAPES.items()}
    return Adapter(layers, {"head": normal(3)})


def plus(start: Adapter, change: Adapter) -> Adapter:
    layers = {
        name: layer.with_factors(layer.A + change.layers[name].A, layer.B + change.layers[name].B)
        for name, layer in start.layers.items()
    }
    return Adapter(layers, {name: tensor + change.tensors[name] for name, tensor in start.tensors.items()})


def pair(start: Adapter, end: Adapter, name: str = "c", examples: int = 1) -> tuple[Job, ClientUpdate]:
    slices = {layer: tuple(range(start.layers[layer].rank)) for layer in start.layers}
    job = Job(Client(name, start.layers["first"].rank), examples, lambda: Download(start, slices))
    return job, ClientUpdate(end, examples, name)


def cohort(sizes, ranks, dtype=torch.float64) -> tuple[list[Job], list[ClientUpdate]]:
    pairs = []
    for k, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
        start = adapter(rank, 1000 + k, dtype)
        pairs.append(pair(start, plus(start, adapter(rank, k, dtype, size)), f"c{k}", k + 1))
    return [job for job, _ in pairs], [update for _, update in pairs]


def wide(start: Adapter, end: Adapter) -> float:
    """The norm of the step from its dense matrices, in NumPy's widest floating type."""
    total = np.longdouble(0)
    for name, before in start.layers.items():
        after = end.layers[name]
        B, A, B1, A1 = (each.double().numpy().astype(np.longdouble) for each in (before.B, before.A, after.B, after.A))
        step = np.longdouble(after.scaling) * (B1 @ A1) - np.longdouble(before.scaling) * (B @ A)
        total += (step * step).sum()
    for name, tensor in start.tensors.items():
        step = end.tensors[name].double().numpy().astype(np.longdouble) - tensor.double().numpy().astype(np.longdouble)
        total += (step * step).sum()
    return float(np.sqrt(total))


# --- norms -----------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 5), st.floats(-9, 9), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_a_step_of_any_size_has_the_norm_of_its_dense_matrix(seed: int, rank: int, power: float, dtype: torch.dtype) -> None:
    """Down to a billionth of the factors, where `|B'A'|^2 - |BA|^2` would have no digits left."""
    start = adapter(rank, seed, dtype)
    job, update = pair(start, plus(start, adapter(rank, seed + 1, dtype, 10**power)))
    assert float(norms([job], [update])[0]) == pytest.approx(wide(start, update.adapter), rel=1e-6)


def test_a_norm_by_hand() -> None:
    """B A goes from (1, 2)^T (3, 0) = ((3, 0), (6, 0)) to (1, 2)^T (3, 1): the step is 2 ((0, 1), (0, 2)), of norm 2 sqrt(5);
    with a head that goes from 1 to 5, sqrt(20 + 16) = 6."""
    one = lambda *row: torch.tensor([row])  # noqa: E731
    start = Adapter({"a": LoraLayer(one(3.0, 0.0), one(1.0, 2.0).T, 2.0)}, {"head": torch.tensor([1.0])})
    end = Adapter({"a": LoraLayer(one(3.0, 1.0), one(1.0, 2.0).T, 2.0)}, {"head": torch.tensor([5.0])})
    assert norm(Download(start, {"a": (0,)}), end) == pytest.approx(6.0, rel=1e-12)


@given(SEEDS, st.floats(-6, 6), st.booleans())
def test_a_step_has_one_norm_however_its_end_is_written(seed: int, power: float, back: bool) -> None:
    """`(B G, G^-1 A)`: slices multiplied and divided by up to a million (powers of two, which are exact), and mixed."""
    start = adapter(4, seed)
    end = plus(start, adapter(4, seed + 1, size=1e-3))
    g = 2.0 ** round(power * math.log2(10))
    G = torch.diag(torch.tensor([g, 1 / g, 1.0, g], dtype=torch.float64))[:, [2, 0, 3, 1] if back else [0, 1, 2, 3]]
    layers = {name: layer.with_factors(torch.linalg.inv(G) @ layer.A, layer.B @ G) for name, layer in end.layers.items()}
    download = Download(start, {})
    expected = norm(download, end)
    tolerance = 1e-6 if not back else 1e-3  # a slice in the place of another is no small change of it any more
    assert norm(download, replace(end, layers=layers)) == pytest.approx(expected, rel=tolerance)


@given(SEEDS, st.floats(0, 6))
def test_no_step_stays_none_when_it_is_written_otherwise(seed: int, power: float) -> None:
    start = adapter(3, seed)
    g = 10**power
    layers = {name: layer.with_factors(layer.A / g, layer.B * g) for name, layer in start.layers.items()}
    size = wide(replace(start, layers={name: layer.with_factors(0 * layer.A, layer.B) for name, layer in start.layers.items()}),
                start)  # fmt: skip
    assert norm(Download(start, {}), replace(start, layers=layers)) <= 1e-7 * size
    assert norm(Download(start, {}), start) == 0.0


def pruned(adapter: Adapter, rank: int) -> Adapter:
    layers = {name: layer.with_factors(layer.A[:rank], layer.B[:, :rank]) for name, layer in adapter.layers.items()}
    return replace(adapter, layers=layers)


@given(SEEDS, st.integers(1, 4), st.floats(0, 1), st.floats(-3, 3))
def test_the_way_to_an_upload_is_the_polynomial(seed: int, rank: int, share: float, power: float) -> None:
    """At any share of the way, for an upload of the download's rank and for one that was pruned."""
    start = adapter(4, seed)
    end = pruned(plus(start, adapter(4, seed + 1, size=10**power)), rank)
    download = Download(start, {})
    layers = {}
    for name, after in end.layers.items():
        A, B = start.layers[name].A[:rank], start.layers[name].B[:, :rank]
        layers[name] = after.with_factors(A + share * (after.A - A), B + share * (after.B - B))
    head = start.tensors["head"]
    point = Adapter(layers, {"head": head + share * (end.tensors["head"] - head)})
    found = sum(c * share**i for i, c in enumerate(along(download, end)))
    # The pruned point in full rank, as `wide` needs it: the dropped slices are zero.
    padded = {
        name: start.layers[name].with_factors(
            torch.cat([layer.A, torch.zeros(4 - rank, layer.A.shape[1], dtype=torch.float64)]),
            torch.cat([layer.B, torch.zeros(layer.B.shape[0], 4 - rank, dtype=torch.float64)], dim=1),
        )
        for name, layer in layers.items()
    }
    assert math.sqrt(max(found, 0.0)) == pytest.approx(wide(start, replace(point, layers=padded)), rel=1e-6, abs=1e-6)
    assert norm(download, point) == pytest.approx(wide(start, replace(point, layers=padded)), rel=1e-9, abs=1e-12)


# --- the Gram matrix -------------------------------------------------------------------------------------------------


def vectors(jobs: list[Job], updates: list[ClientUpdate]) -> torch.Tensor:
    rows = []
    for job, update in zip(jobs, updates, strict=True):
        before, after = job.download.adapter, update.adapter
        moved = [(after.layers[name].delta() - before.layers[name].delta()).flatten() for name in SHAPES]
        rows.append(torch.cat([*moved, after.tensors["head"] - before.tensors["head"]]))
    return torch.stack(rows)


@pytest.mark.parametrize("limit", ["_COLUMNS", "_DOWNLOADS", "_NUMBERS", "none"])
@pytest.mark.parametrize("value", [1, 7, 20, 1000])
def test_blocks_and_parts_of_any_size_give_the_same_matrix(limit: str, value: int, monkeypatch) -> None:
    if limit != "none":
        monkeypatch.setattr(steps, limit, value)
    jobs, updates = cohort((0.1, 1.0, 3.0, 0.5, 1e-3, 1.0, 0.2), (1, 5, 3, 2, 4, 4, 1))
    dense = vectors(jobs, updates)
    torch.testing.assert_close(gram(jobs, updates), dense @ dense.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(norms(jobs, updates), dense.norm(dim=1), rtol=1e-9, atol=0)


def test_of_a_cohort_only_two_blocks_of_downloads_are_held(monkeypatch) -> None:
    """And none after: the downloads of fifty clients with large models need more memory than there is."""
    made: list[weakref.ref] = []
    most = 0
    jobs, updates = cohort([0.1] * 12, [2] * 12)
    monkeypatch.setattr(steps, "_COLUMNS", 3 * 2 * 2)  # three clients of rank 2 a block

    def make(start: Download) -> Download:
        nonlocal most
        fresh = replace(start)
        made.append(weakref.ref(fresh))
        most = max(most, sum(ref() is not None for ref in made))
        return fresh

    own = [Job(job.client, 1, lambda start=job.download: make(start)) for job in jobs]
    expected = gram(jobs, updates)
    torch.testing.assert_close(gram(own, updates), expected)
    assert most == 6
    assert not any(ref() is not None for ref in made)
    most = 0
    norms(own, updates)
    assert most == 1


# --- steps of any size -----------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(0.1, 14), st.sampled_from([torch.float64, torch.float32]), st.integers(1, 4))
def test_a_long_step_is_cut_at_the_bound_as_it_is_stored(seed: int, power: float, dtype: torch.dtype, rank: int) -> None:
    """Up to 10^14 times longer: never above the bound, and within a thousandth of it."""
    start = adapter(rank, seed, dtype)
    job, update = pair(start, plus(start, adapter(rank, seed + 1, dtype, 10**power)))
    bound = 0.05 * min(1.0, norm(job.download, update.adapter))
    cut, share = shortened(job, update, measure(job.download, update.adapter), Lengths(bound, math.inf))
    assert 0.999 * bound < norm(job.download, cut.adapter) <= bound
    assert 0 < share < 1
    assert cut.adapter.layers["first"].A.dtype == dtype


@given(SEEDS, st.floats(0.1, 12), st.integers(1, 4))
def test_a_long_change_of_factors_is_cut_in_their_own_units(seed: int, power: float, rank: int) -> None:
    """`(g B, A / g)` is the same product, so that no step is long; a mean of factors would be moved by it all the same."""
    start = adapter(rank, seed, torch.float64)
    layer = start.layers["first"]
    gauged = replace(start, layers=dict(start.layers, first=layer.with_factors(layer.A / 10**power, layer.B * 10**power)))
    job, update = pair(start, gauged)
    lengths = measure(job.download, update.adapter)
    assert lengths.step < 1e-6 * lengths.change
    bounds = Lengths(math.inf, 0.1 * lengths.change)
    cut, share = shortened(job, update, lengths, bounds)
    assert share == pytest.approx(0.1, rel=1e-6)
    assert 0.999 * bounds.change < measure(job.download, cut.adapter).change <= bounds.change


def test_what_stays_with_a_client_is_neither_measured_nor_moved() -> None:
    """B and the head are the client's own: only the change of A counts, and is shortened."""
    jobs, updates = cohort((0.1, 0.1, 0.1, 50.0), (3, 3, 3, 3), torch.float64)
    own = [
        Job(job.client, job.num_examples, partial(replace, job.download, private=frozenset({"B", "tensors"}))) for job in jobs
    ]
    kept = NormBound(3.0).screen(STATE, own, updates)
    assert list(kept.shortened) == [updates[3].client]
    before, after, cut = (each.adapter for each in (own[3].download, updates[3], kept.updates[3]))
    for name, layer in cut.layers.items():
        assert torch.equal(layer.B, after.layers[name].B)
        moved, whole = layer.A - before.layers[name].A, after.layers[name].A - before.layers[name].A
        torch.testing.assert_close(moved, kept.shortened[updates[3].client] * whole)
    assert torch.equal(cut.tensors["head"], after.tensors["head"])
    assert kept.updates[:3] == updates[:3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_where_nobody_else_moved_a_step_does_not_count(dtype: torch.dtype) -> None:
    """The bound is three times nothing: the download itself is left, bit by bit."""
    jobs, updates = cohort((0.0, 0.0, 0.0, 1.0), (3, 3, 3, 3), dtype)
    kept = NormBound(3.0).screen(STATE, jobs, updates).updates
    for name, layer in jobs[3].download.adapter.layers.items():
        assert torch.equal(kept[3].adapter.layers[name].A, layer.A)
        assert torch.equal(kept[3].adapter.layers[name].B, layer.B)


RULES = [NormBound(3.0), GeometricMedian(), Krum(1, keep=1), Krum(1)]


def whole(updates) -> bool:
    """Whether all numbers are finite."""
    tensors = [t for u in updates for layer in u.adapter.layers.values() for t in (layer.A, layer.B)]
    return all(bool(torch.isfinite(t).all()) for t in [*tensors, *(u.adapter.tensors["head"] for u in updates)])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("count", [5, 6])
def test_where_nobody_trained_nobody_is_the_outlier(rule, count: int) -> None:
    """All steps are zero, and so are all distances: nothing is divided by them, and ties go by names."""
    jobs, updates = cohort([0.0] * count, [2] * count)
    kept = rule.screen(STATE, jobs, updates)
    assert whole(kept.updates)
    if isinstance(rule, Krum):
        assert [update.client for update in kept.updates] == [f"c{k}" for k in range(rule.keep or count - 1)]
    else:
        assert len(kept.updates) == count
        assert not kept.refused
    weights = [update.num_examples / sum(each.num_examples for each in kept.updates) for update in kept.updates]
    if isinstance(rule, GeometricMedian):
        assert weights == pytest.approx([(k + 1) / sum(range(1, count + 1)) for k in range(count)], rel=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equal_uploads_are_no_outliers_either(rule) -> None:
    start = adapter(2, 0)
    end = plus(start, adapter(2, 1, size=0.3))
    pairs = [pair(start, end, f"c{k}") for k in range(5)]  # 2 x 1 + 3: the fewest that krum takes
    jobs, updates = [job for job, _ in pairs], [update for _, update in pairs]
    kept = rule.screen(STATE, jobs, updates)
    assert len(kept.updates) == (rule.keep or 4 if isinstance(rule, Krum) else 5)
    assert len({update.num_examples for update in kept.updates}) == 1
    assert all(update.adapter is end for update in kept.updates)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("size", [1e15, 1e100, 1e200])
@pytest.mark.parametrize("where", ["B", "tensors"])
def test_a_step_of_any_length_that_the_guard_lets_in_is_cut_or_refused(rule, size: float, where: str) -> None:
    """In float64 its square may be no number any more; in each case no other client's update changes."""
    jobs, updates = cohort([0.1] * 6, [2] * 6)
    loud = updates[2].adapter
    layers = {name: layer.with_factors(layer.A, layer.B * size) for name, layer in loud.layers.items()}
    loud = replace(loud, layers=layers) if where == "B" else replace(loud, tensors={"head": loud.tensors["head"] * size})
    hostile = [*updates[:2], replace(updates[2], adapter=loud), *updates[3:]]
    kept = rule.screen(STATE, jobs, hostile)
    assert whole(kept.updates)
    by_name = {update.client: update for update in kept.updates}
    if isinstance(rule, NormBound):
        assert norm(jobs[2].download, by_name["c2"].adapter) <= 3 * sorted(norms(jobs, hostile).tolist())[3]
    elif isinstance(rule, GeometricMedian):
        share = by_name["c2"].num_examples / sum(u.num_examples for u in kept.updates) if "c2" in by_name else 0.0
        assert share * size < 100.0  # its pull on the mean is that of any other
    else:
        assert "c2" not in by_name
    for k in (0, 1, 3, 4, 5):
        assert f"c{k}" in by_name or isinstance(rule, Krum)
        assert f"c{k}" not in by_name or by_name[f"c{k}"].adapter is updates[k].adapter


def test_a_distance_that_is_no_number_is_the_largest() -> None:
    """Steps 0, 1 and one whose square is infinite: of two neighbours, each has that one, whose own distances are infinite."""
    products = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, math.inf], [0.0, math.inf, math.inf]], dtype=torch.float64)
    assert finite(products) == [0, 1]
    assert scores(products, nearest=1).tolist() == [1.0, 1.0, math.inf]
    assert scores(products, nearest=2).tolist() == [math.inf, math.inf, math.inf]


def test_where_no_step_can_be_measured_nothing_is_left() -> None:
    jobs, updates = cohort([0.1] * 5, [2] * 5)
    huge = [replace(u, adapter=replace(u.adapter, tensors={"head": u.adapter.tensors["head"] * 1e200})) for u in updates]
    for rule in (GeometricMedian(), Krum(1)):
        kept = rule.screen(STATE, jobs, huge)
        assert not kept.updates
        assert sorted(kept.refused) == [f"c{k}" for k in range(5)]


@pytest.mark.parametrize("rule", [GeometricMedian(), Krum(1)], ids=str)
@given(order=st.permutations(range(6)))
def test_bits_do_not_depend_on_who_answers_first(rule, order) -> None:
    jobs, updates = cohort([0.1, 0.3, 0.1, 5.0, 0.1, 0.2], [2, 3, 1, 4, 2, 2])
    one, other = rule.screen(STATE, jobs, updates), rule.screen(STATE, jobs, [updates[k] for k in order])
    assert {u.client: u.num_examples for u in one.updates} == {u.client: u.num_examples for u in other.updates}
    assert one.refused == other.refused


def test_doubles_in_the_geometric_median_count_twice() -> None:
    """On a line, 0 twice and 1 once: the median is 0."""
    start = adapter(1, 0)
    at = lambda x: replace(start, tensors={"head": start.tensors["head"] + torch.tensor([x, 0, 0])})  # noqa: E731
    pairs = [pair(start, at(x), f"c{k}") for k, x in enumerate((1.0, 0.0, 0.0))]
    kept = GeometricMedian().screen(STATE, [job for job, _ in pairs], [update for _, update in pairs]).updates
    weights = {update.client: update.num_examples for update in kept}
    assert weights.get("c0", 0) / sum(weights.values()) < 1e-6
    assert weights["c1"] == weights["c2"]
