"""The trimmed mean and the median of each number: by hand, against the plain mean, and against minorities of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank import methods
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config, RobustConfig
from anyrank.errors import ConfigError
from anyrank.messages.records import ClientUpdate, Scaling, ServerState
from anyrank.methods.base import Method, Part, slice_weights
from anyrank.robust import coordinates, rules
from anyrank.robust.coordinates import Median, TrimmedMean

SHAPE, LARGEST = (4, 3), 4  # [out, in] and the server's rank
SUITABLE = ("fedavg", "ffa_lora", "rbla", "rolora", "zeropad")
SEEDS = st.integers(0, 10_000)


def adapter(rank: int, seed: int, scaling: float = 1.0, dtype: torch.dtype = torch.float64) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    return Adapter({"a": LoraLayer(normal(rank, SHAPE[1]), normal(SHAPE[0], rank), scaling)}, {"head": normal(5)})


def state(round: int = 0, scaling: float = 1.0, dtype: torch.dtype = torch.float64) -> ServerState:
    return ServerState(round, 0, adapter(LARGEST, 999, scaling, dtype), Scaling(1.0, "constant"))


def cohort(ranks, scalings=None, dtype: torch.dtype = torch.float64) -> list[ClientUpdate]:
    scalings = scalings or [1.0] * len(ranks)
    made = enumerate(zip(ranks, scalings, strict=True))
    return [ClientUpdate(adapter(rank, k, scaling, dtype), 5, f"c{k:02d}") for k, (rank, scaling) in made]


def ranks_for(name: str, count: int = 6) -> list[int]:
    return [LARGEST] * count if name == "fedavg" else [(1, 2, 4, 3, 2, 4, 1, 3)[k % 8] for k in range(count)]


def one(A: list[float], B: list[float], head: float = 0.0, scaling: float = 1.0) -> Adapter:
    """A layer of one input and one output: a row of numbers for each factor, one number a slice."""
    double = lambda row: torch.tensor(row, dtype=torch.float64)  # noqa: E731
    return Adapter({"a": LoraLayer(double(A)[:, None], double(B)[None, :], scaling)}, {"head": double([head])})


def merged(rule: TrimmedMean, method: str | Method, server: Adapter, clients: list[Adapter], counts=None) -> Adapter:
    before = ServerState(0, 0, server, Scaling(1.0, "constant"))
    method = methods.make(method) if isinstance(method, str) else method
    counts = counts or [1] * len(clients)
    updates = [ClientUpdate(each, n, f"c{k}") for k, (each, n) in enumerate(zip(clients, counts, strict=True))]
    return rule.aggregate(method, before, updates).adapter


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """Of five numbers one is cut at each end: A: (1 + 2 + 3) / 3 = 2, B: (0 + 4 + 8) / 3 = 4, head: (1 + 1 + 4) / 3 = 2;
    medians: 2, 4, 1."""
    clients = [one([a], [b], h) for a, b, h in ((1, 8, 1), (2, 9, 1), (3, 0, 4), (1e30, -1e30, -7), (-5, 4, 1e15))]
    found = merged(TrimmedMean(0.2), "rbla", one([9], [9]), clients)
    assert found.layers["a"].A.tolist() == [[2.0]]
    assert found.layers["a"].B.tolist() == [[4.0]]
    assert found.tensors["head"].tolist() == [2.0]
    found = merged(Median(), "rbla", one([9], [9]), clients)
    assert (found.layers["a"].A.item(), found.layers["a"].B.item(), found.tensors["head"].item()) == (2.0, 4.0, 1.0)


def test_each_slice_goes_by_its_owners_by_hand() -> None:
    """Slice 0 has four owners, 1, 2, 4, 100: the median is (2 + 4) / 2 = 3. Slice 1 has three, 10, 20, 99: 20. Slice 2 has
    one: 7. Slice 3 has none: it stays 9 under rbla, and is 0 under zeropad, where slices count by the owners' share, 4/4, 3/4
    and 1/4 of what they are: 3, 15, 1.75. Example counts do not matter to the order of numbers."""
    server = one([9, 9, 9, 9], [9, 9, 9, 9])
    rows = ([1.0], [2.0, 10.0], [4.0, 20.0, 7.0], [100.0, 99.0])
    clients = [one(row, row) for row in rows]
    kept = merged(Median(), "rbla", server, clients, [1, 5, 3, 2]).layers["a"]
    assert kept.A.flatten().tolist() == kept.B.flatten().tolist() == [3.0, 20.0, 7.0, 9.0]
    padded = merged(Median(), "zeropad", server, clients).layers["a"]
    assert padded.A.flatten().tolist() == padded.B.flatten().tolist() == [3.0, 15.0, 1.75, 0.0]


def test_scalings_go_into_the_numbers_before_they_are_compared_by_hand() -> None:
    """A of 3, 2, 1 under scalings 1, 4, 16 is 3, 4, 4 in units of a scaling of 1 (times the root): the median is 4, and 2 for
    a server with a scaling of 4. Under ffa_lora all of the scaling is B's: 3, 8, 16; the median is 8, and 2 for the server."""
    clients = [one([3], [3], scaling=1.0), one([2], [2], scaling=4.0), one([1], [1], scaling=16.0)]
    found = merged(Median(), "rbla", one([9], [9], scaling=4.0), clients).layers["a"]
    assert (found.A.item(), found.B.item()) == (2.0, 2.0)
    found = merged(Median(), "ffa_lora", one([9], [9], scaling=4.0), clients).layers["a"]
    assert (found.A.item(), found.B.item()) == (9.0, 2.0)


@pytest.mark.parametrize(
    ("count", "trim", "cut"),
    [(10, 0.1, 1), (11, 0.1, 2), (30, 0.1, 3), (100, 0.07, 7), (5, 0.1, 1), (3, 0.1, 1), (2, 0.1, 0), (1, 0.4, 0), (9, 0.0, 0),
     (10, 0.49, 4), (4, 0.5, 1), (5, 0.5, 2)],
)  # fmt: skip
def test_how_many_are_cut(count: int, trim: float, cut: int) -> None:
    """The share, rounded up: one hostile client of five is out at the default of 0.1. Of all numbers, one or two are left."""
    assert TrimmedMean(trim).cut(count) == cut


# --- relations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITABLE)
@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_with_nothing_cut_it_is_the_methods_own_mean(name: str, round: int, count: int) -> None:
    """Where all clients have as many examples; of one client and of two there is nothing to cut for any rule."""
    scalings = [1.0] * count if name == "fedavg" else [0.5 + 0.3 * k for k in range(count)]
    updates, before = cohort(ranks_for(name, count), scalings), state(round, 2.0)
    method = methods.make(name)
    plain = method.aggregate(before, updates)
    for rule in (TrimmedMean(0.0), *((TrimmedMean(0.3), Median()) if count < 3 else ())):
        found = rule.aggregate(method, before, updates)
        assert found.round == plain.round
        torch.testing.assert_close(found.adapter.layers["a"].A, plain.adapter.layers["a"].A, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.adapter.layers["a"].B, plain.adapter.layers["a"].B, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.adapter.tensors["head"], plain.adapter.tensors["head"], rtol=1e-12, atol=1e-14)


def test_a_round_without_updates_is_the_methods() -> None:
    before = state()
    assert Median().aggregate(methods.make("rbla"), before, []).adapter is before.adapter


@pytest.mark.parametrize("rule", [TrimmedMean(0.2), Median()], ids=str)
@pytest.mark.parametrize("name", SUITABLE)
@given(order=st.permutations(range(6)))
def test_the_order_of_replies_changes_no_bit(rule: TrimmedMean, name: str, order: list[int]) -> None:
    updates, method = cohort(ranks_for(name)), methods.make(name)
    zero = replace(updates[0].adapter.layers["a"], B=torch.zeros_like(updates[0].adapter.layers["a"].B))
    negative = replace(zero, B=-zero.B)
    layers = [zero, negative, *(update.adapter.layers["a"] for update in updates[2:])]
    if name == "fedavg":
        updates = [
            replace(u, adapter=replace(u.adapter, layers={"a": layer})) for u, layer in zip(updates, layers, strict=True)
        ]
    one, other = (rule.aggregate(method, state(), each).adapter for each in (updates, [updates[k] for k in order]))
    for name in "AB":
        ours, theirs = getattr(one.layers["a"], name), getattr(other.layers["a"], name)
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()


@pytest.mark.parametrize("rule", [TrimmedMean(0.2), Median()], ids=str)
@given(seed=SEEDS)
def test_names_do_not_decide(rule: TrimmedMean, seed: int) -> None:
    """Other names for the same uploads: the same bits, zeros with a sign included."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-1, 2, (6, 1), generator=draw) * (2.0 * torch.randint(0, 2, (6, 1), generator=draw) - 1).double()
    clients = [one(row.tolist(), row.tolist(), row.item()) for row in numbers]
    some = merged(rule, "rbla", one([9], [9]), clients)
    other = merged(rule, "rbla", one([9], [9]), clients[::-1])
    assert some.layers["a"].A.numpy().tobytes() == other.layers["a"].A.numpy().tobytes()
    assert some.tensors["head"].numpy().tobytes() == other.tensors["head"].numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [TrimmedMean(0.0), TrimmedMean(0.2), Median()], ids=str)
@given(seed=SEEDS, count=st.integers(1, 9), same=st.booleans())
def test_each_number_lies_between_its_owners(rule: TrimmedMean, dtype: torch.dtype, seed: int, count: int, same: bool) -> None:
    """To the last bit; so where all agree, nothing changes."""
    ranks = [(seed + 7 * k) % LARGEST + 1 for k in range(count)]
    sent = [adapter(rank, seed if same else seed + k, dtype=dtype) for k, rank in enumerate(ranks)]
    if same:
        sent = [replace(each, layers={"a": LoraLayer(sent[0].layers["a"].A[:1].expand(rank, -1).clone(),
                                                     sent[0].layers["a"].B[:, :1].expand(-1, rank).clone(), 1.0)})
                for each, rank in zip(sent, ranks, strict=True)]  # fmt: skip
    updates = [ClientUpdate(each, 1 + k, f"c{k}") for k, each in enumerate(sent)]
    found = rule.aggregate(methods.make("rbla"), state(dtype=dtype), updates).adapter
    for j in range(max(ranks)):
        owners = [each.layers["a"] for each, rank in zip(sent, ranks, strict=True) if rank > j]
        for number, numbers in (
            (found.layers["a"].A[j], torch.stack([owner.A[j] for owner in owners])),
            (found.layers["a"].B[:, j], torch.stack([owner.B[:, j] for owner in owners])),
        ):
            assert (number >= numbers.amin(dim=0)).all()
            assert (number <= numbers.amax(dim=0)).all()
    heads = torch.stack([each.tensors["head"] for each in sent])
    assert ((heads.amin(dim=0) <= found.tensors["head"]) & (found.tensors["head"] <= heads.amax(dim=0))).all()


EVIL = st.sampled_from([1e300, -1e300, 1.7e308, -1.7e308, 1e15, -1e15, 0.0, -0.0, 5.0, -5.0])


@pytest.mark.parametrize(("rule", "hostile"), [(TrimmedMean(0.1), 1), (TrimmedMean(0.3), 3), (Median(), 4)], ids=str)
@given(seed=SEEDS, evil=st.lists(EVIL, min_size=4, max_size=4), where=st.permutations(range(9)))
def test_a_minority_of_any_kind_does_not_leave_the_range_of_the_honest(rule, hostile: int, seed: int, evil, where) -> None:
    """Of nine clients, one, three, and four: each number stays between the honest ones', for the largest numbers there are."""
    sent = [adapter(LARGEST, seed + k) for k in range(9)]
    honest = [sent[k] for k in where[hostile:]]
    for k, value in zip(where[:hostile], evil, strict=False):
        layer = sent[k].layers["a"]
        full = LoraLayer(torch.full_like(layer.A, value), torch.full_like(layer.B, -value), 1.0)
        sent[k] = Adapter({"a": full}, {"head": torch.full_like(sent[k].tensors["head"], value)})
    found = rule.aggregate(
        methods.make("rbla"), state(), [ClientUpdate(each, 1, f"c{k}") for k, each in enumerate(sent)]
    ).adapter
    for get in (lambda a: a.layers["a"].A, lambda a: a.layers["a"].B, lambda a: a.tensors["head"]):
        numbers = torch.stack([get(each) for each in honest])
        assert (numbers.amin(dim=0) <= get(found)).all()
        assert (get(found) <= numbers.amax(dim=0)).all()


@pytest.mark.parametrize("rule", [TrimmedMean(0.2), Median()], ids=str)
def test_the_largest_numbers_have_a_finite_mean_by_hand(rule: TrimmedMean) -> None:
    """Of -1, 1e308, 1.5e308, 1.7e308, the two in the middle: 1.25e308, though their sum is more than float64 holds."""
    numbers = torch.tensor([1.7e308, 1e308, -1.0, 1.5e308], dtype=torch.float64)
    assert rule.centre(numbers).item() == pytest.approx(1.25e308, rel=1e-15)


@pytest.mark.parametrize("rule", [TrimmedMean(0.0), TrimmedMean(0.2), Median()], ids=str)
@given(seed=SEEDS, count=st.integers(1, 7))
def test_no_zero_has_a_sign(rule: TrimmedMean, seed: int, count: int) -> None:
    """Which of two equal zeros is kept must not show."""
    draw = torch.Generator().manual_seed(seed)
    zeros = 0.0 * (2.0 * torch.randint(0, 2, (50, count), generator=draw).double() - 1)
    assert not torch.signbit(rule.centre(zeros)).any()


@pytest.mark.parametrize("name", SUITABLE)
@pytest.mark.parametrize("round", [0, 1])
def test_what_is_not_trained_and_what_has_no_owner_stays_as_the_method_leaves_it(name: str, round: int) -> None:
    """A client that sends a factor that was not asked for changes nothing by it."""
    updates = cohort([LARGEST] * 5) if name == "fedavg" else cohort([2, 1, 2, 2, 1])
    before, method = state(round), methods.make(name)
    plain, found = (each.adapter.layers["a"] for each in (method.aggregate(before, updates),
                                                          Median().aggregate(method, before, updates)))  # fmt: skip
    trained = {"ffa_lora": "B", "rolora": "BA"[round]}.get(name, "AB")
    for factor in "AB":
        ours, theirs = (getattr(each, factor) if factor == "A" else each.B.T for each in (found, plain))
        if factor not in trained:
            assert torch.equal(ours, theirs)
        elif name != "fedavg":
            assert torch.equal(ours[2:], theirs[2:])
            assert not torch.isclose(ours[:2], theirs[:2]).any()


def test_a_counter_stays_a_whole_number() -> None:
    heads = [torch.tensor([n, -n]) for n in (1, 2, 9, 5)]  # the median of 1, 2, 5, 9 is 3.5, which rounds to 4
    server = replace(one([9], [9]), tensors={"steps": torch.tensor([0, 0])})
    found = merged(Median(), "rbla", server, [replace(one([1], [1]), tensors={"steps": head}) for head in heads])
    assert found.tensors["steps"].tolist() == [4, -4]
    assert found.tensors["steps"].dtype == torch.int64


@pytest.mark.parametrize("name", SUITABLE)
@pytest.mark.parametrize("numbers", [1, 7, 64])
def test_parts_of_any_size_give_the_same_bits_and_are_no_larger(name: str, numbers: int, monkeypatch) -> None:
    method, updates = methods.make(name), cohort(ranks_for(name))
    expected = TrimmedMean(0.2).aggregate(method, state(), updates).adapter
    monkeypatch.setattr(coordinates, "_NUMBERS", numbers)
    largest = 0
    centre = TrimmedMean.centre

    def seen(rule: TrimmedMean, held: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, held.numel())
        return centre(rule, held)

    monkeypatch.setattr(TrimmedMean, "centre", seen)
    found = TrimmedMean(0.2).aggregate(method, state(), updates).adapter
    assert torch.equal(found.layers["a"].A, expected.layers["a"].A)
    assert torch.equal(found.layers["a"].B, expected.layers["a"].B)
    assert torch.equal(found.tensors["head"], expected.tensors["head"])
    assert largest <= max(numbers, len(updates) * LARGEST)  # one row of all owners at least


@pytest.mark.parametrize("name", SUITABLE)
def test_no_argument_is_changed(name: str) -> None:
    before, updates = state(), cohort(ranks_for(name))
    held = [t for each in (before.adapter, *(u.adapter for u in updates))
            for t in (each.layers["a"].A, each.layers["a"].B, each.tensors["head"])]  # fmt: skip
    copies = [t.clone() for t in held]
    Median().aggregate(methods.make(name), before, updates)
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


@dataclass(frozen=True)
class First(methods.Method):
    """Hands on the first client's own tensors."""

    name, summary, paper, rescale = "first", "", "", "both"
    traits = methods.make("rbla").traits
    weights = staticmethod(slice_weights)

    def merge_layer(self, state: ServerState, name: str, parts: Sequence[Part]) -> LoraLayer:
        return parts[0].layer


def test_an_upload_that_a_method_hands_on_is_not_changed() -> None:
    """Of 1, 2 and 6, the median is 2, and the first client's number stays 1."""
    clients = [one([a], [a], a) for a in (1, 2, 6)]
    found = merged(Median(), First(), one([9], [9]), clients)
    assert (found.layers["a"].A.item(), found.layers["a"].B.item(), found.tensors["head"].item()) == (2.0, 2.0, 2.0)
    assert (clients[0].layers["a"].A.item(), clients[0].layers["a"].B.item()) == (1.0, 1.0)


# --- where it is refused, and in a run --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["trimmed-mean", "median"])
@pytest.mark.parametrize("name", [name for name, kind in sorted(methods.REGISTRY.items()) if not kind.reference])
def test_methods_that_average_no_numbers_are_refused_in_one_line(rule: str, name: str) -> None:
    config = RobustConfig(rule=rule)
    if name in SUITABLE:
        rules.check(config, methods.make(name), central=False, cohort=5)
        return
    with pytest.raises(ConfigError) as error:
        rules.check(config, methods.make(name), central=False, cohort=5)
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    assert methods.make(name).private or ", ".join(SUITABLE) in str(error.value)


@pytest.mark.parametrize("rule", ["trimmed-mean", "median"])
def test_one_hostile_client_of_ten_does_not_ruin_a_run(rule: str, tmp_path: Path, monkeypatch, cache) -> None:
    from test_robust import OFF, accuracy

    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    honest = accuracy(tmp_path, "none", 1.0, "rbla", OFF)
    assert accuracy(tmp_path, rule, -300.0, "rbla", OFF) > honest - 0.1


def test_the_configuration_names_them() -> None:
    from test_robust import OFF

    config = Config().replace(robust={"rule": "trimmed-mean", "trim": 0.25}, guard=OFF)
    assert rules.rule_of(config, methods.make("rbla"), None).rules == (TrimmedMean(0.25),)
    config = Config().replace(robust={"rule": "median"})
    assert rules.rule_of(config, methods.make("rbla"), None).rules[-1] == Median()  # after the guard's
