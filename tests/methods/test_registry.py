"""Methods by name: the nearest word in every error, and a method of one's own from a file."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from anyrank.errors import MethodError
from anyrank.methods import REGISTRY, Holds, catalog, load_file, make, register
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


def test_loading_the_same_file_twice_is_fine_and_a_name_of_the_librarys_own_is_never_given_away(own):
    load_file(own)
    with pytest.raises(MethodError, match=r"'fedavg' is registered already, by anyrank\.methods\.fedavg; choose another"):
        register(dataclasses.dataclass(frozen=True)(type("Mine", (REGISTRY["rbla"],), {"name": "fedavg"})))
    own.write_text(OWN.replace('"last"', '"fedavg"'))
    with pytest.raises(MethodError, match=r"method\.file: .*mine\.py, line \d+: method 'fedavg' is registered already"):
        load_file(own)
    assert REGISTRY["fedavg"].__name__ == "FedAvg"


def test_two_files_may_each_have_a_method_of_one_name(own, tmp_path):
    """Two federations in one process, whose files even have one stem: each makes the method of its own file."""
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "mine.py"
    other.write_text(OWN.replace("strength: float = 1.0", "strength: float = 7.0"))
    for path, strength in ((other, 7.0), (own, 1.0), (other, 7.0), (other, 7.0)):
        load_file(path)
        method = make("last")
        assert method.strength == strength
        assert sys.modules[type(method).__module__].__file__ == str(path)


def test_what_a_file_registers_by_an_import_is_its_own_each_time(own, tmp_path, monkeypatch):
    """The second time, the import runs nothing: its methods are remembered, and another file's do not stay in their place."""
    (tmp_path / "shelf.py").write_text(OWN.replace('"last"', '"shelved"'))
    (tmp_path / "taker.py").write_text("import shelf\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        for _ in range(2):
            load_file(tmp_path / "taker.py")
            assert make("shelved").strength == 1.0
    finally:
        del REGISTRY["shelved"], sys.modules["shelf"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n\nraise ValueError('of\\nmine')\n", "broken.py, line 3: ValueError: of;"),
        ("def f(:\n", "broken.py, line 1: SyntaxError: "),
        ("import no_such_module_here\n", "broken.py, line 1: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("raise SystemExit(3)\n", "broken.py, line 1: SystemExit: 3"),
        ("x = 1\n", "registers no method; put @anyrank.methods.register above its class"),
        (OWN + "\n\n@register\nclass Other(Last): ...\n\n", "method 'last' is registered already, by anyrank_own_"),
        (OWN + "\n\n1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_cannot_be_taken_is_one_line_and_leaves_all_as_it_was(own, tmp_path, text, says):
    path, before = tmp_path / "broken.py", dict(REGISTRY)
    path.write_text(text)
    with pytest.raises(MethodError) as error:
        load_file(path)
    assert str(error.value).startswith(f"method.file: {path}")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert before == REGISTRY


def test_the_stored_catalog_is_what_the_classes_say():
    """`catalog.json` is read where torch is not to be loaded: write it anew by `python -m anyrank.methods.catalog`."""
    own = {name for name, kind in REGISTRY.items() if kind.__module__.startswith("anyrank.methods.")}
    assert [entry for entry in catalog.catalog() if entry["name"] in own] == catalog.stored()
    text = catalog.FILE.read_text()
    assert text == json.dumps(catalog.stored(), indent=1) + "\n"


@pytest.mark.parametrize("entry", catalog.stored(), ids=lambda entry: entry["name"])
def test_what_the_stored_catalog_refuses_is_what_make_refuses(entry):
    """The check that needs no torch says what the check by the classes says, for each option and for names that are none."""
    wrong = ["no", True, 1, 1.0, None]
    requests = [{option: value} for option in entry["options"] for value in wrong] + [{"no_such_option": 1}]
    assert outcome(catalog.check, entry["name"], {}) == outcome(make, entry["name"], {}) == ""
    for options in requests:
        by_class = outcome(make, entry["name"], options)
        if not by_class or by_class.startswith("method '"):  # else a value out of its range, which the class alone knows
            assert outcome(catalog.check, entry["name"], options) == by_class
    misspelt = entry["name"][:-1]
    assert outcome(catalog.check, misspelt, {}) == outcome(make, misspelt, {}) != ""


def outcome(call, *arguments) -> str:
    """The words of its refusal, if any."""
    try:
        call(*arguments)
    except MethodError as error:
        return str(error)
    return ""


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
