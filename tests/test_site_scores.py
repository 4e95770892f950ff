"""Scores that clients report of their own held-out examples: the figures computed by hand, bounded, and no reason to stop."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hostile_frames
from anyrank import devices, report, simulation
from anyrank.config.sections import Config
from anyrank.config.tables import from_table, to_table
from anyrank.data.instructions import Instruction
from anyrank.errors import ConfigError, FrameError
from anyrank.federation.guard import Rejected
from anyrank.federation.reported import Reporting
from anyrank.messages import counts as in_a_frame
from anyrank.messages import wire
from anyrank.messages.frame import from_bytes, to_bytes
from anyrank.messages.records import Client, ClientUpdate, Counts, Reported, Scores
from anyrank.methods import make
from anyrank.report.runs import read
from anyrank.runs.checkpoint import load_state
from anyrank.runs.scored import by_state
from anyrank.simulation.building import in_process
from anyrank.studies import comparison, variants
from anyrank.tasks.language.scoring import Questions
from anyrank.tasks.language.sequences import Encoded, Sequences
from anyrank.training.scoring import counted

transformers = pytest.importorskip("transformers")
from test_sites import HELD_OUT, LABELS, RANKS, lines, site, table  # noqa: E402 - needs transformers
from tiny import make_model  # noqa: E402

NAMES = ("county", "lakeside", "st-mary")
SITES = {"eval": {"where": "sites"}}
FIGURES = ("accuracy", "loss", "worst_client_accuracy", "client_accuracy_std", "sites")


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 1)
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three sites with their files and model, and what they are called."""
    folder = tmp_path_factory.mktemp("scores")
    make_model(folder / "model")
    return SimpleNamespace(folder=folder, listed=[site(folder, name) for name in NAMES])


def config(world: SimpleNamespace, method: str = "rbla", rank: int = 0, **sections: dict[str, Any]) -> Config:
    listed = [one | ({"rank": rank} if rank else {}) for one in world.listed]
    run = {"run": {"name": "three", "rounds": 3} | sections.pop("run", {})}
    return from_table(table(world.folder, listed, method={"name": method}, **run, **SITES | sections))


def peft_scores(world: SimpleNamespace, adapter: Path, name: str, head: torch.Tensor) -> tuple[int, float, int]:
    """Right answers, the sum of losses and the number of a site's rows, by PEFT's own forward pass, one text at a time."""
    peft = pytest.importorskip("peft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.folder / "model")
    model = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(world.folder / "model"), adapter).eval()
    right, losses = 0, 0.0
    rows = list(csv.DictReader((world.folder / f"{name}-test.csv").read_text().splitlines()))
    for row in rows:
        with torch.no_grad():
            hidden = model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state
        logits = 20 * torch.nn.functional.normalize(hidden.mean(dim=1)) @ head.T
        label = LABELS.index(row["label"])
        right += int(logits.argmax()) == label
        losses += float(torch.nn.functional.cross_entropy(logits, torch.tensor([label])))
    return right, losses, len(rows)


@pytest.fixture(scope="module")
def head(world: SimpleNamespace) -> torch.Tensor:
    from anyrank.tasks.load import load_task

    return load_task(config(world)).module.head.weight.detach().clone()


# --- what is reported ------------------------------------------------------------------------------------------------


def test_a_site_reports_what_plain_peft_computes_of_its_own_rank_on_its_rows(world, head, tmp_path) -> None:
    summary = simulation.execute(config(world), tmp_path / "run")
    for name in ("county", "st-mary"):
        right, losses, rows = peft_scores(world, tmp_path / "run" / f"adapter-rank-{RANKS[name]}", name, head)
        own = summary["sites"][name]
        assert (own["accuracy"], own["test_examples"]) == (right / rows, rows)
        assert own["loss"] == pytest.approx(losses / rows, rel=2e-5)  # sums of float32 in another order
    assert {name: row["test_examples"] for name, row in summary["sites"].items()} == HELD_OUT


def test_a_personal_model_is_scored_by_its_own_client(world, head, tmp_path) -> None:
    summary = simulation.execute(config(world, "fedsa"), tmp_path / "run")
    state, method = load_state(tmp_path / "run" / "checkpoint" / "state.safetensors"), make("fedsa")
    for name in ("county", "st-mary"):
        method.dispatch(state, Client(name, RANKS[name])).adapter.save(tmp_path / name)
        right, losses, rows = peft_scores(world, tmp_path / name, name, head)
        assert summary["sites"][name]["accuracy"] == right / rows
        assert summary["sites"][name]["loss"] == pytest.approx(losses / rows, rel=2e-5)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("method", ["rbla", "flora"])
def test_of_one_rank_and_one_model_the_figures_are_those_of_a_server_that_scores(world, tmp_path, method, every) -> None:
    """Each state's figures, at its own round, though they are reported a round later; and not a byte of the adapter differs."""
    chosen = config(world, method, rank=4, eval={"where": "sites", "every": every})
    at_server = chosen.replace(eval={"where": "server"})
    sites, server = (simulation.execute(each, tmp_path / each.eval.where) for each in (chosen, at_server))
    mine, theirs = lines(tmp_path / "sites" / "metrics.jsonl"), lines(tmp_path / "server" / "metrics.jsonl")
    assert [row.get("scored_round") for row in mine] == [0, 1, 2] if every == 1 else [0, None, 2]
    for row, other in zip(by_state(mine, sites), theirs, strict=True):
        assert row["accuracy"] == other["accuracy"]
        assert row["worst_client_accuracy"] == other["worst_client_accuracy"]
        assert (row["loss"] is None) == (other["loss"] is None)
        if row["loss"] is not None:
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
            assert row["accuracy"] is not None
            assert row["client_accuracy_std"] == pytest.approx(other["client_accuracy_std"], abs=1e-12)
    for key in ("accuracy", "best_accuracy", "last_accuracy", "start_accuracy", "worst_site", "client_accuracy"):
        assert sites[key] == server[key], key
    for key in ("loss", "start_loss"):
        assert sites[key] == pytest.approx(server[key], rel=1e-6)
    for path in sorted((tmp_path / "server").glob("adapter*/*.safetensors")):
        assert (tmp_path / "sites" / path.relative_to(tmp_path / "server")).read_bytes() == path.read_bytes()


def test_a_row_is_the_sum_over_the_sites_that_answered_and_says_how_many(world, tmp_path) -> None:
    chosen = config(world, run={"rounds": 6}, clients={"dropout": 0.4}, rounds={"patience": 6})
    simulation.execute(chosen, tmp_path / "run")
    log = lines(tmp_path / "run" / "metrics.jsonl")
    by_round = {
        number: [row for row in lines(tmp_path / "run" / "clients.jsonl") if row["round"] == number] for number in range(1, 7)
    }
    assert {row["scored_by"] for row in log} - {3}, "no site has dropped out"
    for row in log:
        answered = {each["client"] for each in by_round[row["round"]] if each["status"] == "ok"}
        assert (row["scored_by"], row["scored_of"], row["scored_round"]) == (len(answered), 3, row["round"] - 1)
        sites = row.get("sites", {})
        assert sites.keys() == answered
        if not answered:
            assert row["accuracy"] is row["loss"] is None
            continue
        total = sum(each["test_examples"] for each in sites.values())
        for figure in ("accuracy", "loss"):
            mean = sum(each[figure] * each["test_examples"] for each in sites.values()) / total
            assert row[figure] == pytest.approx(mean, abs=1e-12)
        assert row["worst_client_accuracy"] == min(each["accuracy"] for each in sites.values())


def test_by_label_counts_add_up_over_sites(world, tmp_path) -> None:
    summary = simulation.execute(config(world, eval={"where": "sites", "by_label": True}), tmp_path / "run")
    labels = {label: 0 for label in LABELS}
    for name in ("county", "st-mary"):
        for row in csv.DictReader((world.folder / f"{name}-test.csv").read_text().splitlines()):
            labels[row["label"]] += 1
    assert set(summary["metrics"]["per_label"]) == set(LABELS)
    plain = simulation.execute(config(world), tmp_path / "plain")
    assert plain["metrics"] == {}
    assert plain["accuracy"] == summary["accuracy"]
    # lakeside holds out 5 of 25 rows: with its labels, the shares of right answers give back the whole accuracy
    task = simulation.build(config(world))
    try:
        counts = np.bincount(task.engine.model.task.test.labels.numpy(), minlength=3)
    finally:
        task.close()
    right = sum(summary["metrics"]["per_label"][label] * counts[place] for place, label in enumerate(LABELS))
    assert right / counts.sum() == pytest.approx(summary["accuracy"], abs=1e-12)
    assert "per_label" in report.build([tmp_path / "run"], tmp_path / "page.html").read_text()


def test_the_column_of_a_partition_names_clients_that_report(world, tmp_path) -> None:
    chosen = to_table(config(world))
    del chosen["sites"], chosen["clients"]
    whole, held = tmp_path / "all.csv", tmp_path / "held.csv"
    for path, parts in ((whole, ("county", "st-mary")), (held, ("county-test", "st-mary-test"))):
        rows = [row | {"site": part.removesuffix("-test")} for part in parts
                for row in csv.DictReader((world.folder / f"{part}.csv").read_text().splitlines())]  # fmt: skip
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label", "site"])
            writer.writeheader()
            writer.writerows(rows)
    chosen["data"] |= {"source": str(whole), "test_source": str(held), "partition": {"kind": "column", "column": "site"}}
    chosen["clients"] = {"count": 2, "participation": 1.0, "ranks": [4]}
    summary = simulation.execute(from_table(chosen), tmp_path / "run")
    assert summary["client_accuracy"].keys() == {"county", "st-mary"}
    assert (summary["scored_by"], summary["scored_of"]) == (2, 2)
    chosen["data"]["partition"] = {"kind": "iid"}
    with pytest.raises(
        ConfigError, match="eval.where = 'sites': expected clients with held-out examples of their own, got none"
    ):
        simulation.execute(from_table(chosen), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_reference_line_of_all_data_reports_on_all_held_out_examples(world, tmp_path) -> None:
    summary = simulation.execute(config(world, "centralized"), tmp_path / "run")
    other = simulation.execute(config(world, "centralized", eval={"where": "server"}), tmp_path / "server")
    assert summary["accuracy"] == other["accuracy"]
    assert summary["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_workers_report_the_same_as_one_process(world, tmp_path) -> None:
    chosen = config(world, eval={"where": "sites", "by_label": True})
    simulation.execute(chosen, tmp_path / "process")
    simulation.execute(chosen.replace(run={"engine": "workers", "workers": 1}), tmp_path / "workers")
    one, other = ([{k: v for k, v in row.items() if k != "seconds"} for row in lines(tmp_path / way / "metrics.jsonl")]
                  for way in ("process", "workers"))  # fmt: skip
    assert one == other
    ends = [json.loads((tmp_path / way / "summary.json").read_text()) for way in ("process", "workers")]
    assert ends[0] | {"seconds": 0} == ends[1] | {"seconds": 0}


def test_stacked_clients_report_what_they_report_one_by_one(world, tmp_path) -> None:
    rows = {}
    for way in ("always", "never", "auto"):
        simulation.execute(config(world, rank=4, run={"rounds": 2, "stacking": way}), tmp_path / way)
        rows[way] = lines(tmp_path / way / "metrics.jsonl")
    assert [rows["always"][0][key] for key in FIGURES] == [rows["never"][0][key] for key in FIGURES]
    adapters = {way: (tmp_path / way / "adapter" / "adapter_model.safetensors").read_bytes() for way in rows}
    assert adapters["auto"] == adapters["never"], "named sites are stacked though nobody asked for it"


def test_a_run_that_was_stopped_goes_on_to_the_same_rows(world, tmp_path) -> None:
    chosen = config(world, eval={"where": "sites", "every": 2})
    whole = simulation.execute(chosen, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["round"] in stops:
            stops.remove(metrics["round"])
            raise Stopped

    stops = [1, 2, 3]
    for _ in range(3):
        with pytest.raises(Stopped):
            simulation.execute(chosen, tmp_path / "run", resume=True, on_round=stop)
    again = simulation.execute(chosen, tmp_path / "run", resume=True)
    assert again | {"seconds": 0} == whole | {"seconds": 0}
    one, other = ([{k: v for k, v in row.items() if k != "seconds"} for row in lines(tmp_path / way / "metrics.jsonl")]
                  for way in ("whole", "run"))  # fmt: skip
    assert one == other


# --- where nobody scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "method"), [("example", "rbla"), ("client", "ffa_lora")])
def test_under_privacy_nobody_scores_and_every_table_says_why(world, tmp_path, capsys, monkeypatch, level, method) -> None:
    from anyrank.cli import tables
    from anyrank.cli.console import out

    monkeypatch.setenv("ANYRANK_PRIVACY_SEED", "these tests have a secret that everybody knows")
    private = {"level": level, "epsilon": 8.0, "delta": 0.01, "clip": 0.5}
    summary = simulation.execute(config(world, method, rank=4, privacy=private), tmp_path / "run")
    assert summary["unscored"].startswith(f"privacy.level = '{level}': scores of the clients' own examples are not covered")
    for key in ("accuracy", "best_accuracy", "last_accuracy", "loss", "start_accuracy", "start_loss", "worst_client_accuracy"):
        assert summary[key] is None, key
    for row in lines(tmp_path / "run" / "metrics.jsonl"):
        assert row["accuracy"] is row["loss"] is None
        assert "sites" not in row
        assert "scored_by" not in row
    assert not list((tmp_path / "run" / "sites").glob("*/scores.json"))
    with out.capture() as shown:
        out.print(tables.run_table(summary))
    assert "not scored" in shown.get()
    page = report.build([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "is not scored: privacy.level = " in page
    assert "No round of these runs has been scored yet." in page


@pytest.mark.parametrize(
    ("eval", "reason"),
    [
        ({"where": "sites", "metrics": ["macro_f1"]}, "eval.metrics: expected no metrics with eval.where = 'sites'"),
        ({"where": "server", "by_label": True}, "eval.by_label: expected false with eval.where = 'server', got True"),
        ({"where": "site"}, "eval.where: expected one of server, sites, got 'site'"),
    ],
)
def test_keys_that_say_nothing_or_too_much_are_refused(world, eval, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        config(world, eval=eval)


# --- reports and comparisons -----------------------------------------------------------------------------------------


def test_a_chart_has_each_score_at_the_round_of_its_state(world, tmp_path) -> None:
    chosen = config(world, rank=4, run={"rounds": 4})
    for where in ("sites", "server"):
        simulation.execute(chosen.replace(eval={"where": where}), tmp_path / where)
    mine, theirs = read(tmp_path / "sites"), read(tmp_path / "server")
    assert mine.columns["accuracy"].tolist() == theirs.columns["accuracy"].tolist()
    assert mine.columns["loss"] == pytest.approx(theirs.columns["loss"], rel=1e-6)
    (tmp_path / "sites" / "summary.json").unlink()  # of a run in progress, the last state has no scores yet
    unfinished = read(tmp_path / "sites").columns["accuracy"]
    assert unfinished[:-1].tolist() == theirs.columns["accuracy"][:-1].tolist()
    assert math.isnan(unfinished[-1])


def test_the_page_and_the_closing_table_say_who_scored(world, tmp_path) -> None:
    from anyrank.cli import tables
    from anyrank.cli.console import out

    summary = simulation.execute(config(world), tmp_path / "run")
    with out.capture() as shown:
        out.print(tables.run_table(summary))
    assert "3 of 3 clients, on their own held-out examples" in shown.get()
    assert (
        "as clients report them, of their own examples: in the end, 3 of 3 clients"
        in report.build([tmp_path / "run"], tmp_path / "page.html").read_text()
    )


def test_methods_are_compared_by_what_sites_report(world, tmp_path) -> None:
    chosen = config(world, run={"rounds": 2})
    cells = variants.make_cells(chosen, ["rbla", "fedsa"], 2, tmp_path)
    results = comparison.execute(cells, tmp_path, jobs=1)
    for row in results.rows:
        ends = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{row['label']}/*/summary.json"))]
        assert len(ends) == 2
        assert row["accuracy"] == pytest.approx(sum(end["accuracy"] for end in ends) / 2)


# --- what may be claimed ---------------------------------------------------------------------------------------------

REPORTING = Reporting(("ada", "bob"), np.array([10, 4]), np.array([2, 2]), np.array([5, 5]), frozenset({"yes", "no"}))
NUMBERS = st.one_of(
    st.integers(-3, 12), st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=3), st.just([1])
)


@given(
    name=st.sampled_from(["ada", "bob", "eve"]),
    examples=NUMBERS,
    losses=NUMBERS,
    correct=NUMBERS,
    by_label=st.dictionaries(st.sampled_from(["yes", "no", "maybe", ""]), st.tuples(NUMBERS, NUMBERS), max_size=3),
)
def test_whatever_a_client_claims_is_refused_or_bounded(name, examples, losses, correct, by_label) -> None:
    try:
        counts = REPORTING.admit(name, Counts(examples, losses, correct, by_label))
    except (TypeError, ValueError):  # as of any reply that breaks while it is looked at
        return
    except Rejected as error:
        told = str(error)
        counts = None
    if counts is None:
        assert "\n" not in told
        assert len(told) < 1000
        return
    most = {"ada": 10, "bob": 4, "eve": 0}[name]
    assert type(counts.examples) is int
    assert 1 <= counts.examples <= most
    assert counts.correct is None or (type(counts.correct) is int and 0 <= counts.correct <= counts.examples)
    assert counts.losses is None or abs(counts.losses) <= 1e100
    assert counts.by_label.keys() <= {"yes", "no"}
    if counts.by_label:
        assert sum(pair[0] for pair in counts.by_label.values()) == counts.examples
        assert sum(pair[1] for pair in counts.by_label.values()) == counts.correct
    standing = REPORTING.standing({name: counts})
    assert standing.accuracy is None or 0 <= standing.accuracy <= 1
    json.dumps(standing.figures(), allow_nan=False)


GOOD = {"examples": 5, "losses": 2.5, "correct": 3, "by_label": {"yes": [2, 1], "no": [3, 2]}}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"examples": 0}, "examples: expected a whole number of at least 1, got 0"),
        ({"examples": -5}, "at least 1, got -5"),
        ({"examples": 5.0}, "examples: expected int, got float"),
        ({"examples": True}, "examples: expected int, got bool"),
        ({"correct": 6}, "correct: expected at most 5, the examples, got 6"),
        ({"correct": -1}, "correct: expected a whole number of at least 0, got -1"),
        ({"losses": 1e101}, "losses: expected a finite number"),
        ({"losses": "low"}, "losses: expected float or int or NoneType, got str"),
        ({"by_label": {"yes": [2, 1]}}, "by_label: expected 5 examples and 3 correct in all, got 2 and 1"),
        ({"by_label": {"yes": [2, 1], "no": [3, 4]}}, "by_label of no, correct: expected at most 3"),
        ({"by_label": {"yes": [2, 1], "no": 3}}, r"by_label of no: expected \[examples, correct\], got 3"),
        ({"by_label": {"yes": [2, 1], "no": ["3", 2]}}, "by_label of no, examples: expected a whole number"),
        ({"by_label": []}, "by_label: expected dict, got list"),
        ({"more": 1}, "expected the keys examples, losses, correct, by_label"),
    ],
)
def test_counts_that_no_examples_can_have_are_refused_in_a_line(changed, reason) -> None:
    assert in_a_frame.of("counts", GOOD) == Counts(5, 2.5, 3, {"yes": (2, 1), "no": (3, 2)})
    with pytest.raises(FrameError, match=reason) as refusal:
        in_a_frame.of("counts", GOOD | changed)
    assert "\n" not in str(refusal.value)


@given(
    examples=st.integers(1, 2**60),
    losses=st.none() | st.floats(-1e100, 1e100),
    share=st.none() | st.floats(0, 1),
)
def test_counts_arrive_as_they_were(examples, losses, share) -> None:
    correct = None if share is None else int(share * examples)
    by_label = {} if correct is None else {"é": (examples, correct)}
    sent = Reported("ada", Counts(examples, losses, correct, by_label))
    got = wire.counts_of(from_bytes(to_bytes(wire.counts_frame(sent, "run", 3)), 1 << 16))
    assert got == sent
    assert wire.counts_of(wire.counts_frame(Reported("ada", None))) == Reported("ada", None)


def test_a_loss_that_is_not_finite_travels_as_none_and_leaves_no_mean() -> None:
    """(1 of 2 right at ada) and (1 of 4 at bob): 2 of 6; the loss of both together is not finite."""
    scores = Scores(np.array([True, False]), np.array([1.0, np.inf]), np.array([0, 1]))
    ada = counted(scores, ("yes", "no"))
    assert ada == Counts(2, None, 1, {"yes": (1, 1), "no": (1, 0)})
    assert in_a_frame.table(dataclasses.replace(ada, losses=math.nan))["losses"] is None
    standing = REPORTING.standing({"ada": ada, "bob": Counts(4, 2.0, 1)})
    assert standing.accuracy == pytest.approx(2 / 6)
    assert standing.loss is None
    assert standing.sites["ada"]["loss"] is None
    assert standing.sites["bob"]["loss"] == 0.5


LIES = {
    "more examples than it has": Counts(13, 1.0, 1),
    "more right than examples": Counts(2, 1.0, 3),
    "none": Counts(0, 0.0, 0),
    "below nothing": Counts(-2, 1.0, 1),
    "a loss that is no number": Counts(2, math.nan, 1),
    "an endless loss": Counts(2, 10**400, 1),
    "a label of its own": Counts(2, 1.0, 1, {"plague": (2, 1)}),
    "no counts": "good",
}


class Liar:
    """An engine in which `county` reports `lie`."""

    def __init__(self, engine: Any, lie: Any) -> None:
        self._engine, self._lie = engine, lie

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def train(self, *arguments: Any, **wanted: Any) -> Any:
        for reply in self._engine.train(*arguments, **wanted):
            yield dataclasses.replace(reply, counts=self._lie) if reply.client == "county" else reply

    def score(self, *arguments: Any) -> Any:
        for reply in self._engine.score(*arguments):
            yield Reported(reply.client, self._lie) if reply.client == "county" else reply


@pytest.mark.parametrize("lie", LIES)
def test_a_client_that_reports_what_cannot_be_is_rejected_and_the_run_goes_on(world, tmp_path, lie) -> None:
    chosen = config(world, run={"rounds": 2}, eval={"where": "sites", "by_label": True})
    summary = simulation.execute(chosen, tmp_path / "run", engine=lambda setting: Liar(in_process(setting), LIES[lie]))
    rows = [row for row in lines(tmp_path / "run" / "clients.jsonl") if row["client"] == "county"]
    assert [row["status"] for row in rows] == ["rejected", "rejected"]
    assert all("\n" not in row["reason"] and 0 < len(row["reason"]) < 500 for row in rows)
    for row in lines(tmp_path / "run" / "metrics.jsonl"):
        assert row["sites"].keys() == {"lakeside", "st-mary"}
        assert row["scored_by"] == 2
    assert (summary["scored_by"], summary["scored_of"]) == (2, 3)
    assert summary["sites"]["county"]["accuracy"] is None


@pytest.mark.parametrize("losses", [None, 1e100, -1e100])
def test_a_client_that_reports_a_loss_that_cannot_be_judged_stops_nothing(world, tmp_path, losses) -> None:
    """There is no rollback by a loss that clients report: states are those of a run without such a report."""
    lie = Counts(12, losses, 6)
    simulation.execute(config(world), tmp_path / "lied", engine=lambda setting: Liar(in_process(setting), lie))
    simulation.execute(config(world), tmp_path / "true")
    adapters = [(tmp_path / way / "adapter" / "adapter_model.safetensors").read_bytes() for way in ("lied", "true")]
    assert adapters[0] == adapters[1]
    for row in lines(tmp_path / "lied" / "metrics.jsonl"):
        assert row["idle"] == ""
        assert row["sites"]["county"]["accuracy"] == 0.5
        assert row["loss"] is None if losses is None else math.isfinite(row["loss"])


def test_a_liar_counts_for_no_more_than_it_declared(world, tmp_path) -> None:
    """county has 12 of 24 held-out examples, and claims that all are right: (12 + the others' right) / 24, and no more."""
    summary = simulation.execute(
        config(world), tmp_path / "run", engine=lambda setting: Liar(in_process(setting), Counts(12, 0.0, 12))
    )
    others = sum(summary["sites"][name]["accuracy"] * HELD_OUT[name] for name in ("lakeside", "st-mary"))
    assert summary["accuracy"] == pytest.approx((12 + others) / 24)


def test_a_client_whose_scoring_breaks_costs_its_reply_alone(world, tmp_path) -> None:
    def broken(setting: Any) -> Any:
        engine = in_process(setting)
        score = engine.scorer

        def fails(job: Any) -> Any:
            if job.client.name == "county":
                raise MemoryError
            return score(job)

        return dataclasses.replace(engine, scorer=fails)

    for way in ("never", "always"):
        simulation.execute(config(world, rank=4, run={"rounds": 2, "stacking": way}), tmp_path / way, engine=broken)
        rows = lines(tmp_path / way / "clients.jsonl")
        assert {row["client"]: row["status"] for row in rows} == {"county": "failed", "lakeside": "ok", "st-mary": "ok"}
        assert "ran out of memory" in next(row["reason"] for row in rows if row["client"] == "county")


def test_a_late_reply_has_no_part_in_the_figures_of_its_round(world, tmp_path) -> None:
    for late in ("drop", "carry"):
        chosen = config(world, run={"rounds": 5}, clients={"late": 0.5}, rounds={"late": late, "patience": 5})
        simulation.execute(chosen, tmp_path / late)
        rows = lines(tmp_path / late / "clients.jsonl")
        seen = 0
        for row in lines(tmp_path / late / "metrics.jsonl"):
            tardy = {each["client"] for each in rows if each["round"] == row["round"] and "arrived after" in each["reason"]}
            assert not tardy & row.get("sites", {}).keys()
            seen += len(tardy)
        assert seen


# --- parts of held-out examples --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True).map(sorted))
def test_questions_of_one_client_are_its_own_with_their_options(index: list[int]) -> None:
    options = [("a", "b"), ("c",), ("d", "e", "f"), ("a", "b"), ("g", "h")]
    items = [Instruction(f"q{i}", own[0], own[0], options=own) for i, own in enumerate(options)]
    encoded = [Encoded([10 * i + j for j in range(i + 2)], 1) for i in range(5)]
    choices = [Encoded([100 + 10 * i + j, 7], 1) for i, own in enumerate(options) for j in range(len(own))]
    whole = Questions(
        items, Sequences.of(encoded, 0, False), Sequences.of(choices, 0, False), str, frozenset(), None, False, "", ""
    )
    part = whole.part(np.array(index))
    assert list(part.items) == [items[i] for i in index]
    assert part.sequences.tokens.tolist() == [token for i in index for token in encoded[i].ids]
    firsts = [100 + 10 * i + j for i in index for j in range(len(options[i]))]
    assert part.choices.tokens.tolist() == [token for first in firsts for token in (first, 7)]


def test_only_an_update_with_counts_has_them_in_its_frame() -> None:
    download = hostile_frames.good_download()
    plain, scored = (
        wire.update_frame(ClientUpdate(download.adapter, 3, "ada", counts=each), download) for each in (None, Counts(1, 0.5, 1))
    )
    assert plain.header.body.keys() == {"num_examples", "metrics"}
    assert plain.array_bytes == scored.array_bytes
    assert wire.update_of(plain, download).counts is None
    assert wire.update_of(scored, download).counts == Counts(1, 0.5, 1)
