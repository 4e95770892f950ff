"""What may enter a round: a good upload as it is, a bad one never, and nothing that the download did not ask for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.federation.guard import Rejected, admit
from anyrank.messages.records import BOTH, ClientUpdate, Download, Pruning


def adapter(value: float = 1.0, rank: int = 2, scaling: float = 0.5, dtype=torch.float32, layer: str = "fc") -> Adapter:
    A, B = torch.full((rank, 4), value, dtype=dtype), torch.full((3, rank), value, dtype=dtype)
    return Adapter({layer: LoraLayer(A, B, scaling)}, {"head.weight": torch.full((2, 3), value, dtype=dtype)})


def download(train: frozenset[str] = BOTH) -> Download:
    return Download(adapter(), {"fc": (0, 1)}, train=train)


def update(adapter: Adapter, **changes) -> ClientUpdate:
    return replace(ClientUpdate(adapter, 10, "ada", {"loss": 0.5}), **changes)


def with_factor(name: str, position: tuple[int, int], value: float) -> Adapter:
    layer = adapter(2.0).layers["fc"]
    factors = {"A": layer.A.clone(), "B": layer.B.clone()}
    factors[name][position] = value
    return replace(adapter(2.0), layers={"fc": layer.with_factors(**factors)})


def test_a_good_upload_enters_as_it_is():
    sent = update(adapter(2.0))
    admitted = admit(sent, download(), "ada", 10)
    assert torch.equal(admitted.adapter.layers["fc"].A, sent.adapter.layers["fc"].A)
    assert torch.equal(admitted.adapter.layers["fc"].B, sent.adapter.layers["fc"].B)
    assert torch.equal(admitted.adapter.tensors["head.weight"], sent.adapter.tensors["head.weight"])
    assert (admitted.client, admitted.num_examples, admitted.metrics) == ("ada", 10, {"loss": 0.5})


@pytest.mark.parametrize(("train", "a", "b"), [({"A"}, 2.0, 1.0), ({"B"}, 1.0, 2.0), ({"A", "B"}, 2.0, 2.0)])
def test_a_factor_that_was_not_to_be_trained_is_the_downloads_own(train, a, b):
    admitted = admit(update(adapter(2.0)), download(frozenset(train)), "ada", 10)
    assert torch.equal(admitted.adapter.layers["fc"].A, torch.full((2, 4), a))
    assert torch.equal(admitted.adapter.layers["fc"].B, torch.full((3, 2), b))


def test_what_was_not_to_be_trained_cannot_spoil_the_round():
    admitted = admit(update(with_factor("A", (0, 0), math.nan)), download(frozenset({"B"})), "ada", 10)
    assert torch.equal(admitted.adapter.layers["fc"].A, download().adapter.layers["fc"].A)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("factor", "position"), [("A", (1, 3)), ("B", (2, 1))])
def test_one_value_that_is_not_finite_costs_the_upload(factor, position, value):
    with pytest.raises(Rejected, match=f"layer fc, {factor}: contains NaN or infinite"):
        admit(update(with_factor(factor, position, value)), download(), "ada", 10)


def test_infinities_of_both_signs_do_not_cancel():
    layer = adapter(2.0).layers["fc"]
    A = torch.tensor([[math.inf, -math.inf, 2.0, 2.0], [2.0] * 4])
    with pytest.raises(Rejected, match="layer fc, A: contains NaN or infinite"):
        admit(update(replace(adapter(2.0), layers={"fc": layer.with_factors(A, layer.B)})), download(), "ada", 10)


def test_finite_numbers_whose_sum_is_too_large_for_their_dtype_enter():
    layer = adapter().layers["fc"]
    large = replace(adapter(), layers={"fc": layer.with_factors(torch.full((2, 4), 1e38), torch.full((3, 2), 1e-30))})
    assert math.isinf(large.layers["fc"].A.sum())
    assert torch.equal(admit(update(large), download(), "ada", 10).adapter.layers["fc"].A, torch.full((2, 4), 1e38))


@pytest.mark.parametrize("value", [1e30, 3e38])
def test_finite_factors_whose_product_is_too_large_for_their_dtype_are_rejected(value):
    """Each entry of B A is 2 * 1e60 or more; float32 ends at 3.4e38."""
    with pytest.raises(Rejected, match=r"layer fc: (factor A|the change scaling \* B @ A) is too large for torch\.float32"):
        admit(update(adapter(value)), download(), "ada", 10)


def test_a_head_that_is_not_finite_costs_the_upload():
    bad = replace(adapter(), tensors={"head.weight": torch.full((2, 3), math.nan)})
    with pytest.raises(Rejected, match=r"head\.weight: contains NaN"):
        admit(update(bad), download(), "ada", 10)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (adapter(rank=1), r"layer fc, A: expected .*\(2, 4\), got .*\(1, 4\)"),  # would broadcast
        (adapter(rank=3), r"expected .*\(2, 4\), got .*\(3, 4\)"),
        (adapter(dtype=torch.float64), r"expected torch\.float32 .* got torch\.float64"),
        (adapter(scaling=5.0), r"layer fc: expected scaling 0\.5, got 5\.0"),
        (adapter(layer="other"), r"layers differ .* missing \['fc'\], unknown \['other'\]"),
        (replace(adapter(), tensors={}), r"tensors differ .* missing \['head\.weight'\], unknown none"),
        (replace(adapter(), tensors={"head.weight": torch.ones(3, 2)}), r"head\.weight: expected .*\(2, 3\), got .*\(3, 2\)"),
    ],
    ids=["rank-1", "rank-3", "dtype", "scaling", "layers", "no-head", "head-shape"],
)
def test_an_upload_of_another_form_is_rejected_with_what_was_expected(bad, says):
    with pytest.raises(Rejected, match=says):
        admit(update(bad), download(), "ada", 10)


def test_an_unexpected_tensor_is_rejected():
    more = adapter()
    more = replace(more, tensors={**more.tensors, "extra": torch.ones(1)})
    with pytest.raises(Rejected, match=r"unknown \['extra'\]"):
        admit(update(more), download(), "ada", 10)


def test_nobody_sends_in_anothers_name_or_gives_themselves_weight():
    with pytest.raises(Rejected, match="expected an update of ada, got one of eve"):
        admit(update(adapter(), client="eve"), download(), "ada", 10)
    with pytest.raises(Rejected, match="expected an update of ada, got one of nobody"):
        admit(update(adapter(), client=""), download(), "ada", 10)
    with pytest.raises(Rejected, match="reports 1000 examples, but 10 are registered"):
        admit(update(adapter(), num_examples=1000), download(), "ada", 10)


@pytest.mark.parametrize("value", [math.nan, math.inf, "low", None])
def test_a_metric_that_is_not_a_finite_number_is_rejected(value):
    with pytest.raises(Rejected, match="metric loss: expected a finite number"):
        admit(update(adapter(), metrics={"loss": value}), download(), "ada", 10)


def test_kind_kernel_and_config_are_the_servers():
    sent = adapter()
    conv = LoraLayer(sent.layers["fc"].A, sent.layers["fc"].B, 0.5, "conv2d", (2, 2))
    admitted = admit(update(Adapter({"fc": conv}, sent.tensors, {"task_type": "EVIL"})), download(), "ada", 10)
    assert admitted.adapter.layers["fc"].kind == "linear"
    assert admitted.adapter.config == {}


# --- pruned ranks ------------------------------------------------------------------------------------------------------


def cut(adapter: Adapter, rank: int) -> Adapter:
    layers = {name: la.with_factors(la.A[:rank], la.B[:, :rank]) for name, la in adapter.layers.items()}
    return replace(adapter, layers=layers)


def prunable(rank: int, gamma: float = 0.5, min_rank: int = 1) -> Download:
    return replace(download(), adapter=adapter(rank=rank), pruning=Pruning(gamma, 0.0, min_rank))


@pytest.mark.parametrize(("rank", "kept"), [(4, 2), (5, 2), (3, 1)])
def test_a_client_that_may_prune_comes_back_at_its_own_rank_or_at_the_one_that_pruning_leaves(rank, kept):
    for came in (rank, kept):
        admitted = admit(update(cut(adapter(2.0, rank=rank), came)), prunable(rank), "ada", 10)
        assert admitted.adapter.ranks == {"fc": came}
        assert admitted.adapter.layers["fc"].scaling == 0.5


@pytest.mark.parametrize("came", [1, 3, 5])
def test_no_other_rank_is_admitted(came):
    with pytest.raises(Rejected, match=rf"layer fc, A: expected .*\(4, 4\), got .*\({came}, 4\)"):
        admit(update(adapter(2.0, rank=came)), prunable(4), "ada", 10)


def test_nobody_prunes_below_the_least_rank():
    with pytest.raises(Rejected, match=r"layer fc, A: expected"):
        admit(update(cut(adapter(2.0, rank=4), 2)), prunable(4, min_rank=3), "ada", 10)
    with pytest.raises(Rejected, match=r"layer fc, A: expected"):
        admit(update(cut(adapter(2.0, rank=3), 2)), prunable(3, min_rank=3), "ada", 10)


def test_a_pruned_factor_is_checked_like_any_other():
    half = cut(adapter(2.0, rank=4), 2).layers["fc"]
    lopsided = LoraLayer(half.A, torch.ones(2, 2), 0.5)
    with pytest.raises(Rejected, match=r"layer fc, B: expected .*\(3, 2\), got .*\(2, 2\)"):
        admit(update(replace(adapter(2.0), layers={"fc": lopsided})), prunable(4), "ada", 10)
    spoiled = half.with_factors(half.A * math.nan, half.B)
    with pytest.raises(Rejected, match="contains NaN"):
        admit(update(replace(adapter(2.0), layers={"fc": spoiled})), prunable(4), "ada", 10)
