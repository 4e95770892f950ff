"""Methods by name: the nearest word in every error, and a method of one's own from a file."""

from __future__ import annotations

import dataclasses

import pytest

from anyrank.errors import MethodError
from anyrank.methods import REGISTRY, Holds, load_file, make, register
from conformance import test_traits
from conformance.test_traits import MEASURES, deviations
from conformance.world import EQUAL, MIXED, World, after_one_round, begin, everything, updates_of

OWN = '''
"""The last client, by name, wins."""

from dataclasses import dataclass
from typing import Literal

from anyrank.methods import Holds, Method, Traits, register


@register
@dataclass(frozen=True)
class Last(Method):
    """The factors of the last client, the server's rank filled up."""

    name = "last"
    summary = "the last client wins"
    paper = "none"
    traits = Traits(mixed_ranks=True, exact=Holds.NEVER, linear=Holds.ALWAYS, gauge_free=Holds.ALWAYS, stationary=Holds.EQUAL)

    strength: float = 1.0
    mood: Literal["calm", "wild"] = "calm"

    def merge_layer(self, state, name, parts):
        last, held = parts[-1].layer, state.adapter.layers[name]
        return held.with_factors(last.A, last.B * (last.scaling / held.scaling))
'''


@pytest.fixture
def own(tmp_path):
    """A user's file with a method `last`, registered for one test."""
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    load_file(path)
    yield path
    del REGISTRY["last"]


def test_a_method_has_the_options_that_it_was_given():
    assert make("raflora", {"split": "balanced"}).split == "balanced"
    assert make("raflora") == make("raflora", {"split": "singular-in-b", "empty_slice": "keep"})


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("raflroa", {}, "method 'raflroa': unknown; did you mean 'raflora'?"),
        ("FedAvg", {}, "method 'FedAvg': unknown; did you mean 'fedavg'?"),
        ("zzz", {}, "method 'zzz': unknown; known: centralized, fedavg, "),
        ("raflora", {"spilt": "balanced"}, "method 'raflora': unknown option 'spilt'; did you mean 'split'?"),
        ("fedavg", {"split": "balanced"}, "method 'fedavg': unknown option 'split'; it has no options"),
        ("rbla", {"empty_slice": "drop"}, "method 'rbla': option empty_slice expects one of 'keep', 'zero', got 'drop'"),
        ("ffa_lora", {"init_a": 3}, "option init_a expects one of 'kaiming', 'orthonormal', 'gaussian', got 3"),
        ("rbla", {"name": "other"}, "method 'rbla': unknown option 'name'"),
        ("hetlora", {"prune": 1}, "method 'hetlora': option prune expects bool, got 1"),
        ("florist", {"energy": 0.0}, "florist: energy: expected a share above 0 and at most 1, got 0.0"),
        ("lora_fair", {"penalty": 0}, "lora_fair: penalty: expected a number above 0, got 0.0"),
    ],
)
def test_a_wrong_word_is_an_error_with_the_right_one(name, options, says):
    with pytest.raises(MethodError) as error:
        make(name, options)
    assert says in str(error.value)


def test_a_users_method_has_typed_options(own):
    assert make("last", {"strength": 2}).strength == 2.0
    assert isinstance(make("last", {"strength": 2}).strength, float)
    for wrong, expected in (
        ({"strength": "big"}, "expects float, got 'big'"),
        ({"mood": "sad"}, "one of 'calm', 'wild', got 'sad'"),
    ):
        with pytest.raises(MethodError, match=expected):
            make("last", wrong)


def test_a_users_method_is_judged_by_the_same_suite(own):
    method = make("last")
    state = after_one_round(method, World(MIXED))
    updates = updates_of(method, state, World(MIXED).clients())
    assert everything(method.aggregate(state, updates)) == everything(method.aggregate(state, updates[::-1]))
    for trait in MEASURES:
        claim = getattr(method.traits, trait)
        equal, mixed = (max(deviations(method, trait, ranks).values()) for ranks in (EQUAL, MIXED))
        assert (equal < 1e-9) == (claim is not Holds.NEVER), trait
        if claim is not Holds.NEVER:
            assert (mixed < 1e-9) == (claim is Holds.ALWAYS), trait


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        ({"exact": Holds.ALWAYS}, "claims exact: any ranks, but: ranks .* off by"),
        ({"stationary": Holds.ALWAYS}, r"claims stationary: any ranks, but: ranks \(2, 3, 5, 5, 8\)"),
        ({"gauge_free": Holds.NEVER}, "claims gauge_free: no, yet it holds for equal ranks"),
        ({"linear": Holds.EQUAL}, "claims linear: equal ranks, yet it holds for unequal ranks too"),
    ],
    ids=["boastful", "boastful of unequal ranks", "modest", "modest of unequal ranks"],
)
def test_a_false_claim_of_a_users_method_is_found(own, claim, says):
    kind = REGISTRY["last"]
    liar = type("Liar", (kind,), {"traits": dataclasses.replace(kind.traits, **claim)})()
    [trait] = claim
    with pytest.raises(AssertionError, match=says):
        test_traits.test_a_trait_holds_where_it_is_claimed_and_nowhere_else(liar, trait)


def test_loading_the_same_file_twice_is_fine_and_another_method_of_that_name_is_not(own, tmp_path):
    load_file(own)
    other = tmp_path / "other.py"
    other.write_text(OWN)
    with pytest.raises(MethodError, match="method 'last' is registered already, by anyrank_user_methods_mine; choose another"):
        load_file(other)
    with pytest.raises(MethodError, match="method 'fedavg' is registered already"):
        register(dataclasses.dataclass(frozen=True)(type("Mine", (REGISTRY["rbla"],), {"name": "fedavg"})))
    assert REGISTRY["fedavg"].__name__ == "FedAvg"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MethodError, match=r"method\.file: no such file .*nowhere\.py; expected a Python file"):
        load_file(tmp_path / "nowhere.py")


def test_a_method_is_a_value():
    assert make("rbla") == make("rbla")
    assert len({make("rbla"), make("rbla", {"empty_slice": "zero"}), make("rbla")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        make("rbla").empty_slice = "zero"


def test_starting_a_run_changes_nothing_that_is_applied():
    for name in sorted(REGISTRY):
        for layer in begin(make(name), World(EQUAL)).adapter.layers.values():
            assert layer.delta().abs().max() == 0
