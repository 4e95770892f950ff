"""A study is a table of runs: what each column says is reckoned here by hand, or read from the runs themselves."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from anyrank import config
from anyrank.errors import ConfigError
from anyrank.studies import comparison
from anyrank.studies import study as studies

DIGITS = Path(__file__).resolve().parents[1] / "configs" / "digits.toml"
STUDY = """
title = "Collapse on the digits"
claim = "raFLoRA keeps what FlexLoRA loses"
minutes = 0.1
seeds = 2
methods = ["flexlora", "raflora"]
columns = ["last_accuracy", "collapse", "upload"]
figure = "collapse"

[[setting]]
name = "MLP, few rounds"
config = "federation.toml"
set = ["run.rounds=3"]

[[setting]]
name = "One rank"
config = "federation.toml"
set = ["run.rounds=2"]
methods = ["fedavg@2", "raflora:split=balanced:train.learning_rate=0.004"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "federation.toml").write_text(DIGITS.read_text())
    (tmp_path / "collapse.toml").write_text(STUDY)
    return tmp_path


def test_a_study_is_its_runs(folder: Path, anyrank) -> None:
    done = anyrank("study", "collapse.toml", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    out = folder / "runs" / "collapse"
    runs = {
        (label, seed): json.loads((out / "mlp-few-rounds" / label / f"seed-{seed}" / "summary.json").read_text())
        for label in ("flexlora", "raflora")
        for seed in (0, 1)
    }
    first, second = results["settings"]
    assert [row["label"] for row in first["rows"]] == ["flexlora", "raflora"]
    for row in first["rows"]:
        values = [runs[row["label"], seed]["last_accuracy"] for seed in (0, 1)]
        assert row["columns"]["last_accuracy"]["values"] == values
        assert row["columns"]["last_accuracy"]["mean"] == pytest.approx(statistics.fmean(values))
        assert row["columns"]["last_accuracy"]["std"] == pytest.approx(statistics.stdev(values))
    loser = min(first["rows"], key=lambda row: row["columns"]["last_accuracy"]["mean"])
    winner = max(first["rows"], key=lambda row: row["columns"]["last_accuracy"]["mean"])["label"]
    gaps = [runs[loser["label"], seed]["last_accuracy"] - runs[winner, seed]["last_accuracy"] for seed in (0, 1)]
    assert loser["paired"]["to"] == winner
    assert loser["paired"]["mean"] == pytest.approx(statistics.fmean(gaps))
    assert loser["paired"]["ahead"] == sum(gap > 0 for gap in gaps)
    assert second["rows"][1]["label"] == "raflora:split=balanced:train.learning_rate=0.004"
    table = (out / "study.md").read_text()
    assert "| `fedavg@2` |" in table
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    again = anyrank("study", "collapse.toml", "--json")  # nothing is left to run: the same table
    assert json.loads(again.stdout)["settings"] == results["settings"]


def test_a_study_goes_on_without_a_run_that_diverges(folder: Path, anyrank) -> None:
    diverging = "raflora:train.learning_rate=1e30"
    text = STUDY.replace("seeds = 2", "seeds = 1").replace('["flexlora", "raflora"]', f'["flexlora", "{diverging}"]')
    (folder / "collapse.toml").write_text(text)
    done = anyrank("study", "collapse.toml", "--json")
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"anyrank: 1 of 4 runs failed and are not in the table: {diverging} seed 0: round 3: no client sent")
    results = json.loads(done.stdout)
    good, bad = results["settings"][0]["rows"]
    assert bad["columns"]["last_accuracy"]["values"] == [None]
    assert None not in good["columns"]["last_accuracy"]["values"]
    assert [failure["label"] for failure in results["failures"]] == [diverging]
    table = (folder / "runs" / "collapse" / "study.md").read_text()
    assert f"| `{diverging}` | – | – | – |" in table
    assert (folder / "runs" / "collapse" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_study_whose_configuration_changed_names_the_key(folder: Path, anyrank) -> None:
    """Its runs are all there, so that nothing would be left to do but the old table under the new file."""
    (folder / "collapse.toml").write_text(STUDY.replace("seeds = 2", "seeds = 1").replace('"flexlora", "raflora"', '"raflora"'))
    done = anyrank("study", "collapse.toml", "--json")
    assert done.returncode == 0, done.stderr
    out = folder / "runs" / "collapse"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (folder / "federation.toml").write_text(f"{DIGITS.read_text()}\n[train]\nlocal_steps = 3\n")
    done = anyrank("study", "collapse.toml", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"was started with train\.local_steps = \d+, not 3;", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_rounds_to_a_target_and_accuracy_within_a_budget_by_hand() -> None:
    accuracies = [0.2, None, 0.5, 0.4, 0.6]
    metrics = [
        {"round": i, "accuracy": accuracy, "upload_bytes": 400_000, "download_bytes": 600_000}
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    study = studies.Study("s", "t", "c", 1, (), (), target_accuracy=0.5, budget_megabytes=2.0)
    assert studies.COLUMNS["rounds_to_target"].figure({}, metrics, study) == 3
    assert studies.COLUMNS["within_budget"].figure({}, metrics, study) == 0.2  # two rounds of 1 MB; the second is not scored
    out_of_reach = studies.Study("s", "t", "c", 1, (), (), target_accuracy=0.7, budget_megabytes=0.9)
    assert studies.COLUMNS["rounds_to_target"].figure({}, metrics, out_of_reach) is None
    assert studies.COLUMNS["within_budget"].figure({}, metrics, out_of_reach) is None


def test_a_label_says_options_keys_and_rank() -> None:
    base = config.load(DIGITS, ["method.name=raflora", "method.split=balanced"])
    one = comparison.variant(base, "flexlora:train.learning_rate=0.5@8")
    assert (one.method.name, one.method.options, one.train.learning_rate, one.clients.ranks) == ("flexlora", {}, 0.5, (8,))
    other = comparison.variant(base, "raflora:empty_slice=zero")
    assert other.method.options == {"split": "balanced", "empty_slice": "zero"}
    assert other.run.label == "raflora:empty_slice=zero"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("seeds = 2", 'seeds = "two"'), "seeds: expected int, got 'two'"),
        (('"collapse", "upload"', '"colapse"'), "did you mean 'collapse'"),
        (('figure = "collapse"', 'figure = "pie"'), "figure: expected one of accuracy"),
        (("minutes = 0.1", "minuets = 0.1"), "expected the key 'minutes'"),
        (('"collapse", "upload"', '"rounds_to_target"'), "needs target_accuracy"),
        (('name = "One rank"', 'name = "MLP: few rounds"'), "settings of different names"),
        (('config = "federation.toml"', 'config = "absent.toml"'), "no such file"),
        (('"fedavg@2"', '"fedavg@two"'), "expected METHOD[:KEY=VALUE][@RANK]"),
    ],
)
def test_a_wrong_study_is_one_line(folder: Path, change: tuple[str, str], reason: str) -> None:
    (folder / "collapse.toml").write_text(STUDY.replace(*change))
    with pytest.raises(ConfigError) as error:
        studies.load(folder / "collapse.toml")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_data_is_found_where_the_environment_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "rows.csv").write_text("text,label\na,b\n")
    (folder / "text.toml").write_text('[model]\ntask = "text-classification"\n[data]\nsource = "rows.csv"\n')
    assert config.load(folder / "text.toml").data.source == "rows.csv"
    monkeypatch.setenv("ANYRANK_DATA", str(folder / "data"))
    assert config.load(folder / "text.toml").data.source == str(folder / "data" / "rows.csv")
