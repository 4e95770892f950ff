"""Attention in blocks is each text's own attention: against the formula, one text and one head at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank.tasks.text import attention
from anyrank.tasks.text.attention import Layout, attend

HEADS, WIDTH = 3, 4  # of the small cases: d = 12
LENGTHS = {
    "all of a length": [5, 5, 5],
    "all as wide as a block": [16, 16],
    "one text": [7],
    "one token": [1],
    "tokens alone": [1, 1, 1],
    "very unequal": [1, 40, 2, 17, 16],
}


def drawn(tokens: int, dtype=torch.float32, seed: int = 0, width: int = HEADS * WIDTH) -> list[torch.Tensor]:
    """q, k and v, and the gradient of what attention makes of them."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(4)]


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], heads: int = HEADS) -> torch.Tensor:
    texts = []
    for own in zip(*(each.split(lengths) for each in (q, k, v)), strict=True):
        parts = zip(*(each.chunk(heads, dim=1) for each in own), strict=True)
        texts.append(torch.cat([(a @ b.T / a.shape[1] ** 0.5).softmax(dim=1) @ c for a, b, c in parts], dim=1))
    return torch.cat(texts)


def both_ways(q, k, v, g, lengths, heads=HEADS):
    """Outputs and gradients, in blocks and by the formula."""
    made = attend(q, k, v, Layout.of(torch.tensor(lengths), heads)), by_formula(q, k, v, lengths, heads)
    return [(out, *torch.autograd.grad(out, (q, k, v), g)) for out in made]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_blocks_compute_each_texts_own_attention(lengths):
    for found, expected in zip(*both_ways(*drawn(sum(lengths), torch.float64), lengths), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for found, expected in zip(*both_ways(*drawn(sum(lengths)), lengths), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.sampled_from([1, 2, 6]))
@settings(max_examples=40, deadline=None)
def test_blocks_compute_attention_whatever_the_lengths(lengths, heads):
    for found, expected in zip(*both_ways(*drawn(sum(lengths), torch.float64), lengths, heads), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("width", [4, 64], ids=["probabilities made again", "probabilities kept"])
def test_gradients_are_those_of_small_differences(width):
    lengths, heads = [2, 5, 17], 2
    q, k, v, _ = drawn(sum(lengths), torch.float64, width=heads * width)
    layout = Layout.of(torch.tensor(lengths), heads)
    assert torch.autograd.gradcheck(lambda *each: attend(*each, layout), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2)])
def test_what_is_not_trained_gets_no_gradient(trained):
    lengths = [3, 20]
    *projections, g = drawn(sum(lengths), torch.float64)
    given_ = [each.detach().requires_grad_(place in trained) for place, each in enumerate(projections)]
    attend(*given_, Layout.of(torch.tensor(lengths), HEADS)).backward(g)
    expected = torch.autograd.grad(by_formula(*projections, lengths), projections, g)
    for place, each in enumerate(given_):
        if place in trained:
            torch.testing.assert_close(each.grad, expected[place], atol=1e-12, rtol=0)
        else:
            assert each.grad is None


def test_large_blocks_are_cut(monkeypatch):
    """To so few scores that each block holds one text, or two of the shortest."""
    lengths = [5, 30, 7, 16, 33, 31]
    whole = Layout.of(torch.tensor(lengths), HEADS)
    monkeypatch.setattr(attention, "_SCORES", 2 * HEADS * 16**2)
    cut = Layout.of(torch.tensor(lengths), HEADS)
    assert [tuple(block.real.shape[:2]) for block in whole.blocks] == [(9, 16), (6, 32), (3, 48)]
    assert [tuple(block.real.shape[:2]) for block in cut.blocks] == [(6, 16), (3, 16), (3, 32), (3, 32), (3, 48)]
    for found, expected in zip(*both_ways(*drawn(sum(lengths), torch.float64), lengths), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_text_that_is_no_number_leaves_the_others_alone():
    lengths = [3, 4, 20]
    q, k, v, g = drawn(sum(lengths))
    spoilt = [each.detach().clone().requires_grad_() for each in (q, k, v)]
    with torch.no_grad():
        for each in spoilt:
            each[3:7] = float("nan")
    layout = Layout.of(torch.tensor(lengths), HEADS)
    kept = torch.tensor([True] * 3 + [False] * 4 + [True] * 20)
    out, broken = attend(q, k, v, layout), attend(*spoilt, layout)
    assert broken[~kept].isnan().all()
    assert torch.equal(broken[kept], out[kept])
    for one, other in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(broken, spoilt, g), strict=True):
        assert torch.equal(one[kept], other[kept])


def test_the_same_bits_come_out_again():
    lengths = [9, 33, 12, 1]
    one, other = (both_ways(*drawn(sum(lengths)), lengths)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_bfloat16_projections_are_attended_to_in_float32():
    lengths = [4, 19]
    q, k, v, g = drawn(sum(lengths), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, Layout.of(torch.tensor(lengths), HEADS))
    gradients = torch.autograd.grad(out, (q, k, v), g)
    wide = [each.detach().double().requires_grad_() for each in (q, k, v)]
    expected = by_formula(*wide, lengths)
    assert torch.equal(out, expected.float().bfloat16()), "rounded once, at the end"
    for found, other in zip(gradients, torch.autograd.grad(expected, wide, g.double()), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), other, atol=1e-6, rtol=2**-8)


def test_no_more_is_kept_than_projections_in_blocks_and_as_much_again_in_part():
    """Probabilities of texts longer than a head is wide are not kept: they grow with the square of the length."""
    kept = []
    lengths, heads, width = [64, 64], 2, 8
    q, k, v, _ = drawn(sum(lengths), width=heads * width)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        attend(q, k, v, Layout.of(torch.tensor(lengths), heads))
    assert sum(kept) == 3 * sum(lengths) * heads * width
