"""What a server and a worker say to each other besides downloads and uploads: read as it was written, refused in a line."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hostile_frames as hostile
from anyrank import errors
from anyrank.adapter.adapter import Adapter
from anyrank.errors import AnyRankError, ConfigError, FrameError, RunFailed, printable
from anyrank.messages import calls
from anyrank.messages.frame import Frame, Header, from_bytes, to_bytes
from anyrank.messages.records import Facts, Scaling
from anyrank.messages.roster import Names, Roster

LIMIT = 1 << 24
WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=20)


def sent(frame: Frame) -> Frame:
    return from_bytes(to_bytes(frame), LIMIT)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(same(value, getattr(other, name)) for name, value in vars(one).items())
    return type(one) is type(other) and one == other


# --- read as it was written ------------------------------------------------------------------------------------------


@given(
    names=st.lists(WORDS, unique=True, max_size=5),
    clients=st.integers(1, 5),
    labels=st.lists(WORDS, max_size=4),
    known=st.sets(st.sampled_from(("by_label", "owners"))),
    together=st.booleans(),
    numbers=st.lists(st.integers(0, 2**61), min_size=3, max_size=3),
)
def test_a_roster_arrives_as_it_was(
    names: list[str], clients: int, labels: list[str], known: set[str], together: bool, numbers: list[int]
) -> None:
    clients = len(names) or clients
    facts = Facts("a task", "head", "base", tuple(labels), *numbers[:2], numbers[2], together, 3)
    arrays = {"by_label": np.arange(clients * 3).reshape(clients, 3), "owners": np.array([-1, 0])}
    roster = Roster(tuple(names), arrays["by_label"].sum(axis=1), 9, facts, not together, **{key: arrays[key] for key in known})
    ready = calls.Ready(roster, together, numbers[0])
    assert same(calls.ready_of(sent(calls.ready_frame(ready))), ready)


@given(
    alpha=st.floats(1e-6, 1e6),
    rule=st.sampled_from(("constant", "standard", "rslora")),
    own=st.dictionaries(WORDS.filter(bool), st.floats(0.5, 8)),
    rank=st.integers(1, 2**30),
    seed=st.integers(0, 2**61),
)
def test_a_start_is_asked_for_as_it_was(alpha: float, rule: str, own: dict[str, float], rank: int, seed: int) -> None:
    asked = (rank, Scaling(alpha, rule, own), seed)
    assert calls.start_of(sent(calls.start_frame(*asked))) == asked


@given(
    jobs=st.integers(1, 10**6),
    deadline_s=st.none() | st.floats(0.01, 1e6),
    mechanism=st.none() | st.just({"key": "00", "plan": {"noise": {"3": 1.5}}}),
    score=st.booleans(),
    train=st.booleans(),
)
def test_a_cohort_is_asked_for_as_it_was(**values: Any) -> None:
    cohort = calls.Cohort(**values | {"score": values["score"] or not values["train"]})
    assert calls.cohort_of(sent(calls.cohort_frame(cohort))) == cohort


@pytest.mark.parametrize("kind", [calls.ADAPTER, calls.EVALUATE])
@pytest.mark.parametrize("merges", [False, True])
def test_an_adapter_arrives_bit_for_bit(kind: str, merges: bool) -> None:
    adapter = hostile.good_download().adapter
    merged = Adapter({"q": adapter.layers["q"]}) if merges else None
    got, base = calls.adapter_of(sent(calls.adapter_frame(adapter, merged, kind)), kind)
    for one, other in ((adapter, got), *([(merged, base)] if merged else [])):
        assert list(one.layers) == list(other.layers)
        for name, layer in one.layers.items():
            theirs = other.layers[name]
            assert (layer.scaling, layer.kind, layer.kernel) == (theirs.scaling, theirs.kind, theirs.kernel)
            assert torch.equal(layer.A, theirs.A)
            assert torch.equal(layer.B, theirs.B)
            assert layer.A.dtype == theirs.A.dtype
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())
        assert dict(one.config) == dict(other.config)
    assert (base is None) == (not merges)


def every_error() -> list[type[AnyRankError]]:
    kinds = (value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, AnyRankError))
    return [kind for kind in kinds if kind is not AnyRankError]


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_an_error_is_of_its_kind_on_the_other_side(kind: type[AnyRankError]) -> None:
    got = calls.error_of(sent(calls.error_frame(kind("expected this, got that"))))
    assert type(got) is kind
    assert str(got) == "expected this, got that"


@pytest.mark.parametrize("kind", ["SystemExit", "printable", "difflib", "Iterable", "object", "", "AnyRank", "__builtins__"])
def test_an_error_of_a_kind_that_is_none_of_ours_is_a_run_that_failed(kind: str) -> None:
    """The kind is looked up among names: none but errors of ours may be made of it."""
    frame = Frame(Header(calls.ERROR, body={"kind": kind, "text": "boom\n\x1b[31m"}), {})
    got = calls.error_of(sent(frame))
    assert type(got) is RunFailed
    assert str(got) == printable("boom\n\x1b[31m")


# --- refused in a line -----------------------------------------------------------------------------------------------

READERS = {
    calls.SETUP: calls.setup_of,
    calls.PROGRESS: calls.progress_of,
    calls.READY: calls.ready_of,
    calls.START: calls.start_of,
    calls.ADAPTER: calls.adapter_of,
    calls.EVALUATE: lambda frame: calls.adapter_of(frame, calls.EVALUATE),
    calls.COHORT: calls.cohort_of,
    calls.ERROR: calls.error_of,
}
GOOD = [each for each in hostile.good_calls(hostile.good_download().adapter)]


def test_the_cases_have_every_kind() -> None:
    assert {frame.header.kind for frame in GOOD} | {calls.ADAPTER} == READERS.keys()


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("good", GOOD, ids=lambda frame: frame.header.kind)
def test_each_kind_is_read_as_itself_and_as_nothing_else(good: Frame, kind: str) -> None:
    if good.header.kind == kind:
        READERS[kind](sent(good))
    else:
        with pytest.raises(FrameError, match="expected one of kind"):
            READERS[kind](sent(good))


@pytest.mark.parametrize("good", GOOD, ids=lambda frame: frame.header.kind)
def test_a_key_more_or_less_and_an_array_more_are_refused(good: Frame) -> None:
    read, body = READERS[good.header.kind], dict(good.header.body)
    for key in body:
        less = {name: value for name, value in body.items() if name != key}
        with pytest.raises(FrameError):
            read(dataclasses.replace(good, header=dataclasses.replace(good.header, body=less)))
    with pytest.raises(FrameError):
        read(dataclasses.replace(good, header=dataclasses.replace(good.header, body=body | {"more": 1})))
    with pytest.raises(FrameError):
        read(dataclasses.replace(good, arrays={**good.arrays, "more": np.zeros(3)}))


@pytest.mark.parametrize("number", range(150))
def test_a_spoiled_frame_is_read_or_refused_in_a_line(number: int) -> None:
    chance = random.Random(f"calls-{number}")
    assert hostile.frames(hostile.spoiled_frame(chance)) in ("read", "refused", "refused as a record")


def ready(**changed: Any) -> Frame:
    good = hostile.good_ready()
    return calls.ready_frame(dataclasses.replace(good, roster=dataclasses.replace(good.roster, **changed)))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"sizes": np.array([7, -1])}, "of at least 0"),
        ({"sizes": np.array([7])}, "a number of examples for each client"),
        ({"sizes": np.array([7, 5], np.int32)}, "int64"),
        ({"sizes": np.array([[7, 5]])}, "dimensions"),
        ({"sizes": np.array([], np.int64), "names": ()}, "at least one client"),
        ({"names": ("ada", "ada")}, "different names"),
        ({"by_label": np.array([[1, 2]])}, "by_label"),
        ({"by_label": np.array([[1, -2], [3, 4]])}, "by_label"),
        ({"by_label": np.array([[3, 5], [5, 0]])}, "by_label"),
        ({"owners": np.array([0, 2])}, "owners"),
        ({"owners": np.array([0, -2])}, "owners"),
    ],
)
def test_a_roster_that_does_not_fit_together_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(FrameError, match=reason):
        calls.ready_of(sent(ready(**changed)))


@pytest.mark.parametrize("values", [{"pooled": -1}, {"memory": -1}])
def test_numbers_below_nothing_are_refused(values: dict[str, int]) -> None:
    good = calls.ready_frame(hostile.good_ready())
    header = dataclasses.replace(good.header, body={**good.header.body, **values})
    with pytest.raises(FrameError, match="at least 0"):
        calls.ready_of(sent(dataclasses.replace(good, header=header)))


def test_nobody_is_asked_for_less_than_one_thing() -> None:
    for frame in (
        calls.cohort_frame(calls.Cohort(0)),
        calls.cohort_frame(calls.Cohort(1, deadline_s=-1.0)),
    ):
        with pytest.raises(FrameError):
            calls.cohort_of(sent(frame))
    with pytest.raises(FrameError, match="rank"):
        calls.start_of(sent(calls.start_frame(0, Scaling(1.0), 0)))
    with pytest.raises(FrameError, match="largest_rank"):
        calls.setup_of(sent(calls.setup_frame({}, 0)))
    with pytest.raises(FrameError, match="alpha"):
        calls.start_of(
            sent(
                Frame(
                    Header(calls.START, body={"rank": 1, "alpha": -1.0, "rule": "standard", "layer_alpha": {}, "seed": 1}), {}
                )
            )
        )


# --- names -----------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 12_000), place=st.integers(0, 11_999))
def test_the_name_of_a_client_leads_back_to_it(count: int, place: int) -> None:
    names = Names(count)
    if place < count:
        assert names.index(names[place]) == place
        assert len(names[place]) == len(names[0])


@given(text=st.text(max_size=12) | st.from_regex(r"client-[0-9]{0,5}", fullmatch=True), count=st.integers(1, 1000))
def test_no_other_name_leads_to_a_client(text: str, count: int) -> None:
    names = Names(count)
    try:
        place = names.index(text)
    except KeyError:
        return
    assert names[place] == text


def test_a_setup_error_is_of_its_kind() -> None:
    assert isinstance(calls.error_of(calls.error_frame(ConfigError("x"))), ConfigError)
