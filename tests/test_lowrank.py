"""Every function of `lowrank` against the dense computation in float64, singular cases included."""

from __future__ import annotations

import math
import resource

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import lowrank
from anyrank.algebra.lowrank import SVD, Product

EXACT, SINGLE = 1e-10, 1e-6


def dense(product: Product) -> np.ndarray:
    """The product itself, by NumPy, `[out, in]`."""
    return product.left.double().numpy() @ product.right.double().numpy()


def size(product: Product) -> float:
    """What rounding is measured against: `sum_j |left[:, j]| |right[j]|`, at least as large as any norm of the product."""
    return float((product.left.norm(dim=0) * product.right.norm(dim=1)).sum())


def assert_near(value, expected, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=0, atol=tolerance)


def assert_is_svd_of(found: SVD, M: np.ndarray, tolerance: float, rank: int | None = None) -> None:
    """`found` are the top `rank` triples of M: right values, orthonormal vectors, the best approximation's error."""
    k, values = len(found.S), np.linalg.svd(M, compute_uv=False)
    kept = len(values) if rank is None else min(rank, len(values))
    assert k <= kept
    assert_near(np.pad(found.S.numpy(), (0, kept - k)), values[:kept], tolerance)
    assert (np.diff(found.S.numpy()) <= 0).all()
    assert (found.S > 0).all()
    assert_near(found.U.T @ found.U, np.eye(k), EXACT)
    assert_near(found.Vt @ found.Vt.T, np.eye(k), EXACT)
    # Eckart-Young: the best rank-k approximation misses exactly the values that were left out.
    rest = M - (found.U * found.S @ found.Vt).numpy()
    left_out = math.sqrt((values[kept:] ** 2).sum())
    assert abs(np.linalg.norm(rest) - left_out) <= tolerance * math.sqrt(len(values))


def assert_signs_fixed(found: SVD) -> None:
    for row in found.Vt:
        assert row[row.abs().argmax()] > 0


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


products = st.builds(
    lambda seed, out, width, n, low, high: Product(
        draw(seed, out, n) * 10.0 ** torch.linspace(low, high, n, dtype=torch.float64), draw(seed + 1, n, width)
    ),
    seed=st.integers(0, 10_000),
    out=st.integers(1, 12),
    width=st.integers(1, 12),
    n=st.integers(1, 16),  # also more inner columns than the product can have rank
    low=st.sampled_from([-4, 0, 0]),
    high=st.sampled_from([0, 0, 5]),
)


@given(products, st.one_of(st.none(), st.integers(1, 20)))
def test_svd_is_the_dense_svd(product, rank):
    found = lowrank.svd(product, rank)
    assert_is_svd_of(found, dense(product), EXACT * size(product), rank)
    assert_signs_fixed(found)


@given(products)
def test_spectrum_and_norm_are_the_dense_ones(product):
    M = dense(product)
    values = np.linalg.svd(M, compute_uv=False)
    found = lowrank.spectrum(product)
    assert len(found) == min(*M.shape, product.left.shape[1])
    assert_near(found, values[: len(found)], EXACT * size(product))
    assert_near(values[len(found) :], 0.0, EXACT * size(product))
    assert_near(lowrank.norm(product), np.linalg.norm(M), EXACT * size(product))


@given(
    st.lists(st.tuples(st.integers(0, 9999), st.integers(1, 5)), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9)
)
def test_stack_is_the_sum(parts, out, width):
    items = [Product(draw(seed, out, n), draw(seed + 1, n, width)) for seed, n in parts]
    total = lowrank.stack(items)
    assert_near(dense(total), sum(dense(item) for item in items), EXACT * size(total))


@given(products, st.integers(0, 10_000), st.integers(1, 6))
def test_inner_and_difference_are_the_dense_ones(a, seed, n):
    b = Product(draw(seed, a.left.shape[0], n), draw(seed + 1, n, a.right.shape[1]))
    assert_near(lowrank.inner(a, b), (dense(a) * dense(b)).sum(), EXACT * size(a) * size(b))
    assert_near(dense(lowrank.difference(a, b)), dense(a) - dense(b), EXACT * (size(a) + size(b)))


@given(
    seed=st.integers(0, 10_000),
    out=st.integers(1, 10),
    width=st.integers(1, 10),
    rank=st.integers(1, 12),
    scaling=st.floats(0.01, 100),
    weights=st.one_of(st.floats(0, 2), st.integers(0, 999)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_of_layer_is_the_scaled_weighted_product_of_the_stored_numbers(seed, out, width, rank, scaling, weights, dtype):
    layer = LoraLayer(draw(seed, rank, width).to(dtype), draw(seed + 1, out, rank).to(dtype), scaling)
    w = draw(weights, rank).abs() if isinstance(weights, int) else weights
    product = lowrank.of_layer(layer, w)
    A, B = layer.A.double().numpy(), layer.B.double().numpy()  # what bfloat16 kept, exactly
    expected = scaling * B @ np.diag(np.broadcast_to(np.asarray(w), rank)) @ A
    assert product.left.dtype == product.right.dtype == torch.float64
    assert_near(dense(product), expected, EXACT * (np.abs(B).sum() * np.abs(A).sum() * scaling + 1))


@given(products)
def test_float32_factors_give_the_same_figures_to_single_precision(product):
    single = Product(product.left.float(), product.right.float())
    layer = LoraLayer(single.right, single.left, 1.0)
    values = np.linalg.svd(dense(product), compute_uv=False)
    found = lowrank.spectrum(lowrank.of_layer(layer))
    assert_near(found, values[: len(found)], SINGLE * size(product))
    assert_near(lowrank.norm(lowrank.of_layer(layer)), np.linalg.norm(dense(product)), SINGLE * size(product))


# --- singular cases --------------------------------------------------------------------------------------------------


def zero(out: int = 6, width: int = 5, n: int = 3) -> Product:
    return Product(torch.zeros(out, n, dtype=torch.float64), draw(1, n, width))


def test_a_zero_product_has_no_triples_and_a_zero_spectrum():
    found = lowrank.svd(zero())
    assert (found.U.shape, found.S.shape, found.Vt.shape) == ((6, 0), (0,), (0, 5))
    assert lowrank.spectrum(zero()).tolist() == [0.0, 0.0, 0.0]
    assert lowrank.norm(zero()) == 0.0


def test_identical_clients_add_no_rank():
    one = Product(draw(1, 9, 3), draw(2, 3, 8))
    quarter = Product(one.left / 4, one.right)
    found = lowrank.svd(lowrank.stack([quarter] * 4))  # 12 inner columns, rank 3
    assert len(found.S) == 3
    assert_is_svd_of(found, dense(one), EXACT * size(one))


def test_more_inner_columns_than_the_product_has_rank():
    wide = Product(draw(1, 3, 20), draw(2, 20, 4))
    assert len(lowrank.svd(wide).S) == 3
    assert_is_svd_of(lowrank.svd(wide), dense(wide), EXACT * size(wide))


@pytest.mark.parametrize(("out", "width", "n"), [(7, 5, 2), (40, 30, 6), (3, 3, 9)])
def test_a_sum_that_cancels_is_zero_not_noise(out, width, n):
    one = Product(draw(1, out, n), draw(2, n, width))
    assert len(lowrank.svd(lowrank.difference(one, one)).S) == 0
    assert lowrank.norm(lowrank.difference(one, one)) <= 1e-14 * size(one)


def test_what_is_left_of_a_sum_that_nearly_cancels_is_kept():
    one, rest = Product(draw(1, 7, 2), draw(2, 2, 5)), Product(1e-6 * draw(3, 7, 1), draw(4, 1, 5))
    found = lowrank.svd(lowrank.stack([one, rest, Product(-one.left, one.right)]))
    assert len(found.S) == 1
    assert_near(found.S, lowrank.norm(rest), 1e-14 * size(one))


def test_slices_of_wildly_different_scale_between_their_factors_all_count():
    # Slice 1 is (1e8 u)(1e-8 v), slice 2 is (1e-8 u')(1e8 v'): each an ordinary product, only its scale sits elsewhere.
    scale = torch.tensor([1e8, 1e-8], dtype=torch.float64)
    plain = Product(draw(1, 9, 2), draw(2, 2, 8))
    moved = Product(plain.left * scale, plain.right / scale[:, None])
    assert_is_svd_of(lowrank.svd(moved), dense(plain), EXACT * size(plain))
    assert len(lowrank.svd(moved).S) == 2


def test_small_true_values_are_kept_beside_large_ones():
    U, V = torch.linalg.qr(draw(1, 8, 3))[0], torch.linalg.qr(draw(2, 9, 3))[0]
    S = torch.tensor([1e6, 1.0, 1e-6], dtype=torch.float64)
    assert_near(lowrank.svd(Product(U * S, V.T)).S, S, 1e-9)


def test_one_row_and_one_column():
    scalar = Product(torch.tensor([[-2.0]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64))
    found = lowrank.svd(scalar)  # -6 = (-1) * 6 * (+1): the sign goes to U
    assert_near(torch.stack([found.U[0, 0], found.S[0], found.Vt[0, 0]]), [-1.0, 6.0, 1.0], 1e-14)


def test_equal_inputs_give_equal_bytes():
    def once() -> list[bytes]:
        product = Product(draw(1, 30, 6), draw(2, 6, 20))
        found = lowrank.svd(product, 4)
        return [t.numpy().tobytes() for t in (*found, lowrank.spectrum(product))] + [str(lowrank.norm(product)).encode()]

    assert once() == once()


def test_factors_of_a_product_of_forty_billion_entries_are_enough():
    # 200,000 x 200,000 in float64 is 320 GB; two factors of four columns are 13 MB.
    n, sides = 4, 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    product = Product(draw(1, sides, n), draw(2, n, sides))
    found, total = lowrank.svd(product, 2), lowrank.norm(product)
    values = lowrank.spectrum(product)
    gram = (product.left.T @ product.left) @ (product.right @ product.right.T)  # its eigenvalues are the squared values
    expected = np.sort(np.sqrt(np.linalg.eigvals(gram.numpy()).real))[::-1]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(found.S.numpy(), expected[:2], rtol=1e-9)
    assert found.U.shape == (sides, 2)
    assert total == pytest.approx(math.sqrt((expected**2).sum()), rel=1e-12)
    assert lowrank.inner(product, product) == pytest.approx(total**2, rel=1e-12)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 500
