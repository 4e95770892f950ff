"""What goes into the base weight: exact over hundreds of rounds, never larger than it is worth, and gone when it cancels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.algebra import lowrank
from anyrank.messages.records import Client, ClientUpdate, Scaling, ServerState
from anyrank.methods import make
from anyrank.methods.products import add_to_base

OUT, WIDTH = 12, 9
UNIT = 2.0**-24  # float32's unit roundoff


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(layer: LoraLayer) -> Tensor:
    return layer.scaling * layer.B.double() @ layer.A.double()


def state_with(dtype: torch.dtype, merged: LoraLayer | None = None, shape: tuple[int, int] = (OUT, WIDTH)) -> ServerState:
    layer = LoraLayer(noise(4, shape[1], seed=0).to(dtype), torch.zeros(shape[0], 4, dtype=dtype), 2.0)
    return ServerState(0, 0, Adapter({"layer": layer}), Scaling(8.0), merged=merged and Adapter({"layer": merged}))


@pytest.mark.parametrize(("name", "ranks"), [("flora", (1, 2, 4)), ("fedex", (4, 4, 4))])
def test_500_rounds_neither_grow_nor_drift(name, ranks):
    """Against the sum kept dense in float64. Storing factors in float32 moves slice i by at most `2 * 2^-24 * sigma_i` in norm,
    and at most 9 values below 1e-7 of the first are dropped: that much a round, added up. It stays far below, at random.
    """
    method, state = make(name), state_with(torch.float32)
    clients = [Client(f"client-{i}", rank) for i, rank in enumerate(ranks)]
    expected, bound = torch.zeros(OUT, WIDTH, dtype=torch.float64), 0.0
    for round in range(500):
        uploads = []
        for number, client in enumerate(clients, 1):
            layer = method.dispatch(state, client).adapter.layers["layer"]
            seed = 10 * round + number
            A, B = (f + 0.1 * noise(*f.shape, seed=s) for f, s in ((layer.A, seed), (layer.B, -seed)))
            uploads.append(ClientUpdate(Adapter({"layer": layer.with_factors(A, B)}), number, client.name))
        state = method.aggregate(state, uploads)
        mean = sum(u.num_examples / 6 * dense(u.adapter.layers["layer"]) for u in uploads)
        expected += mean - dense(state.adapter.layers["layer"])  # what the clients' mean has and the adapter has not
        base = state.merged.layers["layer"]
        values = lowrank.spectrum(lowrank.of_layer(base))
        bound += float(2 * UNIT * values.sum() + 3 * 1e-7 * values[0])
        assert base.rank <= WIDTH
        assert (base.A.dtype, base.B.dtype, base.scaling) == (torch.float32, torch.float32, 1.0)
    error, size = (float(torch.linalg.norm(m)) for m in (dense(base) - expected, expected))
    assert error < bound
    assert error < 1e-5 * size


def test_factors_stay_as_they_are_while_they_are_smaller_than_the_weight():
    """40 x 60: a rank of up to 24 has 24 * (40 + 60) = 2400 numbers, as many as the weight. Three sums of rank 8 fit."""
    merged, summands = None, []
    for seed in range(1, 6):
        summands.append(lowrank.Product(noise(40, 8, seed=seed), noise(8, 60, seed=-seed)))
        before, merged = merged, add_to_base(state_with(torch.float32, merged, (40, 60)), "layer", summands[-1])
        if seed in (2, 3):
            assert merged.rank == 8 * seed
            assert torch.equal(merged.A[: before.rank], before.A)  # exact: what is there is not touched
        expected = sum(p.left @ p.right for p in summands)
        assert torch.linalg.norm(dense(merged) - expected) < 1e-6 * torch.linalg.norm(expected)
    assert merged.rank == 40  # what remains of 5 * 8


def test_a_sum_of_low_rank_is_found_when_it_is_written_anew():
    """All summands share two directions: 13 of them pass what the weight is worth, and two slices remain."""
    left, right, merged = noise(OUT, 2, seed=1), noise(2, WIDTH, seed=2), None
    for _ in range(13):
        merged = add_to_base(state_with(torch.float64, merged), "layer", lowrank.Product(left, right))
    assert merged.rank <= OUT * WIDTH // (OUT + WIDTH)
    torch.testing.assert_close(dense(merged), 13 * left @ right)


def test_what_cancels_leaves_a_base_that_changes_nothing():
    product = lowrank.Product(noise(OUT, 5, seed=1), noise(5, WIDTH, seed=2))
    merged = add_to_base(state_with(torch.float64), "layer", product)
    merged = add_to_base(state_with(torch.float64, merged), "layer", lowrank.Product(-product.left, product.right))
    assert merged.rank <= 5
    assert dense(merged).abs().max() < 1e-12


def test_nothing_learned_puts_nothing_into_the_base():
    zero = lowrank.Product(torch.zeros(OUT, 3, dtype=torch.float64), noise(3, WIDTH, seed=1))
    assert add_to_base(state_with(torch.float32), "layer", zero) is None
    method, state = make("flora"), state_with(torch.float32)
    uploads = [ClientUpdate(method.dispatch(state, Client("ada", 4)).adapter, 1, "ada")]
    assert method.aggregate(state, uploads).merged is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_base_has_the_adapters_dtype_and_what_it_can_hold(dtype):
    product = lowrank.Product(noise(OUT, 12, seed=1), noise(12, WIDTH, seed=2))
    merged = add_to_base(state_with(dtype), "layer", product)
    expected = product.left @ product.right
    assert merged.A.dtype == merged.B.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps + 1e-14
    assert torch.linalg.norm(dense(merged) - expected) < tolerance * torch.linalg.norm(expected)
