"""Figures beside accuracy and loss: what they are by hand, what may not come out of one, and where they are told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anyrank import Adapter, report, simulation
from anyrank.config.sections import Config, EvalConfig
from anyrank.data.partition import partition
from anyrank.errors import ConfigError, DataError
from anyrank.federation.standing import of_personal
from anyrank.messages.records import Scores
from anyrank.runs.folder import RunDir
from anyrank.studies import comparison
from anyrank.studies import study as studies
from anyrank.tasks import base, metrics
from anyrank.tasks.base import Examples, OwnLoss, Task, TensorInputs
from anyrank.tasks.metrics import REGISTRY, Metric, auc, balanced_accuracy, macro_f1, per_label, register

SMALL = {"run": {"rounds": 2}, "model": {"name": "digits-mlp"}, "method": {"name": "raflora"}}
ALL = ("macro_f1", "balanced_accuracy", "auc", "per_label")


@pytest.fixture(autouse=True)
def registry():
    """The registry as it was, after each test."""
    before, of_file = dict(REGISTRY), dict(metrics._of_file)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)
    metrics._of_file.clear()
    metrics._of_file.update(of_file)


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], EvalConfig]:
    """An `[eval]` whose file holds a text."""

    def write(text: str, *names: str) -> EvalConfig:
        (tmp_path / "mine.py").write_text(text)
        return EvalConfig(file=str(tmp_path / "mine.py"), metrics=names)

    return write


def held(labels: list[int], predictions: list[int] | None = None, scores: list[list[float]] | None = None) -> Scores:
    labels = np.array(labels)
    predictions = labels if predictions is None else np.array(predictions)
    given = None if scores is None else np.array(scores, dtype=np.float32)
    return Scores(labels == predictions, np.ones(len(labels)), labels, predictions, given)


def one(metric: Metric, scores: Scores = held([0, 1]), names: tuple[str, ...] = ()) -> object:  # noqa: B008 - never changed
    return metrics.compute([metric], scores, names)[metric.name]


# --- by hand ---------------------------------------------------------------------------------------------------------

LABELS, PREDICTIONS = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 3])


def test_macro_f1_by_hand() -> None:
    """0: TP 2, FP 0, FN 1: 4/5. 1: TP 1, FP 1, FN 1: 1/2. 2: TP 0. 3: predicted, never held out: 0."""
    assert macro_f1(LABELS, PREDICTIONS) == pytest.approx((4 / 5 + 1 / 2 + 0 + 0) / 4)


def test_recall_by_label_and_its_mean_by_hand() -> None:
    assert per_label(LABELS, PREDICTIONS) == pytest.approx({0: 2 / 3, 1: 1 / 2, 2: 0.0})
    assert balanced_accuracy(LABELS, PREDICTIONS) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_auc_by_hand() -> None:
    """Class 0 against the rest: 0.8 beats both, 0.3 beats one and ties with the other: (2 + 1.5) / 4. Class 1 against the
    rest: 0.3 of 0.1, 0.4, 0.2: 2 of 3. Class 2: 0.5 beats all three. Class 3 has no held-out examples: left out."""
    scores = np.array([[0.8, 0.1, 0.1, 0.0], [0.3, 0.4, 0.1, 0.2], [0.3, 0.3, 0.1, 0.3], [0.2, 0.2, 0.5, 0.1]])
    assert auc(np.array([0, 0, 1, 2]), scores) == pytest.approx((3.5 / 4 + 2 / 3 + 1) / 3)


def test_auc_of_two_classes_is_that_of_class_1() -> None:
    """Of class 1: 0.4 and 0.8 against 0.1 and 0.5: 3 of 4. Ties of class 0's scores do not count."""
    assert auc(np.array([0, 1, 0, 1]), np.array([[0.5, 0.1], [0.5, 0.4], [0.5, 0.5], [0.5, 0.8]])) == 0.75


# --- against other formulas, and what must not change them ------------------------------------------------------------


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and predictions `[n]` in 2 to 5 classes, two at least among the labels, and scores on a grid, with ties."""
    classes, seed = draw(st.integers(2, 5)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[0, 1], rng.integers(0, classes, draw(st.integers(0, 30)))])
    return labels, rng.integers(0, classes, len(labels)), rng.integers(0, 6, (len(labels), classes)) / 8


def table_of(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """The confusion table `[classes, classes]`: rows are labels."""
    size = int(max(labels.max(), predictions.max())) + 1
    return np.bincount(labels * size + predictions, minlength=size * size).reshape(size, size)


@given(answers())
def test_f1_is_the_harmonic_mean_of_precision_and_recall(case) -> None:
    labels, predictions, _ = case
    table = table_of(labels, predictions)
    found = []
    for c in range(len(table)):
        row, column, right = table[c].sum(), table[:, c].sum(), table[c, c]
        if row or column:
            found.append(2 / (row / right + column / right) if right else 0.0)
    assert macro_f1(labels, predictions) == pytest.approx(np.mean(found))


@given(answers())
def test_balanced_accuracy_is_accuracy_where_every_label_weighs_the_same(case) -> None:
    labels, predictions, _ = case
    weights = 1 / np.bincount(labels)[labels]
    expected = ((labels == predictions) * weights).sum() / weights.sum()
    assert balanced_accuracy(labels, predictions) == pytest.approx(expected)
    assert np.mean(list(per_label(labels, predictions).values())) == pytest.approx(expected)


@given(answers())
def test_auc_is_the_share_of_pairs_in_the_right_order(case) -> None:
    labels, _, scores = case
    areas = []
    for c in [1] if scores.shape[1] == 2 else range(scores.shape[1]):
        own, others = scores[labels == c, c], scores[labels != c, c]
        if len(own) and len(others):
            gaps = own[:, None] - others[None]
            areas.append(((gaps > 0) + 0.5 * (gaps == 0)).mean())
    assert auc(labels, scores) == pytest.approx(np.mean(areas))


@given(answers(), st.randoms(use_true_random=False))
def test_the_order_of_examples_changes_nothing(case, random) -> None:
    labels, predictions, scores = case
    order = np.array(random.sample(range(len(labels)), len(labels)))
    for function, second in (
        (macro_f1, predictions),
        (balanced_accuracy, predictions),
        (per_label, predictions),
        (auc, scores),
    ):
        assert function(labels[order], second[order]) == pytest.approx(function(labels, second))


@given(answers(), st.randoms(use_true_random=False))
def test_other_numbers_for_the_classes_change_nothing(case, random) -> None:
    labels, predictions, scores = case
    classes = scores.shape[1]
    new = np.array(random.sample(range(classes), classes))
    assert macro_f1(new[labels], new[predictions]) == pytest.approx(macro_f1(labels, predictions))
    assert balanced_accuracy(new[labels], new[predictions]) == pytest.approx(balanced_accuracy(labels, predictions))
    if classes > 2:  # of two classes the AUC is that of class 1 alone
        assert auc(new[labels], scores[:, np.argsort(new)]) == pytest.approx(auc(labels, scores))


@given(answers())
def test_a_perfect_model_has_1_of_everything(case) -> None:
    labels, _, scores = case
    right = np.eye(scores.shape[1])[labels]
    assert macro_f1(labels, labels) == balanced_accuracy(labels, labels) == auc(labels, right) == 1
    assert set(per_label(labels, labels).values()) == {1.0}


@given(answers(), st.integers(0, 1))
def test_who_always_says_the_same_is_right_on_one_class(case, said: int) -> None:
    labels, _, scores = case
    assert balanced_accuracy(labels, np.full(len(labels), said)) == pytest.approx(1 / len(np.unique(labels)))
    assert auc(labels, np.full_like(scores, 0.5)) == 0.5


# --- what may not come out of a metric --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (float("nan"), "expected a finite number, got nan"),
        (float("inf"), "expected a finite number, got inf"),
        (np.float32("-inf"), "expected a finite number, got -inf"),
        (None, "expected a finite number, got None"),
        ("0.5", "expected a finite number, got '0.5'"),
        (True, "expected a finite number, got True"),
        (1j, "expected a finite number, got 1j"),
        (np.zeros(3), "expected one number, got an array of shape (3,)"),
        (torch.zeros(1, 2), "expected one number, got an array of shape (1, 2)"),
        ([0.5], "expected a finite number, got [0.5]"),
        ({}, "expected a number for each label, got an empty mapping"),
        ({"a": 0.5, "b": float("nan")}, "expected a finite number for 'b', got nan"),
        ({"a": {"b": 1.0}}, "expected a finite number for 'a', got {'b': 1.0}"),
    ],
)
def test_a_value_that_is_no_number_is_one_line(value: object, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        one(Metric("mine", lambda labels, predictions: value))
    assert f"metric 'mine': {told}" in str(error.value)
    assert re.search("; (correct|return) ", str(error.value))
    assert "\n" not in str(error.value)


def test_a_metric_that_raises_is_one_line() -> None:
    def fails(labels, predictions):
        raise ValueError("first line\nsecond line")

    with pytest.raises(ConfigError, match=r"^metric 'mine': failed on labels \(2,\) and predictions \(2,\): ValueError: first"):
        one(Metric("mine", fails))
    with pytest.raises(ConfigError, match="auc.*no held-out examples of two different labels"):
        one(REGISTRY["auc"], held([1, 1], scores=[[0.5, 0.5], [0.1, 0.9]]))


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.int64(3), np.array(0.5), torch.tensor(0.5)])
def test_any_finite_number_will_do(value: object) -> None:
    found = one(Metric("mine", lambda labels, predictions: value))
    assert (type(found), found) == (float, float(value))


def test_a_metric_cannot_change_what_others_see() -> None:
    def spoils(labels, predictions):
        labels[:], predictions[:] = 7, 8
        return 0

    found = metrics.compute([Metric("spoils", spoils), Metric("right", lambda y, p: (y == p).mean())], held([0, 1]))
    assert found["right"] == 1


def test_whole_numbers_in_a_mapping_are_labels() -> None:
    by_label = Metric("mine", lambda labels, predictions: {np.int64(0): 0.5, 1: 0.25, "all": 1})
    assert one(by_label, names=("cat", "dog")) == {"cat": 0.5, "dog": 0.25, "all": 1.0}
    assert one(by_label, names=("cat", "cat")) == {"0": 0.5, "1": 0.25, "all": 1.0}  # names that tell nothing apart
    assert list(one(by_label)) == ["0", "1", "all"]


# --- names and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["accuracy", "loss", "round", "upload_bytes", "within_budget", "per_label.a", "", "two words"])
def test_a_name_that_files_use_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="choose (another|such a) name"):
        register(name)(macro_f1)


def test_every_key_of_a_runs_files_is_taken(tmp_path: Path) -> None:
    private = {"level": "example", "noise_multiplier": 1.0, "delta": 1e-4}
    config = Config().replace(**SMALL, privacy=private, train={"optimizer": "sgd", "learning_rate": 0.05})
    simulation.execute(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row} <= metrics.TAKEN
    assert studies.COLUMNS.keys() <= metrics.TAKEN


def test_a_name_belongs_to_one_function() -> None:
    with pytest.raises(ConfigError, match=r"'auc': is registered already, by anyrank.tasks.metrics; choose another name"):
        register("auc")(lambda labels, predictions: 0)
    assert register("auc", of="scores")(auc) is auc


def test_a_file_of_ones_own(own, tmp_path: Path) -> None:
    text = """
from sklearn.metrics import cohen_kappa_score, f1_score
from anyrank.tasks.metrics import register
register("kappa")(cohen_kappa_score)
@register("perplexity", of="losses")
def perplexity(labels, losses):
    return {answer}
"""
    config = own(text.replace("{answer}", "1.5"), "perplexity", "kappa")
    chosen = metrics.choose({}, config)
    assert list(chosen) == ["perplexity", "kappa"]
    assert metrics.compute(chosen.values(), held([0, 1, 1], [0, 1, 0])) == pytest.approx({"perplexity": 1.5, "kappa": 0.4})
    again = metrics.choose({}, own(text.replace("{answer}", "2.5"), "perplexity"))  # a file that was edited
    assert one(again["perplexity"]) == 2.5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n", "mine.py registers no metric; put @register"),
        ("x = 1\nx.y\n", "mine.py, line 2: AttributeError: 'int' object has no attribute 'y'; correct the file"),
        ("x = (\n", "mine.py, line 1: SyntaxError"),
        ("import absent_package\n", "mine.py, line 1: ModuleNotFoundError: No module named 'absent_package'"),
        ("raise SystemExit\n", "mine.py, line 1: SystemExit"),
        (
            "from anyrank.tasks.metrics import register\nregister('loss')(print)\n",
            "mine.py, line 2: metric 'loss': a run's files use that name already",
        ),
    ],
)
def test_a_file_that_is_wrong_is_one_line(own, text: str, told: str) -> None:
    before = dict(REGISTRY)
    with pytest.raises(ConfigError) as error:
        metrics.choose({}, own(text))
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert before == REGISTRY


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval.file: no such file .*absent\.py; expected a Python file"):
        metrics.choose({}, EvalConfig(file=str(tmp_path / "absent.py")))


def test_an_unknown_name_stops_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"eval.metrics: unknown metric 'makro_f1'; did you mean 'macro_f1'\?"):
        metrics.choose({}, EvalConfig(metrics=("makro_f1",)))


def test_a_tasks_own_metrics_are_always_reckoned_and_win() -> None:
    mine = lambda labels, predictions: 0.125  # noqa: E731
    chosen = metrics.choose({"macro_f1": mine, "late": Metric("any", mine, "losses")}, EvalConfig(metrics=("auc", "macro_f1")))
    assert list(chosen) == ["macro_f1", "late", "auc"]
    assert (chosen["macro_f1"].function, chosen["late"].name, chosen["late"].of) == (mine, "late", "losses")
    for wrong in ({"mine": 3}, {"accuracy": mine}, ["macro_f1"]):
        with pytest.raises(ConfigError):
            metrics.choose(wrong, EvalConfig())
    with pytest.raises(ConfigError, match="did you mean 'scores'"):
        register("mine", of="score")(mine)


# --- what a task has for them -----------------------------------------------------------------------------------------


def tiny_task(labels: torch.Tensor, outputs: int = 3, **more) -> Task:
    torch.manual_seed(0)
    inputs = torch.randn(len(labels), 4)
    examples = Examples(TensorInputs(inputs, "input"), labels)
    return Task(
        module=nn.Sequential(nn.Linear(4, outputs)),
        targets=("0",),
        train=examples,
        test=examples,
        label_names=("a", "b", "c"),
        **more,
    )


def test_classes_have_predictions_and_probabilities_where_they_are_asked_for() -> None:
    task = tiny_task(torch.tensor([0, 1, 2, 1, 0, 2, 2]))
    logits = task.module(task.test.inputs.values).detach()
    plain = task.objective.score(task.module, task.test, 3)
    assert plain.predictions.tolist() == logits.argmax(1).tolist()
    assert plain.scores is None
    asked = task.objective.score(task.module, task.test, 3, {"scores"})
    np.testing.assert_allclose(asked.scores, logits.softmax(1), rtol=1e-5)
    assert (asked.scores.dtype, asked.accuracy, asked.loss) == (np.float32, plain.accuracy, plain.loss)
    chosen = base.judged(task, EvalConfig(metrics=ALL))
    found = base.score(chosen, 3)
    assert found.scores is None
    assert found.figures["macro_f1"] == macro_f1(task.test.labels.numpy(), plain.predictions)
    assert found.figures["auc"] == auc(task.test.labels.numpy(), asked.scores)
    assert list(found.figures["per_label"]) == ["a", "b", "c"]


def test_a_loss_of_ones_own_over_classes_has_an_accuracy() -> None:
    labels = torch.tensor([0, 1, 2, 1])
    twice = OwnLoss(lambda outputs, labels: 2 * nn.functional.cross_entropy(outputs, labels, reduction="none"))
    plain, own = (base.score(tiny_task(labels, **more), 2) for more in ({}, {"objective": twice}))
    assert own.accuracy == plain.accuracy
    assert own.loss == pytest.approx(2 * plain.loss)


def squared(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (outputs.squeeze(-1) - labels) ** 2


def test_regression_has_a_loss_and_metrics_of_its_outputs_and_no_accuracy() -> None:
    task = tiny_task(torch.tensor([0.5, -1.0, 2.0, 0.25, 3.0]), 1, objective=OwnLoss(squared), metrics={"error": r_squared})
    found = base.score(task, 2)
    outputs = task.module(task.test.inputs.values).detach().squeeze(-1).numpy()
    labels = task.test.labels.numpy()
    assert found.accuracy is None
    assert found.correct is None
    assert found.loss == pytest.approx(((outputs - labels) ** 2).mean(), rel=1e-6)
    assert found.figures["error"] == pytest.approx(1 - ((outputs - labels) ** 2).sum() / ((labels - labels.mean()) ** 2).sum())
    with pytest.raises(ConfigError, match="metric 'auc': is of scores, and this task has predictions, losses"):
        base.score(base.judged(task, EvalConfig(metrics=("auc",))), 2)
    with pytest.raises(
        ConfigError, match="metric 'macro_f1': failed on .*; correct the function, or remove it from eval.metrics"
    ):
        base.score(base.judged(task, EvalConfig(metrics=("macro_f1",))), 2)


def r_squared(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import r2_score

    return r2_score(labels, predictions)


def test_what_a_task_does_not_have_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(ConfigError, match="'macro_f1': is of predictions, and this task has losses; a language model has"):
        metrics.choose({}, EvalConfig(metrics=("macro_f1",)), {"losses"})


def test_a_partition_by_label_needs_labels_that_are_kinds() -> None:
    config = Config().data.partition
    with pytest.raises(DataError, match="'dirichlet' splits by label, and these labels are float32 numbers"):
        partition(config, torch.rand(20), 2, 0)


def test_a_personal_models_metrics_are_means() -> None:
    by_client = {
        name: replace(held([0, 1]), figures={"f1": value, "by": {"a": value, **more}})
        for name, value, more in (("x", 0.25, {}), ("y", 0.75, {"b": 0.5}))
    }
    assert of_personal(by_client, None).metrics == {"f1": 0.5, "by": {"a": 0.5, "b": 0.5}}


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_runs_metrics_are_those_of_its_adapters_predictions(tmp_path: Path) -> None:
    """What `metrics.jsonl` says of the last round is what scikit-learn says of the model with the adapter on disk."""
    from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score, roc_auc_score

    config = Config().replace(**SMALL, eval={"metrics": ALL, "every": 2})
    summary = simulation.execute(config, tmp_path / "run")
    first, last = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    model = simulation.build(config).engine.model
    model.apply(Adapter.load(tmp_path / "run" / "adapter"), None)
    examples = model.task.test
    with torch.no_grad():
        logits = model.task.module(**examples.inputs.batch(torch.arange(len(examples))))
    labels, predictions = examples.labels.numpy(), logits.argmax(1).numpy()
    assert last["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro", zero_division=0))
    assert last["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert last["auc"] == pytest.approx(roc_auc_score(labels, logits.softmax(1), multi_class="ovr"), abs=1e-5)
    assert list(last["per_label"].values()) == pytest.approx(recall_score(labels, predictions, average=None).tolist())
    assert list(last["per_label"]) == list(model.task.label_names)
    assert summary["metrics"] == {name: last[name] for name in ALL}
    assert summary["start_metrics"].keys() == set(ALL)
    assert not first.keys() & set(ALL)  # a round that was not scored
    assert first["accuracy"] is None


def test_metrics_change_no_byte_of_the_adapters(tmp_path: Path) -> None:
    for name, more in (("plain", {}), ("told", {"metrics": ALL})):
        simulation.execute(Config().replace(**SMALL, eval=more), tmp_path / name)
    plain, told = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("plain", "told"))
    assert plain == told


def test_personal_models_are_told_by_the_mean_of_their_metrics(tmp_path: Path) -> None:
    clients = {"count": 3, "participation": 1.0, "ranks": (2,)}
    config = Config().replace(**SMALL | {"method": {"name": "local-only"}}, clients=clients, eval={"metrics": ALL})
    summary = simulation.execute(config, tmp_path / "run")
    assert summary["metrics"].keys() == set(ALL)
    assert np.mean(list(summary["metrics"]["per_label"].values())) == pytest.approx(summary["metrics"]["balanced_accuracy"])


def test_a_metric_that_is_wrong_from_the_start_ends_the_run_in_one_line(own, tmp_path: Path) -> None:
    text = "from anyrank.tasks.metrics import register\nregister('mine')(lambda labels, predictions: float('nan'))\n"
    with pytest.raises(ConfigError, match="metric 'mine': expected a finite number, got nan"):
        simulation.execute(Config().replace(**SMALL, eval=vars(own(text, "mine"))), tmp_path / "run")


def federation_of_numbers(monkeypatch: pytest.MonkeyPatch) -> Config:
    """A configuration whose task, as it is loaded, is regression: labels are sums of the inputs."""
    torch.manual_seed(0)
    inputs = torch.randn(120, 6)
    examples = Examples(TensorInputs(inputs, "input"), inputs.sum(1))
    task = Task(
        module=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), targets=("0",), train=examples, test=examples,
        objective=OwnLoss(squared), metrics={"r2": r_squared},
    )  # fmt: skip
    monkeypatch.setattr("anyrank.simulation.building.load_task", lambda config, progress=None: base.judged(task, config.eval))
    clients = {"count": 4, "participation": 1.0, "ranks": (1, 1, 2, 2)}
    return Config().replace(
        run={"rounds": 3}, clients=clients, data={"partition": replace(Config().data.partition, kind="iid")}
    )


def test_a_task_without_accuracy_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Metrics, summary, tables, comparison, study, progress and report of runs in which nothing is right or wrong."""
    from anyrank.cli import console, tables

    config = federation_of_numbers(monkeypatch)
    cells = comparison.make_cells(config, ["raflora", "flexlora"], 2, tmp_path / "cmp")
    rows = comparison.execute(cells, tmp_path / "cmp", jobs=1).rows
    for row in rows:
        assert row["accuracy"] is row["best_accuracy"] is row["last_accuracy"] is row["accuracy_paired"] is None
    best = min(rows, key=lambda row: row["loss"])
    assert all(row["loss_paired"]["to"] == best["label"] for row in rows)
    assert all(row["loss_paired"]["difference"] >= 0 for row in rows)
    values = [json.loads((cell.out / "summary.json").read_text())["metrics"]["r2"] for cell in cells if cell.label == "raflora"]
    told = next(row for row in rows if row["label"] == "raflora")["metrics"]["r2"]
    assert told == pytest.approx({"mean": np.mean(values), "std": np.std(values, ddof=1)})

    summary = json.loads((cells[0].out / "summary.json").read_text())
    lines = [json.loads(line) for line in (cells[0].out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["accuracy"] is None and line["loss"] > 0 and "r2" in line for line in lines)
    assert summary["loss"] < summary["start_loss"]
    assert (summary["accuracy"], summary["start_accuracy"], summary["client_accuracy"]) == (None, None, None)
    console.out.print(tables.run_table(summary))
    console.out.print(tables.comparison_table(rows, "numbers"))
    printed = capsys.readouterr().out
    assert re.search(r"accuracy +│ –", printed)
    assert "r2" in printed
    with console.Rounds(3, "numbers") as rounds:
        for line in lines:
            rounds("", line)
    assert f"loss {lines[-1]['loss']:.3f}" in capsys.readouterr().err

    page = report.build([cell.out for cell in cells], tmp_path / "report.html").read_text()
    assert f"{best['label']} has the lowest final loss" in page
    assert "final loss" in page
    assert "final accuracy" not in page
    assert "r2 on held-out examples after each round" in page
    assert report.figure([cell.out for cell in cells], tmp_path / "figure.png").stat().st_size > 1000
    settings = [("numbers", [cell.out for cell in cells])]
    for kind in ("accuracy", "bytes", "collapse"):
        assert report.study_figure(settings, kind, tmp_path / f"{kind}.png").stat().st_size > 1000
    setting = studies.Setting("numbers", config, ("raflora", "flexlora"), 2)
    study = studies.Study("s", "t", "c", 1, (setting,), ("loss", "r2", "accuracy"))
    results = studies.execute(study, tmp_path / "study", jobs=1)
    told = {row["label"]: row for row in results["settings"][0]["rows"]}
    assert told["raflora"]["columns"]["accuracy"]["mean"] is None
    assert told["raflora"]["columns"]["r2"]["values"] == values
    assert {row["paired"]["to"] for row in told.values()} == {best["label"]}
    with RunDir.open(cells[0].out, cells[0].config, resume=True) as store:
        assert store.restore().round == 3


def test_a_study_names_metrics_as_columns(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        '[run]\nrounds = 2\n[model]\nname = "digits-mlp"\n[eval]\nmetrics = ["macro_f1", "per_label"]\n'
    )
    text = 'title = "t"\nclaim = "c"\nminutes = 1\nseeds = 2\nmethods = ["raflora"]\ncolumns = ["macro_f1", "per_label.3"]\n'
    text += '[[setting]]\nname = "digits"\nconfig = "c.toml"\n'
    (tmp_path / "s.toml").write_text(text)
    study = studies.load(tmp_path / "s.toml")
    results = studies.execute(study, tmp_path / "out", jobs=1)
    (row,) = results["settings"][0]["rows"]
    runs = [json.loads((cell.out / "summary.json").read_text())["metrics"] for cell in study.cells(tmp_path / "out")]
    assert row["columns"]["macro_f1"]["values"] == [run["macro_f1"] for run in runs]
    assert row["columns"]["per_label.3"]["values"] == [run["per_label"]["3"] for run in runs]
    for wrong, told in (("makro_f1", "did you mean 'macro_f1'"), ("auc", "unknown column 'auc'")):
        (tmp_path / "s.toml").write_text(text.replace("macro_f1", wrong))
        with pytest.raises(ConfigError, match=told):
            studies.load(tmp_path / "s.toml")
    with pytest.raises(ConfigError, match="per_label has a number for each label; name one of them: per_label.0"):
        studies.tell(replace(study, columns=("per_label",)), tmp_path / "out")
