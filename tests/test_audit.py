"""The audit's bound is the binomial one, worked out here by hand; it passes honest noise and refutes broken noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from anyrank.config.sections import Config, PartitionConfig
from anyrank.errors import ConfigError
from anyrank.studies import audit
from anyrank.studies.audit import Canaries, lower_bound, p_value

PRIVATE = Config().replace(
    run={"rounds": 6},
    model={"name": "digits-mlp"},
    data={"partition": PartitionConfig(kind="iid")},
    clients={"count": 3, "participation": 1.0, "ranks": (4,)},
    train={"optimizer": "sgd", "learning_rate": 0.2, "batch_size": 64, "local_steps": 10},
    method={"name": "ffa_lora"},
    privacy={"level": "example", "epsilon": 1.0, "delta": 1e-5, "clip": 1.0},
)


def test_the_bound_by_hand() -> None:
    """All 100 of 100 right: P = q^100 <= 0.05 where q <= 0.05^(1/100), and e^eps / (1 + e^eps) = q."""
    q = 0.05 ** (1 / 100)
    assert lower_bound(100, 100, 100, 0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-3)
    assert p_value(3, 3, 3, 0.0, 0.0) == pytest.approx(1 / 8)
    assert p_value(3, 3, 2, 0.0, 0.0) == pytest.approx(4 / 8)
    assert p_value(3, 3, 2, math.log(3), 0.0) == pytest.approx(27 / 64 + 27 / 64)


def test_delta_makes_a_bound_more_careful_by_hand() -> None:
    """Two coins, two right, epsilon 0: P[X >= 2] = 1/4; P[2 > X >= 1] = 1/2 and P[2 > X >= 0] / 2 = 3/8, so 2 m delta / 2."""
    assert p_value(2, 2, 2, 0.0, 0.01) == pytest.approx(1 / 4 + 2 * 2 * 0.01 * 0.5)
    assert lower_bound(500, 250, 250, 1e-3) < lower_bound(500, 250, 250, 0.0)


def test_guessing_at_random_refutes_nothing() -> None:
    """By definition of the confidence: over many audits of perfect secrecy, at most one in twenty is wrong."""
    draw = np.random.default_rng(0)
    wrong = sum(lower_bound(200, 100, int(draw.binomial(100, 0.5)), 1e-5) > 0 for _ in range(400))
    assert wrong <= 0.05 * 400


def test_the_posterior_is_bayes_rule() -> None:
    """Against the joint Gaussian of N and y, conditioned by the textbook formula in the P x P form."""
    draw = torch.Generator().manual_seed(0)
    G = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    mean, spread = torch.rand(5, generator=draw, dtype=torch.float64), torch.rand(5, generator=draw, dtype=torch.float64)
    y, noise = torch.randn(7, generator=draw, dtype=torch.float64), 0.3
    floor = 1e-3 * float((G @ G.T).diagonal().mean())
    covariance = G.T @ torch.diag(spread) @ G + (noise + floor) * torch.eye(7, dtype=torch.float64)
    expected = torch.diag(spread) @ G @ torch.linalg.inv(covariance) @ (y - G.T @ mean)
    assert torch.allclose(audit._posterior(G, y, mean, spread, noise), expected, atol=1e-12)


def test_canaries_have_wrong_labels_and_fair_coins() -> None:
    labels = np.arange(2000) % 10
    canaries = Canaries.draw(labels, np.arange(500, 2000), 1000, seed=3)
    assert len(set(canaries.index.tolist())) == 1000
    assert canaries.index.min() >= 500
    assert (canaries.labels != labels[canaries.index]).all()
    assert set(canaries.labels.tolist()) == set(range(10))
    assert 430 < canaries.included.sum() < 570  # four standard deviations


def test_honest_noise_stands_and_broken_noise_is_caught(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dp_accounting")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("ANYRANK_PRIVACY_SEED", "a secret of at least thirty-two characters")
    honest = audit.audit(PRIVATE, canaries=600)
    assert honest["claimed"] == pytest.approx(1.0, abs=0.01)
    assert honest["lower_bound"] < honest["claimed"]
    assert not honest["refuted"]
    broken = audit.audit(PRIVATE, canaries=600, noise_factor=0.01)
    assert broken["claimed"] == honest["claimed"]
    assert broken["lower_bound"] > broken["claimed"]
    assert broken["refuted"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"privacy": {"level": "none", "epsilon": 0.0}}, "expected level = 'example'"),
        ({"train": {"optimizer": "adamw"}}, "expected optimizer = 'sgd'"),
    ],
)
def test_what_cannot_be_audited_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        audit.audit(PRIVATE.replace(**change), canaries=100)


def test_more_canaries_than_half_the_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match="half of the 1437 training examples"):
        audit.audit(PRIVATE, canaries=1000)
