"""What a site takes from a finished run, and its scores: those of its own adapter on its own rows, as plain PEFT has them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anyrank import devices, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.config.tables import from_table, to_table
from anyrank.errors import AnyRankError, DataError, RunError
from anyrank.messages.records import Client
from anyrank.methods import make
from anyrank.runs import seal
from anyrank.runs.checkpoint import load_state
from anyrank.runs.finding import finished
from anyrank.runs.matching import stored_config
from anyrank.studies import evaluation
from anyrank.tasks.load import load_task

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from test_sites import HELD_OUT, LABELS, RANKS, site, table, write  # noqa: E402 - needs transformers
from tiny import make_classifier, make_model  # noqa: E402

METHODS = ("stayput", "fedsa", "flora", "fedex", "hetlora")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory, cache):
    """A folder with the files of three sites, a model, and one finished run by each method, with a trained head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYRANK_CACHE", str(cache))
        patch.setattr(devices, "cores", lambda: 1)
        folder = tmp_path_factory.mktemp("evaluate")
        make_model(folder / "model")
        whole = table(folder, [site(folder, name) for name in RANKS], train={"local_steps": 4, "learning_rate": 0.02})
        whole["model"] |= {"head": "trained"}
        summaries = {}
        for name in METHODS:
            one = whole | {"method": {"name": name}}
            if name == "fedex":  # takes clients of one rank
                one |= {"sites": [each | {"rank": 4} for each in whole["sites"]]}
            summaries[name] = simulation.execute(from_table(one), folder / name)
        yield SimpleNamespace(folder=folder, table=whole, summaries=summaries)


def scores(run: Path, *names: str, data: str = "") -> dict:
    config = finished(run)
    return evaluation.of_sites(run, config, names or [each.name for each in config.sites], data)["sites"]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def by_peft(world, run: Path, name: str, rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and losses of the site's folder as PEFT loads it, one text at a time, with the head of its folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.folder / "model")
    model = transformers.AutoModel.from_pretrained(world.folder / "model")
    own = run / "sites" / name
    if (own / "base-update").is_dir():
        model = peft.PeftModel.from_pretrained(model, own / "base-update").merge_and_unload()
    model = peft.PeftModel.from_pretrained(model, own / "adapter").eval()
    head = Adapter.load(own / "adapter").tensors
    said, losses = [], []
    for row in rows:
        with torch.no_grad():
            hidden = model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state.mean(dim=1)
        logits = 20 * torch.nn.functional.normalize(hidden) @ head["head.weight"].T + head["head.bias"]
        said.append(int(logits.argmax()))
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([LABELS.index(row["label"])]))))
    return np.array(said), np.array(losses)


def check_figures(found: dict, said: np.ndarray, losses: np.ndarray, rows: list[dict[str, str]]) -> None:
    """The figures are those of the predictions `said`, computed by hand."""
    labels = np.array([LABELS.index(row["label"]) for row in rows])
    assert found["test_examples"] == len(rows)
    assert found["accuracy"] == float((said == labels).mean())
    assert found["loss"] == pytest.approx(losses.mean(), rel=2e-4)
    f1 = []
    for label in sorted({*said.tolist(), *labels.tolist()}):
        right = int(((said == label) & (labels == label)).sum())
        wrong = int((said == label).sum() + (labels == label).sum()) - 2 * right  # FP + FN
        f1.append(2 * right / (2 * right + wrong))
    assert found["macro_f1"] == pytest.approx(sum(f1) / len(f1))
    told = {name: (row["test_examples"], row["accuracy"]) for name, row in found["labels"].items()}
    assert told == {
        LABELS[label]: (int((labels == label).sum()), float((said == labels)[labels == label].mean()))
        for label in np.unique(labels).tolist()
    }


# --- the folder of a site ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_site_takes_the_adapter_that_it_would_run(world, method: str) -> None:
    run, config = world.folder / method, finished(world.folder / method)
    state, rule = load_state(run / "checkpoint" / "state.safetensors"), make(method, config.method.options)
    for each in config.sites:
        own = rule.share(state, Client(each.name, each.rank))
        saved = Adapter.load(run / "sites" / each.name / "adapter")
        assert saved.ranks == own.ranks
        assert saved.tensors.keys() == own.tensors.keys()
        assert all(torch.equal(tensor, own.tensors[name]) for name, tensor in saved.tensors.items())
        for name, layer in saved.layers.items():
            assert torch.equal(layer.A, own.layers[name].A)
            assert torch.equal(layer.B, own.layers[name].B)
            assert layer.scaling == pytest.approx(own.layers[name].scaling)
        assert json.loads((run / "sites" / each.name / "labels.json").read_text()) == list(LABELS)
        assert (run / "sites" / each.name / "base-update").is_dir() == (state.merged is not None)


def test_sites_of_one_rank_share_files_and_personal_ones_do_not(world) -> None:
    weights = "adapter/adapter_model.safetensors"
    for each in RANKS:
        own, shared = (
            world.folder / "stayput" / "sites" / each / weights,
            f"adapter-rank-{RANKS[each]}/adapter_model.safetensors",
        )
        assert own.samefile(world.folder / "stayput" / shared)
        personal = world.folder / "fedsa" / "sites" / each / weights
        assert not personal.samefile(world.folder / "fedsa" / shared)
        assert personal.read_bytes() != (world.folder / "fedsa" / shared).read_bytes()
    assert len({(world.folder / "fedsa" / "sites" / each / weights).read_bytes() for each in RANKS}) == 3


def test_without_hard_links_a_site_has_a_copy(world, tmp_path, monkeypatch) -> None:
    def refuse(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    config = from_table(world.table | {"run": {"name": "copies", "rounds": 1}})
    simulation.execute(config, tmp_path / "run")
    for each, rank in RANKS.items():
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            one = tmp_path / "run" / "sites" / each / "adapter" / file
            assert one.read_bytes() == (tmp_path / "run" / f"adapter-rank-{rank}" / file).read_bytes()
            assert one.stat().st_nlink == 1
    assert seal.fits(tmp_path / "run")


def test_an_extended_run_has_the_folders_of_its_last_round(world, tmp_path) -> None:
    config = from_table(world.table | {"run": {"name": "longer", "rounds": 1}})
    simulation.execute(config, tmp_path / "run")
    first = {each: (tmp_path / "run/sites" / each / "adapter/adapter_model.safetensors").read_bytes() for each in RANKS}
    simulation.execute(config.replace(run={"rounds": 2}), tmp_path / "run", resume=True)
    for each, before in first.items():
        after = (tmp_path / "run/sites" / each / "adapter/adapter_model.safetensors").read_bytes()
        assert after != before
        assert after == (world.folder / "stayput/sites" / each / "adapter/adapter_model.safetensors").read_bytes()
        assert json.loads((tmp_path / "run/sites" / each / "scores.json").read_text())["round"] == 2
    assert seal.fits(tmp_path / "run")


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["stayput", "fedsa", "flora", "fedex"])
def test_scores_are_those_of_the_sites_folder_in_plain_peft(world, method: str) -> None:
    run = world.folder / method
    found = scores(run)
    assert {name: row["test_examples"] for name, row in found.items()} == HELD_OUT
    for name in ("county", "st-mary"):
        rows = rows_of(world.folder / f"{name}-test.csv")
        said, losses = by_peft(world, run, name, rows)
        check_figures(found[name], said, losses, rows)
        assert scores(run, name)[name] == found[name]


def test_other_rows_of_a_site_are_scored_by_its_own_adapter(world, tmp_path) -> None:
    data = write(tmp_path / "new.csv", 30, "new rows", ward="north")
    run = world.folder / "fedsa"
    for name in ("lakeside", "county"):  # without and with held-out rows of its own
        found = scores(run, name, data=str(data))[name]
        check_figures(found, *by_peft(world, run, name, rows_of(data)), rows_of(data))


def test_a_whole_classifier_with_its_own_head_is_scored_as_peft_does(world, tmp_path) -> None:
    make_classifier(tmp_path / "model", labels=LABELS[::-1])  # its outputs are in another order than the data's labels
    keys = world.table["model"] | {"path": str(tmp_path / "model"), "head": "model-trained"}
    simulation.execute(from_table(world.table | {"model": keys}), tmp_path / "run")
    rows = rows_of(world.folder / "county-test.csv")
    folder = tmp_path / "run" / "sites" / "county"
    labels = json.loads((folder / "labels.json").read_text())
    assert labels == list(LABELS[::-1])
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    numbers = torch.tensor([labels.index(row["label"]) for row in rows])
    found = scores(tmp_path / "run", "county")["county"]
    assert found["accuracy"] == float((logits.argmax(dim=1) == numbers).double().mean())
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, numbers)), rel=2e-4)


def test_one_pass_serves_all_sites_of_one_adapter(world, monkeypatch) -> None:
    applied = []
    real = evaluation.LoraModel.apply
    monkeypatch.setattr(evaluation.LoraModel, "apply", lambda self, *of: (applied.append(1), real(self, *of))[1])
    scores(world.folder / "fedex")  # three sites of rank 4
    assert len(applied) == 1
    scores(world.folder / "fedsa")
    assert len(applied) == 1 + 3


def test_the_task_is_as_it_was_after_it_was_scored(world) -> None:
    task = load_task(finished(world.folder / "stayput"))
    before = {name: tensor.clone() for name, tensor in task.module.state_dict().items()}
    scores(world.folder / "stayput")
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.module.state_dict().items())
    assert not any("forward" in vars(part) for part in task.module.modules())


def test_a_metric_that_a_site_does_not_give_is_null(world, tmp_path) -> None:
    (tmp_path / "one.csv").write_text("text,label\ncard,arrival\npay,arrival\n")
    config = from_table(world.table | {"eval": {"metrics": ["auc", "balanced_accuracy"]}})
    simulation.execute(config, tmp_path / "run")
    found = scores(tmp_path / "run", "county", data=str(tmp_path / "one.csv"))["county"]
    assert found["metrics"]["auc"] is None  # of one label there is no curve
    assert found["metrics"]["balanced_accuracy"] == found["accuracy"]
    assert isinstance(scores(tmp_path / "run", "county")["county"]["metrics"]["auc"], float)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def call(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": str(columns)}
    command = [sys.executable, "-m", "anyrank", "evaluate", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def refused(*arguments: str) -> str:
    """The one line on stderr of a command that ends with status 2 and prints nothing else."""
    done = call(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_wrong_requests_are_one_line_each(world, tmp_path) -> None:
    run = str(world.folder / "stayput")
    assert "the run has no such site; did you mean 'lakeside'?" in refused(run, "--site", "lakside")
    assert "--data gone.csv: no such file" in refused(run, "--site", "county", "--data", "gone.csv")
    assert "whose rows are these? give --site NAME too" in refused(run, "--data", str(world.folder / "county.csv"))
    assert "no such folder; expected the folder of a finished run" in refused(str(tmp_path / "gone"))
    (tmp_path / "bad.csv").write_text("text,label\ncard,arival\n")
    told = refused(run, "--site", "county", "--data", str(tmp_path / "bad.csv"))
    assert "site county: label 'arival' of held-out examples is not among the 3 labels" in told


def changed(world, tmp_path: Path) -> Path:
    """A copy of the finished run, with files that the test may change."""
    shutil.copytree(world.folder, tmp_path / "copy", ignore=shutil.ignore_patterns(*METHODS))
    text = json.dumps(to_table(from_table(world.table))).replace(str(world.folder), str(tmp_path / "copy"))
    simulation.execute(from_table(json.loads(text)), tmp_path / "copy" / "run")
    return tmp_path / "copy" / "run"


def test_what_has_changed_since_the_run_is_named(world, tmp_path) -> None:
    run = changed(world, tmp_path)

    def says(path: Path, change, told: str) -> None:
        kept = path.read_bytes()
        change(path)
        with pytest.raises(AnyRankError) as error:
            scores(run, "county")
        assert str(error.value).startswith(f"{path}")
        assert told in str(error.value)
        assert "\n" not in str(error.value)
        path.write_bytes(kept)

    flip = lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01")  # noqa: E731
    says(run / "sites/county/adapter/adapter_model.safetensors", flip, "has changed since the run ended; anyrank run")
    says(run / "sites/county/adapter/adapter_config.json", Path.unlink, "is missing; anyrank run")
    says(run.parent / "county-test.csv", flip, "has changed since the run in")
    says(run.parent / "model" / "model.safetensors", Path.unlink, "is gone since the run in")
    (run / "summary.json").unlink()
    with pytest.raises(RunError, match="the run is not finished; finish it by anyrank run .* --resume$"):
        scores(run)
    simulation.execute(stored_config(run), run, resume=True)
    assert scores(run, "county")["county"]["test_examples"] == HELD_OUT["county"]


def test_a_run_without_sites_and_a_site_without_rows_are_refused(world, tmp_path) -> None:
    one = dict(world.table) | {"data": {"test_source": str(world.folder / "county-test.csv")}}
    simulation.execute(from_table(one), tmp_path / "common")  # lakeside holds nothing out
    with pytest.raises(DataError, match="^site lakeside: has no held-out examples of its own; give rows with labels by --data"):
        scores(tmp_path / "common", "lakeside")
    assert scores(tmp_path / "common")["lakeside"]["accuracy"] is None
    del one["sites"]
    one |= {"data": {"source": str(world.folder / "county.csv")}, "clients": {"count": 2, "ranks": [4]}}
    simulation.execute(from_table(one), tmp_path / "plain")
    assert "the run has no named sites; expected a run with [[sites]]" in refused(str(tmp_path / "plain"))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_json_or_tables_that_fit(world) -> None:
    run = world.folder / "stayput"
    done = call(str(run), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sites"] == scores(run)
    assert (found["run"], found["data"], found["private"]) == (str(run), None, False)
    for columns in (50, 80):
        shown = call(str(run), columns=columns).stdout
        assert max(map(len, shown.splitlines())) <= columns
        for name, row in found["sites"].items():
            assert name in shown
            assert f"{row['accuracy']:.4f}" in shown
            assert f"{row['loss']:.4f}" in shown
        alone = call(str(run), "--site", "county", columns=columns).stdout
        assert max(map(len, alone.splitlines())) <= columns
        assert "lakeside" not in alone
        assert all(label in alone for label in found["sites"]["county"]["labels"])


def test_under_privacy_scores_are_given_with_a_remark(world, tmp_path) -> None:
    private = {"privacy": {"level": "client", "epsilon": 8.0, "delta": 0.01, "clip": 0.5}, "method": {"name": "ffa_lora"}}
    public = next(each["test_source"] for each in world.table["sites"] if each["name"] == "county")
    same = [{"test_source": public} | each | {"rank": 4} for each in world.table["sites"]]
    simulation.execute(from_table(world.table | private | {"sites": same}), tmp_path / "run")
    done = call(str(tmp_path / "run"), "--site", "county")
    assert done.returncode == 0, done.stderr
    assert "privacy guarantee does not cover these scores" in " ".join(done.stdout.split())


def test_an_update_of_the_base_that_was_taken_away_or_put_there_is_no_part_of_the_scores(world, tmp_path) -> None:
    """What the run left decides, and not what lies in its folder by now."""
    for method in ("flora", "stayput"):
        shutil.copytree(world.folder / method, tmp_path / method)
    own = "sites/county/base-update"
    shutil.copytree(tmp_path / "flora" / own, tmp_path / "stayput" / own)
    for folder in (
        "base-update",
        *(path.relative_to(tmp_path / "flora") for path in (tmp_path / "flora").glob("sites/*/base-*")),
    ):
        shutil.rmtree(tmp_path / "flora" / folder)
    with pytest.raises(RunError, match=r"base-update/adapter_config\.json: is missing"):
        scores(tmp_path / "flora", "county")
    assert scores(tmp_path / "stayput", "county") == scores(world.folder / "stayput", "county")
