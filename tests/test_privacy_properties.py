"""What leaves, minus the same with the noise source silenced: properties that hold whatever the mechanism is made of.

No test here speaks of one mistake. Noise is measured where it leaves (uploads, gradients that an optimizer is given, the
server's state), by real clients through the functions that runs use, and compared with the promise. Every bound is exact or
fails honest noise less than once in a million runs; keys are fixed, so that a result is repeatable.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import privacy_world as w
from anyrank.messages.records import ClientUpdate
from anyrank.privacy import noise as noises
from anyrank.privacy.noise import Mechanism, SystemDraws, new_key
from anyrank.training import trainer
from privacy_world import BATCH, CLIP, COUNTS, KEY, SIGMAS, Muted, Quiet, check, how, jobs_of, muted, plan_of, trained

ROUNDS = range(1, 13)
EXAMPLE, CLIENT, CENTRAL = plan_of(), plan_of("client"), plan_of("client", noise_at="server")
ONE_FACTOR = ("ffa_lora", "rolora", "fedsvd")

# --- the noise of uploads, of steps and of the server's mean -----------------------------------------------------------


@pytest.mark.parametrize("method", ["rbla", "raflora", "flexlora", "ffa_lora", "rolora", "fedsvd"])
def test_uploads_have_the_promised_noise(method: str) -> None:
    check([noise for round in ROUNDS for noise in w.uploads(method, round, Mechanism(EXAMPLE, KEY), w.world())])


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "proximal": {"proximal_mu": 0.5},
    "in parts": {"accumulation_steps": 4},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_step_has_noise_of_its_own(optimizer: str) -> None:
    mechanism = Mechanism(plan_of(steps=5), KEY)
    check([n for round in (1, 2, 3) for n in w.steps("rbla", round, mechanism, w.world(), **OPTIMIZERS[optimizer])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_has_noise_of_its_own_in_a_narrow_type(dtype: torch.dtype) -> None:
    mechanism = Mechanism(plan_of(steps=5), KEY)
    found = [noise for round in (1, 2, 3) for noise in w.steps("ffa_lora", round, mechanism, w.world(dtype))]
    w.check_sizes(found)
    w.check_independent(found)


def test_a_step_without_examples_has_the_same_noise() -> None:
    """Two examples, each drawn with probability 1/16 or less: most steps have none."""
    held = {name: own[:2] for name, own in w.shards().items()}
    mechanism = Mechanism(plan_of(steps=9, batch_size=1), KEY)
    found = [n for round in (1, 2) for n in w.steps("rbla", round, mechanism, w.world(), held)]
    check([replace(noise, z=noise.z / BATCH) for noise in found])


@pytest.mark.parametrize("method", ONE_FACTOR)
def test_uploads_of_whole_clients_have_the_promised_noise(method: str) -> None:
    check([noise for round in ROUNDS for noise in w.whole_uploads(method, round, Mechanism(CLIENT, KEY), w.world())])


@pytest.mark.parametrize("method", w.LARGEST)
def test_the_servers_mean_has_the_promised_noise(method: str) -> None:
    check([noise for round in range(1, 17) for noise in w.means(method, round, Mechanism(CENTRAL, KEY), w.world())])


def test_the_server_has_enough_noise_for_the_client_that_needs_most() -> None:
    plan = replace(CENTRAL, noise={64: 1.0, 128: 2.0, 256: 1.5})
    check([noise for round in range(1, 17) for noise in w.means("rbla", round, Mechanism(plan, KEY), w.world())])


PATHS = {
    "upload": (w.uploads, EXAMPLE, "ffa_lora"),
    "step": (w.steps, plan_of(steps=2), "ffa_lora"),
    "client": (w.whole_uploads, CLIENT, "ffa_lora"),
    "server": (w.means, CENTRAL, "ffa_lora"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("clip", [1e-3, 40.0])
def test_noise_is_as_large_as_the_clip_says(path: str, clip: float) -> None:
    measure, plan, method = PATHS[path]
    check(
        [n for round in range(1, 6) for n in measure(method, round, Mechanism(replace(plan, clip_norm=clip), KEY), w.world())]
    )


@pytest.mark.parametrize("path", PATHS)
def test_noise_does_not_follow_what_it_hides(path: str) -> None:
    """Inputs a thousand times as large, under the same key: the same noise."""
    measure, plan, method = PATHS[path]
    one, other = (measure(method, 1, Mechanism(plan, KEY), w.world(size=size)) for size in (1.0, 1e3))
    for noise, same in zip(one, other, strict=True):
        np.testing.assert_allclose(noise.z, same.z, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_another_plan_key_round_or_client_has_other_noise(path: str) -> None:
    """All at once: whatever differs in one of them shares nothing with the others, and a repeated round repeats its bytes."""
    measure, plan, method = PATHS[path]
    keys = {"first": KEY, "last bit": KEY[:-1] + bytes([KEY[-1] ^ 1]), "first bit": bytes([128]) + KEY[1:]}
    found = []
    for name, key in keys.items():
        for round in (1, 2):
            made = measure(method, round, Mechanism(plan, key), w.world())
            again = measure(method, round, Mechanism(plan, key), w.world())
            assert all((one.z == other.z).all() for one, other in zip(made, again, strict=True))
            found += [replace(noise, where=(f"{name} {noise.where[0]}", *noise.where[1:])) for noise in made]
    check(found)


def test_two_secrets_or_two_configurations_have_other_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [{"run": {"seed": seed}, "data": {"source": source}} for seed in (0, 1) for source in ("a", "b")]
    found = []
    for secret in ("0123456789abcdef" * 2, "0123456789abcdef" * 2 + "0"):
        monkeypatch.setenv(noises.SEED, secret)
        for table in tables:
            key = new_key(table)
            assert len(key) == 32
            assert key == new_key(table)
            for noise in w.uploads("ffa_lora", 1, Mechanism(EXAMPLE, key), w.world(), ["eve"]):
                found.append(replace(noise, where=(f"{secret[-1]} {table}", *noise.where[1:])))
    check(found)
    monkeypatch.delenv(noises.SEED)
    fresh = [new_key(tables[0]) for _ in range(64)]
    bits = np.unpackbits(np.frombuffer(b"".join(fresh), np.uint8).reshape(64, -1), axis=1)
    assert bits.shape == (64, 256)
    assert set(bits.sum(axis=0).tolist()).isdisjoint({0, 64}), "each of 256 bits is drawn"
    assert len(np.unique(bits, axis=1).T) == 256, "and each by itself"


# --- full resolution ---------------------------------------------------------------------------------------------------


def grids(one: np.ndarray, deviation: float) -> np.ndarray:
    """`one` in whole numbers of the largest power of two of which all are multiples, which is fine enough."""
    step = 2.0 ** (math.floor(math.log2(deviation)) - 30)
    units = one.ravel() / step
    whole = np.rint(units)
    assert abs(units - whole).max() < 1e-3, "a number between two of the grid"
    whole = whole.astype(np.int64)
    while not (whole % 2).any():
        whole, step = whole // 2, 2 * step
    assert step <= deviation * 2.0**-24
    return whole


@pytest.mark.parametrize("level", ["example", "client"])
def test_releases_are_whole_numbers_of_one_step_and_use_them_all(level: str) -> None:
    """Both with noise and in silence; and where numbers are large, all remainders are as frequent."""
    large = []
    for round, clip in itertools.product(range(1, 9), (0.02, CLIP)):
        plan = plan_of(level, clip=clip, noise_at="client" if level == "example" else "server")
        for job, before, loud, silent in releases(Mechanism(plan, KEY), round, level):
            far = dict(zip(before, (w._OF_ALL,) * len(before), strict=True))
            for key in before:
                if level == "example":
                    deviation = SIGMAS[job] * clip
                    noisy, quiet = ((before[key] - each[key]) * BATCH for each in (loud, silent))
                elif key in far and not key.endswith((".A", ".B")):
                    deviation = plan.noise[64] * clip * w._OF_ALL
                    noisy, quiet = loud[key], silent[key]
                else:
                    continue  # each slice of a factor has a step of its own
                both = grids(np.stack([noisy.ravel(), quiet.ravel()]), deviation).reshape(2, -1)
                if key == "head.weight" or level == "example":
                    whole = both[0] - both[1]
                    large.append(whole[abs(whole) > 2.0**24])
    whole = np.concatenate(large)
    assert len(whole) > 200
    for divisor in (2, 3, 4, 5):
        counts = np.bincount(whole % divisor, minlength=divisor)
        assert stats.chisquare(counts).pvalue > w.RARE, f"remainders by {divisor}: {counts}"


def releases(mechanism: Mechanism, round: int, level: str):
    """What is sent, what leaves, and what would leave in silence: of each client, or of the server."""
    model, method = w.world(), "ffa_lora"
    jobs = jobs_of(model, method, round)
    ways = (mechanism, muted(mechanism))
    if level == "example":
        loud, silent = (trained(model, jobs, how(round), each) for each in ways)
        for job in jobs:
            train, name = job.download.train, job.client.name
            sent = job.download.adapter
            yield (job.num_examples, *(w.numbers(each, train) for each in (sent, loud[name].adapter, silent[name].adapter)))
        return
    state = w.state_of(model, method, round - 1)
    updates, train = list(trained(model, jobs, how(round, 2, 0.1), mechanism).values()), jobs[0].download.train
    rules = [w.rule_of(w.Config(), w.make(method), each) for each in ways]
    after = [rule.aggregate(w.make(method), state, rule.screen(state, jobs, updates).updates).adapter for rule in rules]
    yield (0, *(w.numbers(each, train) for each in (state.adapter, *after)))


class Ladder:
    """Normal numbers that differ by less than a float32 could hold, and no example drawn."""

    def random(self, size: int) -> np.ndarray:
        return np.ones(size)

    def standard_normal(self, size: int) -> np.ndarray:
        return 3.5 + np.arange(size) * 2.0**-26


@pytest.mark.parametrize("level", ["example", "client"])
def test_normal_numbers_keep_their_digits(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is their multiple up to half a step: no number is rounded to fewer digits on the way."""
    monkeypatch.setattr(Mechanism, "draws", lambda self, round, client: Ladder())
    monkeypatch.setattr(Muted, "draws", lambda self, round, client: Quiet(Ladder()))
    plan = plan_of(level, noise_at="client" if level == "example" else "server")
    checked = 0
    for declared, before, loud, silent in releases(Mechanism(plan, KEY), 1, level):
        for name in before:
            factor = BATCH / (SIGMAS[declared] * CLIP) if level == "example" else 1 / (plan.noise[64] * CLIP * w._OF_ALL)
            noise = abs(loud[name] - silent[name]).ravel() * factor  # in promised standard deviations
            if noise.size < 64 or (level == "client" and name.endswith((".A", ".B"))):
                continue  # each slice of a factor has a scale of its own
            places = np.arange(noise.size)
            slope, start = np.polyfit(places, noise - noise[0], 1)
            assert start + noise[0] == pytest.approx(3.5, rel=1e-3)
            assert abs(noise - noise[0] - start - slope * places).max() <= 0.6 * 2.0**-24
            checked += 1
    assert checked


# --- the key -----------------------------------------------------------------------------------------------------------


def first(mechanism: Mechanism, round: int = 1, client: str = "ada", count: int = 8) -> np.ndarray:
    return mechanism.draws(round, client).standard_normal(count)


def unlike(streams: np.ndarray) -> None:
    """Rows `[streams, numbers]` that share nothing: no number twice, no two rows correlated, all together normal."""
    assert len(np.unique(streams)) == streams.size
    w.check_shape(streams.ravel())
    sums = streams @ streams.T / math.sqrt(streams.shape[1])
    np.fill_diagonal(sums, 0.0)
    assert abs(sums).max() < 9


def test_every_bit_of_the_key_matters_and_there_are_256() -> None:
    flipped = [KEY] + [
        bytes(b ^ (1 << bit if i == at else 0) for i, b in enumerate(KEY)) for at in range(32) for bit in range(8)
    ]
    assert len(KEY) == 32
    unlike(np.stack([first(Mechanism(EXAMPLE, key), count=64) for key in flipped]))


NAMES = (
    "a", "b", "aa", "a1", "a11", "1", "11", "A", "a ", " a", "a\x1f", "a\x1f1", "\x1fa", "1\x1fa", "a/1", "a:1", "\u00e4",
    "a\u0308", "client-1", "client-11", "server", "client-1\0", "", "0", "\x1f", "a" * 300, "a" * 299 + "b", "private",
)  # fmt: skip


def test_names_and_rounds_that_look_alike_have_noise_of_their_own() -> None:
    pairs = list(itertools.product((1, 2, 10, 11, 12, 111, 256, 257, 65537, 2**32 + 1), NAMES))
    unlike(np.stack([first(Mechanism(EXAMPLE, KEY), round, name, 64) for round, name in pairs]))


def test_streams_cannot_be_searched() -> None:
    """Of 2^32 streams, about two pairs of these would be one by chance; of 2^64, none."""
    mechanism, seen = Mechanism(EXAMPLE, KEY), set()
    count = 130_000
    for number in range(count):
        seen.add(mechanism.draws(number >> 8, str(number & 255)).random(2).tobytes())
    assert len(seen) == count


def test_the_generator_has_a_key_of_128_bits_all_of_which_are_drawn() -> None:
    """The state that the draws start from: an attacker who searches for it has that many to try."""
    states = []
    for number in range(64):
        state = Mechanism(EXAMPLE, KEY).draws(number, "ada").bit_generator.state["state"]
        states.append(np.concatenate([np.atleast_1d(np.asarray(state[name], np.uint64)) for name in ("key",)]))
    bits = np.unpackbits(np.stack(states).view(np.uint8), axis=1)
    assert bits.shape[1] >= 128
    assert (bits.any(axis=0) & ~bits.all(axis=0)).all()


# --- the source --------------------------------------------------------------------------------------------------------


def test_nothing_global_decides_and_nothing_global_is_moved() -> None:
    """Seeds of torch, NumPy and Python: the same noise under others, and no draw is taken from them."""
    model, (job, *_) = w.world(), jobs_of(w.world(), "rbla", 1)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = np.random.get_state()[1].tobytes(), random.getstate()
        train = trainer._PRIVATELY["example"]
        state = torch.get_rng_state()
        update = train(model, "ada", job.download, 64, w.shards()["ada"], how(1), Mechanism(EXAMPLE, KEY))
        assert torch.equal(torch.get_rng_state(), state)
        assert (np.random.get_state()[1].tobytes(), random.getstate()) == before
        made.append(update.adapter)
    for name, layer in made[0].layers.items():
        assert torch.equal(layer.A, made[1].layers[name].A)
        assert torch.equal(layer.B, made[1].layers[name].B)


class Source:
    """What stands for the system's source: bytes that can be repeated, and how many were asked for."""

    def __init__(self, seed: int) -> None:
        self.rng, self.count = np.random.default_rng(seed), 0

    def __call__(self, size: int) -> bytes:
        self.count += size
        return self.rng.bytes(size)


def test_secure_noise_is_a_function_of_the_systems_source_and_of_all_that_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number takes 64 bits or more; the same bytes give the same release, other bytes another one; seeds give nothing."""
    model, jobs = w.world(), jobs_of(w.world(), "rbla", 1, ["eve"])
    size = sum(p.numel() for p in model.load(jobs[0].download))
    made = []
    for seed in (5, 5, 6):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        source = Source(seed)
        monkeypatch.setattr(noises.os, "urandom", source)
        made.append(trained(model, jobs, how(1), Mechanism(EXAMPLE))["eve"].adapter)
        assert source.count >= 8 * (size + COUNTS["eve"])
    layers = [adapter.layers["first"].B for adapter in made]
    assert torch.equal(layers[0], layers[1])
    assert not (layers[0] == layers[2]).any()


@pytest.mark.parametrize("path", PATHS)
def test_secure_noise_is_the_promised_one(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The silent twin has the same bytes of the source; every release takes fresh ones."""
    measure, plan, method = PATHS[path]
    draws, asked = Mechanism.draws, Counter()

    def seeded(self: Mechanism, round: int, client: str) -> Any:
        """The n-th time that a release is made with noise, and the n-th time that it is made in silence: the same bytes."""
        which = (round, client, isinstance(self, Muted))
        asked[which] += 1
        seed = zlib.crc32(f"{round} {client} {asked[which]}".encode())
        monkeypatch.setattr(noises.os, "urandom", Source(seed))
        return draws(self, round, client)

    monkeypatch.setattr(Mechanism, "draws", seeded)
    monkeypatch.setattr(Muted, "draws", lambda self, round, client: Quiet(seeded(self, round, client)))
    check([n for round in range(1, 7) for n in measure(method, round, Mechanism(plan), w.world())])


def test_the_systems_source_is_normal_and_never_repeats() -> None:
    unlike(np.stack([SystemDraws().standard_normal(400) for _ in range(100)]))
    uniform = SystemDraws().random(40_000)
    assert stats.kstest(uniform, "uniform").pvalue > w.RARE
    assert len(np.unique(uniform)) == len(uniform)
    assert (uniform >= 0).all()
    assert (uniform < 1).all()


# --- sampling ----------------------------------------------------------------------------------------------------------


def sampled(rounds: range, count: int, steps: int, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Which of its examples each client drew: `{client: bool [rounds, steps, n]}`."""
    model, found = w.world(), {}
    seen = model.task.train.inputs.seen
    for name in COUNTS:
        own = np.zeros((len(rounds), steps, len(held[name])), bool)
        for place, round in enumerate(rounds):
            seen.clear()
            plan = plan_of(steps=steps)
            trained(model, jobs_of(model, "ffa_lora", round, [name]), how(round, steps, 1e-200), Mechanism(plan, KEY), held)
            assert len(seen) == steps, "none is empty: that has a probability below 1e-7"
            for step, index in enumerate(seen):
                assert len(set(index.tolist())) == len(index), "no example twice in a step"
                own[place, step] = np.isin(held[name], index)
                assert own[place, step].sum() == len(index), "no example of another client"
        found[name] = own
    return found


def test_examples_are_drawn_independently_at_the_declared_rate() -> None:
    """The batch is binomial; each example has the rate of the declared count, whatever the client holds; and no two examples,
    steps, rounds or clients have anything to do with each other."""
    held = w.shards()
    held["ada"] = np.arange(80)  # declared as 64
    held["bob"], held["eve"] = held["bob"][16:], held["eve"][:200]
    drawn = sampled(range(1, 7), 64, 50, held)
    for name, own in drawn.items():
        rate, flat = BATCH / COUNTS[name], own.reshape(-1, own.shape[2]).astype(float)
        steps, n = flat.shape
        low, high = stats.binom.ppf([w.RARE / n, 1 - w.RARE / n], steps, rate)
        assert (low <= flat.sum(axis=0)).all()
        assert (flat.sum(axis=0) <= high).all()
        low, high = stats.binom.ppf([w.RARE, 1 - w.RARE], steps * n, rate)
        assert low <= flat.sum() <= high, f"{name}: {flat.mean():.4f}, not {rate:.4f}"
        sizes = flat.sum(axis=1)
        low, high = stats.chi2.ppf([w.RARE, 1 - w.RARE], steps - 1) / (steps - 1)
        assert low * 0.95 <= sizes.var(ddof=1) / (n * rate * (1 - rate)) <= high * 1.05, "of a fixed size, or in groups"
        z = (flat - rate) / math.sqrt(rate * (1 - rate))
        together = z.T @ z / math.sqrt(steps)
        np.fill_diagonal(together, 0.0)
        assert abs(together).max() < 8.5, f"{name}: two examples go together"
        later = z @ z.T / math.sqrt(n)
        np.fill_diagonal(later, 0.0)
        assert abs(later).max() < 8.5, f"{name}: two steps go together"
    for (one, first_drawn), (other, then) in itertools.combinations(drawn.items(), 2):
        n = min(first_drawn.shape[2], then.shape[2])
        a, b = first_drawn[..., :n].reshape(-1, n).astype(float), then[..., :n].reshape(-1, n).astype(float)
        p, q = BATCH / COUNTS[one], BATCH / COUNTS[other]
        together = ((a - p) * (b - q)).sum() / math.sqrt(a.size * p * (1 - p) * q * (1 - q))
        assert abs(together) < 6, f"{one} and {other} draw the same places"


# --- one example, one client ---------------------------------------------------------------------------------------------


class Chosen:
    """Draws with given uniform numbers, and no noise."""

    def __init__(self, uniform: np.ndarray) -> None:
        self.uniform = uniform

    def random(self, size: int) -> np.ndarray:
        assert size == len(self.uniform)
        return self.uniform

    def standard_normal(self, size: int) -> np.ndarray:
        return np.zeros(size)


def sum_of(model, method: str, own: np.ndarray, taken: np.ndarray, clip: float, patch: pytest.MonkeyPatch) -> np.ndarray:
    """What a step of a client releases in silence, when of its examples `own` those in `taken` are drawn; times the batch."""
    patch.setattr(Mechanism, "draws", lambda self, round, client: Chosen(np.where(np.isin(own, taken), 0.0, 1.0)))
    (job,) = jobs_of(model, method, 1, ["ada"])
    update = trained(model, [job], how(1), Mechanism(plan_of(clip=clip), KEY), {"ada": own})["ada"]
    before, after = (w.numbers(each, job.download.train) for each in (job.download.adapter, update.adapter))
    return BATCH * np.concatenate([(before[key] - after[key]).ravel() for key in before])


def gradient_of(model, method: str, example: int) -> np.ndarray:
    """An example's gradient by itself, as torch has it."""
    (job,) = jobs_of(model, method, 1, ["ada"])
    parameters, train = model.load(job.download), model.task.train
    logits = model.module(train.inputs.values[example : example + 1])
    loss = torch.nn.functional.cross_entropy(logits, train.labels[example : example + 1])
    return np.concatenate([gradient.numpy().ravel() for gradient in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("method", ["rbla", "ffa_lora", "rolora"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_one_example_changes_the_sum_by_its_clipped_gradient_and_by_no_more(method: str, size: float, monkeypatch) -> None:
    """Whatever the others are, and however many: the sum is divided by the expected batch. Of gradients above the clip, the
    change is the clip, over all tensors together."""
    model, own = w.world(size=size), w.shards()["ada"]
    alone = [gradient_of(model, method, example) for example in own[:6]]
    clip = float(np.median([np.linalg.norm(one) for one in alone]))
    for others in (own[:0], own[6:9], own[6:]):
        base = sum_of(model, method, own, others, clip, monkeypatch)
        for i, gradient in enumerate(alone):
            change = sum_of(model, method, own, np.append(others, own[i]), clip, monkeypatch) - base
            norm = np.linalg.norm(gradient)
            assert np.linalg.norm(change) <= clip * (1 + 1e-6)
            np.testing.assert_allclose(change, gradient * min(1.0, clip / norm), atol=1e-5 * clip)
            absent = np.delete(own, i)
            without = sum_of(model, method, absent, others, clip, monkeypatch)
            np.testing.assert_allclose(without, base, atol=1e-7 * clip)


def test_an_example_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = w.world(size=1.5), w.shards()["ada"]
    values = model.task.train.inputs.values
    base = sum_of(model, "rbla", own, own[1:4], CLIP, monkeypatch)
    for value in (math.nan, math.inf, -math.inf, 1e308):
        values[own[0]] = value
        changed = sum_of(model, "rbla", own, own[:4], CLIP, monkeypatch)
        assert np.isfinite(changed).all()
        assert np.linalg.norm(changed - base) <= CLIP * (1 + 1e-6)


@pytest.mark.parametrize("method", ONE_FACTOR)
@pytest.mark.parametrize("rate", [1e-3, 1e3])
def test_a_client_changes_the_products_by_at_most_the_clip(method: str, rate: float) -> None:
    model, jobs = w.world(), jobs_of(w.world(), method, 2)
    silent = trained(model, jobs, how(2, 3, rate), muted(Mechanism(CLIENT, KEY)))
    largest = 0.0
    for job in jobs:
        before, after = job.download.adapter, silent[job.client.name].adapter
        parts = [(after.layers[name].delta() - layer.delta()).flatten() for name, layer in before.layers.items()]
        parts += [(after.tensors[name] - tensor).flatten() for name, tensor in before.tensors.items()]
        largest = max(largest, float(torch.cat(parts).norm()))
    assert largest <= CLIP * (1 + 1e-6)
    assert rate < 1 or largest > 0.9 * CLIP


def test_a_release_is_the_same_whoever_else_trains() -> None:
    model, mechanism = w.world(), Mechanism(EXAMPLE, KEY)
    jobs = jobs_of(model, "rbla", 1)
    together = trained(model, jobs, how(1), mechanism)
    for some in (jobs[::-1], jobs[:1], jobs[1:]):
        for name, update in trained(model, some, how(1), mechanism).items():
            assert isinstance(update, ClientUpdate)
            for layer, found in update.adapter.layers.items():
                assert torch.equal(found.A, together[name].adapter.layers[layer].A)
