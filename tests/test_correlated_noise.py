"""Noise that is correlated over steps: the factorisation against dense matrices, its sensitivity by trying all patterns, what
training really adds, and the runs that use it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm as normal
from torch import nn

from anyrank import config as configs
from anyrank import simulation
from anyrank.config.sections import Config
from anyrank.config.sections.privacy import PrivacyConfig
from anyrank.errors import AnyRankError, ConfigError, RunError
from anyrank.messages.plan import plan_round
from anyrank.privacy import correlated, noise
from anyrank.privacy.accountants import Spending, epsilon
from anyrank.privacy.ledger import Ledger
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import PrivacyPlan, plan_privacy
from anyrank.studies import audit
from anyrank.training import private_examples
from anyrank.training.lora import LoraModel
from anyrank.training.private_examples import PerExample
from kinds_of_run import whole
from test_models import Net, features
from test_private_training import EVERY_SET, download_of, task_of

DELTA, KEY = 1e-5, bytes(range(32))


def dense(bands: int, steps: int) -> np.ndarray:
    """C, from the definition: entry (t, s) is the binomial (2i over i) / 4^i for i = t - s from 0 to bands - 1."""
    C = np.zeros((steps, steps))
    for t, s in itertools.product(range(steps), repeat=2):
        if 0 <= t - s < bands:
            C[t, s] = math.comb(2 * (t - s), t - s) / 4 ** (t - s)
    return C


def sums(steps: int) -> np.ndarray:
    return np.tril(np.ones((steps, steps)))


# --- the factorisation ------------------------------------------------------------------------------------------------


def test_with_all_bands_it_is_the_root_of_the_sums() -> None:
    C = dense(12, 12)
    np.testing.assert_allclose(C @ C, sums(12), atol=1e-12)
    np.testing.assert_allclose(correlated.coefficients(12), C[:, 0], rtol=1e-12)


@given(bands=st.integers(1, 9), first=st.integers(0, 12), steps=st.integers(1, 9))
def test_the_noise_of_a_round_is_rows_of_the_inverse_times_fresh_noise(bands: int, first: int, steps: int) -> None:
    Z = np.random.default_rng(0).standard_normal((first + steps, 3))
    expected = np.linalg.solve(dense(bands, first + steps), Z)[first:]
    found = np.array(list(correlated.combined(lambda step: Z[step], bands, first, steps)))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_one_band_is_fresh_noise_as_it_is() -> None:
    Z = np.random.default_rng(0).standard_normal((7, 4))
    assert np.array_equal(list(correlated.combined(lambda step: Z[step], 1, 2, 5)), Z[2:])
    assert correlated.norm(1) == 1.0


@pytest.mark.parametrize(("bands", "steps"), [(1, 5), (3, 10), (4, 4), (8, 30), (30, 30)])
def test_the_error_is_that_of_the_dense_matrices(bands: int, steps: int) -> None:
    """The noise in the first t sums is row t of `sums C^-1` times Z, whose deviation is the largest column of C."""
    C = dense(bands, steps)
    rows = np.linalg.norm(sums(steps) @ np.linalg.inv(C), axis=1)
    expected = math.sqrt((rows**2).mean()) * np.linalg.norm(C, axis=0).max()
    assert correlated.error(bands, steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("bands", "steps"), [(1, 5), (2, 7), (3, 8), (4, 8), (8, 8)])
def test_no_pattern_of_draws_moves_more_than_its_draws_one_by_one(bands: int, steps: int) -> None:
    """All patterns of an example of any group, with gradients +g and -g in any order: since the blocks of rows have nothing in
    common, d draws move C x by at most sqrt(d) |c|, and one draw of the first group by exactly |c|. This is what the
    accountant composes."""
    C, most = dense(bands, steps), 0.0
    for group in range(bands):
        own = range(group, steps, bands)
        assert len(own) <= correlated.draws(bands, steps)
        for signs in itertools.product((-1, 0, 1), repeat=len(own)):
            moved = sum((sign * C[:, step] for sign, step in zip(signs, own, strict=True)), np.zeros(steps))
            drawn = sum(map(abs, signs))
            assert np.linalg.norm(moved) <= math.sqrt(drawn) * correlated.norm(bands) * (1 + 1e-12)
            most = max(most, np.linalg.norm(moved) / math.sqrt(max(1, drawn)))
        for one, other in itertools.combinations(own, 2):
            assert not (C[:, one] * C[:, other]).any(), "the rows that two draws change are apart"
    assert most == pytest.approx(correlated.norm(bands)), "and less noise would not be enough"
    if bands > 1:  # without groups, an example drawn in two steps in a row would move C x by more than the plan covers
        assert np.linalg.norm(C[:, 0] + C[:, 1]) > math.sqrt(2) * correlated.norm(bands)


# --- plans ------------------------------------------------------------------------------------------------------------


def config(**sections) -> Config:
    private = {"level": "example", "epsilon": 6.0, "delta": DELTA, "noise": "correlated"} | sections.pop("privacy", {})
    train = {"optimizer": "sgd", "batch_size": 128, "local_steps": 10}
    return Config().replace(run={"rounds": 10}, train=train, privacy=private).replace(**sections)


def test_without_sampling_epsilon_is_that_of_one_gaussian() -> None:
    """4 batches in 4 bands: every example is drawn in each of its steps, 3 of 12. The whole run is one Gaussian mechanism whose
    sensitivity is sqrt(3) |c|; its delta at epsilon has a closed form (Balle and Wang 2018)."""
    asked = config(run={"rounds": 4}, train={"batch_size": 100, "local_steps": 3}, privacy={"bands": 4, "counts": "exact"})
    plan = plan_privacy(asked, [400])
    assert plan.bands == {400: 4}
    assert plan.sampling_rate(400) == 1.0
    s = plan.multiplier(400) / (math.sqrt(3) * np.linalg.norm(dense(4, 12)[:, 0]))
    found = plan.epsilon_after(400, 4)
    delta = normal.cdf(0.5 / s - found * s) - math.exp(found) * normal.cdf(-0.5 / s - found * s)
    assert found <= 6.0
    assert delta == pytest.approx(DELTA, rel=0.02)


def test_a_plan_costs_what_sampled_gaussians_cost_one_for_each_turn() -> None:
    """3,300 examples in batches of 128, 8 bands: rate 8 * 128 / 3072 (declared), 100 steps are 13 turns at most."""
    plan = plan_privacy(config(privacy={"bands": 8}), [3300])
    assert plan.spending(3072, 10) == Spending(8 * 128 / 3072, plan.noise[3072], 13)
    assert plan.epsilon_after(3072, 10) == epsilon("pld", plan.spending(3072, 10), DELTA) <= 6.0
    assert plan.multiplier(3072) == pytest.approx(plan.noise[3072] * np.linalg.norm(dense(8, 8)[:, 0]))


def test_bands_are_chosen_for_the_least_noise_in_the_sums() -> None:
    """At epsilon 6, correlation is worth its price; at 1, for a quarter of all examples in a step, sampling is worth more."""
    plan = plan_privacy(config(privacy={"accountant": "rdp"}), [3300])
    error = {
        bands: other.noise[3072] * correlated.error(bands, 100)
        for bands in (1, 2, 4, 8, 16, 24)
        for other in [plan_privacy(config(privacy={"bands": bands, "accountant": "rdp"}), [3300])]
    }
    assert plan.bands == {3072: min(error, key=error.get)}
    assert error[plan.bands[3072]] < 0.85 * error[1]
    assert plan_privacy(config(privacy={"epsilon": 1.0}), [512]).bands == {512: 1}


def test_bands_are_no_more_than_batches_and_steps() -> None:
    many = {"bands": 50, "epsilon": 0.0, "noise_multiplier": 1.0}
    plan = plan_privacy(config(privacy=many), [200, 3300])
    assert plan.bands == {192: 1, 3072: 24}
    short = plan_privacy(config(run={"rounds": 1}, train={"batch_size": 16, "local_steps": 3}, privacy=many), [3300])
    assert short.bands == {3072: 3}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"level": "client"}, "privacy.noise: expected 'independent' with level = 'client'"),
        ({"secure": True}, "privacy.noise: 'correlated' draws the noise of earlier steps again"),
        ({"epsilon": 0.0, "noise_multiplier": 1.0}, "privacy.bands: expected a number above 0 with noise_multiplier"),
        ({"bands": -1}, "privacy.bands: expected"),
        ({"noise": "independent", "bands": 4}, "privacy.bands: expected 0 with noise = 'independent'"),
        ({"noise": "pink"}, "privacy.noise: expected one of independent, correlated"),
        ({"level": "none", "epsilon": 0.0, "delta": 0.0}, "privacy.noise: expected level"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(asked: dict, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        PrivacyConfig(**{"level": "example", "epsilon": 6.0, "delta": DELTA, "noise": "correlated"} | asked)
    assert str(raised.value).startswith(words)


@pytest.mark.parametrize("method", ["raflora", "fedsvd", "flora", "rolora"])
def test_methods_whose_coordinates_change_are_refused(method: str) -> None:
    asked = config(
        model={"name": "digits-mlp"},
        clients={"ranks": [4]},
        method={"name": method},
        train={"batch_size": 16},
        privacy={"epsilon": 0.0, "noise_multiplier": 1.0, "bands": 2},
    )
    with pytest.raises(
        AnyRankError, match=rf"method.name: {method} gives a client other coordinates.* is for fedavg, ffa_lora"
    ):
        simulation.build(asked)


def test_an_audit_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"privacy.noise: an audit reads steps whose noise is independent, got 'correlated'"):
        audit.audit(config(), canaries=10)


# --- what training adds -----------------------------------------------------------------------------------------------

COUNT, BATCH, BANDS = 64, 16, 3


def plan_of(steps: int, rounds: int, bands: int = BANDS, clip_norm: float = 0.5) -> PrivacyPlan:
    return PrivacyPlan(
        *("example", 0.0, DELTA, clip_norm, "pld", False, "exact", BATCH, steps, rounds, rounds, 1.0, {COUNT: 2.0}),
        bands={COUNT: bands},
    )


def rows(mechanism: Mechanism, client: str, rounds: Iterator[int], numbers: int = 20_000) -> np.ndarray:
    """The noise of all steps of a client that takes part in `rounds`, `[steps, numbers]`."""
    found = []
    for before, round in enumerate(rounds):
        own = replace(mechanism, earlier={client: before, "another": 7})
        draws = own.draws(round, client)
        found += [source.standard_normal(numbers) for _, source in own.steps(round, client, COUNT, COUNT, numbers, draws)]
    return np.array(found)


@pytest.mark.parametrize("rounds", [range(1, 7), (2, 3, 7, 11, 12, 20)], ids=["all rounds", "some rounds"])
def test_times_c_it_is_white_and_of_the_deviation_that_the_plan_states(rounds) -> None:
    """Over 20,000 numbers, a correlation of independent noise is below 5 / sqrt(20,000) = 0.035. Rounds that a client misses
    are no gap in its own sequence."""
    Z = dense(BANDS, 12) @ rows(Mechanism(plan_of(2, 20), KEY), "ada", rounds)
    covariance = Z @ Z.T / Z.shape[1]
    np.testing.assert_allclose(covariance, np.eye(12), atol=0.035 * 2**0.5)


def test_another_client_key_and_step_has_noise_of_its_own() -> None:
    mechanism = Mechanism(plan_of(2, 6), KEY)
    one = rows(mechanism, "ada", range(1, 7))
    for other in (rows(mechanism, "bob", range(1, 7)), rows(Mechanism(plan_of(2, 6), KEY[::-1]), "ada", range(1, 7))):
        assert abs(np.corrcoef(one, other)[:12, 12:]).max() < 0.04
    assert np.array_equal(one, rows(mechanism, "ada", range(1, 7))), "and the same when it is drawn again"


@pytest.fixture
def toy() -> tuple[LoraModel, object]:
    torch.manual_seed(0)
    model = LoraModel(task_of(Net(nn.Linear(6, 5), 5), features(COUNT, 6)))
    private_examples.check(model, EVERY_SET)
    return model, download_of(model)


def trained(toy, mechanism: Mechanism, round: int, examples: np.ndarray) -> np.ndarray:
    """The change of the factors by one round's training at learning rate 1."""
    model, download = toy
    steps = mechanism.plan.local_steps
    keys = {"optimizer": "sgd", "learning_rate": 1.0, "batch_size": BATCH, "local_steps": steps}
    plan = plan_round(Config().replace(train=keys).train, round, 20, 0)
    after = private_examples.train(model, "ada", download, COUNT, examples, plan, mechanism).adapter.layers["target"]
    before = download.adapter.layers["target"]
    return np.concatenate([(getattr(after, f) - getattr(before, f)).double().numpy().ravel() for f in "AB"])


def test_training_adds_this_noise_across_rounds_at_the_plans_size(toy) -> None:
    """Without examples, a step is `-(2 |c| 0.5 / 16)` times a row of noise: the multiplier of 2, the clip norm, the batch."""
    scale = 2.0 * np.linalg.norm(dense(BANDS, BANDS)[:, 0]) * 0.5 / BATCH
    mechanism = Mechanism(plan_of(1, 6), KEY)
    nobody = np.zeros(0, dtype=np.int64)
    found = [trained(toy, replace(mechanism, earlier={"ada": before}), 2 * before + 1, nobody) for before in range(6)]
    expected = rows(mechanism, "ada", range(6), numbers=len(found[0]))
    np.testing.assert_allclose(found, -scale * expected, atol=1e-6)
    pairs = Mechanism(plan_of(2, 3), KEY)  # two steps in each of three rounds: the same six steps
    together = [trained(toy, replace(pairs, earlier={"ada": before}), before + 1, nobody) for before in range(3)]
    np.testing.assert_allclose(together, np.add.reduceat(found, [0, 2, 4]), atol=1e-6)


def test_an_example_is_drawn_in_the_steps_of_its_group_only(toy, monkeypatch) -> None:
    """3 bands, rate 3 * 16 / 64 = 0.75: over 12 rounds of one step each, an example of group g is drawn in steps that are g
    modulo 3, in three of four of them. A round of training in between, of another client, changes nothing."""
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(
        PerExample,
        "clipped",
        lambda self, index, *_: drawn.append(index.numpy()) or [torch.zeros_like(p) for p in self.parameters],
    )
    seen = np.zeros((60, 12, COUNT), dtype=bool)
    for key, step in itertools.product(range(60), range(12)):
        mechanism = Mechanism(plan_of(1, 12), key.to_bytes(32, "big"), {"ada": step})
        trained(toy, mechanism, step + 3, np.arange(COUNT))
        seen[key, step, drawn[-1]] = True
    by_turn = seen.reshape(60, 4, 3, COUNT)  # key, turn, step modulo 3, example
    groups = by_turn.any(axis=1)
    assert (groups.sum(axis=1) <= 1).all(), "never in two groups"
    turns = by_turn.sum(axis=(1, 2))
    assert turns.mean() / 4 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / seen.size * 3) ** 0.5)
    sizes = groups.sum(axis=2)  # of groups: each example has one of its own, so that others' do not depend on it
    assert sizes.mean(axis=0) == pytest.approx([COUNT / 3] * 3, abs=5 * (COUNT * 2 / 9 / 60) ** 0.5)
    assert sizes.std(axis=0).min() > 2, "not dealt in equal parts, which would move others when an example is removed"


@pytest.mark.parametrize("missing", [{"key": None}, {"earlier": None}])
def test_noise_that_cannot_be_continued_is_refused(toy, missing: dict) -> None:
    """Training without the key or the rounds before would draw noise that was released already, or forget to cancel it."""
    mechanism = replace(Mechanism(plan_of(1, 6), KEY, {"ada": 1}), **missing)
    with pytest.raises(RunError, match="correlated noise needs the run's key and the rounds that were charged before"):
        trained(toy, mechanism, 1, np.arange(COUNT))


def test_a_mechanism_travels_with_bands_and_rounds() -> None:
    mechanism = Mechanism(plan_of(2, 6), KEY, {"ada": 3})
    assert Mechanism.of(json.loads(json.dumps(mechanism.table()))) == mechanism


# --- runs -------------------------------------------------------------------------------------------------------------

RUN = """
[run]
name = "correlated"
rounds = 6
[model]
name = "digits-mlp"
[data.partition]
kind = "iid"
[clients]
count = 4
participation = 0.75
ranks = [2, 4]
[train]
optimizer = "sgd"
learning_rate = 0.5
local_steps = 2
batch_size = 16
[method]
name = "ffa_lora"
[privacy]
level = "example"
epsilon = 6.0
delta = 1e-5
noise = "correlated"
bands = 5
max_rounds = 4
accountant = "rdp"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv(noise.SEED, "0123456789abcdef" * 2)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def charges(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "privacy.jsonl").read_text().splitlines()]


def test_a_run_that_was_stopped_goes_on_with_the_same_bytes_and_charges(place: Path) -> None:
    chosen = configs.load(place / "run.toml")
    summary = simulation.execute(chosen, place / "whole")
    for stop in (1, 4):

        def leave(metrics, stop=stop) -> None:
            if metrics["round"] == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            simulation.execute(chosen, place / f"stopped-{stop}", on_round=leave)
        simulation.execute(chosen, place / f"stopped-{stop}", resume=True)
        assert whole(place / f"stopped-{stop}") == whole(place / "whole")
    assert summary["epsilon"] <= 6.0
    rounds = {
        name: [r["round"] for r in charges(place / "whole") if r["client"] == name]
        for name in summary["privacy"]["epsilon_by_client"]
    }
    assert max(map(len, rounds.values())) == 4, "no client takes part more often than max_rounds"
    for name, own in rounds.items():  # two steps a round and 5 bands: 2, 4, 6, 8 steps are 1, 1, 2, 2 turns
        mine = [row for row in charges(place / "whole") if row["client"] == name]
        assert np.cumsum([row["steps"] for row in mine]).tolist() == [1, 1, 2, 2][: len(own)]
        assert {row["sampling_rate"] for row in mine} == {5 * 16 / mine[0]["num_examples"]}


def test_each_round_is_handed_the_rounds_that_were_charged_before(place: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.rows: list[dict] = []

        def charges(self) -> list[dict]:
            return self.rows

        def charge(self, rows) -> None:
            self.rows += rows

    plan, books = plan_of(2, 6), Kept()
    ledger = Ledger(plan, books, noise.keep_key(KEY))
    for round, names in enumerate((["ada"], ["ada", "bob"], ["bob"]), 1):
        ledger.charge(round, dict.fromkeys(names, COUNT))
    assert [ledger.mechanism(round).earlier for round in (1, 2, 3, 4)] == [
        {"ada": 0, "bob": 0}, {"ada": 1, "bob": 0}, {"ada": 2, "bob": 1}, {"ada": 2, "bob": 2},
    ]  # fmt: skip
    assert Ledger(plan, books, ledger.key_name).mechanism(2).earlier == {"ada": 1, "bob": 0}, "a repeated round, too"
