"""Budgets and noise: the libraries' accountants against each other, plans that are refused, and the command that answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm
from typer.testing import CliRunner

from anyrank import simulation
from anyrank.cli.verbs import app
from anyrank.config.sections import Config
from anyrank.config.tables import from_table, to_table
from anyrank.errors import AnyRankError, ConfigError
from anyrank.privacy.accountants import ACCOUNTANTS, Spending, epsilon, noise_for
from anyrank.privacy.plan import PrivacyPlan, plan_privacy

DELTA = 1e-5
ORDERS = (*range(2, 64), 96, 128, 192, 256, 512, 1024)
SPENDINGS = [
    Spending(0.05, 1.0, 400),
    Spending(0.16, 2.0, 1000),
    Spending(0.01, 0.6, 100),
    Spending(0.5, 5.0, 200),
    Spending(1.0, 10.0, 50),
    Spending(0.1, 60.0, 400),
]


# --- accountants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spending", SPENDINGS, ids=str)
def test_the_accountants_agree(spending: Spending) -> None:
    """PLD (dp-accounting) and PRV (Opacus) are two computations of one number; RDP, by either library, is a bound above it."""
    from opacus.accountants import RDPAccountant

    pld, prv, rdp = (epsilon(name, spending, DELTA) for name in ("pld", "prv", "rdp"))
    assert pld == pytest.approx(prv, rel=0.015)
    assert prv <= rdp
    assert pld <= rdp * (1 + 1e-3)
    theirs = RDPAccountant()
    theirs.history = [(spending.noise_multiplier, spending.sampling_rate, spending.steps)]
    assert rdp == pytest.approx(theirs.get_epsilon(delta=DELTA, alphas=list(ORDERS)), rel=1e-6)
    assert rdp <= 1.4 * prv, "Renyi's bound is known to be loose by a fraction"


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("noise", [3.0, 20.0])
def test_without_sampling_epsilon_is_that_of_one_gaussian(accountant: str, noise: float) -> None:
    """T steps of noise s on everybody are one of noise s / sqrt(T), whose delta at epsilon has a closed form
    (Balle and Wang 2018): Phi(1/2s - e s) - exp(e) Phi(-1/2s - e s)."""
    steps = 9
    found, s = epsilon(accountant, Spending(1.0, noise, steps), DELTA), noise / math.sqrt(steps)
    delta = norm.cdf(0.5 / s - found * s) - math.exp(found) * norm.cdf(-0.5 / s - found * s)
    assert delta <= DELTA * (1 + 1e-6), "an upper bound of epsilon"
    tight = found / (1.25 if accountant == "rdp" else 1.02)
    assert norm.cdf(0.5 / s - tight * s) - math.exp(tight) * norm.cdf(-0.5 / s - tight * s) > DELTA, "and not far above it"


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize(("rate", "steps", "target"), [(0.05, 400, 6.0), (0.2, 100, 1.0), (1.0, 40, 3.0)])
def test_noise_for_a_budget_is_just_enough(accountant: str, rate: float, steps: int, target: float) -> None:
    found = noise_for(accountant, target, DELTA, rate, steps)
    assert epsilon(accountant, Spending(rate, found, steps), DELTA) <= target
    assert epsilon(accountant, Spending(rate, found * 0.99, steps), DELTA) > target


@pytest.mark.parametrize(("rate", "steps", "target"), [(0.05, 400, 6.0), (0.2, 100, 1.0)])
def test_a_wrong_noise_does_not_pass_for_the_right_one(rate: float, steps: int, target: float) -> None:
    """The library's own PLD and RDP accountants, asked step by step as a reader would, say what our noise costs."""
    found = noise_for("pld", target, DELTA, rate, steps)
    pld, rdp = PLDAccountant(), RdpAccountant()
    for accountant in (pld, rdp):
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(found)), steps)
    assert 0.99 * target <= pld.get_epsilon(DELTA) <= target
    assert rdp.get_epsilon(DELTA) == pytest.approx(target, rel=0.25)


def test_more_privacy_never_costs_less() -> None:
    base = epsilon("pld", Spending(0.1, 1.5, 100), DELTA)
    assert epsilon("pld", Spending(0.1, 1.5, 100), 1e-7) > base
    assert epsilon("pld", Spending(0.1, 1.5, 200), DELTA) > base
    assert epsilon("pld", Spending(0.2, 1.5, 100), DELTA) > base
    assert epsilon("pld", Spending(0.1, 1.2, 100), DELTA) > base
    assert epsilon("pld", Spending(0.1, 1.5, 0), DELTA) == 0


def test_hopeless_noise_has_an_epsilon_that_says_so_at_once() -> None:
    assert epsilon("pld", Spending(0.1, 1e-3, 400), DELTA) > 1e6


def test_a_budget_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no noise multiplier up to .* raise epsilon, or take fewer steps"):
        noise_for("rdp", 1e-5, 1e-9, 0.9, 1_000_000)


# --- plans ------------------------------------------------------------------------------------------------------------


def config(**sections) -> Config:
    private = {"level": "example", "epsilon": 4.0, "delta": DELTA, "accountant": "rdp"} | sections.pop("privacy", {})
    return Config().replace(run={"rounds": 10}, train={"batch_size": 8, "local_steps": 5}, privacy=private).replace(**sections)


def test_the_noise_is_solved_once_for_all_steps_that_a_client_can_take() -> None:
    plan = plan_privacy(config(), [40, 100])
    assert plan.noise == {count: noise_for("rdp", 4.0, DELTA, 8 / count, 50) for count in (40, 96)}
    assert plan.spending(40, 10) == Spending(0.2, plan.noise[40], 50)
    assert plan.epsilon_after(96, 10) <= 4.0 < plan.epsilon_after(96, 11)


def test_a_client_that_may_take_part_in_fewer_rounds_needs_less_noise() -> None:
    half = plan_privacy(config(privacy={"max_rounds": 5}), [40])
    assert half.max_rounds == 5
    assert half.noise == {40: noise_for("rdp", 4.0, DELTA, 0.2, 25)}
    assert plan_privacy(config(privacy={"max_rounds": 99}), [40]).max_rounds == 10


def test_noise_that_is_given_is_everybodys() -> None:
    plan = plan_privacy(config(privacy={"epsilon": 0.0, "noise_multiplier": 1.5}), [40, 100])
    assert plan.noise == {40: 1.5, 96: 1.5}
    assert plan.epsilon_after(40, 10) > plan.epsilon_after(96, 10), "who has fewer examples has each of them drawn more often"


def test_counts_are_rounded_down_to_three_binary_digits() -> None:
    plan, exact = (plan_privacy(config(privacy={"counts": counts}), [40, 100]) for counts in ("rounded", "exact"))
    assert [plan.declared(n) for n in (7, 8, 9, 39, 40, 100, 127)] == [7, 8, 8, 32, 40, 96, 112]
    assert [exact.declared(n) for n in (9, 100)] == [9, 100]
    assert exact.sampling_rate(100) == 0.08


def test_a_run_without_privacy_has_no_plan() -> None:
    assert plan_privacy(Config(), [3]) is None


REFUSED = {
    "no budget": ({"privacy": {"epsilon": 0.0}}, r"privacy.epsilon: expected a number above 0"),
    "a budget below zero": ({"privacy": {"epsilon": -2.0}}, r"privacy.epsilon: expected a number above 0.*got -2.0"),
    "an endless budget": ({"privacy": {"epsilon": math.inf}}, r"privacy.epsilon"),
    "noise below zero": ({"privacy": {"epsilon": 0.0, "noise_multiplier": -1.0}}, r"privacy.noise_multiplier: .*got -1.0"),
    "budget and noise": ({"privacy": {"noise_multiplier": 1.0}}, r"privacy: give epsilon .* or noise_multiplier .* not both"),
    "no delta": ({"privacy": {"delta": 0.0}}, r"privacy.delta: expected a number above 0"),
    "delta of one example": ({"privacy": {"delta": 0.011}}, r"privacy.delta: expected less than 1 over the 96 examples"),
    "no clipping": ({"privacy": {"clip": 0.0}}, r"privacy.clip: expected a number above 0"),
    "epochs": ({"train": {"local_steps": 0, "local_epochs": 1}}, r"train.local_epochs: private training draws"),
    "a client with fewer examples than a batch": ({"train": {"batch_size": 41}}, r"train.batch_size: expected at most .* 40"),
    "shared examples": ({"data": {"partition": "sampled"}}, r"data.partition.kind: with 'sampled', clients share examples"),
    "an accountant that is not there": ({"privacy": {"accountant": "moments"}}, r"accountant: expected one of pld, prv, rdp"),
    "an unknown level": ({"privacy": {"level": "user"}}, r"privacy.level: expected one of none, example, person, client"),
    "keys without a level": ({"privacy": {"level": "none"}}, r"privacy.epsilon: expected level = 'example', 'pers"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_plan_that_cannot_be_kept_is_refused_with_the_reason(what: str) -> None:
    sections, words = REFUSED[what]
    table = to_table(config())
    for section, keys in sections.items():
        if keys.get("partition"):
            table["data"]["partition"] |= {"kind": "sampled", "examples_per_client": 50}
        else:
            table[section] |= keys
    with pytest.raises(ConfigError, match=words):
        plan_privacy(from_table(table), [40, 100])


METHODS_REFUSED = {
    "centralized": r"centralized gathers all examples in one place",
    "fedsa": r"with fedsa, B and tensors stay with each client",
    "local-only": r"stay with each client",
    "hetlora": r"method.prune: hetlora would prune ranks by norms that are mostly noise; set method.prune=false",
}
DIGITS = {"model": {"name": "digits-mlp"}, "clients": {"count": 4, "ranks": (4,)}, "data": {}}


@pytest.mark.parametrize("method", METHODS_REFUSED)
def test_methods_that_the_plan_does_not_cover_are_refused(method: str) -> None:
    chosen = config(**DIGITS, method={"name": method})
    with pytest.raises(ConfigError, match=METHODS_REFUSED[method]):
        simulation.build(chosen)


@pytest.mark.parametrize("method", ["fedavg", "ffa_lora", "rolora", "fedsvd", "flora", "raflora", "rbla"])
def test_methods_train_privately_whatever_they_train(method: str) -> None:
    from anyrank.federation import asking, loop
    from anyrank.messages.plan import plan_round
    from anyrank.messages.records import ClientUpdate
    from anyrank.privacy.noise import Mechanism

    built = simulation.build(config(**DIGITS, method={"name": method}))
    state = loop.start(built)
    for round in (1, 2):
        jobs, _ = asking.dispatch(built, state, round)
        plan, mechanism = plan_round(built.config.train, round, 2, 0), Mechanism(built.privacy, b"k" * 32)
        replies = list(built.engine.train(jobs, plan, mechanism))
        assert all(isinstance(reply, ClientUpdate) and reply.metrics == {} for reply in replies)
        for reply, job in zip(replies, jobs, strict=True):
            for name, layer in reply.adapter.layers.items():
                for factor in "AB":
                    moved = not getattr(layer, factor).equal(getattr(job.download.adapter.layers[name], factor))
                    assert moved == (factor in job.download.train)
        state = built.method.aggregate(state, replies)
    built.close()


# --- the command ------------------------------------------------------------------------------------------------------

PRIVATE = """
[run]
rounds = 10
[model]
name = "digits-mlp"
[clients]
count = 4
participation = 0.5
ranks = [4]
[train]
batch_size = 8
local_steps = 5
[method]
name = "ffa_lora"
[privacy]
level = "example"
epsilon = 4.0
delta = 1e-5
accountant = "rdp"
"""


def answer(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["privacy", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.output)


def test_the_command_answers_noise_for_epsilon_and_epsilon_for_noise() -> None:
    asked = ("--examples", "1000", "--batch-size", "50", "--steps", "400")
    noise = answer(*asked, "--epsilon", "6")["counts"][0]["noise_multiplier"]
    assert answer(*asked, "--noise-multiplier", str(noise))["epsilon"] == answer(*asked, "--epsilon", "6")["epsilon"]
    assert 5.95 < answer(*asked, "--noise-multiplier", str(noise))["epsilon"] <= 6


def test_the_command_tells_of_a_configuration_what_a_run_would_spend(tmp_path: Path) -> None:
    (tmp_path / "private.toml").write_text(PRIVATE)
    told = answer(str(tmp_path / "private.toml"), "--set", "privacy.max_rounds=6")
    assert sum(row["clients"] for row in told["counts"]) == 4
    for row in told["counts"]:
        assert row["steps"] == 6 * 5
        assert row["sampling_rate"] == 8 / row["num_examples"]
        assert epsilon("rdp", Spending(row["sampling_rate"], row["noise_multiplier"], 30), 1e-5) == row["epsilon"] <= 4.0
    assert told["drawn"]["least"] <= 5 <= told["drawn"]["most"]  # two of four clients in each of ten rounds
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "private.toml")])
    assert "epsilon" in result.output
    table = CliRunner().invoke(app, ["privacy", str(tmp_path / "private.toml")]).output
    assert "noise multiplier" in table
    assert "10 of 10 rounds per client" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "expected a configuration, or all of --examples, --batch-size and --steps"),
        (("--examples", "10", "--batch-size", "20", "--steps", "3", "--epsilon", "1"), "--batch-size: expected .* 1 to the 10"),
        (("--examples", "10", "--batch-size", "5", "--steps", "3"), "privacy.epsilon: expected a number above 0"),
        (("--examples", "9", "--batch-size", "5", "--steps", "3", "--epsilon", "1", "--delta", "0.2"), "--delta: .* less"),
    ],
)  # fmt: skip
def test_questions_that_make_no_sense_are_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(AnyRankError, match=words):
        CliRunner().invoke(app, ["privacy", *arguments], catch_exceptions=False)


def test_a_plan_says_what_it_is_made_of() -> None:
    plan: PrivacyPlan = plan_privacy(config(), [40])
    told = json.loads(json.dumps(plan.table()))
    assert told.keys() >= {
        "level",
        "epsilon",
        "delta",
        "clip_norm",
        "batch_size",
        "local_steps",
        "rounds",
        "participation",
        "noise",
    }
    assert told["noise"] == {"40": plan.noise[40]}
