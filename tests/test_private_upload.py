"""Client-level privacy: the norm that is clipped is the product's, and the noise has the promised size in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anyrank import simulation
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config
from anyrank.errors import ConfigError, RunFailed
from anyrank.federation import asking, loop
from anyrank.messages.plan import plan_round
from anyrank.messages.records import Download
from anyrank.privacy.accountants import Spending, noise_for
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import plan_privacy
from anyrank.training import private_upload
from anyrank.training.private_upload import release

SHAPES = {"first": (5, 7, 3, 2.0), "second": (4, 6, 2, 0.5)}  # out, in, rank, scaling


class Silent:
    """Noise of zero."""

    def standard_normal(self, size: int) -> np.ndarray:
        return np.zeros(size)


def adapter(seed: int, like: Adapter | None = None) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    number = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    layers = {name: LoraLayer(number(r, width), number(out, r), s) for name, (out, width, r, s) in SHAPES.items()}
    return Adapter(layers, {"head": number(3)})


def moved(start: Adapter, factor: str, size: float) -> Adapter:
    """`start` with one factor of every layer, and the head, moved."""
    to = adapter(1)
    layers = {
        name: layer.with_factors(
            layer.A + size * to.layers[name].A if factor == "A" else layer.A,
            layer.B + size * to.layers[name].B if factor == "B" else layer.B,
        )
        for name, layer in start.layers.items()
    }
    return replace(start, layers=layers, tensors={"head": start.tensors["head"] + size * to.tensors["head"]})


def download(start: Adapter, factor: str) -> Download:
    return Download(start, {name: tuple(range(layer.rank)) for name, layer in start.layers.items()}, frozenset(factor))


def distance(one: Adapter, other: Adapter) -> float:
    """Between what two adapters apply: products dense, plain tensors as they are."""
    parts = [(one.layers[name].delta() - other.layers[name].delta()).flatten() for name in one.layers]
    return float(torch.cat([*parts, one.tensors["head"] - other.tensors["head"]]).norm())


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_change_within_the_clip_norm_is_sent_as_it_is(factor: str) -> None:
    start = adapter(0)
    trained = moved(start, factor, 1e-3)
    sent = release(download(start, factor), trained, 1.0, 0.0, Silent())
    assert distance(sent, trained) < 1e-9


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("clip_norm", [0.2, 3.0])
def test_a_larger_change_moves_the_products_by_the_clip_norm(factor: str, clip_norm: float) -> None:
    """Never by more; by less only as far as the small multiple of the identity in the norm makes it."""
    start = adapter(0)
    sent = release(download(start, factor), moved(start, factor, 50.0), clip_norm, 0.0, Silent())
    assert 0.99 * clip_norm < distance(sent, start) <= clip_norm * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_noise_reaches_the_product_with_one_size_whatever_the_other_factor_is(factor: str, scale: float) -> None:
    """`s E M^-1 A` has `out * rank` coordinates, each of variance (sigma C)^2, also when A is thirty times as large."""
    start = adapter(0)
    fixed = {
        name: layer.with_factors(layer.A * (scale if factor == "B" else 1), layer.B * (scale if factor == "A" else 1))
        for name, layer in start.layers.items()
    }
    start = replace(start, layers=fixed)
    squares, rng = [], np.random.default_rng(0)
    for _ in range(300):
        sent = release(download(start, factor), start, 0.5, 4.0, rng)
        squares.append(distance(sent, start) ** 2)
    coordinates = 3 + sum(r * (out if factor == "B" else width) for out, width, r, _ in SHAPES.values())
    assert np.mean(squares) == pytest.approx((4.0 * 0.5) ** 2 * coordinates, rel=0.05)


def test_a_change_that_is_not_finite_is_sent_as_none() -> None:
    start = adapter(0)
    broken = moved(start, "B", float("inf"))
    assert distance(release(download(start, "B"), broken, 1.0, 0.0, Silent()), start) == 0


def test_slices_that_apply_nothing_yet_do_no_harm() -> None:
    start = adapter(0)
    zero = {name: layer.with_factors(layer.A, torch.zeros_like(layer.B)) for name, layer in start.layers.items()}
    start = replace(start, layers=zero)
    sent = release(download(start, "A"), moved(start, "A", 1.0), 1.0, 1.0, np.random.default_rng(0))
    assert all(torch.isfinite(layer.A).all() for layer in sent.layers.values())


# --- a run ------------------------------------------------------------------------------------------------------------


def config(**sections) -> Config:
    base = Config().replace(
        run={"rounds": 3}, model={"name": "digits-mlp"}, clients={"count": 6, "participation": 0.5, "ranks": (2, 4)},
        train={"local_steps": 2}, method={"name": "ffa_lora"},
        privacy={"level": "client", "epsilon": 8.0, "delta": 1e-3, "accountant": "rdp"},
    )  # fmt: skip
    return base.replace(**sections)


def test_each_upload_is_one_release_of_the_whole_client() -> None:
    plan = plan_privacy(config(), [20, 300])
    assert plan.spending(20, 3) == Spending(1.0, plan.noise[20], 3)
    assert set(plan.noise.values()) == {noise_for("rdp", 8.0, 1e-3, 1.0, 3)}
    assert plan_privacy(config(train={"local_steps": 0, "local_epochs": 2}), [3, 20]), "no draw of examples, so no limit by it"


@pytest.mark.parametrize("method", ["ffa_lora", "rolora", "fedsvd"])
def test_a_run_spends_no_more_than_its_budget(tmp_path: Path, monkeypatch, method: str) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    summary = simulation.execute(config(method={"name": method}), tmp_path / "run")
    assert 0 < summary["epsilon"] <= 8.0
    assert np.isfinite(summary["loss"])


def test_a_client_that_fails_sends_noise_like_any_other(monkeypatch) -> None:
    def fails(*_):
        raise RunFailed("loss is nan at local step 2")

    built = simulation.build(config())
    jobs, _ = asking.dispatch(built, loop.start(built), 1)
    monkeypatch.setattr(private_upload.local, "train", fails)
    plan, mechanism = plan_round(built.config.train, 1, 3, 0), Mechanism(built.privacy, b"k" * 32)
    replies = list(built.engine.train(jobs, plan, mechanism))
    built.close()
    for reply, job in zip(replies, jobs, strict=True):
        assert reply.num_examples == built.counted(int(built.population.sizes[built.population.index(job.client.name)]))
        assert all(layer.B.any() for layer in reply.adapter.layers.values())


def test_methods_that_train_both_factors_are_refused_with_the_ones_that_do_not() -> None:
    with pytest.raises(ConfigError, match=r"raflora trains A and B together.*: fedsvd, ffa_lora, rolora"):
        simulation.build(config(method={"name": "raflora"}))


def test_delta_must_be_below_one_over_the_clients() -> None:
    with pytest.raises(ConfigError, match="less than 1 over the 6 clients"):
        plan_privacy(config(privacy={"delta": 0.2}), [20] * 6)
