"""Named sites: each one's files, rank, name and scores stay its own, and an error is one line that names the site."""

from __future__ import annotations

import csv
import json
import random
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from anyrank import devices, report, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.config import explain, filelist
from anyrank.config.sections import Config, DataConfig, SiteConfig
from anyrank.config.tables import from_table, identity, load, override, to_table
from anyrank.data import images, instructions, sites, texts
from anyrank.data.texts import Table
from anyrank.errors import AnyRankError, ConfigError, DataError, RunError
from anyrank.federation.standing import Labels, Sites, of_global, of_personal
from anyrank.messages.records import Scores
from anyrank.report.runs import read
from anyrank.runs.removal import remove_run
from anyrank.simulation.building import build
from anyrank.studies.variants import variant
from anyrank.tasks.load import load_task
from anyrank.training.lora import LoraModel

transformers = pytest.importorskip("transformers")
from tiny import WORDS, make_model  # noqa: E402 - needs transformers

RANKS = {"county": 8, "lakeside": 4, "st-mary": 16}
ROWS = {"county": 60, "lakeside": 25, "st-mary": 40}
HELD_OUT = {"county": 12, "lakeside": 5, "st-mary": 7}  # lakeside has no test_source: a fifth of its 25 rows
KEYS = ("name", "rank", "source", "test_source", "memory_gb")
LABELS = ("arrival", "exchange", "top-up")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 1)


def write(path: Path, number: int, seed: str, **columns) -> Path:
    """A CSV file of `number` random texts; `columns`: further columns, `name=value`."""
    draw = random.Random(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", *columns])
        for _ in range(number):
            text = " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))
            writer.writerow([text, draw.choice(LABELS), *columns.values()])
    return path


def site(folder: Path, name: str, **keys) -> dict:
    made = {"name": name, "rank": RANKS[name], "source": str(write(folder / f"{name}.csv", ROWS[name], name))}
    if name != "lakeside":
        made["test_source"] = str(write(folder / f"{name}-test.csv", HELD_OUT[name], f"{name} test"))
    return made | keys


def table(folder: Path, listed: list[dict], **sections) -> dict:
    """A configuration of LoRA in a small encoder, whose weights are in `folder/model`."""
    return {
        "run": {"name": "three", "rounds": 2},
        "model": {"task": "text-classification", "path": str(folder / "model"), "head": "frozen", "dtype": "float32"},
        "lora": {"target_modules": ["query", "value"]},
        "train": {"local_steps": 2, "batch_size": 8},
        "sites": listed,
    } | sections


@pytest.fixture(scope="module")
def world(tmp_path_factory, cache):
    """The folder of three sites, their configuration, and their finished run with its summary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYRANK_CACHE", str(cache))
        patch.setattr(devices, "cores", lambda: 1)
        folder = tmp_path_factory.mktemp("sites")
        make_model(folder / "model")
        config = from_table(table(folder, [site(folder, name) for name in ("st-mary", "lakeside", "county")]))
        summary = simulation.execute(config, folder / "run")
        yield SimpleNamespace(folder=folder, config=config, run=folder / "run", summary=summary)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- one run of three sites -------------------------------------------------------------------------------------------


def test_every_round_has_all_sites_under_their_names_and_ranks(world) -> None:
    rows = lines(world.run / "clients.jsonl")
    # lakeside trains on 25 - 5 rows; the others hold out nothing of their source
    expected = {("county", 8, 60), ("lakeside", 4, 20), ("st-mary", 16, 40)}
    for number in (1, 2):
        assert {(row["client"], row["rank"], row["num_examples"]) for row in rows if row["round"] == number} == expected
    assert world.summary["ranks"] == {"4": 1, "8": 1, "16": 1}
    told = {name: (row["rank"], row["train_examples"], row["test_examples"]) for name, row in world.summary["sites"].items()}
    assert told == {"county": (8, 60, 12), "lakeside": (4, 20, 5), "st-mary": (16, 40, 7)}


def test_the_sites_scores_add_up_to_the_global_ones(world) -> None:
    rows = world.summary["sites"].values()
    assert sum(HELD_OUT.values()) == world.summary["test_examples"]
    for figure in ("accuracy", "loss"):
        mean = sum(row[figure] * row["test_examples"] for row in rows) / 24
        assert mean == pytest.approx(world.summary[figure], abs=1e-12)


def test_the_worst_site_and_the_spread_are_those_of_the_sites_own_accuracies(world) -> None:
    accuracies = {name: row["accuracy"] for name, row in world.summary["sites"].items()}
    assert world.summary["client_accuracy"] == accuracies
    assert world.summary["worst_client_accuracy"] == min(accuracies.values()) == accuracies[world.summary["worst_site"]]
    mean = sum(accuracies.values()) / 3
    spread = (sum((value - mean) ** 2 for value in accuracies.values()) / 3) ** 0.5
    assert world.summary["client_accuracy_std"] == pytest.approx(spread, abs=1e-12)


def test_the_run_folder_has_each_sites_scores(world) -> None:
    assert {path.name for path in (world.run / "sites").iterdir()} == RANKS.keys()
    last = lines(world.run / "metrics.jsonl")[-1]
    for name, row in world.summary["sites"].items():
        assert json.loads((world.run / "sites" / name / "scores.json").read_text()) == {
            **{"site": name, "round": 2, "model": "global"},
            **row,
        }
        assert last["sites"][name] == {key: row[key] for key in ("accuracy", "loss", "test_examples")}


def test_a_sites_scores_are_those_of_plain_peft_on_its_rows(world) -> None:
    peft = pytest.importorskip("peft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.folder / "model")
    encoder = transformers.AutoModel.from_pretrained(world.folder / "model")
    model = peft.PeftModel.from_pretrained(encoder, world.run / "adapter").eval()
    head = load_task(world.config).module.head.weight
    for name in ("county", "st-mary"):
        rows = list(csv.DictReader((world.folder / f"{name}-test.csv").read_text().splitlines()))
        right, losses = 0, []
        for row in rows:
            with torch.no_grad():
                hidden = model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state
            logits = 20 * torch.nn.functional.normalize(hidden.mean(dim=1)) @ head.T
            label = LABELS.index(row["label"])
            right += int(logits.argmax()) == label
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([label]))))
        own = world.summary["sites"][name]
        assert own["accuracy"] == right / len(rows)
        assert own["loss"] == pytest.approx(sum(losses) / len(losses), rel=2e-5)  # sums of float32 in another order


def test_the_order_of_the_sites_in_the_file_changes_no_byte(world, tmp_path, cache, monkeypatch) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    listed = to_table(world.config)["sites"]
    other = from_table(to_table(world.config) | {"sites": listed[::-1]})
    assert other == world.config
    assert identity(other) == identity(world.config)
    simulation.execute(other, tmp_path / "run")
    for path in sorted((world.run / "adapter").iterdir()):
        assert (tmp_path / "run" / "adapter" / path.name).read_bytes() == path.read_bytes()


def test_the_closing_table_and_the_report_have_a_row_for_each_site(world, capsys) -> None:
    from anyrank.cli import tables
    from anyrank.cli.console import out

    with out.capture() as shown:
        out.print(tables.run_table(world.summary))
    page = report.build([world.run], world.run / "report.html").read_text()
    for name, row in world.summary["sites"].items():
        line = next(line for line in shown.get().splitlines() if line.startswith(f"│ {name} "))
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1:3] == [str(row["rank"]), str(row["train_examples"])]
        assert cells[3:5] == [f"{row['accuracy']:.3f}", f"{row['loss']:.4f}"]
        assert f'<th scope="row" class="name">{name}</th><td>{row["rank"]}</td>' in page
        assert f"<td>{100 * row['accuracy']:.2f}</td>" in page
    assert f"worst site {world.summary['worst_site']}" in page


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a\u202eb", "\x1b[31m", '"><img src=x>', "x" * 500])
def test_the_report_shows_any_name_of_a_site_as_text(world, tmp_path, name: str) -> None:
    shutil.copytree(world.run, tmp_path / "run")
    row = world.summary["sites"]["county"] | {"accuracy": 0.0}
    odd = {"b": 3, "c": {"accuracy": "high", "rank": None}}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(world.summary | {"sites": {name: row} | odd}))
    page = report.build([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "Scores of each site" in page
    assert name not in page


def test_the_ranks_of_an_unfinished_run_are_those_of_its_sites(world, tmp_path) -> None:
    (tmp_path / "config.toml").write_bytes((world.run / "config.toml").read_bytes())
    assert sorted(read(tmp_path).planned_ranks) == [4, 8, 16]


def test_a_run_does_not_go_on_with_a_sites_other_file(world, tmp_path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(world.folder, folder, ignore=shutil.ignore_patterns("run"))
    listed = [one | {key: one[key].replace(str(world.folder), str(folder)) for key in ("source", "test_source")}
              for one in to_table(world.config)["sites"]]  # fmt: skip
    config = from_table(to_table(world.config) | {"sites": listed, "run": {"name": "three", "rounds": 1}})
    simulation.execute(config, folder / "run")
    for key, path in {"lakeside.source": "lakeside.csv", "st-mary.test_source": "st-mary-test.csv"}.items():
        before = (folder / path).read_bytes()
        write(folder / path, 25, "another draw")
        with pytest.raises(RunError) as error:
            simulation.execute(config.replace(run={"rounds": 2}), folder / "run", resume=True)
        assert str(error.value).startswith(f"{folder / path} (sites.{key}): has changed since the run in ")
        (folder / path).write_bytes(before)
    assert simulation.execute(config.replace(run={"rounds": 2}), folder / "run", resume=True)["rounds"] == 2


def test_a_folder_of_runs_with_sites_can_be_deleted_and_nothing_else_in_it(world, tmp_path) -> None:
    run = tmp_path / "compared" / "stayput" / "seed-0"
    shutil.copytree(world.run, run)
    (tmp_path / "compared" / "compare.json").write_text(json.dumps({"runs": ["stayput/seed-0"]}))
    for stranger in (
        "sites/notes.txt",
        "sites/county/notes.txt",
        "sites/adapter_config.json",
        "sites/county/deeper/scores.json",
    ):
        (run / stranger).parent.mkdir(exist_ok=True)
        (run / stranger).write_text("mine")
        with pytest.raises(RunError, match="which is not deleted"):
            remove_run(tmp_path / "compared")
        (run / stranger).unlink()
    (run / "sites" / "county" / "deeper").rmdir()
    remove_run(tmp_path / "compared")
    assert not (tmp_path / "compared").exists()


def test_under_privacy_no_site_is_scored_and_counts_are_the_declared_ones(world, tmp_path) -> None:
    private = {"privacy": {"level": "client", "epsilon": 8.0, "delta": 0.01, "clip": 0.5}, "method": {"name": "ffa_lora"}}
    public = str(world.folder / "county-test.csv")  # lakeside would else hold out rows of its own, which are private
    same = [one | {"rank": 4, "test_source": one.get("test_source") or public} for one in to_table(world.config)["sites"]]
    summary = simulation.execute(from_table(to_table(world.config) | private | {"sites": same}), tmp_path / "run")
    own = [path.name for path in (tmp_path / "run" / "sites").glob("*/*")]
    assert sorted(own) == sorted(3 * ["adapter", "labels.json"])  # and no scores.json
    assert all("sites" not in row for row in lines(tmp_path / "run" / "metrics.jsonl"))
    assert summary["worst_site"] is None
    # 60 = 111100b, 25 = 11001b and 40 = 101000b keep their first three binary digits: 56, 24 and 40
    assert {name: row["train_examples"] for name, row in summary["sites"].items()} == {
        "county": 56,
        "lakeside": 24,
        "st-mary": 40,
    }
    assert all(row["accuracy"] is row["loss"] is row["test_examples"] is None for row in summary["sites"].values())


# --- examples ---------------------------------------------------------------------------------------------------------


def made(name: str, labels: list[str]) -> Table:
    known = tuple(sorted(set(labels)))
    rows = tuple(f"{name}/{number}/{label}" for number, label in enumerate(labels))
    return Table(rows, np.array([known.index(label) for label in labels], dtype=np.int64), known)


def reader(stored: dict[str, Table]) -> SimpleNamespace:
    """The texts module, with tables in memory for files."""
    held = lambda config: stored[config.test_source] if config.test_source else None  # noqa: E731
    return SimpleNamespace(
        CLOSED=True, training=lambda config: stored[config.source], given_held_out=held, together=texts.together
    )


rows_of = st.lists(st.sampled_from("abc"), min_size=1, max_size=12)


@given(
    own=st.lists(rows_of, min_size=1, max_size=4),
    tests=st.lists(st.one_of(st.none(), rows_of), min_size=4, max_size=4),
    common=st.one_of(st.none(), rows_of),
    fraction=st.floats(0.05, 0.9),
)
def test_every_row_goes_to_one_place_and_belongs_to_the_site_whose_file_it_is_in(own, tests, common, fraction) -> None:
    stored = {f"s{i}": made(f"s{i}", labels) for i, labels in enumerate(own)}
    stored |= {f"t{i}": made(f"s{i}", [*labels]) for i, labels in enumerate(tests[: len(own)]) if labels}
    stored |= {"common": made("common", common)} if common else {}
    names = [f"s{i}" for i in range(len(own))]
    listed = [SiteConfig(name, 4, name, f"t{i}" if tests[i] else "") for i, name in enumerate(names)]
    data = DataConfig(test_source="common" if common else "", test_fraction=fraction)
    known = {label for labels in own for label in labels}
    held = {label for labels in [*tests[: len(own)], common] if labels for label in labels}
    try:
        train, test = sites.load_split(reader(stored), data, listed)
    except DataError:
        few = all(len(labels) * fraction < 1.5 or len(labels) == len(set(labels)) for labels in own)
        assert len(known) < 2 or held - known or (few and not held)
        return
    assert len(known) >= 2
    assert not held - known
    shards = sites.shards(train.columns, names)
    assert sorted(np.concatenate(list(shards)).tolist()) == list(range(len(train.texts)))
    for name, shard in zip(names, shards, strict=True):
        assert all(train.texts[row].split("/")[0] == name for row in shard)
    owners = sites.owners(test.columns[sites.OWNER], names)
    for text, owner in zip(test.texts, owners, strict=True):
        assert text.split("/")[0] == (names[owner] if owner >= 0 else "common")
    for part in (train, test):  # a label is the same label after its numbers are those of all sites
        assert [part.label_names[label] for label in part.labels] == [text.split("/")[2] for text in part.texts]
    for i, name in enumerate(names):
        kept = [text for text in train.texts if text.startswith(f"{name}/")]
        away = [text for text in test.texts if text.startswith(f"{name}/")]
        if tests[i] or common:
            assert kept == list(stored[name].texts)
            assert away == list(stored[f"t{i}"].texts if tests[i] else ())
        else:
            assert sorted(kept + away) == sorted(stored[name].texts)
            assert {text.split("/")[2] for text in kept} == set(own[i])  # every label keeps a row to train on


def test_which_rows_a_site_holds_out_depends_on_its_own_name_and_rows_alone() -> None:
    stored = {name: made(name, list("ab" * 20)) for name in ("x", "y", "z")}
    alone = sites.load_split(reader(stored), DataConfig(), [SiteConfig("x", 4, "x")])[1].texts
    beside = sites.load_split(reader(stored), DataConfig(), [SiteConfig(name, 4, name) for name in "xyz"])[1].texts
    assert len(alone) == 8  # a fifth of 40
    assert [text for text in beside if text.startswith("x/")] == list(alone)
    places = [{text.split("/")[1] for text in beside if text.startswith(f"{name}/")} for name in "xyz"]
    assert places[0] != places[1] != places[2]  # one draw for all would hold out the same places everywhere


def test_instructions_and_images_are_read_site_by_site_too(tmp_path) -> None:
    for name in ("b", "a"):
        rows = [{"prompt": f"{name}{i}", "completion": "yes" if i % 2 else "no"} for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pixels = np.full((5, 4, 4), ord(name), dtype=np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None]
        np.savez(tmp_path / f"{name}.npz", image=pixels, label=np.array(["p", "q", "p", "q", name]))
    listed = [SiteConfig(name, 4, str(tmp_path / f"{name}.jsonl")) for name in "ab"]
    parts = sites.load_split(instructions, DataConfig(), listed)
    assert sorted(item.prompt for part in parts for item in part.items) == [f"{name}{i}" for name in "ab" for i in range(5)]
    for part in parts:
        assert [item.prompt[0] for item in part.items] == list(part.columns[sites.OWNER])
    listed = [SiteConfig(name, 4, str(tmp_path / f"{name}.npz")) for name in "ab"]
    train, test = sites.load_split(images, DataConfig(test_fraction=0.4), listed)
    assert train.label_names == test.label_names == ("a", "b", "p", "q")
    # of a site's labels p, p, q, q and its own name, two of five rows are held out: one p and one q
    assert len(train) == 6
    assert len(test) == 4
    for part in (train, test):
        for i, (owner, picture) in enumerate(zip(part.columns[sites.OWNER], part, strict=True)):
            number = int(picture[0, 0]) - ord(owner)
            assert 0 <= number < 5
            assert part.label_names[part.labels[i]] == ["p", "q", "p", "q", owner][number]
            assert part.where(i) == f"{tmp_path / owner}.npz, image {number}"


# --- scores -----------------------------------------------------------------------------------------------------------


def scored(correct: list[bool], losses: list[float], labels: list[int]) -> Scores:
    return Scores(np.array(correct), np.array(losses), np.array(labels))


OWN = Sites(("a", "b", "c"), np.array([0, 1, 0, 1, -1]), np.array([2, 4, 8]), np.array([9, 9, 9]))


def test_a_site_is_scored_on_its_own_rows_and_not_by_its_label_shares() -> None:
    """Both sites have the same labels, and the model is right on all rows of one and on none of the other: by label shares,
    both would have the same accuracy."""
    scores = scored([True, False, True, False, False], [1.0, 2.0, 3.0, 4.0, 100.0], [0, 0, 1, 1, 1])
    found = of_global(scores, OWN)
    assert found.sites == {
        "a": {"accuracy": 1.0, "loss": 2.0, "test_examples": 2},
        "b": {"accuracy": 0.0, "loss": 3.0, "test_examples": 2},
    }  # the last row is of no site, and c has no row
    assert found.clients == {"a": 1.0, "b": 0.0}
    assert found.worst == "b"
    assert found.figures()["worst_client_accuracy"] == 0.0
    assert found.figures()["client_accuracy_std"] == 0.5
    shares = Labels.of(("a", "b"), [np.array([0, 1]), np.array([2, 3])], np.array([0, 1, 0, 1]))
    assert len(set(of_global(scores, shares).clients.values())) == 1


def test_a_personal_model_is_scored_on_the_rows_of_its_site() -> None:
    first = scored([True, True, False, True, True], [1.0, 9.0, 2.0, 9.0, 9.0], [0, 0, 1, 1, 1])
    second = scored([True, False, True, True, True], [9.0, 5.0, 9.0, 7.0, 9.0], [0, 0, 1, 1, 1])
    found = of_personal({"a": first, "b": second}, OWN).sites
    assert found == {
        "a": {"accuracy": 0.5, "loss": 1.5, "test_examples": 2},
        "b": {"accuracy": 0.5, "loss": 6.0, "test_examples": 2},
    }


def test_every_metric_is_each_sites_own_where_its_rows_give_it(world, tmp_path) -> None:
    names = ["macro_f1", "per_label", "auc"]
    (tmp_path / "one.csv").write_text("text,label\ncard,top-up\nwhere is my card,top-up\n")
    listed = [one | ({"test_source": str(tmp_path / "one.csv")} if one["name"] == "lakeside" else {})
              for one in to_table(world.config)["sites"]]  # fmt: skip
    config = from_table(to_table(world.config) | {"sites": listed, "eval": {"metrics": names}})
    summary = simulation.execute(config, tmp_path / "run")
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    task = load_task(config)
    model = LoraModel(task)
    model.apply(Adapter.load(tmp_path / "run" / "adapter"))
    found = task.objective.score(task.module, task.test, 1024)
    model.close()
    for name, row in summary["sites"].items():
        own = np.flatnonzero(task.test_columns[sites.OWNER] == name)
        labels, said = found.labels[own], found.predictions[own]
        recall = {LABELS[label]: float((said == label)[labels == label].mean()) for label in np.unique(labels).tolist()}
        assert row["metrics"]["per_label"] == recall
        assert row["metrics"]["macro_f1"] == pytest.approx(f1_score(labels, said, average="macro", zero_division=0))
        assert (row["metrics"]["auc"] is None) == (name == "lakeside")  # of one label there is no curve
        assert last["sites"][name]["metrics"] == row["metrics"]
        assert json.loads((tmp_path / "run" / "sites" / name / "scores.json").read_text())["metrics"] == row["metrics"]
    assert "metrics" not in world.summary["sites"]["county"]


def test_without_right_and_wrong_a_site_has_a_loss_and_no_accuracy() -> None:
    found = of_global(Scores(None, np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.zeros(5)), OWN)
    assert found.sites["a"] == {"accuracy": None, "loss": 2.0, "test_examples": 2}
    assert found.clients == {}
    assert found.worst is None
    assert found.figures()["worst_client_accuracy"] is None


def test_clients_of_a_column_keep_its_values_as_names_and_ranks_in_their_order(world, tmp_path, cache, monkeypatch) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    for part, sizes in {"train": {"north": 12, "east": 30, "west": 21}, "test": {"north": 4, "west": 6}}.items():
        whole = [write(tmp_path / f"{name}.csv", size, f"{part} {name}", site=name) for name, size in sizes.items()]
        rows = [row for path in whole for row in path.read_text().splitlines()[1:]]
        random.Random(0).shuffle(rows)
        (tmp_path / f"{part}.csv").write_text("\n".join(["text,label,site", *rows]))
    split = {"kind": "column", "column": "site"}
    data = {"source": str(tmp_path / "train.csv"), "test_source": str(tmp_path / "test.csv"), "partition": split}
    whole = table(world.folder, [], data=data, clients={"count": 3, "ranks": [2, 4, 8], "participation": 1.0})
    del whole["sites"]
    for seed in (0, 1, 2):
        config = from_table(whole).replace(run={"seed": seed})
        built = build(config)
        population = built.population
        told = [(population.name(i), int(population.ranks[i]), int(population.sizes[i])) for i in range(3)]
        built.close()
        assert told == [("east", 2, 30), ("north", 4, 12), ("west", 8, 21)]
    summary = simulation.execute(config, tmp_path / "run")
    assert {name: row["test_examples"] for name, row in summary["sites"].items()} == {"east": None, "north": 4, "west": 6}
    assert sorted(path.parent.name for path in (tmp_path / "run" / "sites").glob("*/scores.json")) == ["north", "west"]
    assert sorted(path.parent.name for path in (tmp_path / "run" / "sites").glob("*/adapter")) == ["east", "north", "west"]
    fewer = from_table(whole | {"clients": {"count": 2, "ranks": [2, 4]}})  # a client has two values: no value is its name
    built = build(fewer)
    assert built.population.name(0) == "client-0"
    built.close()
    (tmp_path / "odd.csv").write_text((tmp_path / "train.csv").read_text().replace("west", "a/b"))
    with pytest.raises(DataError, match="'a/b' of column 'site'.*clients.names"):
        build(from_table(whole | {"data": data | {"source": str(tmp_path / "odd.csv")}}))


# --- configuration ----------------------------------------------------------------------------------------------------


def test_sites_are_read_and_written_with_paths_from_the_configurations_folder(tmp_path) -> None:
    write(tmp_path / "a.csv", 3, "a")
    text = '[[sites]]\nname = "B"\nsource = "a.csv"\n[[sites]]\nname = "A"\nrank = 2\nsource = "gone.csv"\n'
    (tmp_path / "c.toml").write_text('[model]\ntask = "text-classification"\n' + text)
    config = load(tmp_path / "c.toml")
    assert config.sites == (SiteConfig("A", 2, "gone.csv"), SiteConfig("B", 8, str(tmp_path / "a.csv")))
    assert (config.clients.count, config.clients.names, config.clients.ranks) == (2, ("A", "B"), (2, 8))
    assert config.clients.participation == 1.0
    assert from_table(to_table(config)) == config
    assert override(config, ["clients.participation=0.5"]).clients.participation == 0.5
    assert "sites" not in to_table(Config())
    assert "sites" not in identity(Config())
    assert [key.path for key in explain.find("sites")] == [f"sites.{key}" for key in KEYS]


def test_the_configuration_in_the_document_is_one() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "sites.md").read_text()
    config = from_table(tomllib.loads(text.split("```toml\n")[1].split("```")[0]))
    assert [(one.name, one.rank, bool(one.test_source)) for one in config.sites] == [
        ("lakeside", 4, False),
        ("st-mary", 16, True),
    ]


def test_a_list_of_files_makes_a_client_of_each(tmp_path) -> None:
    listed = [str(write(tmp_path / f"{name}.csv", 3, name)) for name in ("west", "east", "north")]
    whole = {"model": {"task": "text-classification"}, "data": {"source": listed}, "clients": {"ranks": [2, 4]}}
    config = from_table(whole)
    # ranks repeat over the files in the order given; clients are in the order of their names
    assert [(one.name, one.rank, one.source) for one in config.sites] == [
        ("east", 4, listed[1]),
        ("north", 2, listed[2]),
        ("west", 2, listed[0]),
    ]
    assert from_table(to_table(config)) == config


def test_a_pattern_makes_a_client_of_each_table_in_a_folder(tmp_path) -> None:
    folder = tmp_path / "sites"
    folder.mkdir()
    for name in ("west", "east", "north"):
        write(folder / f"{name}.csv", 3, name)
    (folder / "south.csv").symlink_to(write(tmp_path / "elsewhere.csv", 3, "south"))
    for other in (".hidden.csv", "notes.txt", "east.csv.bak"):
        (folder / other).write_text("text,label\n")
    (folder / "deeper.csv").mkdir()
    (tmp_path / "c.toml").write_text(
        '[model]\ntask = "text-classification"\n[data]\nsource = "sites/*.csv"\n[clients]\nranks = [2, 4]\n'
    )
    config = load(tmp_path / "c.toml")
    told = [(one.name, one.rank, one.source) for one in config.sites]  # ranks in the order of the sorted names
    names = [("east", 2), ("north", 4), ("south", 2), ("west", 4)]
    assert told == [(name, rank, str(folder / f"{name}.csv")) for name, rank in names]
    assert from_table(to_table(config)) == config
    whole = {"model": {"task": "text-classification"}, "data": {"source": str(folder / "*[s]t.csv")}}
    assert [one.name for one in from_table(whole).sites] == ["east", "west"]
    (folder / "*[s]t.csv").write_text("text,label\n")  # a file of exactly this name is that file
    assert from_table(whole).data.source == str(folder / "*[s]t.csv")


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("*.tsv", "has such a name; correct the pattern"),
        ("gone/*.csv", "gone cannot be read (No such file or directory); name a folder"),
        ("*", "expected tables of one kind (.csv, .tsv, .json, .jsonl, .ndjson, .parquet), got .csv, .png (a.csv)"),
        ("*.png", "got .png (b.png); give the ending in the pattern, as in *.csv"),
        ("*.csv", "expected at most 2 files, one for each client, got 3"),
    ],
)
def test_a_pattern_that_gives_no_clients_is_told_in_one_line(tmp_path, monkeypatch, pattern: str, says: str) -> None:
    monkeypatch.setattr(filelist, "MOST_FILES", 2 if pattern == "*.csv" else 99)
    for name in ("a.csv", "b.png", "c.csv", "d.csv"):
        (tmp_path / name).write_text("text,label\n")
    with pytest.raises(ConfigError) as error:
        from_table({"model": {"task": "text-classification"}, "data": {"source": str(tmp_path / pattern)}})
    assert str(error.value).startswith("data.source = ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_link_to_nothing_and_names_of_one_folder_are_errors(tmp_path) -> None:
    source = {"source": str(tmp_path / "*.csv")}
    write(tmp_path / "a.csv", 9, "a")
    (tmp_path / "b.csv").symlink_to(tmp_path / "gone.csv")
    config = from_table({"model": {"task": "text-classification"}, "data": source})
    with pytest.raises(DataError, match=r"^site b: source: no such file: "):
        sites.load_split(texts, config.data, config.sites)
    (tmp_path / "b.csv").unlink()
    write(tmp_path / "A.csv", 9, "a")
    if len(list(tmp_path.iterdir())) == 2:  # the file system tells cases apart
        with pytest.raises(ConfigError, match="sites: expected different names"):
            from_table({"model": {"task": "text-classification"}, "data": source})


def test_a_comparison_may_set_one_rank_for_all_sites(world) -> None:
    chosen = variant(world.config, "fedavg@8")
    assert {one.name: one.rank for one in chosen.sites} == dict.fromkeys(RANKS, 8)
    assert chosen.clients.ranks == (8, 8, 8)
    assert variant(chosen, "stayput").sites == chosen.sites


A = {"name": "a", "source": "a.csv"}
WRONG = [
    ({"sites": []}, "sites: expected a table [[sites]] for each site, got []"),
    ({"sites": {"name": "a"}}, "sites: expected a table [[sites]] for each site"),
    ({"sites": [3]}, "sites[1]: expected a table of keys, got 3"),
    ({"sites": [A, A]}, "sites: expected different names, whatever the case of their letters, got 'a' and 'a'"),
    ({"sites": [A, A | {"name": "A"}]}, "got 'a' and 'A'"),
    ({"sites": [A | {"name": "\u00e9"}, A | {"name": "e\u0301"}]}, "sites: expected different names"),
    ({"sites": [A, A | {"name": "b"}]}, "sites: a and b have the same source, 'a.csv', whose examples would count twice"),
    ({"sites": [A | {"rank": "Auto"}]}, "sites.a.rank: expected a whole number of at least 1, or auto, got 'Auto'"),
    ({"sites": [A | {"memory_gb": -1.0}]}, "sites.a.memory_gb: expected a number of at least 0, got -1.0"),
    ({"sites": [A], "clients": {"ranks": [4, 8]}}, "clients.ranks = [4, 8]: the [[sites]] say"),
    ({"sites": [A | {"rank": 0}]}, "sites.a.rank: expected a whole number of at least 1, or auto, got 0"),
    ({"sites": [A | {"rank": True}]}, "sites.a.rank: expected whole number or string, got True"),
    ({"sites": [A | {"rnk": 4}]}, "sites.a.rnk: unknown key; did you mean 'rank'?"),
    ({"sites": [{"name": "a"}]}, "sites.a.source: expected the site's own training examples"),
    ({"sites": [{"source": "a.csv"}]}, "sites: name: expected a name of printable characters"),
    ({"sites": [A], "clients": {"count": 3}}, "clients.count = 3: the [[sites]] say which clients there are"),
    ({"sites": [A], "clients": {"ranks": [4]}}, "clients.ranks = [4]: the [[sites]] say"),
    ({"sites": [A], "clients": {"names": ["b"], "count": 1}}, "clients.names = ['b']: the [[sites]] say"),
    ({"sites": [A], "data": {"source": "b.csv"}}, "data.source = 'b.csv': the [[sites]] say"),
    ({"sites": [A], "data": {"partition": {"kind": "iid"}}}, "data.partition.kind = 'iid': the [[sites]] say"),
    ({"sites": [A], "data": {"test_split": "test"}}, "data.test_split = 'test': is for one source of all clients"),
    ({"sites": [A], "model": {"file": "m.py"}}, "sites: a task of your own reads its examples itself"),
    ({"sites": [A], "data": {"source": ["b.csv"]}}, "data.source: a list of files makes a site of each"),
    ({"data": {"source": []}}, "data.source: expected a file, or a list of at least one file, got []"),
    ({"data": {"source": ["x/a.csv", "y/a.csv"]}}, "sites: expected different names"),
    (
        {"data": {"source": [".csv", "b.csv"]}},
        "data.source: each file's name names a client, and '.csv' cannot be the name of a folder",
    ),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[says[:40] for _, says in WRONG])
def test_a_wrong_configuration_is_told_in_one_line(wrong: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_table({"model": {"task": "text-classification"}} | wrong)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


NAMES = [
    "global",
    "start",
    "all-data",
    "",
    " a",
    "a ",
    "a/b",
    "..",
    ".a",
    "a.",
    "a\\b",
    "a\nb",
    "\x1b",
    "a\u202eb",
    "con",
    "NUL.txt",
    "a:b",
    "x" * 101,
    "é" * 51,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_folder_can_have_or_that_means_something_else_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        SiteConfig(name, 4, "a.csv")
    assert "sites: name" in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["St. Mary's (2)", "köln", "病院", "x" * 100, "contour"])
def test_a_name_in_any_script_is_a_name(name: str) -> None:
    assert SiteConfig(name, 4, "a.csv").name == name


def test_no_override_addresses_a_site() -> None:
    config = from_table({"model": {"task": "text-classification"}, "sites": [A]})
    with pytest.raises(ConfigError, match=r"^--set sites.rank=4: the \[\[sites\]\] are set in the file"):
        override(config, ["sites.rank=4"])


FILES = {
    "gone.csv": (None, "site b: source: no such file: "),
    "columns.csv": ("title,label\nx,arrival\n", "no column 'text' for data.text"),
    "empty.csv": ("", "expected rows of data, got an empty file"),
    "ragged.csv": ("text,label\nx,arrival,y\n", "line 2: expected 2 columns, got 3"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("key", ["source", "test_source"])
def test_a_wrong_file_is_told_with_the_name_of_its_site(tmp_path, file: str, key: str) -> None:
    content, says = FILES[file]
    right = str(write(tmp_path / "right.csv", 9, "right"))
    if content is not None:
        (tmp_path / file).write_text(content)
    wrong = SiteConfig("b", 4, **{"source": right, key: str(tmp_path / file)})
    with pytest.raises(DataError) as error:
        sites.load_split(texts, DataConfig(), [SiteConfig("a", 4, right), wrong])
    assert str(error.value).startswith("site b: ")
    assert says.replace("source", key) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_label_that_nobody_trains_on_is_told_with_the_site_that_has_it(tmp_path) -> None:
    right = str(write(tmp_path / "right.csv", 9, "right"))
    (tmp_path / "test.csv").write_text("text,label\nx,arival\n")
    with pytest.raises(AnyRankError, match="^site b: label 'arival' .*did you mean 'arrival'"):
        sites.load_split(
            texts, DataConfig(), [SiteConfig("a", 4, right), SiteConfig("b", 4, right, str(tmp_path / "test.csv"))]
        )
    with pytest.raises(AnyRankError, match="^data.test_source: label 'arival' "):
        sites.load_split(texts, DataConfig(test_source=str(tmp_path / "test.csv")), [SiteConfig("a", 4, right)])
