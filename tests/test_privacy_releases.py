"""Private runs and sites from outside: everything that is released was charged before, on disk, as what it is; no upload above
the clip counts; a repeated round repeats its bytes; and the epsilon that is reported is that of all charges.

What is released is measured as in `privacy_world`: minus its silent twin. Costs are computed by dp-accounting from
the promise's own numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st

import privacy_world as w
from anyrank import simulation
from anyrank.config.sections import Config, PartitionConfig
from anyrank.federation import loop
from anyrank.messages import change, wire
from anyrank.messages.records import ClientUpdate, Job
from anyrank.privacy import ledger as ledgers
from anyrank.privacy import noise as noises
from anyrank.privacy.noise import Mechanism, SystemDraws
from anyrank.privacy.plan import declare, plan_privacy
from anyrank.runs.folder import RunDir
from anyrank.training import trainer
from anyrank.worker import site as site_module
from test_hostile_server import BATCH as SITE_BATCH
from test_hostile_server import DECLARED, NOISE, Server, public, ready, world  # noqa: F401

CLIP, RATE = 0.7, 0.5
SECRET = "0123456789abcdef" * 2


def config(level: str = "example", steps: int = 1, **sections: Mapping[str, Any]) -> Config:
    where = {"noise_at": "server"} if level == "server" else {}
    base = Config().replace(
        run={"rounds": 3},
        model={"name": "digits-mlp"},
        data={"partition": PartitionConfig(kind="quantity", alpha=2.0, min_examples=64)},
        clients={"count": 6, "participation": 0.5, "ranks": (2, 4)},
        train={"optimizer": "sgd", "learning_rate": RATE, "batch_size": 32, "local_steps": steps},
        method={"name": "ffa_lora"},
        privacy={"level": "example" if level == "example" else "client", "noise_multiplier": 1.7, "delta": 1e-5, "clip": CLIP}
        | where,
    )
    return base.replace(**sections)


@pytest.fixture(autouse=True)
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv(noises.SEED, SECRET)


@contextmanager
def durable() -> Iterator[Callable[[Path], bytes]]:
    """What of a file would still be there after a loss of power: what an fsync has seen."""
    sizes: dict[tuple[int, int], int] = {}
    fsync = os.fsync

    def watching(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        sizes[found.st_dev, found.st_ino] = found.st_size

    def read(path: Path) -> bytes:
        if not path.exists():
            return b""
        found = path.stat()
        return path.read_bytes()[: sizes.get((found.st_dev, found.st_ino), 0)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", watching)
        yield read


def rows(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().splitlines()]


@dataclasses.dataclass
class Released:
    """One upload, its silent twin, and the charges that were on disk when its training began."""

    job: Job
    round: int
    loud: ClientUpdate
    silent: ClientUpdate
    steps: int
    charges: list[dict[str, Any]]


def played(folder: Path, chosen: Config, stop: int = 0, resume: bool = False) -> list[Released]:
    """A run, and everything that its clients released. `stop`: interrupt it after so many uploads."""
    found: list[Released] = []
    train = trainer.train

    def watching(model, job, examples, plan, mechanism=None, *more) -> Any:
        charges = rows(read(folder / "privacy.jsonl"))
        seen: list[list[np.ndarray]] = []
        with w.gradients(seen):
            loud = train(model, job, examples, plan, mechanism, *more)
        silent = train(model, job, examples, plan, w.muted(mechanism), *more)
        found.append(Released(job, plan.round, loud, silent, len(seen), charges))
        if len(found) == stop:
            raise KeyboardInterrupt
        return loud

    with durable() as read, pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        patch.setattr(trainer, "train", watching)
        built = simulation.build(chosen)
        try:
            with RunDir.open(folder, chosen, resume) as store:
                loop.run(built, store)
        except KeyboardInterrupt:
            assert stop
        finally:
            built.close()
    return found


LEVELS = {
    "example": config(),
    "example, several steps": config(steps=3),
    "example, exact counts": config(privacy={"counts": "exact"}),
    "client": config("client"),
    "server": config("server"),
    "example, secure": config(privacy={"secure": True}),
}


@pytest.mark.parametrize("kind", LEVELS)
def test_every_release_is_charged_on_disk_before_its_training_begins_as_what_it_is(kind: str, tmp_path: Path) -> None:
    """The charge of its client and round, with the noise that was measured, the rate of the plan, and the steps taken."""
    chosen = LEVELS[kind]
    found, noise = played(tmp_path / "run", chosen), []
    assert len(found) == 9
    for release in found:
        client, declared = release.job.client.name, release.job.num_examples
        (charge,) = [row for row in release.charges if (row["round"], row["client"]) == (release.round, client)]
        example = chosen.privacy.level == "example"
        assert charge["num_examples"] == declared == release.loud.num_examples
        assert charge["sampling_rate"] == (32 / declared if example else 1.0)
        assert charge["steps"] == (release.steps if example else 1)
        assert charge["noise_multiplier"] == 1.7
        if kind in ("example", "example, exact counts"):
            train, unit = release.job.download.train, RATE * charge["noise_multiplier"] * CLIP / 32
            one, other = (w.numbers(each.adapter, train) for each in (release.loud, release.silent))
            noise += [w.Noise((client, release.round, 0, key), (one[key] - other[key]).ravel() / unit) for key in one]
    if noise:
        w.check(noise)
    charged = Counter((row["round"], row["client"]) for row in rows((tmp_path / "run" / "privacy.jsonl").read_bytes()))
    assert charged == Counter((release.round, release.job.client.name) for release in found)
    sizes = {release.job.client.name: release.job.num_examples for release in found}
    assert len(set(sizes.values())) > 1


@pytest.mark.parametrize("secure", [False, True])
def test_a_repeated_round_repeats_its_bytes_or_is_charged_again(secure: bool, tmp_path: Path) -> None:
    """Interrupted in round 2, after the uploads of two of its clients."""
    chosen = config(privacy={"secure": secure})
    before = played(tmp_path / "run", chosen, stop=5)
    after = played(tmp_path / "run", chosen, resume=True)
    again = {(release.round, release.job.client.name): release for release in after}
    repeated = [(one, again[one.round, one.job.client.name]) for one in before if one.round == 2]
    assert len(repeated) == 2
    for one, other in repeated:
        layers = [(one.loud.adapter.layers[name].B, layer.B) for name, layer in other.loud.adapter.layers.items()]
        assert all(torch.equal(*pair) != secure for pair in layers)
    charged = Counter((row["round"], row["client"]) for row in rows((tmp_path / "run" / "privacy.jsonl").read_bytes()))
    for one, _ in repeated:
        assert charged[2, one.job.client.name] == (2 if secure else 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    counts = {release.job.client.name: release.job.num_examples for release in after + before}
    spent = {
        client: cost(32 / count, 1.7, sum(times for (_, name), times in charged.items() if name == client), 1e-5)
        for client, count in counts.items()
    }
    assert summary["epsilon"] == pytest.approx(max(spent.values()), rel=5e-3)


def test_a_secure_run_takes_all_its_noise_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 bits for each number of noise or more; no key is kept, and a run under one secret does not repeat."""
    taken = []
    urandom = os.urandom
    monkeypatch.setattr(noises.os, "urandom", lambda size: taken.append(size) or urandom(size))
    one, other = (played(tmp_path / name, LEVELS["example, secure"]) for name in ("one", "other"))
    numbers = sum(sum(v.size for v in w.numbers(r.loud.adapter, r.job.download.train).values()) for r in one + other)
    assert sum(taken) >= 2 * 8 * numbers  # of the twin as well
    for release, same in zip(one, other, strict=True):
        for name, layer in release.loud.adapter.layers.items():
            assert not torch.equal(layer.B, same.loud.adapter.layers[name].B)
    assert not list((tmp_path / "state").rglob("*/privacy/*"))


SMALL = 0.05  # so that local training is clipped

# --- the server's clip check ---------------------------------------------------------------------------------------------


def scaled(job: Job, update: ClientUpdate, size: float) -> ClientUpdate:
    """The upload whose change since the download has the norm `size`."""
    before, to = job.download.adapter, size / change.norm(job.download, update.adapter)
    layers = {
        name: layer.with_factors(
            *((a.double() + to * (b.double() - a.double())).to(a.dtype) for a, b in ((layer.A, now.A), (layer.B, now.B)))
        )
        for (name, layer), now in zip(before.layers.items(), update.adapter.layers.values(), strict=True)
    }
    return dataclasses.replace(update, adapter=dataclasses.replace(before, layers=layers))


CHEATS: dict[str, Callable[[Job, ClientUpdate], ClientUpdate]] = {
    "nothing": lambda job, update: dataclasses.replace(update, adapter=job.download.adapter),
    "a hair more": lambda job, update: scaled(job, update, SMALL * (1 + 1e-4)),
    "twice": lambda job, update: scaled(job, update, 2 * SMALL),
    "a million": lambda job, update: scaled(job, update, 1e6),
    "not a number": lambda job, update: scaled(job, update, math.nan),
    "a hair less": lambda job, update: scaled(job, update, SMALL * (1 - 1e-4)),
}


@pytest.mark.parametrize("method", ["rbla", "ffa_lora"])
def test_an_upload_above_the_clip_moves_the_server_as_one_that_changes_nothing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a hair or by a million; one a hair below it counts."""
    chosen = config("server", steps=20, run={"rounds": 1}, method={"name": method}, train={"learning_rate": 0.1},
                    privacy={"clip": SMALL})  # fmt: skip
    train, adapters, status = trainer.train, {}, {}
    for name, cheat in CHEATS.items():
        built = simulation.build(chosen)
        first = min(built.drawn(1))

        def cheating(model, job, *rest, cheat=cheat, first=first) -> Any:
            update = train(model, job, *rest)
            return cheat(job, update) if job.client.name == first else update

        monkeypatch.setattr(trainer, "train", cheating)
        try:
            with RunDir.open(tmp_path / name, chosen) as store:
                loop.run(built, store)
        finally:
            built.close()
        adapters[name] = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        status[name] = [
            row["status"] for row in rows((tmp_path / name / "clients.jsonl").read_bytes()) if row["client"] == first
        ]
    assert {name for name, (found,) in status.items() if found == "ok"} == {"nothing", "a hair less"}
    assert {name for name in CHEATS if adapters[name] == adapters["nothing"]} == set(CHEATS) - {"a hair less"}


# --- what is planned and reported ------------------------------------------------------------------------------------------


@functools.cache
def cost(rate: float, noise: float, steps: int, delta: float) -> float:
    """Epsilon, by dp-accounting alone."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    event = GaussianDpEvent(noise) if rate == 1 else PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
    accountant.compose(event, steps)
    return accountant.get_epsilon(delta)


PLANS = {  # sizes, level, counts, target, delta, rounds, rounds that a client may take part in
    "examples": ([300, 1000], "example", "rounded", 2.0, 1e-5, 4, 0),
    "few rounds each": ([45], "example", "exact", 0.8, 1e-4, 12, 5),
    "clients": ([40, 3000], "client", "exact", 6.0, 1e-6, 3, 2),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_is_within_its_budget_and_wastes_little(kind: str) -> None:
    """For each declared count: its noise, over every step of every round that it may take part in, costs at most the target."""
    sizes, level, counts, target, delta, rounds, most = PLANS[kind]
    asked = {"level": level, "noise_multiplier": 0.0, "epsilon": target, "delta": delta, "max_rounds": most, "counts": counts}
    plan = plan_privacy(config(run={"rounds": rounds}, train={"local_steps": 4}, privacy=asked), sizes)
    limit = min(most or rounds, rounds)
    assert plan.max_rounds == limit
    assert set(plan.noise) == {declare(size, counts) for size in sizes}
    for size in sizes:
        count = plan.declared(size)
        assert count == size if counts == "exact" else 0.75 * size < count <= size
        rate, steps = (32 / count, 4) if level == "example" else (1.0, 1)
        assert plan.sampling_rate(count) == rate
        whole = cost(rate, plan.noise[count], steps * limit, delta)
        assert 0.97 * target < whole <= target * (1 + 2e-3)
        one = cost(rate, plan.noise[count], steps, delta)
        assert one * (1 - 2e-3) - 1e-3 <= plan.epsilon_after(count, 1) <= one * (1 + 1e-2) + 1e-3


@dataclasses.dataclass
class Books:
    """A ledger in memory."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def charges(self) -> list[dict[str, Any]]:
        return list(self.rows)

    def charge(self, rows: list[dict[str, Any]]) -> None:
        self.rows += map(dict, rows)


@pytest.mark.parametrize("secure", [False, True])
def test_the_epsilon_of_a_round_is_the_largest_of_all_charges_up_to_it(secure: bool) -> None:
    """Clients of other counts, drawn in other rounds, one of them last: none of them decides by its place."""
    noise = {64: 1.2, 128: 0.9, 256: 0.8}
    plan = dataclasses.replace(w.plan_of(steps=3), secure=secure, max_rounds=3, noise=noise, delta=1e-6, accountant="pld")
    books = Books()
    ledger = ledgers.Ledger(plan, books, "")
    rounds = [{"ada": 64}, {"bob": 128, "eve": 256}, {"bob": 128}, {"bob": 128, "ada": 64}, {"eve": 256}, {"bob": 128}]
    times: Counter[str] = Counter()
    for round, cohort in enumerate(rounds, 1):
        assert {name for name in cohort if not ledger.has_left(name, round)} == {name for name in cohort if times[name] == 3}
        asked = {name: count for name, count in cohort.items() if ledger.has_left(name, round)}
        ledger.charge(round, asked)
        ledger.charge(round, {} if secure else asked)  # a repeated round costs nothing with a key
        times.update(asked.keys())
        counts = {"ada": 64, "bob": 128, "eve": 256}
        spent = {name: cost(w.BATCH / counts[name], plan.noise[counts[name]], 3 * taken, 1e-6) for name, taken in times.items()}
        for book in (ledger, ledgers.Ledger(plan, Books(list(books.rows)), "")):
            assert book.figures(round)["epsilon"] == pytest.approx(max(spent.values()), rel=1e-2)
            assert book.by_client(round) == pytest.approx(spent, rel=1e-2)
    assert [(row["round"], row["client"]) for row in books.rows] == [
        (1, "ada"), (2, "bob"), (2, "eve"), (3, "bob"), (4, "ada"), (4, "bob"), (5, "eve"),
    ]  # fmt: skip


# --- a site ----------------------------------------------------------------------------------------------------------------


def site_releases(place: Path, store: str, silent: bool, patch: pytest.MonkeyPatch, read: Any) -> list[dict[str, np.ndarray]]:
    """What a site sends in three rounds and for two downloads each, from a source that repeats; each charged before."""
    seen, system, train = w.Quiet, SystemDraws.standard_normal, trainer.train
    source = np.random.default_rng(9)
    patch.setattr(noises.os, "urandom", source.bytes)
    if silent:
        patch.setattr(SystemDraws, "standard_normal", lambda self, size: 0.0 * system(self, size))
    server, site = ready(place, store, public(train={"optimizer": "sgd", "learning_rate": RATE, "local_steps": 1},
                                              privacy={"clip": CLIP, "max_rounds": 0}), privacy={"epsilon": 100.0})  # fmt: skip
    made: list[int] = []

    def watching(*arguments: Any) -> Any:
        charges = rows(read(place / store / "ledger.jsonl"))
        made.append(len(charges))
        assert charges[-1]["noise_multiplier"] == NOISE
        assert charges[-1]["sampling_rate"] == SITE_BATCH / DECLARED
        assert charges[-1]["steps"] == 1
        return train(*arguments)

    patch.setattr(site_module.trainer, "train", watching)
    found = []
    for round in (1, 2, 3):
        for other in (0, 1):
            job = server.job(round, other)
            (frame,) = site.ask(*server.frames(round, other))
            assert frame.header.kind == wire.UPDATE
            update = wire.update_of(frame, job.download)
            found.append(w.numbers(update.adapter, job.download.train))
    assert made == list(range(1, 7)), "each release was charged, on disk, before its training"
    site.close()
    assert seen
    return found


def test_a_sites_releases_have_the_promised_noise_and_are_charged_before(world: Path) -> None:  # noqa: F811
    both = []
    for silent in (False, True):
        with pytest.MonkeyPatch.context() as patch, durable() as read:
            both.append(site_releases(world, f"noise-{silent}", silent, patch, read))
    unit = RATE * NOISE * CLIP / SITE_BATCH
    w.check(
        [
            w.Noise(("site", place, 0, key), (loud[key] - silent[key]).ravel() / unit)
            for place, (loud, silent) in enumerate(zip(*both, strict=True))
            for key in loud
        ]
    )


@given(st.floats(1e-3, 1e3), st.binary(min_size=32, max_size=32))
def test_a_worker_is_given_the_whole_mechanism(sigma: float, key: bytes) -> None:
    """As JSON, in which it goes to a worker's process: every digit of the noise, every bit of the key."""
    mechanism = Mechanism(dataclasses.replace(w.plan_of(), noise={64: sigma, 128: 1.0}), key)
    assert Mechanism.of(json.loads(json.dumps(mechanism.table()))) == mechanism
    assert Mechanism.of(json.loads(json.dumps(Mechanism(mechanism.plan).table()))).key is None
