"""What is released under privacy is possible for every value that it could have come from, number by number.

The adversary here knows the noise's size, the clip norm and two candidates for the value. It looks for releases that one of
them cannot have led to, as in Mironov's attack (CCS 2012).
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from anyrank.privacy.grid import Gaussian
from anyrank.privacy.noise import Mechanism, SystemDraws
from anyrank.robust.central_noise import Reach, cover
from anyrank.training import private_examples
from anyrank.training.private_examples import PerExample
from test_private_training import BATCH, COUNT, download_of, plan_of, toy, trained_by  # noqa: F401 - toy is a fixture


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def grid_of(deviation: float, multiplier: float) -> Fraction:
    """The step, from public numbers alone: the largest power of two that is at most the deviation, over 2^24 times the least
    power of two that is at least the multiplier."""
    power = Fraction(2) ** math.floor(math.log2(deviation))
    assert power <= deviation < 2 * power
    return power / 2**24 / max(1, 2 ** math.ceil(math.log2(multiplier)))


@given(
    values=arrays.arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e6, 1e6)),
    multiplier=st.floats(0.1, 1e4),
    clip_norm=st.floats(1e-6, 1e3),
    seed=st.integers(0, 2**32),
)
def test_every_release_is_a_whole_number_of_steps_that_follow_from_public_numbers(values, multiplier, clip_norm, seed) -> None:
    noise = Gaussian(multiplier, clip_norm, len(values))
    step = grid_of(noise.deviation, multiplier)
    for number in noise.added(values, draws(seed)).tolist():
        assert (Fraction(number) / step).denominator == 1


@given(
    pair=arrays.arrays(np.float64, (2, 20), elements=st.floats(-1e3, 1e3)),
    multiplier=st.floats(0.3, 50),
    seed=st.integers(0, 2**32),
)
def test_two_values_have_the_same_possible_releases(pair, multiplier, seed) -> None:
    """Whatever came from the one: there is a whole number of steps of noise by which it comes from the other, exactly."""
    noise = Gaussian(multiplier, 1.0, 20)
    step = float(grid_of(noise.deviation, multiplier))
    one, other = pair
    release = noise.added(one, draws(seed))
    needed = (release - np.rint(other / step) * step) / step
    assert (needed == np.rint(needed)).all()
    assert (np.rint(other / step) * step + needed * step == release).all()


@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 7.3])
@pytest.mark.parametrize("multiplier", [0.4, 1.0, 3.7, 900.0])
def test_rounding_the_value_is_paid_for(multiplier, clip_norm) -> None:
    """Neighbours at distance C whose every coordinate is rounded the worst way: noise over distance is the multiplier still."""
    dimensions = 10_000
    noise = Gaussian(multiplier, clip_norm, dimensions)
    step = float(grid_of(noise.deviation, multiplier))
    worst = clip_norm + step * math.sqrt(dimensions)
    assert noise.deviation / worst >= multiplier * (1 - 1e-12)
    assert noise.deviation / (multiplier * clip_norm) < 1 + 1e-4, "and it costs next to nothing"


@given(
    value=st.floats(-1e30, 1e30),
    multiplier=st.floats(1e-3, 1e3),
    clip_norm=st.sampled_from([1e-30, 1e-12, 1e-9, 1e-3, 1.0]),
    seed=st.integers(0, 2**32),
)
@example(value=1.0, multiplier=0.5, clip_norm=1e-9, seed=0)  # 2^52 steps are 0.001 here: a weight of 1 would have become that
def test_a_value_far_above_the_clip_keeps_its_size_and_is_rounded_from_whole_steps(value, multiplier, clip_norm, seed) -> None:
    """As weights are, to whose mean the server's noise is added. The exact sum of whole steps, rounded once to float64, is a
    function of that sum alone."""
    noise = Gaussian(multiplier, clip_norm, 1)
    step = grid_of(noise.deviation, multiplier)
    whole = round(Fraction(value) / step) + round(Fraction(float(draws(seed).standard_normal(1)[0]) * noise.deviation) / step)
    (got,) = noise.added(np.array([value]), draws(seed)).tolist()
    assert abs(Fraction(got) - whole * step) <= max(2 * step, Fraction(math.ulp(got)))


@pytest.mark.parametrize("dimensions", [1, 10**6, 10**9, 10**11])
@pytest.mark.parametrize("multiplier", [0.5, 1.0, 64.0])
def test_rounding_is_paid_for_by_the_step_of_the_noise_that_is_added(multiplier, dimensions) -> None:
    """The step grows with the deviation that makes up for it. Where the deviation is a power of two, it is the largest."""
    noise = Gaussian(multiplier, 1.0, dimensions)
    clip_norm = 2.0 ** math.ceil(math.log2(noise.deviation)) / noise.deviation  # the deviation is then a power of two
    noise = Gaussian(multiplier, clip_norm, dimensions)
    step = noise.deviation * 2.0**-24 / max(1, 2 ** math.ceil(math.log2(multiplier)))
    assert noise.deviation / (clip_norm + step * math.sqrt(dimensions)) >= multiplier * (1 - 1e-12)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1.7e308, 5e-324])
@pytest.mark.parametrize("clip_norm", [1e-12, 1.0, 1e12])
def test_whatever_the_value_is_the_release_is_finite(value, clip_norm) -> None:
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(Gaussian(1.5, clip_norm, 3).added(np.full(3, value), draws(1), np.array([1.0, 0.3, 1e-6]))).all()


@pytest.mark.parametrize("source", [SystemDraws(), draws(3)], ids=["system", "key"])
def test_the_noise_is_normal_at_full_resolution(source) -> None:
    """Moments, tails and the last bits: among whole numbers of steps, even and odd are equally frequent, and so are the rest
    of divisions by 3 and 5."""
    noise, count, step = Gaussian(2.0, 0.5, 1), 400_000, float(grid_of(1.0, 2.0))
    found = noise.added(np.full(count, 123.456), source) - float(np.rint(123.456 / step)) * step
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt({1: 1, 2: 2, 3: 15, 4: 96}[power] / count)
        assert (found**power).mean() == pytest.approx(moment, abs=5 * spread)
    for bound, share in ((1.0, 0.3173105), (2.0, 0.0455003), (3.0, 0.0026998)):
        assert (abs(found) > bound).mean() == pytest.approx(share, abs=5 * math.sqrt(share / count))
    steps = np.rint(found / step).astype(np.int64)
    for divisor in (2, 3, 5, 16):
        shares = np.bincount(steps % divisor, minlength=divisor) / count
        assert abs(shares - 1 / divisor).max() < 5 * math.sqrt(1 / divisor / count)


def impossible(numbers: np.ndarray, scale: float, step: Fraction) -> int:
    """How many of these float32 numbers are not what some whole number of steps, divided by `scale`, is rounded to."""
    whole = np.rint(numbers.astype(np.float64) * scale / float(step))
    near = [((whole + shift) * float(step) / scale).astype(np.float32) for shift in (-1, 0, 1)]
    return int((~np.logical_or.reduce([each == numbers for each in near])).sum())


@pytest.mark.parametrize("multiplier", [0.7, 3.0])
def test_gradients_under_privacy_have_no_impossible_numbers_in_any_step(toy, monkeypatch, multiplier) -> None:  # noqa: F811
    """What the optimizer is given, over steps and keys; and the same numbers by float32 sums, as a check of the check."""
    model, download = toy
    seen: list[np.ndarray] = []
    optimizer = private_examples.Optimizer

    class Watching(optimizer):
        def step(self) -> None:
            seen.append(torch.cat([p.grad.flatten() for p in self.watched]).numpy().copy())
            super().step()

        def __init__(self, parameters, *more) -> None:
            self.watched = list(parameters)
            super().__init__(parameters, *more)

    monkeypatch.setattr(private_examples, "Optimizer", Watching)
    for key in range(8):
        trained_by(Mechanism(plan_of(multiplier), key.to_bytes(32, "big")), model, download)
    numbers = np.concatenate(seen)
    noise = Gaussian(multiplier, 0.5, len(seen[0]))
    step = grid_of(noise.deviation, multiplier)
    assert numbers.dtype == np.float32
    assert impossible(numbers, BATCH, step) == 0
    gradient = np.float32(0.123456789)
    floats = gradient + np.float32(noise.deviation) * draws(1).standard_normal(len(numbers)).astype(np.float32)
    assert impossible(floats / np.float32(BATCH), BATCH, step) > len(numbers) / 200, (
        "small numbers have more bits than the grid"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_servers_noise_has_none_either(dtype) -> None:
    from anyrank.adapter.adapter import Adapter
    from anyrank.adapter.layer import LoraLayer

    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 300), (200, 4)))
    far = torch.tensor([1.0, 0.5, 0.25, 0.3], dtype=torch.float64)
    reach = Reach({"layer": {"A": far[:, None], "B": far[None, :]}}, 0.4)
    noise = Gaussian(1.5, 0.2, 10_000)
    got = cover(Adapter({"layer": LoraLayer(A, B, 1.0)}, {}, {}), reach, noise, draws(5)).layers["layer"]
    for slice, share in enumerate(far.tolist()):
        step = grid_of(noise.deviation * share, 1.5)
        for row in (got.A[slice], got.B[:, slice]):
            whole = torch.round(row.double() / float(step))
            near = [((whole + shift) * float(step)).to(dtype) for shift in (-1, 0, 1)]
            assert bool(torch.stack([each == row for each in near]).any(dim=0).all())


def test_a_sum_of_clipped_gradients_is_as_exact_as_float64(toy) -> None:  # noqa: F811
    """Neighbours that differ in one example: the others' rounding does not move the sum by more than 1e-12 clips."""
    model, download = toy
    sums = PerExample(model, model.load(download))
    everybody = torch.arange(COUNT)
    with_it, without = (sums.clipped(index, 0.5) for index in (everybody, everybody[1:]))
    one = sums.clipped(everybody[:1], 0.5)
    rest = torch.cat([(a - b - c).flatten() for a, b, c in zip(with_it, without, one, strict=True)])
    assert {total.dtype for total in with_it} == {torch.float64}
    moved = torch.cat([(a - b).flatten() for a, b in zip(with_it, without, strict=True)])
    assert float(moved.norm()) <= 0.5 * (1 + 1e-6)
    assert float(rest.norm()) <= 1e-6 * 0.5  # each example's own gradient is float32: a batch may round it otherwise


def test_values_beyond_the_grid_and_reach_zero() -> None:
    noise = Gaussian(1.0, 1.0, 4)
    got = noise.added(np.array([np.nan, np.inf, -np.inf, 5.0]), draws(), np.array([1.0, 1.0, 1.0, 0.0]))
    assert np.isfinite(got).all()
    assert abs(got[0]) < 10
    assert got[3] == 5.0, "what no client can move needs no noise"
