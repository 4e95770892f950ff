"""The fast ways to singular values against the dense ones: what float32 can hold, an honest error, singular cases included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anyrank.algebra import lowrank, names, subspace
from anyrank.algebra.lowrank import Product, Term
from anyrank.errors import MethodError

NARROW = [torch.float32, torch.float16, torch.bfloat16]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(product: Product) -> Tensor:
    return product.left @ product.right


def size(product: Product) -> float:
    """What rounding is measured against: the norms of the slices, as if they stood at right angles."""
    return float((product.left.norm(dim=0) * product.right.norm(dim=1)).norm())


def best(M: Tensor, rank: int) -> Tensor:
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vt[:rank]


def rounding(M: Tensor, rank: int, slices: int) -> float:
    """How far float32 leaves a truncation of M to `rank` from the exact one, as a norm: `sqrt(2 n) u |M|` times a condition.

    Each number of U S and of Vt is a sum of n = `slices` products. Its n roundings of at most u = eps / 2 are independent, so
    that they add up as their squares do; that is the distance E to M of the matrix that is truncated. Cut between values
    that are alike, the truncation turns: E's entry for the vectors i <= rank < j is magnified by `s_i / (s_i - s_j)`. What E's
    entries are magnified by, as the root of the mean square, is the condition.
    """
    s = torch.linalg.svdvals(M)
    turned = s[:rank, None] / (s[:rank, None] - s[rank:])
    condition = (rank**2 + 2 * float((turned**2).sum())) / (rank**2 + 2 * turned.numel())
    return math.sqrt(2 * slices * condition) * torch.finfo(torch.float32).eps / 2 * float(M.norm())


def solve(product: Product, rank: int, algebra: str) -> tuple[Tensor, lowrank.SVD, lowrank.Work]:
    with lowrank.using(algebra) as work:
        found = lowrank.svd(product, rank)
    return found.U.double() * found.S.double() @ found.Vt.double(), found, work


def federation(ranks: list[int], side: int, seed: int = 0, start: float = 0.3, dtype: torch.dtype = torch.float32) -> Product:
    """Clients with a common start of A and a common signal in B, each `start` away from it."""
    A0, B0 = (
        draw(seed, max(ranks), side) / side**0.5,
        draw(seed + 1, side, max(ranks)) * torch.arange(1, max(ranks) + 1) ** -0.7,
    )
    terms = []
    for k, rank in enumerate(ranks):
        A = A0[:rank] + start * draw(seed + 10 + k, rank, side) / side**0.5
        B = B0[:, :rank] + start * draw(seed + 90 + k, side, rank)
        terms.append(Term(B.to(dtype), torch.full((rank,), 1 / rank, dtype=torch.float64), A.to(dtype)))
    return Product.of(terms)


products = st.builds(
    lambda seed, parts, out, width, dtype, low: Product.of(
        [
            Term(
                (draw(seed + i, out, n) * 10.0 ** torch.linspace(low, 0, n)).to(dtype),
                draw(seed + 50 + i, n).double().abs() + 0.01,
                draw(seed + 90 + i, n, width).to(dtype),
            )
            for i, n in enumerate(parts)
        ]
    ),
    seed=st.integers(0, 10_000),
    parts=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    out=st.integers(1, 40),
    width=st.integers(1, 40),
    dtype=st.sampled_from(NARROW),
    low=st.sampled_from([0, -3]),
)


@given(products, st.integers(1, 20))
def test_the_gram_way_is_the_dense_truncation_to_single_precision(product: Product, rank: int) -> None:
    """Cut where neighbouring values are alike, the product may turn between them: its distance to M is then what counts."""
    found, svd, work = solve(product, rank, "gram")
    M, kept = dense(product), min(rank, *product.shape, product.slices)
    values = torch.linalg.svdvals(M)
    assert svd.U.dtype == torch.float32
    assert (svd.S.diff() <= 0).all()
    padded = torch.nn.functional.pad(svd.S.double(), (0, kept - len(svd.S)))
    assert (padded - values[:kept]).abs().max() <= 4e-6 * size(product)
    left_out = float(values[kept:].norm())
    assert float((M - found).norm()) <= left_out + 4e-6 * size(product)
    assert work.error < 1e-3 or len(svd.S) < kept


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("start", [1.0, 0.3, 1e-2, 1e-4])
def test_the_gram_way_is_within_rounding(dtype: torch.dtype, start: float, monkeypatch) -> None:
    """By itself: what would mend a wrong result, at twice the cost, is not called."""
    monkeypatch.setattr(subspace, "ritz", None)
    product = federation([4, 8, 16, 32] * 3, 300, start=start, dtype=dtype)
    found, _, work = solve(product, 32, "gram")
    M = dense(product)
    bound = rounding(M, 32, product.slices)
    assert float((found - best(M, 32)).norm()) < bound
    assert bound < 2e-6 * float(M.norm()), "what it would let through is small"
    assert work.paths == {"gram": 1}
    assert 1e-9 < work.error < subspace.tolerance(torch.float32)


def test_float64_factors_take_the_exact_way_unless_told() -> None:
    product = federation([4, 8, 16, 32] * 3, 300, dtype=torch.float64)
    M = dense(product)
    for algebra, path, bound in (("auto", "qr", 1e-13), ("gram", "gram", 1e-11)):
        found, svd, work = solve(product, 32, algebra)
        assert work.paths == {path: 1}
        assert svd.U.dtype == torch.float64
        assert float((found - best(M, 32)).norm() / M.norm()) < bound


@pytest.mark.parametrize("start", [1.0, 0.3])
def test_the_randomized_way_says_how_far_it_is(start: float) -> None:
    product = federation([4, 8, 16] * 20, 500, start=start)
    found, _, work = solve(product, 16, "randomized")
    M = dense(product)
    deviation = float((found - best(M, 16)).norm() / M.norm())
    assert work.paths == {"randomized": 1}
    assert deviation < 2e-5
    assert work.error < subspace.tolerance(torch.float32)


def test_an_error_that_is_large_is_stated() -> None:
    """A flat spectrum and room for few blocks: the residual is measured, not assumed."""
    product = Product(draw(0, 120, 100), draw(1, 100, 120))
    _, svd, work = solve(product, 40, "randomized")
    M = dense(product)
    true = float((M @ svd.Vt.double().T - svd.U.double() * svd.S.double()).norm() / svd.S.double().norm())
    assert true > 1e-3
    assert true / 3 < work.error < 3 * true


SINGULAR = {
    "B zero": lambda p: Product.of([t._replace(left=torch.zeros_like(t.left)) for t in p.terms]),
    "identical clients": lambda p: Product.of([p.terms[0]] * 4),
    "cancellation": lambda p: lowrank.difference(p, p),
    "one client left": lambda p: lowrank.difference(p, Product.of(p.terms[1:])),
    "weights zero": lambda p: Product.of([t._replace(weights=0 * t.weights) for t in p.terms]),
    "zero slices": lambda p: Product.of(
        [t._replace(right=t.right * (torch.arange(len(t.right)) > 1)[:, None]) for t in p.terms]
    ),
    "scales apart": lambda p: Product.of([t._replace(left=t.left * 1e9, right=t.right * 1e-9) for t in p.terms]),
    "squares overflow": lambda p: Product.of([t._replace(left=t.left * 1e25, right=t.right * 1e-15) for t in p.terms]),
    "squares vanish": lambda p: Product.of([t._replace(left=t.left * 1e-24) for t in p.terms]),
    "rank above the sides": lambda p: Product.of([Term(t.left[:20], t.weights, t.right[:, :25]) for t in p.terms]),
}


@pytest.mark.parametrize("case", SINGULAR)
@pytest.mark.parametrize("algebra", ["gram", "randomized", "auto"])
def test_singular_cases(case: str, algebra: str) -> None:
    product = SINGULAR[case](federation([2, 4, 8] * 3, 60))
    found, svd, _ = solve(product, 8, algebra)
    M = dense(product)
    values = torch.linalg.svdvals(M)
    true = int((values > 1e-6 * size(product)).sum())
    assert torch.isfinite(found).all()
    assert len(svd.S) == min(8, true)
    excess = float((M - found).norm() - values[8:].norm())
    assert excess <= (1e-2 if algebra == "randomized" else 2e-6) * max(size(product), 1e-300)


def test_what_gram_cannot_tell_apart_is_left_to_qr() -> None:
    """A sum that cancels to a thousandth: single precision of the factors is not enough, and `auto` knows."""
    one = federation([4, 8, 16, 32] * 2, 200)
    product = lowrank.difference(Product.of([t._replace(left=t.left * 1.001) for t in one.terms]), one)
    found, _, work = solve(product, 16, "auto")
    M = dense(product)
    assert work.paths == {"qr": 1}
    assert float((found - best(M, 16)).norm() / M.norm()) < 1e-6
    _, _, forced = solve(product, 16, "gram")
    assert forced.error > 1e-5


@pytest.mark.parametrize(
    ("sides", "slices", "rank", "way"),
    [(64, 40, 8, "qr"), (4096, 248, 64, "gram"), (4096, 496, 64, "gram"), (4096, 2480, 64, "randomized"), (120, 256, 64, "qr")],
)
def test_the_cheapest_way_is_taken(sides: int, slices: int, rank: int, way: str) -> None:
    cost = subspace.cost(sides, sides, slices, rank)
    assert min(cost, key=cost.__getitem__) == way


def test_a_block_krylov_space_needs_room() -> None:
    assert math.isinf(subspace.cost(4096, 4096, 248, 64)["randomized"])


@pytest.mark.parametrize("algebra", names.ALGEBRAS)
def test_equal_inputs_give_equal_bytes(algebra: str) -> None:
    product = federation([4, 8, 16] * 6, 200)
    first, second = (solve(product, 8, algebra)[1] for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all((row[row.abs().argmax()] > 0).item() for row in first.Vt)


def test_the_callers_threads_are_what_they_were(monkeypatch) -> None:
    """Eigenvectors are one thread's work; also where they fail."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        solve(federation([4, 8, 16] * 6, 200), 8, "gram")
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError):
            subspace._eigh(torch.ones(2, 3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("n", [1, 95, 96, 97, 250])
def test_the_core_is_put_together_from_its_panels(n: int) -> None:
    G, L = draw(0, n, n).double(), draw(1, n, n).double().tril()
    torch.testing.assert_close(subspace._core(G + G.T, L).triu(), (L.T @ (G + G.T) @ L).triu())


def test_an_unknown_way_names_the_known_ones() -> None:
    with pytest.raises(MethodError, match="algebra 'gramm': unknown; did you mean 'gram'"), lowrank.using("gramm"):
        pass


def test_factors_are_not_held_in_a_wider_type() -> None:
    """The stacks of bfloat16 factors are made once, in float32, and the memory is used again for the next layer."""
    product = federation([4, 8], 100, dtype=torch.bfloat16)
    work = lowrank.Work()
    X, _, Y = lowrank._stacked([product], work)
    again, _, _ = lowrank._stacked([product], work)
    assert X.dtype == Y.dtype == torch.float32
    assert X.data_ptr() == again.data_ptr()
    assert X.shape == (100, 12)


# --- the leading eigenvectors of a core ------------------------------------------------------------------------------

N, RANK = 420, 64
PLACES = torch.arange(1, N + 1, dtype=torch.float64)
SPECTRA = {  # eigenvalues, and whether a small space settles their leading pairs
    "falling": (PLACES**-3, True),
    "of low rank": (torch.where(PLACES <= 30, PLACES**-2, 0.0), False),
    "flat": (1 + 1e-3 * PLACES.flip(0), False),
    "more copies than a block has columns": (torch.where(PLACES <= 63, 1.0, 0.1 * 0.7 ** (PLACES - 64)), False),
}


def symmetric(eigenvalues: Tensor, seed: int) -> Tensor:
    Q = torch.linalg.qr(draw(seed, N, N).double())[0]
    return (Q * eigenvalues) @ Q.T


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_leading_pairs_are_the_dense_ones_whatever_the_spectrum(spectrum: str) -> None:
    eigenvalues, small_space_will_do = SPECTRA[spectrum]
    A, floor = symmetric(eigenvalues, 3), torch.tensor(5e-7, dtype=torch.float64)
    values, vectors = subspace._leading(A.triu(), RANK, floor)
    expected = eigenvalues.sort(descending=True)[0]
    torch.testing.assert_close(values[:RANK], expected[:RANK], rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(RANK + 8, dtype=torch.float64), rtol=0, atol=1e-10)
    # What A does to the vectors lies in their span, but for what changes `U S` by less than float32's rounding.
    beyond = A @ vectors[:, :RANK] - vectors[:, :RANK] * values[:RANK]
    present = expected[:RANK] > floor**2
    assert float((beyond[:, present] / expected[:RANK][present].sqrt()).norm() / expected[:RANK].sum().sqrt()) < 6e-8
    _, _, settled = subspace._lanczos(A, RANK, floor)
    assert settled or not small_space_will_do


def test_each_matrix_of_a_batch_is_settled_by_itself() -> None:
    batch = torch.stack([symmetric(eigenvalues, 3) for eigenvalues, _ in SPECTRA.values()])
    floor = torch.full((len(batch),), 5e-7, dtype=torch.float64)
    _, _, settled = subspace._lanczos(batch.clone(), RANK, floor)
    assert settled[0]
    assert not settled[2]
    values, _ = subspace._leading(batch, RANK, floor)
    for found, (eigenvalues, _) in zip(values, SPECTRA.values(), strict=True):
        torch.testing.assert_close(found[:RANK], eigenvalues.sort(descending=True)[0][:RANK], rtol=0, atol=1e-12)


def test_what_a_block_has_no_columns_for_is_missed_and_noticed() -> None:
    """63 copies of the largest eigenvalue, and a space of blocks of twelve: its pairs are pairs, but not the leading ones."""
    A, floor = symmetric(SPECTRA["more copies than a block has columns"][0], 3), torch.tensor(5e-7, dtype=torch.float64)
    values, vectors, settled = subspace._lanczos(A, RANK, floor)
    assert float((A @ vectors - vectors * values)[:, :RANK].norm()) < 1e-6
    assert int((values > 0.5).sum()) < 63
    assert not settled


def test_the_gram_way_is_as_exact_where_the_core_is_large() -> None:
    product = federation([4, 8, 16, 32, 64] * 4, 600)
    found, _, work = solve(product, 64, "gram")
    M = dense(product)
    assert subspace._has_room(product.slices, 64)
    assert float((found - best(M, 64)).norm()) < rounding(M, 64, product.slices)
    assert work.paths == {"gram": 1}
    assert work.error < subspace.tolerance(torch.float32)


# --- many products side by side --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algebra", names.ALGEBRAS)
def test_products_side_by_side_are_solved_as_one_by_one(algebra: str) -> None:
    """Singular ones among them: what one product needs is done for it alone, and the others do not notice."""
    cases = [case for name, case in SINGULAR.items() if name not in ("rank above the sides", "cancellation", "one client left")]
    products = [federation([2, 4, 8] * 3, 60), *(case(federation([2, 4, 8] * 3, 60)) for case in cases)]
    products = [product for product in products if product.slices == 42]
    assert len(products) >= 6
    found, works = [], []
    for batch_bytes in (0, 1 << 30):
        with lowrank.using(algebra, batch_bytes=batch_bytes) as work:
            found.append(lowrank.svd_all(products, [8] * len(products)))
        works.append(work)
    assert works[0].paths == works[1].paths
    for product, one, other in zip(products, *found, strict=True):
        assert len(one.S) == len(other.S)
        difference = (one.U * one.S).double() @ one.Vt.double() - (other.U * other.S).double() @ other.Vt.double()
        assert float(difference.norm()) <= 1e-6 * size(product)


def test_a_layer_that_gram_cannot_settle_is_the_only_one_left_to_qr() -> None:
    one = federation([4, 8, 16, 32] * 2, 400)
    cancels = lowrank.difference(Product.of([t._replace(left=t.left * 1.001) for t in one.terms]), one)
    ordinary = lowrank.stack([one, federation([4, 8, 16, 32] * 2, 400, seed=5)])
    with lowrank.using("auto", batch_bytes=1 << 30) as work:
        found = lowrank.svd_all([ordinary, cancels, ordinary], [32] * 3)
    assert work.paths == {"gram": 2, "qr": 1}
    for product, (U, S, Vt) in zip((ordinary, cancels, ordinary), found, strict=True):
        M = dense(product)
        assert float(((U * S).double() @ Vt.double() - best(M, 32)).norm() / M.norm()) < 1e-6


@pytest.mark.parametrize(("batch_bytes", "together"), [(0, [1, 1, 1]), (2 * 12 * 200 * 4, [2, 1]), (1 << 30, [3])])
def test_as_many_are_solved_side_by_side_as_their_factors_have_room(batch_bytes: int, together: list[int], monkeypatch) -> None:
    """Two stacks of 12 slices and 100 + 100 numbers each, in float32; one by one if there is room for none."""
    seen = []
    solve_some = lowrank._solve
    monkeypatch.setattr(lowrank, "_solve", lambda some, *rest: seen.append(len(some)) or solve_some(some, *rest))
    products = [federation([4, 8], 100, seed=seed) for seed in range(3)]
    with lowrank.using("gram", batch_bytes=batch_bytes):
        alike = lowrank.svd_all([products[0], federation([4], 100), *products[1:]], [4, 4, 4, 4])
    assert seen == [*together, 1]
    assert [len(found.S) for found in alike] == [4] * 4
