"""The audit by known noise: honest noise stands, and what is planted is refuted and named, at both levels and at the server."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from anyrank.cli.verbs import app
from anyrank.config.sections import Config, PartitionConfig
from anyrank.config.tables import from_table
from anyrank.errors import ConfigError
from anyrank.privacy.grid import Gaussian
from anyrank.privacy.noise import Mechanism
from anyrank.studies import noise_audit
from anyrank.studies.tally import Signs, Sizes, Tally
from anyrank.training import private_examples, private_upload
from anyrank.training.private_examples import PerExample

pytest.importorskip("dp_accounting")
LONG = pytest.mark.skipif(os.environ.get("ANYRANK_AUDITS") != "all", reason="ANYRANK_AUDITS=all runs it (`make audits`)")


def config(level: str = "example", **sections: Any) -> Config:
    privacy = {"level": level, "epsilon": 1.0, "delta": 1e-5 if level == "example" else 1e-3, "clip": 1.0, "accountant": "rdp"}
    base = Config().replace(
        run={"rounds": 4},
        model={"name": "digits-mlp", "head": "trained"},
        data={"partition": PartitionConfig(kind="iid")},
        clients={"count": 3, "participation": 1.0, "ranks": (4,)},
        train={"optimizer": "adamw", "learning_rate": 0.01, "batch_size": 64, "local_steps": 3},
        method={"name": "ffa_lora"},
        privacy=privacy,
    )
    return base.replace(**sections)


KINDS = {
    "example": config(),
    "example, SGD": config(train={"optimizer": "sgd", "momentum": 0.9, "proximal_mu": 0.1}, method={"name": "raflora"}),
    "example, secure": config(privacy={"secure": True}),
    "client": config("client", method={"name": "rolora"}),
    "server": config("client", privacy={"noise_at": "server"}, method={"name": "rbla"}),
}


def key(number: int) -> bytes:
    return hashlib.sha256(f"audit {number}".encode()).digest()


def audited(kind: str, factor: float = 1.0, number: int = 0, rounds: int = 2) -> dict[str, Any]:
    return noise_audit.audit(KINDS[kind], rounds, factor, key=key(number))


@pytest.mark.parametrize("kind", KINDS)
def test_honest_noise_stands_and_half_of_it_is_refuted(kind: str) -> None:
    """At epsilon 1. The bound is near the claim, and nothing else is found."""
    honest = audited(kind)
    assert honest["claimed"] == pytest.approx(1.0, abs=0.01)
    assert (honest["short"], honest["repeats"], honest["faults"], honest["refuted"]) == ([], [], [], False)
    assert 0.5 < honest["lower_bound"] <= honest["claimed"]
    assert honest["releases"] == (2 if kind == "server" else 6)
    for row in honest["rows"]:
        assert row["low"] < row["noise"] < row["high"]
    halved = audited(kind, 0.5)
    assert halved["claimed"] == honest["claimed"]
    assert halved["refuted"]
    assert halved["lower_bound"] > 1.5
    large = [row["what"] for row in halved["rows"] if row["numbers"] > 100]
    assert set(large) <= set(halved["short"])


@pytest.mark.parametrize("kind", ["example", "client", "server"])
def test_a_forgotten_tensor_is_refuted_and_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's weight, 10 of whose numbers are not enough to see by, but all."""
    added = Gaussian.added

    def forgetting(self: Gaussian, values: np.ndarray, draws: Any, *reach: Any) -> np.ndarray:
        noisy = added(self, values, draws, *reach)
        return values if values.ndim == 2 and len(values) == 10 else noisy

    monkeypatch.setattr(Gaussian, "added", forgetting)
    found = audited(kind)
    assert found["refuted"]
    named = [name for name in found["short"] if name.startswith(("layer", "parameter"))]
    assert named == ["parameter fc3.weight"] or (len(named) == 1 and named[0].endswith("weight"))


def test_noise_that_repeats_is_refuted_although_its_size_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = Mechanism.draws
    planted = {
        "in two rounds": lambda self, round, client: draws(self, 1, client),
        "in two clients": lambda self, round, client: draws(self, round, "all"),
    }
    for what, wrong in planted.items():
        monkeypatch.setattr(Mechanism, "draws", wrong)
        found = audited("client")
        assert found["refuted"]
        assert any(what in pair for pair in found["repeats"]), what
        assert not found["faults"]
    monkeypatch.setattr(Mechanism, "draws", draws)
    again: dict[int, np.ndarray] = {}

    def same(self: Gaussian, values: np.ndarray, source: Any, *reach: Any) -> np.ndarray:
        if not source.standard_normal(1).any():
            return values
        normal = again.setdefault(values.size, np.random.default_rng(0).standard_normal(values.size))
        return values + self.deviation * normal.reshape(values.shape)

    monkeypatch.setattr(Gaussian, "added", same)
    assert any("in two steps" in pair for pair in audited("example")["repeats"])


def test_one_client_with_less_noise_is_refuted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    train = private_examples.train

    def less(model, client, download, declared, examples, plan, mechanism):
        if client == "client-1":
            noise = {count: 0.8 * value for count, value in mechanism.plan.noise.items()}
            mechanism = replace(mechanism, plan=replace(mechanism.plan, noise=noise))
        return train(model, client, download, declared, examples, plan, mechanism)

    monkeypatch.setitem(noise_audit.trainer._PRIVATELY, "example", less)
    found = audited("example")
    assert "client-1" in found["short"]
    assert not {"client-0", "client-2"} & set(found["short"])


def unclipped(self: PerExample, index: torch.Tensor, clip_norm: float, parts: int = 1) -> list[torch.Tensor]:
    return [100 * gradient.double().sum(dim=0) for gradient in self.gradients(index)]


def noticed(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Any, kind: str = "example") -> list[str]:
    monkeypatch.setattr(owner, name, wrong)
    found = audited(kind, rounds=1)
    assert found["refuted"]
    return found["faults"]


def test_gradients_that_are_not_clipped_are_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noticed(monkeypatch, PerExample, "clipped", unclipped) == ["one example or client changes more than it may"]


def test_uploads_that_are_not_clipped_are_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda changes, clip_norm: {name: 1e3 * change for name, change in changes.items()}  # noqa: E731
    faults = noticed(monkeypatch, private_upload, "_clipped", wrong, "client")
    assert faults == ["one example or client changes more than it may"]


def test_uploads_that_the_server_would_reject_are_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = noticed(monkeypatch, private_upload.change, "clipped", lambda download, trained, bound: trained, "server")
    assert faults == ["one example or client changes more than it may"]


def test_an_upload_that_has_more_than_noisy_gradients_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that follows from how many examples were trained on: it is another one where an example is left out."""
    train = private_examples.train

    def telling(model, client, download, declared, examples, *rest):
        update = train(model, client, download, declared, examples, *rest)
        tensors = {name: tensor + 1e-4 * len(examples) for name, tensor in update.adapter.tensors.items()}
        return replace(update, adapter=replace(update.adapter, tensors=tensors))

    monkeypatch.setitem(noise_audit.trainer._PRIVATELY, "example", telling)
    assert audited("example", rounds=1)["faults"] == ["uploads are not functions of the noisy gradients alone"]


def test_a_step_more_than_planned_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    train = private_examples.train

    def longer(model, client, download, declared, examples, plan, mechanism):
        more = replace(mechanism, plan=replace(mechanism.plan, local_steps=mechanism.plan.local_steps + 1))
        return train(model, client, download, declared, examples, plan, more)

    monkeypatch.setitem(noise_audit.trainer._PRIVATELY, "example", longer)
    assert audited("example", rounds=1)["faults"] == ["not the planned number of private steps is taken"]


def test_a_causal_language_model_is_audited_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_causal import make_model

    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path / "cache"))
    make_model(tmp_path / "model")
    draw = random.Random(0)
    rows = [{"prompt": f"Add {draw.randint(1, 99)} and {draw.randint(1, 99)}.", "completion": f" {n}"} for n in range(60)]
    for name, part in (("rows", rows[:50]), ("public", rows[50:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    table = {
        "run": {"rounds": 2},
        "model": {"task": "causal-lm", "path": str(tmp_path / "model")},
        "data": {
            "source": str(tmp_path / "rows.jsonl"),
            "test_source": str(tmp_path / "public.jsonl"),
            "partition": {"kind": "iid"},
        },
        "clients": {"count": 2, "participation": 1.0, "ranks": [4]},
        "lora": {"target_modules": ["q_proj", "v_proj"]},
        "train": {"optimizer": "adamw", "learning_rate": 0.01, "batch_size": 4, "local_steps": 2},
        "method": {"name": "ffa_lora"},
        "privacy": {"level": "example", "epsilon": 1.0, "delta": 1e-3, "accountant": "rdp"},
    }
    honest, halved = (noise_audit.audit(from_table(table), 1, factor, key=key(1)) for factor in (1.0, 0.5))
    assert (honest["refuted"], halved["refuted"]) == (False, True)
    assert sum(row["what"].startswith("layer") for row in honest["rows"]) == 4


# --- statistics --------------------------------------------------------------------------------------------------------


def test_bounds_by_hand() -> None:
    """Four numbers whose squares add up to 10; and of 100, five above and ten below half the shift of 2.5."""
    sizes = Sizes()
    sizes.add(np.array([1.0, -1.0, 2.0, -2.0]))
    low, high = sizes.interval(0.1)
    assert sizes.ratio == pytest.approx(math.sqrt(10 / 4))
    assert (10 / low**2, 10 / high**2) == pytest.approx((stats.chi2.ppf(0.95, 4), stats.chi2.ppf(0.05, 4)))
    counted = Sizes()
    counted.add(np.concatenate([np.full(5, 1.3), np.full(10, -1.3), np.zeros(85)]))
    rates = [stats.binomtest(errors, 100).proportion_ci(0.9, "exact").high for errors in (5, 10)]
    assert counted.hides(0.1) == pytest.approx(2.5 / sum(stats.norm.isf(rate) for rate in rates))
    nothing = Sizes()
    nothing.add(np.array([5.0, -5.0]))
    assert math.isinf(nothing.hides(0.1))


def test_bounds_are_as_often_wrong_as_they_say() -> None:
    """Of honest noise, over 2,000 audits of 300 numbers; and noise of another shape and less width does not pass for it."""
    draw, wrong, misled = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        sizes = Sizes()
        sizes.add(draw.standard_normal(300))
        low, high = sizes.interval(0.1)
        wrong += not low <= 1 <= high
        misled += sizes.hides(0.1) < 1
    assert abs(wrong - 200) < 5 * math.sqrt(180)
    assert misled < 200 + 5 * math.sqrt(180)
    flat = Sizes()
    flat.add(draw.uniform(-math.sqrt(3), math.sqrt(3), 20_000))  # of variance 1, and never above 1.74
    assert flat.hides(0.05) < 0.97 or flat.interval(0.05)[1] < 1.05


def test_signs_and_the_share_of_each_test() -> None:
    tally, draw = Tally(), np.random.default_rng(0)
    for name, z in (("one", draw.standard_normal(200)), ("other", draw.standard_normal(200))):
        tally.noise(z, [name, "all"])
    tally.pair("honest", draw.random(400) < 0.5, draw.random(500) < 0.5)
    same = draw.random(400) < 0.5
    tally.pair("same", same, same)
    tally.pair("mirrored", same, ~same)
    assert tally.sizes["all"].count == 400
    assert tally.alpha(0.93) == pytest.approx(0.07 / (2 * 3 + 3))
    assert tally.repeats(0.01) == ["same", "mirrored"]
    assert Signs().p_value() == 1.0


# --- the command -------------------------------------------------------------------------------------------------------

TOML = """
[run]
name = "private"
rounds = 4
[model]
name = "digits-mlp"
[clients]
count = 2
participation = 1.0
ranks = [4]
[train]
batch_size = 32
local_steps = 2
[method]
name = "ffa_lora"
[privacy]
level = "example"
epsilon = 1.0
delta = 1e-5
"""


@functools.cache
def command(folder: Path, *arguments: str) -> tuple[int, str, str]:
    (folder / "private.toml").write_text(TOML)
    done = CliRunner().invoke(app, ["audit", str(folder / "private.toml"), *arguments], env={"COLUMNS": "200"})
    return done.exit_code, done.stdout, done.stderr


def test_the_command_says_what_it_does_and_what_it_found(tmp_path: Path) -> None:
    status, told, said = command(tmp_path, "--rounds", "1", "--noise-factor", "0.5")
    assert status == 0
    assert "trains on the clients' data, in this process, and discards what it trains" in " ".join(said.split())
    assert "refuted" in told
    assert "layer fc1, B" in told
    status, told, said = command(tmp_path, "--rounds", "1", "--json")
    found = json.loads(told)
    assert found["kind"] == "known noise"
    assert {"claimed", "lower_bound", "delta", "confidence", "rows", "short", "repeats", "faults", "refuted"} <= found.keys()
    assert {row.keys() >= {"what", "numbers", "noise", "low", "high", "most"} for row in found["rows"]} == {True}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--confidence", "1"), "--confidence: expected a number from 0.5 to below 1"),
        (("--noise-factor", "-1"), "--noise-factor: expected a number of 0 or more"),
        (("--canaries", "5", "--rounds", "1"), "--rounds: an audit by --canaries takes all rounds"),
        (("--set", "privacy.level=none", "--set", "privacy.epsilon=0", "--set", "privacy.delta=0"), "nothing to audit"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "private.toml").write_text(TOML)
    done = CliRunner().invoke(app, ["audit", str(tmp_path / "private.toml"), *arguments])
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)


@LONG
@pytest.mark.parametrize("kind", KINDS)
def test_honest_noise_is_refuted_as_seldom_as_the_confidence_says(kind: str) -> None:
    """Of 25 audits with 99 % confidence, 3 or more refuted would happen by chance once in 500; less noise is always refuted."""
    refuted = [audited(kind, number=number)["refuted"] for number in range(25)]
    print(f"{kind}: {sum(refuted)} of 25 honest audits refuted")
    assert sum(refuted) < 3
    for factor in (0.5, 0.8, 0.9):
        found = [audited(kind, factor, number)["refuted"] for number in range(25)]
        print(f"{kind}: {sum(found)} of 25 audits of {factor} of the noise refuted")
        assert all(found) or factor > 0.5
