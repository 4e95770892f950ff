"""Whose each example is, from the column of a file to the clients of a run: nobody is split, missed, counted twice or named."""

from __future__ import annotations

import csv
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import anyrank
from anyrank import config as configs
from anyrank import simulation
from anyrank.config.sections import Config, DataConfig, SiteConfig
from anyrank.data import images, instructions, people, sites, texts
from anyrank.data.partition import by_hand
from anyrank.data.split import held_out
from anyrank.engines import workers
from anyrank.errors import AnyRankError, ConfigError, DataError
from anyrank.messages import calls
from anyrank.privacy import noise
from anyrank.privacy.accountants import Spending, composed, epsilon
from anyrank.privacy.grant import Grant, Release
from anyrank.training import private_examples
from anyrank.worker.sitefile import load as load_site
from site_world import LABELS, WORDS, Asked, make_world, setup, site_file, table
from test_workers import Direct, assert_same, whole

SECRET = "Ægir-Þórsson"  # a name that nothing may say
OWNERS = [f"{SECRET}-{place % 7}" for place in range(40)]  # 7 persons, of 5 or 6 rows
ROWS = [(f"card {place} exchange", LABELS[place % 3], owner) for place, owner in enumerate(OWNERS)]


# --- every source -----------------------------------------------------------------------------------------------------


def as_csv(folder: Path, rows: Sequence[Sequence[object]] = ROWS, name: str = "data.csv") -> DataConfig:
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label", "who"), *rows])
    return DataConfig(source=str(folder / name), person="who")


def as_tsv(folder: Path) -> DataConfig:
    text = "".join(f"{text}\t{label}\t{owner}\n" for text, label, owner in ROWS)
    (folder / "data.tsv").write_text(text, encoding="utf-8")
    return DataConfig(source=str(folder / "data.tsv"), header=False, text=0, label=1, person="2")


def as_lines(folder: Path) -> DataConfig:
    lines = [json.dumps({"text": text, "label": label, "who": owner}) for text, label, owner in ROWS]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return DataConfig(source=str(folder / "data.jsonl"), person="who")


def as_parquet(folder: Path) -> DataConfig:
    import pyarrow
    from pyarrow import parquet

    columns = dict(zip(("text", "label", "who"), map(list, zip(*ROWS, strict=True)), strict=True))
    parquet.write_table(pyarrow.table(columns), folder / "data.parquet")
    return DataConfig(source=str(folder / "data.parquet"), person="who")


def as_dataset(folder: Path) -> DataConfig:
    import datasets

    columns = dict(zip(("text", "label", "who"), map(list, zip(*ROWS, strict=True)), strict=True))
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
    return DataConfig(source=str(folder / "saved"), person="who")


def as_instructions(folder: Path) -> DataConfig:
    lines = [json.dumps({"prompt": text, "completion": label, "who": owner}) for text, label, owner in ROWS]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return DataConfig(source=str(folder / "data.jsonl"), person="who")


def as_arrays(folder: Path) -> DataConfig:
    pixels = np.zeros((len(ROWS), 4, 4), dtype=np.uint8)
    labels = np.array([label for _, label, _ in ROWS])
    np.savez(folder / "data.npz", image=pixels, label=labels, who=np.array(OWNERS))
    return DataConfig(source=str(folder / "data.npz"), person="who")


def as_pictures(folder: Path) -> DataConfig:
    rows = [("file_name", "who")]
    for place, (_, label, owner) in enumerate(ROWS):
        (folder / "pictures" / label).mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / "pictures" / label / f"{place:02d}.png")
        rows.append((f"{label}/{place:02d}.png", owner))
    with open(folder / "pictures" / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return DataConfig(source=str(folder / "pictures"), person="who")


SOURCES = {
    "CSV": (texts, as_csv),
    "TSV by number": (texts, as_tsv),
    "JSON lines": (texts, as_lines),
    "Parquet": (texts, as_parquet),
    "dataset": (texts, as_dataset),
    "instructions": (instructions, as_instructions),
    "arrays": (images, as_arrays),
    "pictures": (images, as_pictures),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_person_is_held_out_with_all_of_their_examples_whatever_the_source(kind: str, tmp_path: Path) -> None:
    reader, write = SOURCES[kind]
    data = write(tmp_path)
    train, test = reader.load_split(data)
    ours, theirs = (people.ids(part.columns, data.person) for part in (train, test))
    assert set(ours) | set(theirs) == set(OWNERS)
    assert not set(ours) & set(theirs)
    assert sorted([*ours, *theirs]) == sorted(OWNERS)


@settings(max_examples=50, deadline=None)
@given(names=st.lists(st.sampled_from([f"p{k}" for k in range(30)]), min_size=1, max_size=60), gone=st.integers(0, 59))
def test_whether_a_person_is_held_out_depends_on_nobody_else(names: list[str], gone: int) -> None:
    """So that a data set with one person less has the same split of all others."""
    data = DataConfig(person="who", test_fraction=0.3)

    def split(owners: list[str]) -> dict[str, bool]:
        part = texts.Table(("t",) * len(owners), np.zeros(len(owners), np.int64), ("a",), {"who": np.array(owners, object)})
        if all(people._draw(name) < 0.3 for name in owners):
            with pytest.raises(DataError, match="leave none to train on"):
                people.set_aside(part, data)
            return dict.fromkeys(owners, True)
        mask = people.set_aside(part, data)
        assert len({*zip(owners, mask.tolist(), strict=True)}) == len(set(owners))
        return dict(zip(owners, mask.tolist(), strict=True))

    everyone, removed = split(names), names[gone % len(names)]
    rest = [name for name in names if name != removed]
    if rest:
        assert split(rest) == {name: held for name, held in everyone.items() if name != removed}


def test_the_share_of_persons_that_are_held_out_is_the_one_that_is_asked_for() -> None:
    part = texts.Table(
        ("t",) * 4000, np.zeros(4000, np.int64), ("a",), {"who": np.array([f"p{k}" for k in range(4000)], object)}
    )
    for fraction in (0.1, 0.5):
        share = people.set_aside(part, DataConfig(person="who", test_fraction=fraction)).mean()
        assert share == pytest.approx(fraction, abs=5 * (fraction * (1 - fraction) / 4000) ** 0.5)


def test_without_a_person_the_split_is_the_one_by_label(tmp_path: Path) -> None:
    data = DataConfig(source=as_csv(tmp_path).source)
    part = texts.training(data)
    assert (people.set_aside(part, data) == held_out(part.labels, 0.2)).all()


def test_a_person_is_on_one_side_of_the_split_at_all_sites(tmp_path: Path) -> None:
    as_csv(tmp_path, ROWS[:20], "one.csv")
    as_csv(tmp_path, ROWS[20:], "two.csv")
    asked = [SiteConfig(name, source=str(tmp_path / f"{name}.csv")) for name in ("one", "two")]
    train, test = sites.load_split(texts, DataConfig(person="who"), asked)
    assert not set(train.columns["who"]) & set(test.columns["who"])


@pytest.mark.parametrize(
    ("written", "persons"),
    [
        (["1", " 1", "1 ", "\t1"], 1),
        (["1", "2", "01", "1.0"], 3),  # 1.0 is 1, as tables with gaps write whole numbers; 01 is a name
        (["é", "é", "E", "e"], 3),  # one composed letter, or two; case is part of a name
        (["x y", "xy", "x  y", "X"], 4),
        ([7, 7.0, "7", np.int64(7)], 1),
        (["0", "-0", "false", "-"], 4),
    ],
)
def test_what_is_one_person_and_what_is_two(written: list, persons: int) -> None:
    column = {"who": np.array(written, dtype=object)}
    assert len(set(people.numbers(people.ids(column, "who")).tolist())) == persons


NOBODY = ["", "  ", "\t", None, math.nan, "NaN", "nan", "None", "null", "N/A", "NA", "<NA>", "NaT", "\u3000"]


@pytest.mark.parametrize("empty", NOBODY)
def test_an_example_of_nobody_is_refused_in_one_line_that_names_nobody_else(empty: object) -> None:
    column = {"who": np.array([SECRET, empty, SECRET, empty], dtype=object)}
    with pytest.raises(DataError, match=r"^data\.person: 2 of 4 examples name nobody in column 'who'; ") as refused:
        people.ids(column, "who")
    assert "\n" not in str(refused.value)
    assert SECRET not in str(refused.value)


def test_a_column_of_floats_with_a_gap_is_refused() -> None:
    with pytest.raises(DataError, match="1 of 3 examples name nobody"):
        people.ids({"who": np.array([1.0, math.nan, 2.0])}, "who")


@pytest.mark.parametrize("text", ['{"text": "a", "label": "x"}', '{"text": "a", "label": "x", "who": null}'])
def test_a_row_without_the_key_and_one_with_null_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "b", "label": "y", "who": "' + SECRET + '"}\n' + text)
    with pytest.raises(DataError, match=r"data\.person: ") as refused:
        texts.load_split(DataConfig(source=str(tmp_path / "data.jsonl"), person="who"))
    assert SECRET not in str(refused.value)


# --- who has whose examples -------------------------------------------------------------------------------------------

PRIVACY = {"level": "person", "noise_multiplier": 2.0, "delta": 1e-3, "accountant": "rdp"}
SIZES = [1, 2, 3, 6, 9, 1, 1, 5, 4, 8]  # rows of ten persons; four times as many, in two hospitals


def task_of(owners: Sequence[object], held: Sequence[object] = (), more: dict[str, Sequence[object]] | None = None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, size = torch.randn(len(owners), 6), len(held) or 8
    columns = {"who": np.array(owners, dtype=object)} | {name: np.array(each) for name, each in (more or {}).items()}
    return anyrank.Task(
        module=net, targets=("0",), train=(x, torch.arange(len(owners)) % 3), columns=columns,
        test=(torch.randn(size, 6), torch.arange(size) % 3), test_columns={"who": np.array(held, dtype=object)} if held else {},
    )  # fmt: skip


OWNED = [f"{SECRET}-{person}" for person in range(40) for _ in range(SIZES[person % 10])]
HOSPITALS = [("north", "south")[int(owner.rpartition("-")[2]) % 2] for owner in OWNED]


def config_of(**sections) -> Config:
    keys = {
        "run": {"rounds": 2, "name": "people"}, "model": {}, "data": {"person": "who"}, "clients": {"count": 2, "ranks": (2,)},
        "train": {"optimizer": "sgd", "learning_rate": 0.5, "batch_size": 4, "local_steps": 3}, "privacy": PRIVACY,
        "method": {"name": "rbla"},
    }  # fmt: skip
    return Config().replace(**{name: each | sections.get(name, {}) for name, each in keys.items()})


def by_column(column: str = "hospital") -> dict:
    return {"person": "who", "partition": configs.sections.PartitionConfig(kind="column", column=column)}


def built(config: Config, task):
    found = simulation.build(config, task=task)
    found.close()
    return found


def test_clients_count_their_persons_everywhere() -> None:
    found = built(config_of(data=by_column(), clients={"participation": 1.0}), task_of(OWNED, more={"hospital": HOSPITALS}))
    assert found.population.sizes.tolist() == [20, 20]
    assert found.privacy.noise.keys() == {20}
    assert found.privacy.sampling_rate(20) == 4 / 20
    assert found.drawn(1) == {"north": 20, "south": 20}
    assert found.facts.train_examples == 40
    assert found.labels is None


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "pathological"])
def test_a_partition_that_splits_persons_is_refused(kind: str) -> None:
    asked = {"person": "who", "partition": configs.sections.PartitionConfig(kind=kind)}
    with pytest.raises(DataError) as refused:
        built(config_of(data=asked), task_of(OWNED))
    assert str(refused.value).startswith(f"data.partition: kind = '{kind}' gives the examples of ")
    assert "kind = 'column' with column = 'who'" in str(refused.value)
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_column_that_persons_do_not_agree_in_is_refused() -> None:
    moved = ["south" if place == 1 else each for place, each in enumerate(HOSPITALS)]  # one row of the second person
    moved[1] = "north" if HOSPITALS[1] == "south" else "south"
    with pytest.raises(DataError, match="gives the examples of 1 persons"):
        built(config_of(data=by_column()), task_of(OWNED, more={"hospital": moved}))


def test_clients_are_not_named_after_persons() -> None:
    """One client a person: its name would be the person's."""
    few = [owner for owner in OWNED if owner.removeprefix(f"{SECRET}-") in ("3", "7", "13", "17")]
    found = built(config_of(data=by_column("who"), train={"batch_size": 1}, clients={"count": 4}), task_of(few))
    assert found.population.sizes.tolist() == [1] * 4
    names = [found.population.name(place) for place in range(4)]
    assert not [name for name in names if SECRET in name]


def test_persons_may_be_divided_among_clients() -> None:
    found = built(config_of(data=by_column("who"), clients={"count": 3}), task_of(OWNED))
    assert sorted(found.population.sizes.tolist()) == [13, 13, 14]


def test_shards_that_split_a_person_are_refused() -> None:
    """From Python too: the second person's two rows, 1 and 2, go to two clients."""
    halves = {"a": [0, 1], "b": list(range(2, len(OWNED)))}
    shards = {name: np.array(rows) for name, rows in halves.items()}
    with pytest.raises(DataError, match="examples of 1 persons"):
        simulation.build(config_of(), task=task_of(OWNED), shards=by_hand(shards, len(OWNED)))


def test_a_person_who_is_held_out_too_is_refused() -> None:
    task = task_of(OWNED, held=[OWNED[0], "someone else"], more={"hospital": HOSPITALS})
    with pytest.raises(DataError, match=r"^data\.test_source: 1 persons of column 'who'") as refused:
        built(config_of(data=by_column()), task)
    assert SECRET not in str(refused.value)


def test_persons_at_two_sites_are_refused(tmp_path: Path) -> None:
    train, _ = _two_sites(tmp_path, ROWS[20:])
    with pytest.raises(DataError, match=r"^sites: 7 persons \(data\.person = 'who'\) have examples at several sites"):
        simulation.build(train)


def test_other_persons_at_two_sites_are_not(tmp_path: Path) -> None:
    chosen, _ = _two_sites(tmp_path, [(text, label, f"south-{owner}") for text, label, owner in ROWS[20:]])
    found = simulation.build(chosen)
    found.close()
    assert found.population.sizes.sum() == 14  # persons


def _two_sites(folder: Path, second: Sequence[Sequence[object]]) -> tuple[Config, Path]:
    make_world(folder)
    as_csv(folder, ROWS[:20], "one.csv")
    as_csv(folder, second, "two.csv")
    as_csv(folder, [(text, label, f"public-{owner}") for text, label, owner in ROWS[:6]], "public.csv")
    asked = [{"name": name, "rank": 2, "source": str(folder / f"{name}.csv")} for name in ("one", "two")]
    held_out = {"person": "who", "test_source": str(folder / "public.csv")}
    made = table("rbla", inside=False, privacy=PRIVACY, data=held_out, train={"batch_size": 2})
    made |= {"sites": asked}
    made["model"] |= {"path": str(folder / "model"), "name": ""}
    return configs.from_table(made), folder


WRONG = {
    "no column is named": ({"data": {"person": ""}}, r"^data\.person: expected the column that names whose each example is"),
    "an unknown column": ({"data": {"person": "whom"}}, r"^data\.person: no column 'whom' that all examples have.*'who'"),
    "a bound below zero": ({"privacy": {"examples_per_person": -1}}, r"^privacy\.examples_per_person: expected a whole number"),
    "a bound for examples": (
        {"privacy": {"level": "example", "examples_per_person": 3}}, r"^privacy\.examples_per_person: .*got 3",
    ),
    "epochs": ({"train": {"local_epochs": 1, "local_steps": 0}}, r"^train\.local_epochs: private training draws"),
    "more persons a step than there are": (
        {"train": {"batch_size": 21}}, r"^train\.batch_size: expected at most the declared persons of the smallest client, 20",
    ),
    "a delta of a whole person": (
        {"privacy": {"delta": 0.06}}, r"^privacy\.delta: expected less than 1 over the 20 persons .* a whole person could be",
    ),
    "noise at the server": ({"privacy": {"noise_at": "server"}}, r"^privacy\.noise_at: .* with level = 'person'"),
    "a method that keeps tensors": ({"method": {"name": "fedsa"}}, r"^method\.name: "),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_promised_to_a_person_is_refused_in_one_line(what: str) -> None:
    sections, words = WRONG[what]
    sections = {**sections, "data": by_column() | sections.get("data", {})}
    with pytest.raises(AnyRankError, match=words) as refused:
        built(config_of(**sections), task_of(OWNED, more={"hospital": HOSPITALS}))
    assert "\n" not in str(refused.value)
    assert SECRET not in str(refused.value)


def test_without_privacy_the_column_only_keeps_persons_together() -> None:
    off = {"level": "none", "noise_multiplier": 0.0, "delta": 0.0, "accountant": "pld"}
    found = built(config_of(privacy=off, data={"person": "who"}), task_of(OWNED))
    assert found.population.sizes.sum() == len(OWNED)
    with pytest.raises(ConfigError, match=r"^privacy\.examples_per_person: expected level = 'example', 'person' or 'client'"):
        config_of(privacy=off | {"examples_per_person": 2})


# --- runs -------------------------------------------------------------------------------------------------------------

RUN = """
[run]
name = "people"
rounds = 2
stacking = "never"
[model]
task = "text-classification"
path = "model"
head = "trained"
[data]
source = "rows.csv"
test_source = "public.csv"
person = "who"
[data.partition]
kind = "column"
column = "hospital"
[clients]
count = 2
ranks = [2, 4]
participation = 1.0
[train]
optimizer = "sgd"
learning_rate = 0.2
batch_size = 4
local_steps = 2
[method]
name = "rbla"
[privacy]
level = "person"
examples_per_person = 2
epsilon = 6.0
delta = 1e-3
accountant = "rdp"
"""


@pytest.fixture
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("transformers")
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv(noise.SEED, "0123456789abcdef" * 2)
    make_world(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)
    draw = np.random.default_rng(0)
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        rows = [
            (" ".join(draw.choice(WORDS, 4)), LABELS[number % 3], owner, hospital)
            for number, (owner, hospital) in enumerate(zip(OWNED, HOSPITALS, strict=True))
        ]
        csv.writer(file).writerows([("text", "label", "who", "hospital"), *rows])
    with open(tmp_path / "public.csv", "w", newline="", encoding="utf-8") as file:
        others = [(text, label, f"public {number}", hospital) for number, (text, label, _, hospital) in enumerate(rows[:12])]
        csv.writer(file).writerows([("text", "label", "who", "hospital"), *others])
    return tmp_path


def run(folder: Path, out: str, *overrides: str) -> dict:
    return simulation.execute(configs.load(folder / "run.toml", overrides), folder / out, resume=True)


def test_a_run_leaves_the_same_bytes_in_process_and_in_workers_and_no_name(place: Path, monkeypatch) -> None:
    monkeypatch.setattr(workers, "Supervised", Direct)
    summary = run(place, "process")
    run(place, "workers", "run.engine=workers", "run.workers=1")
    assert_same(whole(place / "process"), whole(place / "workers"))
    assert [row for row in (place / "process").rglob("*") if row.is_file() and SECRET.encode() in row.read_bytes()] == []
    assert summary["privacy"]["plan"]["examples_per_person"] == 2
    assert summary["privacy"]["plan"]["level"] == "person"
    charges = [json.loads(line) for line in (place / "process" / "privacy.jsonl").read_text().splitlines()]
    persons = {
        name: len({owner for owner, at in zip(OWNED, HOSPITALS, strict=True) if at == name}) for name in ("north", "south")
    }
    for row in charges:
        assert row["num_examples"] <= persons[row["client"]]  # rounded
        assert row["sampling_rate"] == 4 / row["num_examples"]
    spent = max(epsilon("rdp", Spending(r["sampling_rate"], r["noise_multiplier"], 4), 1e-3) for r in charges)
    assert summary["epsilon"] == pytest.approx(spent)
    assert summary["epsilon"] <= 6.0


def test_resume_with_another_bound_is_refused(place: Path) -> None:
    run(place, "run", "run.rounds=1")
    with pytest.raises(AnyRankError, match=r"examples_per_person = 2, not 3"):
        run(place, "run", "run.rounds=1", "privacy.examples_per_person=3")


def test_a_build_without_the_check_of_the_model_trains_nobody(place: Path, monkeypatch) -> None:
    """The probe cannot be skipped: what was not checked is not trained, at either level."""
    monkeypatch.setattr(private_examples, "check", lambda model, trains: None)
    for level, bound in (("person", 2), ("example", 0)):
        with pytest.raises(AnyRankError):
            run(place, level, f"privacy.level={level}", f"privacy.examples_per_person={bound}")
        rows = [json.loads(line) for line in (place / level / "clients.jsonl").read_text().splitlines()]
        assert {row["status"] for row in rows} <= {"failed"}


# --- sites ------------------------------------------------------------------------------------------------------------


def public(person: str) -> dict:
    more = {"data": {"person": person}, "train": {"batch_size": 2}, "model": {"head": "frozen"}}
    return table("rbla", inside=False, privacy=PRIVACY, **more)


SITE_PRIVACY = {"level": "person", "epsilon": 20.0, "delta": 1e-3}


def test_a_site_declares_and_charges_its_persons(place: Path) -> None:
    as_csv(place, [(t, label, owner) for t, label, owner in ROWS], "county.csv")
    made = table(
        "rbla", inside=False, privacy=PRIVACY, data={"person": "elsewhere"}, train={"batch_size": 2}, model={"head": "frozen"}
    )
    site = Asked(site_file(place, "county", data={"source": "county.csv", "person": "who"}, privacy=SITE_PRIVACY))
    (reply,) = site.ask(setup(made))
    assert reply.header.kind == calls.READY, reply.header.body
    held = site.desk.held
    persons = {owner for owner in OWNERS if people._draw(owner) >= 0.2}
    assert held.declared == held.privacy.declared(len(persons))
    assert calls.ready_of(reply).roster.sizes.tolist() == [held.declared]
    assert held.privacy.spending(held.declared, 1).sampling_rate == 2 / held.declared
    site.close()


@pytest.mark.parametrize(
    ("data", "privacy"),
    [
        ({"person": "whom"}, SITE_PRIVACY),
        ({"person": "who"}, SITE_PRIVACY | {"level": "example"}),
        ({}, {"level": "none"}),
    ],
)
def test_a_site_that_cannot_protect_persons_refuses_and_says_nothing(place: Path, data: dict, privacy: dict) -> None:
    as_csv(place, name="county.csv")
    made = table(
        "rbla", inside=False, privacy=PRIVACY, data={"person": "who"}, train={"batch_size": 2}, model={"head": "frozen"}
    )
    site = Asked(site_file(place, "county", data={"source": "county.csv", **data}, privacy=privacy))
    (reply,) = site.ask(setup(made))
    assert reply.header.kind == calls.ERROR
    assert SECRET not in str(reply.header.body)
    assert "who" not in str(calls.error_of(reply)).split()
    site.close()


@pytest.mark.parametrize(
    ("unit", "level", "counts"),
    [
        ("example", "example", Spending(0.1, 4.0, 6)),
        ("person", "person", Spending(0.1, 4.0, 6)),
        ("example", "person", Spending(1.0, 2.0, 6)),  # another example of the person takes its place: twice the clip
        ("example", "client", Spending(1.0, 2.0, 6)),
        ("person", "client", Spending(1.0, 2.0, 6)),
        ("person", "example", None),
        ("client", "person", None),
    ],
)
def test_what_a_release_for_one_unit_costs_another(tmp_path: Path, unit: str, level: str, counts: Spending | None) -> None:
    Grant(tmp_path, level, 1e6, 1e-5).charge(Release(level, 0.1, 4.0, 6), {})
    found = Grant(tmp_path, unit, 1e6, 1e-5).spent()
    assert found == (math.inf if counts is None else composed((counts,), 1e-5))


def test_a_site_file_that_protects_persons_names_their_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.person: expected the column that names whose each example is"):
        load_site(site_file(tmp_path, "county", data={"source": "x.csv"}, privacy=SITE_PRIVACY))


def test_the_levels_of_a_site_file_are_those_of_a_run(tmp_path: Path) -> None:
    path = site_file(tmp_path, "county", data={"source": "x.csv", "person": "who"}, privacy=SITE_PRIVACY)
    assert tomllib.loads(path.read_text())["privacy"]["level"] == load_site(path).privacy.level == "person"
