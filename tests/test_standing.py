"""What a model is worth to each client: its accuracy by label, in the client's own proportions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from anyrank import simulation
from anyrank.config.sections import Config
from anyrank.federation.standing import Labels, of_global, of_personal
from anyrank.messages.records import Scores

# Ten held-out examples: label 0 is right 3 of 4 times, label 1 1 of 2, label 2 never of 4; nobody held out a label 3.
SCORES = Scores(
    correct=np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0], dtype=bool),
    losses=np.arange(10.0),
    labels=np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2]),
)
# a: half label 0, half label 1; b: all label 2; c: a third label 0, the rest label 3, which cannot be scored
LABELS = Labels.of("abc", [np.array([0, 1]), np.array([2]), np.array([3, 4, 5])], np.array([0, 1, 2, 0, 3, 3]))


def test_one_model_for_all_by_hand() -> None:
    standing = of_global(SCORES, LABELS)
    assert standing.clients == pytest.approx({"a": (3 / 4 + 1 / 2) / 2, "b": 0.0, "c": 3 / 4})
    assert (standing.accuracy, standing.loss) == (0.4, 4.5)
    figures = standing.figures()
    assert figures["worst_client_accuracy"] == 0.0
    assert figures["client_accuracy_std"] == pytest.approx(np.std([0.625, 0, 0.75]))


def test_a_client_with_everyones_labels_measures_what_all_held_out_examples_say() -> None:
    """With training labels in the held-out proportions, a client's accuracy is the accuracy."""
    everyone = Labels.of(["all"], [np.arange(10)], SCORES.labels)
    assert of_global(SCORES, everyone).clients["all"] == pytest.approx(SCORES.accuracy)


def test_personal_models_are_scored_each_on_its_own_clients_labels() -> None:
    perfect = Scores(np.ones(10, dtype=bool), np.zeros(10), SCORES.labels)
    standing = of_personal({"a": SCORES, "b": perfect}, LABELS)
    assert standing.clients == pytest.approx({"a": 0.625, "b": 1.0})
    assert standing.accuracy == pytest.approx((0.4 + 1) / 2)


def test_clients_without_examples_have_no_standing() -> None:
    labels = Labels.of("ab", [np.array([0]), np.array([], dtype=np.int64)], np.array([0, 1]))
    assert labels.names == ("a",)


def test_clients_that_are_not_told_apart_leave_the_figures_empty() -> None:
    figures = of_global(SCORES, None).figures()
    assert figures["worst_client_accuracy"] is None
    assert figures["client_accuracy_std"] is None


@pytest.mark.parametrize("method", ["raflora", "local-only", "centralized"])
def test_a_run_tells_every_clients_accuracy(method: str, tmp_path) -> None:
    clients = {"count": 4, "participation": 1.0, "ranks": (2, 4)}
    config = Config().replace(run={"rounds": 2}, model={"name": "digits-mlp"}, clients=clients, method={"name": method})
    summary = simulation.execute(config, tmp_path / "run")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(summary["client_accuracy"]) == {f"client-{i}" for i in range(4)}
    assert last["worst_client_accuracy"] == summary["worst_client_accuracy"] == min(summary["client_accuracy"].values())
    assert min(summary["client_accuracy"].values()) < max(summary["client_accuracy"].values())
