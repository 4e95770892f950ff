"""Better noise for the same epsilon: `python experiments/better_noise.py` writes a table into `docs/results.md`.

Three clients train FFA-LoRA's B on the map above a frozen sentence encoder (`configs/banking77.toml`, `configs/sst2.toml`), in
all of 10 rounds of 10 steps, 128 examples expected in each. Ways: plain DP-SGD; noise that is correlated over steps, with the
number of bands that the plan chooses, and with as many as there are batches in an epoch (no sampling to speak of); and clips
that follow a quantile of the gradient norms, counted with noise of its own (Andrew et al., NeurIPS 2021). Every way has its own
learning rate and clip (or quantile) for each budget, by accuracy on a fifth of the training examples, held out, with other run
seeds; then it trains on all training examples, and the test examples are read once. The model is small enough that
gradients of single examples have a closed form; the plan, the noise and the sampling are the library's own.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import results

from anyrank import config as configs
from anyrank import keys
from anyrank.config.sections import Config
from anyrank.privacy import correlated
from anyrank.privacy.accountants import noise_for
from anyrank.privacy.grid import Gaussian
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import PrivacyPlan, plan_privacy
from anyrank.tasks.load import load_task

NAME = "6f-better-noise"
KEPT = results.ROOT / "runs" / "better-noise.json"
CLIENTS, SCALING, TEMPERATURE, BATCH, STEPS = 3, 2.0, 20.0, 128, 10
RANKS = {"banking77": 8, "banking77, rank 32": 32, "sst2": 32}  # of the frozen A
EPSILONS, TUNED_ON, SEEDS = (1, 3, 6), (100, 101), (0, 1, 2, 3, 4)
QUANTILES = (0.2, 0.5, 0.8)
SPEED, COUNT_NOISE = 0.2, 0.05  # of adaptive clips: their rate, and the deviation of a count over the expected batch


@dataclass(frozen=True)
class Data:
    """Features `[n, d]`, labels `[n]`, and the frozen head `[labels, d]`; `rank`: of A."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    head: np.ndarray
    rank: int

    def tuning(self) -> Data:
        """A fifth of the training examples in the place of the test examples."""
        held = keys.rng(0, "held out").random(len(self.y)) < 0.2
        return replace(self, x=self.x[~held], y=self.y[~held], test_x=self.x[held], test_y=self.y[held])


@dataclass(frozen=True)
class Way:
    """How noise and clip are made: `noise` and `bands` as in `[privacy]`; `quantiles`: of adaptive clips."""

    name: str
    noise: str = "independent"
    bands: int = 0
    quantiles: tuple[float, ...] = ()

    @property
    def first(self) -> tuple[float, float]:
        """The clip, or the quantile, and the learning rate where tuning begins."""
        return (0.5, 4.0) if self.quantiles else (1.0, 8.0)

    def neighbours(self, second: float, rate: float) -> Iterator[tuple[float, float]]:
        """What tuning compares with: other rates, and other clips at the same length of a clipped step."""
        yield from ((second, 2 * rate), (second, rate / 2))
        if self.quantiles:
            yield from ((each, rate) for each in self.quantiles if 0 < abs(each - second) < 0.4)
        else:
            yield from ((round(second * 3, 6), round(rate / 3, 6)), (round(second / 3, 6), round(rate * 3, 6)))


PLAIN = Way("plain DP-SGD")
WAYS = (
    PLAIN,
    Way("correlated noise", "correlated"),
    Way("correlated noise, most bands", "correlated", 1_000_000),
    Way("adaptive clips", quantiles=QUANTILES),
)


class Model:
    """Logits `head(20 normalize((1 + s B A) x))`, with A `[rank, d]` fixed and B `[d, rank]` trained."""

    def __init__(self, data: Data, seed: int) -> None:
        width = data.x.shape[1]
        self.data, self.A = data, keys.rng(seed, "A").uniform(-1, 1, (data.rank, width)) / np.sqrt(width)

    def gradients(self, B: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gradient of example i by B as `left[i] right[i]^T`: `[b, d]`, `[b, rank]`."""
        x, y = self.data.x[index], self.data.y[index]
        right = SCALING * (x @ self.A.T)
        unit, length = _normalized(x + right @ B.T)
        logits = TEMPERATURE * (unit @ self.data.head.T)
        error = np.exp(logits - logits.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(y)), y] -= 1
        back = error @ self.data.head
        back -= (back * unit).sum(axis=1, keepdims=True) * unit
        return TEMPERATURE * back / length, right

    def accuracy(self, B: np.ndarray) -> float:
        x = self.data.test_x
        unit, _ = _normalized(x + SCALING * (x @ self.A.T) @ B.T)
        return float(((unit @ self.data.head.T).argmax(axis=1) == self.data.test_y).mean())


def _normalized(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = np.linalg.norm(h, axis=1, keepdims=True)
    return h / length, length


@dataclass
class Clip:
    """A client's clip: fixed, or moving to the quantile `aim` of its gradients' norms by noised counts."""

    norm: float
    noise: float  # of the gradients, over the clip norm
    aim: float | None = None
    counts: float = COUNT_NOISE * BATCH

    def split(self) -> float:
        """The noise of the gradients, so that they and the counts together cost what `noise` alone does (theorem 1)."""
        return self.noise if self.aim is None else (self.noise**-2 - (2 * self.counts) ** -2) ** -0.5

    def follow(self, norms: np.ndarray, normal: float) -> None:
        """Move by a count of norms below the clip; an example changes the sum of `+-1/2` by 1/2."""
        if self.aim is not None:
            excess = (np.where(norms <= self.norm, 0.5, -0.5).sum() + self.counts * normal) / BATCH
            self.norm *= float(np.exp(-SPEED * (excess + 0.5 - self.aim)))


def train(data: Data, plan: PrivacyPlan, aim: float | None, rate: float, seed: int) -> float:
    """Test accuracy after the last round, the mean over its last three rounds."""
    model, shards = Model(data, seed), np.array_split(keys.rng(seed, "shards").permutation(len(data.y)), CLIENTS)
    B = np.zeros((data.x.shape[1], data.rank))
    clips = [Clip(plan.clip_norm, 1.0, aim) for _ in shards]
    scores = []
    for round in range(1, plan.rounds + 1):
        earlier = {f"client-{place}": round - 1 for place in range(CLIENTS)}
        mechanism = Mechanism(plan, f"better noise {seed}".encode(), earlier)
        changes = [_local(model, B, mechanism, round, place, shards[place], clips[place], rate) for place in range(CLIENTS)]
        B = B + np.average(changes, axis=0, weights=[plan.declared(len(shard)) for shard in shards])
        scores.append(model.accuracy(B))
    return statistics.fmean(scores[-3:])


def _local(
    model: Model, B: np.ndarray, mechanism: Mechanism, round: int, place: int, examples: np.ndarray, clip: Clip, rate: float
) -> np.ndarray:
    plan, client, start = mechanism.plan, f"client-{place}", B
    draws, declared = mechanism.draws(round, client), plan.declared(len(examples))
    clip.noise = plan.multiplier(declared)
    for turn, source in mechanism.steps(round, client, declared, len(examples), B.size, draws):
        drawn = examples[turn & (draws.random(len(examples)) < plan.sampling_rate(declared))]
        left, right = model.gradients(B, drawn)
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        total = (left * (clip.norm / np.maximum(norms, clip.norm))[:, None]).T @ right
        B = B - rate * Gaussian(clip.split(), clip.norm, B.size).added(total, source) / plan.batch_size
        if clip.aim is not None:
            clip.follow(norms, float(draws.standard_normal(1)[0]))
    return B - start


# --- settings, tuning and the table -----------------------------------------------------------------------------------


def load(name: str) -> tuple[Config, Data]:
    config = configs.load(results.ROOT / "configs" / f"{name.partition(',')[0]}.toml", ())
    task = load_task(config)
    x, test_x = (np.asarray(each.inputs.batch(slice(None))["inputs"], dtype=np.float64) for each in (task.train, task.test))
    head = task.module.head.weight.numpy().astype(np.float64)
    return config, Data(x, task.train.labels.numpy(), test_x, task.test.labels.numpy(), head, RANKS[name])


def plan_of(config: Config, data: Data, way: Way, epsilon: float, clip: float, rounds: int) -> PrivacyPlan:
    private = {"level": "example", "epsilon": float(epsilon), "delta": 1e-5, "noise": way.noise, "bands": way.bands}
    asked = config.replace(
        run={"rounds": rounds},
        train={"batch_size": BATCH, "local_steps": STEPS},
        clients={"participation": 1.0},
        privacy=private,
    )
    plan = plan_privacy(asked, [len(part) for part in np.array_split(np.arange(len(data.y)), CLIENTS)])
    return replace(plan, clip_norm=clip)


class Runs:
    """Accuracies, each computed once, kept in a file."""

    def __init__(self, name: str, rounds: int) -> None:
        self.name, self.rounds = name, rounds
        self.config, self.data = load(name)
        self.known = json.loads(KEPT.read_text()) if KEPT.exists() else {}

    def accuracy(self, way: Way, epsilon: float, second: float, rate: float, seed: int) -> float:
        key = f"{self.name}/{self.rounds}/{way.name}/{epsilon:g}/{second:g}/{rate:g}/{seed}"
        if key not in self.known:
            data = self.data.tuning() if seed in TUNED_ON else self.data
            clip, aim = (0.3, second) if way.quantiles else (second, None)
            plan = plan_of(self.config, data, way, epsilon, clip, self.rounds)
            self.known[key] = train(data, plan, aim, rate, seed)
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(self.known, indent=1) + "\n")
        return self.known[key]

    def tuned(self, way: Way, epsilon: float) -> tuple[float, float]:
        """The clip (or quantile) and the rate whose neighbours are no better on held-out examples."""
        best, before = way.first, None
        while best != before:
            before = best
            best = max((before, *way.neighbours(*before)), key=lambda each: self._mean(way, epsilon, *each))
        return best

    def _mean(self, way: Way, epsilon: float, second: float, rate: float) -> float:
        return statistics.fmean(self.accuracy(way, epsilon, second, rate, seed) for seed in TUNED_ON)

    def rows(self) -> Iterator[str]:
        for epsilon, way in itertools.product(EPSILONS, WAYS):
            if (
                way.noise == "correlated"
                and max(plan_of(self.config, self.data, way, epsilon, 1.0, self.rounds).bands.values()) == 1
            ):
                yield f"| {self.name} | {STEPS * self.rounds} | {epsilon:g} | {way.name} | 1 | | as plain DP-SGD | |"
                continue
            second, rate = self.tuned(way, epsilon)
            found = [self.accuracy(way, epsilon, second, rate, seed) for seed in SEEDS]
            plain = [self.accuracy(PLAIN, epsilon, *self.tuned(PLAIN, epsilon), seed) for seed in SEEDS]
            gains = [one - other for one, other in zip(found, plain, strict=True)]
            yield _line(self, way, epsilon, second, rate, found, gains)


def _line(
    runs: Runs, way: Way, epsilon: float, second: float, rate: float, found: Sequence[float], gains: Sequence[float]
) -> str:
    plan = plan_of(runs.config, runs.data, way, epsilon, 1.0, runs.rounds)
    bands: Mapping[int, int] = plan.bands
    shown = f"{min(bands.values())}" if bands else "1"
    gain = "" if way == PLAIN else f"{_spread(gains, '+')}"
    what = f"quantile {second:g}" if way.quantiles else f"clip {second:g}"
    cells = [runs.name, STEPS * runs.rounds, f"{epsilon:g}", way.name, shown, f"{what}, rate {rate:g}", _spread(found), gain]
    line = f"| {' | '.join(map(str, cells))} |"
    print(line, flush=True)
    return line


def _spread(values: Sequence[float], sign: str = "") -> str:
    return f"{100 * statistics.fmean(values):{sign}.2f} ± {100 * statistics.stdev(values):.2f}"


def noises() -> None:
    """Print the noise in the sums of steps by number of bands, and that of a client level whose cohorts were secret."""
    for (examples, steps), epsilon in itertools.product(((1000, 100), (3300, 100), (3300, 400), (10_000, 400)), EPSILONS):
        found = {
            bands: noise_for("pld", float(epsilon), 1e-5, bands * BATCH / examples, correlated.draws(bands, steps))
            * correlated.error(bands, steps)
            for bands in correlated.choices(min(examples // BATCH, steps))
        }
        best = min(found, key=found.get)
        print(examples, steps, epsilon, f"independent {found[1]:.3g}, {best} bands {found[best]:.3g}", flush=True)
    for (share, rounds), epsilon in itertools.product(((0.25, 40), (0.1, 100), (0.02, 200)), EPSILONS):
        known, secret = (noise_for("pld", float(epsilon), 1e-4, rate, rounds) for rate in (1.0, share))
        often = noise_for("pld", float(epsilon), 1e-4, 1.0, math.ceil(1.5 * share * rounds))
        print(share, rounds, epsilon, f"all rounds {known:.3g}, max_rounds {often:.3g}, secret {secret:.3g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, nargs="*", default=[10])
    parser.add_argument("--show", action="store_true", help="print the table only")
    parser.add_argument("--noise", action="store_true", help="print what the noise is, without training")
    asked, began = parser.parse_args(), time.monotonic()
    if asked.noise:
        return noises()
    lines = [row for rounds in asked.rounds for name in RANKS for row in Runs(name, rounds).rows()]
    if asked.show:
        return
    head = ["data", "steps", "epsilon", "noise", "bands", "tuned", "accuracy, %", "gain over plain DP-SGD"]
    claim = "*Choquette-Choo et al. 2023; Andrew et al. 2021: less noise for the same epsilon. Means and standard deviations.*"
    seeds, today = ", ".join(map(str, SEEDS)), datetime.date.today().isoformat()
    told = f"`python experiments/better_noise.py` · seeds {seeds} · {results.circumstances(time.monotonic() - began, today)}"
    table = "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines])
    results.put(NAME, "Better noise for the same epsilon", [claim, told, table])


if __name__ == "__main__":
    main()
