"""A site's examples are its own: beside other sites it has the inputs, labels and columns, bit for bit, that it has alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from anyrank import devices
from anyrank.config.sections import Config
from anyrank.config.tables import from_table
from anyrank.data.sites import OWNER
from anyrank.errors import DataError
from anyrank.tasks.base import Examples
from anyrank.tasks.load import _cached_task, load_task
from anyrank.tasks.text.encoder import Encoder
from anyrank.tasks.vision import task as vision

transformers = pytest.importorskip("transformers")
import test_causal  # noqa: E402 - need transformers
import test_vision  # noqa: E402
from tiny import WORDS, make_classifier, make_model  # noqa: E402

LABELS = ("arrival", "exchange", "top-up")
Rows = list[tuple[int, str]]  # a number that the example is made from, and its label


# --- files of every kind ----------------------------------------------------------------------------------------------


def _text(number: int) -> str:
    draw = random.Random(number)
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))


def write_texts(path: Path, rows: Rows, column: str) -> Path:
    lines = [f"{_text(number)},{label},{number}" for number, label in rows]
    path.with_suffix(".csv").write_text("\n".join([f"text,label,{column}", *lines]) + "\n")
    return path.with_suffix(".csv")


def write_pictures(path: Path, rows: Rows, column: str) -> Path:
    values = [np.random.default_rng(number).integers(0, 256, (12, 8, 3), dtype=np.uint8) for number, _ in rows]
    columns = {"image": np.stack(values), "label": np.array([label for _, label in rows])}
    np.savez(path.with_suffix(".npz"), **columns, **{column: np.array([str(number) for number, _ in rows])})
    return path.with_suffix(".npz")


def write_prompts(path: Path, rows: Rows, column: str) -> Path:
    made = [
        {"prompt": _text(number), "completion": f" it is {number}", "label": label, column: number} for number, label in rows
    ]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return path.with_suffix(".jsonl")


@dataclass(frozen=True)
class Kind:
    """A kind of task: what makes its model, its keys, the modules that get LoRA, and what writes a site's file."""

    model: Callable[[Path], Path] | None
    keys: dict
    targets: list[str]
    write: Callable[[Path, Rows, str], Path]


TEXT = {"task": "text-classification", "dtype": "float32"}
IMAGES = {"task": "image-classification", "dtype": "float32"}
UPPER = [f"encoder.layer.2.attention.self.{name}" for name in ("query", "value")]
KINDS = {
    "text, map": Kind(make_model, TEXT | {"head": "frozen"}, [], write_texts),
    "text, names as head": Kind(make_model, TEXT | {"head": "label-names"}, [], write_texts),
    "text, frozen layers": Kind(make_model, TEXT | {"head": "frozen"}, UPPER, write_texts),
    "text, features on disk": Kind(make_model, TEXT | {"head": "frozen", "features": "disk"}, UPPER, write_texts),
    "text, token ids": Kind(make_model, TEXT | {"head": "trained"}, ["query"], write_texts),
    "text, own head": Kind(
        lambda path: make_classifier(path, labels=LABELS), TEXT | {"head": "model-trained"}, ["query"], write_texts
    ),
    "images, map": Kind(test_vision.make_model, IMAGES | {"head": "trained"}, ["map"], write_pictures),
    "images, frozen layers": Kind(test_vision.make_model, IMAGES | {"head": "frozen"}, [], write_pictures),
    "images, features on disk": Kind(test_vision.make_model, IMAGES | {"features": "disk"}, [], write_pictures),
    "images, small": Kind(
        None, {"task": "image-classification", "name": "fashion-mlp", "pretrained": False}, [], write_pictures
    ),
    "instructions": Kind(test_causal.make_model, {"task": "causal-lm", "max_length": 400}, ["q_proj"], write_prompts),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path | None]:
    """The model folder of a kind, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("kinds"), {}

    def folder(kind: str) -> Path | None:
        make = KINDS[kind].model
        if make and kind not in made:
            made[kind] = make(root / kind.replace(", ", "-"))
        return made.get(kind)

    return folder


def table(kind: str, model: Path | None, sites: list[dict]) -> Config:
    path = {"path": str(model)} if model else {}
    lora = {"lora": {"target_modules": KINDS[kind].targets}} if KINDS[kind].targets else {}
    return from_table({"model": KINDS[kind].keys | path, "data": {"label_names": list(LABELS)}, "sites": sites} | lora)


def load_with(config: Config, cores: int, cache: Path, patch: pytest.MonkeyPatch):
    """The task, made anew with features of its own on so many cores."""
    _cached_task.cache_clear()
    patch.setattr(devices, "cores", lambda: cores)
    patch.setenv("ANYRANK_CACHE", str(cache))
    task = load_task(config)
    _cached_task.cache_clear()
    return task


def check_same(alone: Examples, among: Examples, rows: np.ndarray) -> None:
    """The examples `alone` are the rows `among` others, bit for bit, in their order."""
    assert len(alone) == len(rows)
    assert torch.equal(alone.labels, among.labels[rows])
    for place, row in enumerate(rows.tolist()):
        one, other = (part.inputs.batch(torch.tensor([at])) for part, at in ((alone, place), (among, row)))
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


rows_of = st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(LABELS)), min_size=3, max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@given(
    own=st.lists(st.tuples(rows_of, rows_of), min_size=2, max_size=3),
    common=st.booleans(),
    cores=st.lists(st.integers(1, 3), min_size=4, max_size=4),
)
@settings(  # not shrunk: each case loads several models
    max_examples=8, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_a_site_has_beside_others_what_it_has_alone(kind, own, common, cores, folders, tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("case")
    listed = []
    for number, (train, test) in enumerate(own):
        column = "age" if common else f"age{number}"  # the files of sites need not have the same columns
        sources = [KINDS[kind].write(root / f"s{number}-{part}", rows, column) for part, rows in (("a", train), ("b", test))]
        listed.append({"name": f"s{number}", "source": str(sources[0]), "test_source": str(sources[1])})
    with pytest.MonkeyPatch.context() as patch:
        among = load_with(table(kind, folders(kind), listed), cores[-1], root / "cache", patch)
        assert among.label_names == LABELS
        for number, site in enumerate(listed):
            cache = root / f"cache-{number}"  # so that nothing is read that was made for all sites
            alone = load_with(table(kind, folders(kind), [site]), cores[number], cache, patch)
            for part, columns in (("train", "columns"), ("test", "test_columns")):
                here, there = getattr(alone, columns), getattr(among, columns)
                rows = np.flatnonzero(there[OWNER] == site["name"])
                check_same(getattr(alone, part), getattr(among, part), rows)
                assert set(here) > {OWNER}
                assert all(np.array_equal(values, there[name][rows]) for name, values in here.items())
            assert alone.label_names == among.label_names
            assert alone.targets == among.targets
            frozen = zip(alone.module.state_dict().items(), among.module.state_dict().items(), strict=True)
            assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in frozen)


def test_another_site_leaves_the_features_on_disk_as_they_are(folders, tmp_path, monkeypatch) -> None:
    kind = "text, map"
    rows = [(number, LABELS[number % 3]) for number in range(9)]
    listed = [{"name": name, "source": str(write_texts(tmp_path / name, rows, "age"))} for name in ("a", "b", "c")]
    load_with(table(kind, folders(kind), listed[:2]), 1, tmp_path / "cache", monkeypatch)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    counted: list[tuple[int, int]] = []
    _cached_task.cache_clear()
    load_task(table(kind, folders(kind), listed), progress=lambda done, total: counted.append((done, total)))
    _cached_task.cache_clear()
    assert {total for _, total in counted} == {9}  # the rows of site c, trained and held out: a and b are there
    assert counted[-1] == (9, 9)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert before.items() <= after.items()


@given(own=st.lists(st.integers(9, 40), min_size=2, max_size=3))
@settings(max_examples=8, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_picture_is_in_a_batch_with_those_of_another_site(own, folders, tmp_path_factory) -> None:
    """The frozen part is replaced by one that adds the mean of its batch to each picture's features."""
    root, kind, listed = tmp_path_factory.mktemp("mixed"), "images, map", []
    for number, size in enumerate(own):
        rows = [(100 * number + row, LABELS[row % 3]) for row in range(size)]
        listed.append({"name": f"s{number}", "source": str(write_pictures(root / f"s{number}", rows, "age"))})
    model = folders(kind)
    real = vision.prefix.inputs_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision.prefix, "inputs_of", lambda *of: real(*of) + of[2].mean())
        among = load_with(table(kind, model, listed), 2, root / "cache", patch)
        for site in listed:
            alone = load_with(table(kind, model, [site]), 1, root / f"cache-{site['name']}", patch)
            check_same(alone.train, among.train, np.flatnonzero(among.columns[OWNER] == site["name"]))


@pytest.mark.parametrize("named", [True, False])
def test_the_features_of_sites_are_computed_on_one_thread_each(named: bool, folders, tmp_path, monkeypatch) -> None:
    seen, real = set(), Encoder.hidden

    def hidden(self, *of):
        seen.add(torch.get_num_threads())
        return real(self, *of)

    monkeypatch.setattr(Encoder, "hidden", hidden)
    path = str(write_texts(tmp_path / "a", [(number, LABELS[number % 3]) for number in range(9)], "age"))
    config = table("text, map", folders("text, map"), [{"name": "a", "source": path}])
    if not named:
        config = from_table({"model": TEXT | {"path": str(folders("text, map")), "head": "frozen"}, "data": {"source": path}})
    load_with(config, 3, tmp_path / "cache", monkeypatch)
    assert seen == ({1} if named else {3})


# --- labels -----------------------------------------------------------------------------------------------------------


def labels_of(tmp_path: Path, folders, names: list[str], **files: str) -> tuple[tuple[str, ...], list[int]]:
    """The label names, and the training labels in the order of the sites, of sites with one text for each label in a word."""
    listed = []
    for name, labels in files.items():
        path = tmp_path / f"{name}.csv"
        path.write_text("".join(["text,label\n", *(f"card,{label}\n" for label in labels.split())]))
        listed.append({"name": name, "source": str(path), "test_source": str(path)})
    keys = TEXT | {"head": "frozen", "path": str(folders("text, map"))}
    task = load_task(from_table({"model": keys, "data": {"label_names": names}, "sites": listed}))
    return task.label_names, task.train.labels.tolist()


def test_the_labels_of_sites_are_numbered_as_they_are_listed(folders, tmp_path) -> None:
    assert labels_of(tmp_path, folders, ["c", "a", "b"], one="a b", two="b c") == (("c", "a", "b"), [1, 2, 2, 0])
    assert labels_of(tmp_path, folders, ["c", "a", "b"], two="b c") == (("c", "a", "b"), [2, 0])
    # a label that nobody trains on is an output all the same
    assert labels_of(tmp_path, folders, ["d", "c", "b"], two="b c") == (("d", "c", "b"), [2, 1])


def test_other_names_for_all_labels_are_in_the_order_of_the_labels(folders, tmp_path) -> None:
    assert labels_of(tmp_path, folders, ["no", "yes"], one="0", two="1 0") == (("no", "yes"), [0, 1, 0])


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a", "bee"], "data.label_names: has 'a' of the sites' labels and not 'b'; did you mean 'bee'?; give all labels"),
        (["a", "b", "a"], "data.label_names: has 'a' of the sites' labels and one of them twice"),
        (["no", "yes", "maybe"], "data.label_names: expected 2 different names, for the labels of all sites"),
    ],
)
def test_names_that_are_neither_the_labels_nor_others_for_all_are_refused(folders, tmp_path, names, says) -> None:
    with pytest.raises(DataError) as error:
        labels_of(tmp_path, folders, names, one="a b")
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_a_held_out_label_that_is_not_listed_is_reported(folders, tmp_path) -> None:
    (tmp_path / "test.csv").write_text("text,label\ncard,arival\n")
    site = {"name": "a", "source": str(write_texts(tmp_path / "a", [(1, "arrival"), (2, "top-up")], "age"))}
    config = table("text, map", folders("text, map"), [site | {"test_source": str(tmp_path / "test.csv")}])
    with pytest.raises(DataError, match=r"^site a: label 'arival' .* not among the 3 labels of data.label_names"):
        load_task(config)


# --- spreading over cores ---------------------------------------------------------------------------------------------


@given(items=st.lists(st.integers(), max_size=30), cores=st.integers(1, 5))
@settings(max_examples=30)
def test_results_are_taken_in_order_and_each_is_computed_on_one_thread(items, cores) -> None:
    taken, threads = [], set()

    def compute(item: int) -> int:
        threads.add(torch.get_num_threads())
        return item * 2

    with pytest.MonkeyPatch.context() as patch, devices.threads(2):
        patch.setattr(devices, "cores", lambda: cores)
        devices.spread(iter(items), compute, lambda item, found: taken.append((item, found)))
        assert torch.get_num_threads() == 2
    assert taken == [(item, item * 2) for item in items]
    assert threads <= {1}


def test_an_error_of_a_computation_is_raised_and_what_waits_is_not_begun(monkeypatch) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 1)
    begun = []

    def compute(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise DataError("text 3")
        return item

    with pytest.raises(DataError, match="text 3"):
        devices.spread(range(1000), compute, lambda item, found: None)
    assert len(begun) < 20  # one core: at most two wait
