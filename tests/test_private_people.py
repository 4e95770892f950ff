"""A person as the unit of privacy: all of a person's examples together count by at most the clip norm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from anyrank.config.sections import Config
from anyrank.errors import DataError
from anyrank.messages.plan import plan_round
from anyrank.messages.records import BOTH, Download
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import PrivacyPlan, plan_privacy
from anyrank.tasks.base import Examples, Task, TensorInputs
from anyrank.training import private_examples, private_people
from anyrank.training.lora import LoraModel
from anyrank.training.private_examples import PerExample
from test_models import Net, build, features
from test_private_training import Recorded, alone, download_of, norm

COUNT, BATCH = 24, 6  # examples, and persons that a step draws on average
CLIP = 0.5


def opened(inputs: Tensor, people: np.ndarray, trained: tuple[str, ...] = ()) -> LoraModel:
    """A model of one linear target over examples of three labels, of which each is of a person."""
    torch.manual_seed(0)
    examples = Examples(TensorInputs(inputs), torch.arange(len(inputs)) % 3)
    test = Examples(TensorInputs(features(4, 6)), torch.arange(4) % 3)
    model = LoraModel(Task(module=Net(nn.Linear(6, 5), 5), targets=("target",), train=examples, test=test, trained=trained))
    private_examples.check(model, [BOTH])
    model.people = people
    return model


def plan_of(noise: float, persons: int, steps: int = 1, most: int = 0, level: str = "person") -> PrivacyPlan:
    keys = {"local_steps": steps, "rounds": 1, "max_rounds": 1, "participation": 1.0, "noise": {persons: noise}}
    return PrivacyPlan(
        level, 0.0, 1e-5, CLIP, "pld", False, "exact", BATCH, **keys, examples_per_person=most
    )  # fmt: skip


def trained(model: LoraModel, mechanism: Mechanism, persons: int, way=private_people.train, examples=None, **train):
    keys = {"optimizer": "sgd", "learning_rate": 1.0, "batch_size": BATCH, "local_steps": mechanism.plan.local_steps} | train
    plan = plan_round(Config().replace(train=keys).train, 1, 1, 0)
    examples = np.arange(len(model.task.train)) if examples is None else examples
    return way(model, "ada", download_of(model), persons, examples, plan, mechanism).adapter


def by_hand(model: LoraModel, parameters: list[nn.Parameter], people: list[list[int]], clip_norm: float) -> list[Tensor]:
    """Every example's gradient by itself, as torch gives it; the mean of a person's, scaled down to the clip norm; the sum."""
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for own in people:
        each = [alone(model, parameters, example) for example in own]
        mean = [sum(parts) / len(own) for parts in zip(*each, strict=True)]
        kept = min(1.0, clip_norm / norm(mean))
        totals = [total + kept * part for total, part in zip(totals, mean, strict=True)]
    return totals


# --- what a step sums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "most"), [(1, 6), (1, 1), (2, 3), (3, 100)])
@pytest.mark.parametrize("clip_norm", [1e-3, 0.3, 1e4])
def test_a_person_counts_by_the_clipped_mean_of_all_their_examples(clip_norm: float, parts: int, most: int) -> None:
    module, inputs = build("conv2d")
    inputs = torch.cat([inputs.flip(-1) * (0.4 + 0.3 * k) for k in range(12)])[:12]
    examples = Examples(TensorInputs(inputs), torch.arange(len(inputs)) % 3)
    names = ("head.weight", "head.bias")
    model = LoraModel(Task(module=module, targets=("target",), train=examples, test=examples, trained=names))
    parameters = model.load(download_of(model))
    people = [[0, 5, 7, 9, 11], [2], [1, 3], [4, 6, 10]]
    expected = by_hand(model, parameters, people, clip_norm)
    found = private_people.clipped(PerExample(model, parameters), [torch.tensor(own) for own in people], clip_norm, parts, most)
    for total, dense in zip(found, expected, strict=True):
        torch.testing.assert_close(total.float(), dense, rtol=1e-4, atol=1e-6)
    model.close()


@settings(max_examples=60, deadline=None)
@given(
    owners=st.lists(st.integers(0, 5), min_size=COUNT, max_size=COUNT),
    scales=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4, np.inf]), min_size=COUNT, max_size=COUNT),
    clip_norm=st.sampled_from([1e-4, 0.5, 1e3]),
    parts=st.integers(1, 3),
    most=st.integers(1, 30),
)
def test_removing_a_person_moves_the_sum_by_at_most_the_clip_norm(owners, scales, clip_norm, parts, most) -> None:
    """Whatever the number and the size of their examples, over all tensors together; an example may even be infinite."""
    people = np.array(owners)
    model = opened(features(COUNT, 6) * torch.tensor(scales)[:, None].float(), people, ("head.weight", "head.bias"))
    sums = PerExample(model, model.load(download_of(model)))
    groups = [torch.from_numpy(own) for own in private_people.by_person(np.arange(COUNT), people)]
    whole = private_people.clipped(sums, groups, clip_norm, parts, most)
    for place in range(len(groups)):
        without = private_people.clipped(sums, groups[:place] + groups[place + 1 :], clip_norm, parts, most)
        moved = norm([one - other for one, other in zip(whole, without, strict=True)])
        assert moved <= clip_norm * (1 + 1e-4)  # float32's rounding of the others, who are in other batches
    model.close()


def test_a_person_with_ten_thousand_examples_counts_once_and_passes_in_parts(monkeypatch) -> None:
    rows = 10_000
    people = np.array([0] * rows + [1, 1, 2])
    model = opened(features(rows + 3, 6), people)
    parameters = model.load(download_of(model))
    sizes: list[int] = []
    gradients = PerExample.gradients
    monkeypatch.setattr(PerExample, "gradients", lambda self, index: sizes.append(len(index)) or gradients(self, index))
    groups = [torch.from_numpy(own) for own in private_people.by_person(np.arange(rows + 3), people)]
    found = private_people.clipped(PerExample(model, parameters), groups, 1e-3, 1, 256)
    assert sum(sizes) == rows + 3
    assert max(sizes) <= 256
    assert norm(found) <= 3 * 1e-3 * (1 + 1e-6)
    loss = nn.functional.cross_entropy(model.module(model.task.train.inputs.values[:rows]), model.task.train.labels[:rows])
    mean = torch.autograd.grad(loss, parameters)  # of all in one batch
    alone_found = private_people.clipped(PerExample(model, parameters), groups[:1], 1e-3, 1, 256)
    for own, dense in zip(alone_found, mean, strict=True):
        torch.testing.assert_close(own.float(), dense * 1e-3 / norm(mean), rtol=1e-3, atol=1e-8)


def test_no_persons_are_a_sum_of_zero() -> None:
    model = opened(features(COUNT, 6), np.arange(COUNT))
    found = private_people.clipped(PerExample(model, model.load(download_of(model))), [], 1.0, 2, 8)
    assert all(not total.any() and total.dtype == torch.float64 for total in found)


def noted(drawn: list):
    """In the place of the sum: what is drawn is noted, and nothing is trained."""

    def zero(sums: PerExample, groups: list[Tensor], *_: object) -> list[Tensor]:
        drawn.append([own.tolist() for own in groups])
        return [torch.zeros_like(parameter) for parameter in sums.parameters]

    return zero


# --- what a step draws ------------------------------------------------------------------------------------------------


def test_persons_are_drawn_not_examples(monkeypatch) -> None:
    """Persons of 1 to 7 examples: each is drawn with one rate, with all of their examples or none, independently of others."""
    people = np.repeat(np.arange(6), [1, 2, 3, 4, 7, 7])
    model, drawn = opened(features(COUNT, 6), people), []
    monkeypatch.setattr(private_people, "clipped", noted(drawn))
    persons, steps = 12, 2000  # a declared count of 12 gives a rate of 6 / 12, whoever is there
    trained(model, Mechanism(plan_of(1.0, persons, steps), b"k" * 32), persons)
    whole = {tuple(np.flatnonzero(people == person).tolist()): person for person in range(6)}
    seen = np.array([[tuple(own) in {tuple(each) for each in groups} for own in whole] for groups in drawn])
    assert len(drawn) == steps
    assert {tuple(own) for groups in drawn for own in groups} == set(whole)
    assert abs(seen.mean(axis=0) - 0.5).max() < 5 * (0.25 / steps) ** 0.5
    assert abs(np.corrcoef(seen.T) - np.eye(6)).max() < 5 / steps**0.5


def test_what_a_person_contributes_is_bounded_and_drawn_anew(monkeypatch) -> None:
    """Two of nine examples, uniformly: each pair in 1 of 36 steps; one with fewer keeps them all, in their order."""
    people = np.array([0] * 9 + [1, 1])
    model, drawn = opened(features(11, 6), people), []
    monkeypatch.setattr(private_people, "clipped", noted(drawn))
    steps = 3600
    trained(model, Mechanism(plan_of(1.0, BATCH, steps, most=2), b"k" * 32), BATCH)  # a rate of 1
    assert all(small == [9, 10] for _, small in drawn)
    pairs = [tuple(large) for large, _ in drawn]
    assert all(first < second < 9 for first, second in pairs)
    counts = np.array([pairs.count(pair) for pair in set(pairs)])
    assert len(counts) == 36
    assert ((counts - 100.0) ** 2 / 100).sum() < 90  # chi squared of 35 degrees: beyond 90 less than once in a million


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(COUNT)), key=st.binary(min_size=32, max_size=32), most=st.integers(0, 3))
def test_with_one_example_a_person_both_levels_are_one_mechanism(order, key: bytes, most: int) -> None:
    """The same sampling, the same clipping, the same noise: the same bytes; and the same noise multiplier for a budget."""
    model = opened(features(COUNT, 6), np.array(order))
    persons = trained(model, Mechanism(plan_of(1.5, COUNT, 3, most), key), COUNT)
    examples = trained(model, Mechanism(plan_of(1.5, COUNT, 3, level="example"), key), COUNT, private_examples.train)
    for one, other in zip(persons.layers.values(), examples.layers.values(), strict=True):
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.B, other.B)
    model.close()


def test_a_budget_costs_a_person_what_it_costs_an_example() -> None:
    base = Config().replace(
        run={"rounds": 4}, train={"batch_size": 8, "local_steps": 5, "local_epochs": 0}, data={"person": "who"},
        privacy={"level": "example", "epsilon": 4.0, "delta": 1e-5, "accountant": "rdp"},
    )  # fmt: skip
    example, person = (plan_privacy(base.replace(privacy={"level": level}), [40, 100]) for level in ("example", "person"))
    assert person == replace(example, level="person")
    assert person.noise == example.noise
    assert person.spending(96, 3) == example.spending(96, 3)


def test_a_step_is_the_sum_and_its_noise_over_the_expected_number_of_persons(monkeypatch) -> None:
    """Persons 1 and 3 of four drawn, six expected: the sum of two is divided by six, with noise of sigma times the clip."""
    people = np.array([0, 1, 1, 2, 3, 3, 3, 0])
    model = opened(features(8, 6), people)
    draws = Recorded([np.array([0.9, 0.0, 0.9, 0.0])])  # with a declared count of 12 the rate is one half
    monkeypatch.setattr(Mechanism, "draws", lambda self, round, client: draws)
    dense = by_hand(model, model.load(download_of(model)), [[1, 2], [4, 5, 6]], CLIP)
    before = download_of(model).adapter.layers["target"]
    after = trained(model, Mechanism(plan_of(2.0, 12), None), 12).layers["target"]
    for start, end, total in zip((before.A, before.B), (after.A, after.B), dense, strict=True):
        torch.testing.assert_close(end, start - (total + 2.0 * CLIP) / BATCH, rtol=1e-4, atol=1e-5)


def test_the_persons_of_a_client_are_those_of_its_examples() -> None:
    groups = private_people.by_person(np.array([2, 3, 5, 9]), np.array([4, 0, 4, 1]))
    assert [own.tolist() for own in groups] == [[2, 5], [3], [9]]


def test_a_model_that_does_not_know_its_persons_trains_nobody() -> None:
    model = opened(features(COUNT, 6), np.arange(COUNT))
    model.people = None
    with pytest.raises(DataError, match=r"^data\.person: "):
        trained(model, Mechanism(plan_of(1.0, COUNT), b"k" * 32), COUNT)


def test_persons_are_not_trained_with_a_set_of_factors_that_was_not_checked() -> None:
    model = opened(features(COUNT, 6), np.arange(COUNT))
    sent = download_of(model, frozenset("B"))
    plan = plan_round(Config().replace(train={"batch_size": BATCH, "local_steps": 1, "local_epochs": 0}).train, 1, 1, 0)
    with pytest.raises(Exception, match="was not checked for that"):
        private_people.train(model, "ada", Download(sent.adapter, sent.slices, sent.train), COUNT, np.arange(COUNT), plan,
                             Mechanism(plan_of(1.0, COUNT), b"k" * 32))  # fmt: skip
