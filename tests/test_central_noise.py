"""Noise at the server: no client moves the mean by more than the noise covers, and no noise is wasted."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from anyrank import simulation
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.cli.verbs import app
from anyrank.config.sections import Config, PrivacyConfig
from anyrank.errors import ConfigError, RunFailed
from anyrank.federation import asking, intake, loop
from anyrank.federation.federation import Federation
from anyrank.messages import change
from anyrank.messages.plan import Plan, plan_round
from anyrank.messages.records import Client, ClientUpdate, Download, Job, Scaling, ServerState
from anyrank.methods import Holds, make
from anyrank.methods.registry import REGISTRY
from anyrank.privacy import noise
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import PrivacyPlan, plan_privacy
from anyrank.robust import central_noise
from anyrank.robust.rules import rule_of
from anyrank.training import private_upload
from test_privacy_run import MOMENTS, PRELUDE, command, files, lines

OFFERED = ("fedavg", "ffa_lora", "rbla", "rolora", "zeropad")
SIGMA, CLIP = 1.7, 0.3
PLAN = PrivacyPlan("client", 0.0, 1e-5, CLIP, "rdp", False, "exact", 1, 1, 9, 9, 1.0, {1: SIGMA}, "server")
SHAPES = {"first": (5, 7), "second": (4, 6)}  # out, in


class Ones:
    """Draws in which every number is 1: what is added is the standard deviation itself."""

    def standard_normal(self, size: int) -> np.ndarray:
        return np.ones(size)


@dataclass(frozen=True)
class Fixed:
    """The plan with draws that are given."""

    source: object
    plan: PrivacyPlan = PLAN

    def draws(self, round: int, client: str) -> object:
        return self.source


def aggregated(method, state: ServerState, jobs: list[Job], updates: list[ClientUpdate], mechanism) -> ServerState:
    """The state after a round, as the loop makes it: what the rule lets pass, merged under its noise."""
    rule = rule_of(Config(), method, mechanism)
    return rule.aggregate(method, state, rule.screen(state, jobs, updates).updates)


@dataclass(frozen=True)
class World:
    """A cohort about to train: a method's state with nothing in it that is zero, and each client with its count."""

    method: str
    option: tuple[tuple[str, str], ...]
    clients: tuple[tuple[int, int], ...]  # rank, declared count
    alpha: float
    rule: str
    round: int
    seed: int

    def rule_of_the_server(self):
        return make(self.method, dict(self.option))

    def state(self) -> ServerState:
        largest, scaling = max(rank for rank, _ in self.clients), Scaling(self.alpha, self.rule, {"second": 3.0})
        layers = {
            name: LoraLayer(self.numbers(name, largest, width), self.numbers(name, out, largest), scaling.of(name, largest))
            for name, (out, width) in SHAPES.items()
        }
        return ServerState(self.round, 0, Adapter(layers, {"head": self.numbers("head", 3)}), scaling)

    def numbers(self, name: str, *shape: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(self.seed + len(name) * 1000 + math.prod(shape))
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def jobs(self) -> list[Job]:
        state, method = self.state(), self.rule_of_the_server()
        clients = [Client(f"client-{index}", rank) for index, (rank, _) in enumerate(self.clients)]
        counts = [count for _, count in self.clients]
        return [Job(client, counts[i], partial(method.dispatch, state, client)) for i, client in enumerate(clients)]

    def released(self, updates: list[ClientUpdate], draws: object) -> Adapter:
        method = self.rule_of_the_server()
        return aggregated(method, self.state(), self.jobs(), updates, Fixed(draws)).adapter

    def mean(self, updates: list[ClientUpdate]) -> Adapter:
        return self.rule_of_the_server().aggregate(self.state(), updates).adapter


@st.composite
def worlds(draw: st.DrawFn) -> World:
    method = draw(st.sampled_from(OFFERED))
    rank = st.integers(1, 4)
    ranks = draw(st.lists(rank, min_size=1, max_size=4))
    if method == "fedavg":
        ranks = ranks[:1] * len(ranks)
    counts = draw(st.lists(st.integers(1, 50), min_size=len(ranks), max_size=len(ranks)))
    option = (("empty_slice", draw(st.sampled_from(["keep", "zero"]))),) if method == "rbla" else ()
    rule = draw(st.sampled_from(["standard", "rslora", "constant"]))
    alpha, turn, seed = draw(st.floats(0.1, 50)), draw(st.integers(0, 1)), draw(st.integers(0, 999))
    return World(method, option, tuple(zip(ranks, counts, strict=True)), alpha, rule, turn, seed)


def numbers_of(adapter: Adapter) -> torch.Tensor:
    layers = [factor.flatten() for _, layer in sorted(adapter.layers.items()) for factor in (layer.A, layer.B)]
    return torch.cat([*layers, *(tensor.flatten() for tensor in adapter.tensors.values())])


def unchanged(jobs: list[Job]) -> list[ClientUpdate]:
    return [ClientUpdate(job.download.adapter, job.num_examples, job.client.name) for job in jobs]


def moved(job: Job, seed: int, where: str, slice_index: int | None) -> ClientUpdate:
    """A client's change far beyond the clip, clipped: of everything, or of one layer or the head, or of one slice of it."""
    draw, layers = torch.Generator().manual_seed(seed), {}
    for name, layer in job.download.adapter.layers.items():
        at = torch.zeros(layer.rank, dtype=torch.float64)
        at[slice(None) if slice_index is None else slice_index % layer.rank] = 1e6 if where in ("all", name) else 0.0
        A = layer.A + at[:, None] * torch.randn(layer.A.shape, generator=draw, dtype=torch.float64)
        B = layer.B + at * torch.randn(layer.B.shape, generator=draw, dtype=torch.float64)
        layers[name] = layer.with_factors(A, B)
    head = job.download.adapter.tensors["head"] + (1e6 if where in ("all", "head") else 0.0)
    trained = replace(job.download.adapter, layers=layers, tensors={"head": head})
    return ClientUpdate(change.clipped(job.download, trained, CLIP), job.num_examples, job.client.name)


def in_noise(world: World, updates: list[ClientUpdate], k: int) -> float:
    """How far client k's upload moves what is released, against it having changed nothing, in standard deviations."""
    base = list(updates)
    base[k] = unchanged(world.jobs())[k]
    deviation = numbers_of(world.released(updates, Ones())) - numbers_of(world.mean(updates))
    movement = numbers_of(world.mean(updates)) - numbers_of(world.mean(base))
    silent = deviation.abs() < 1e-9 * (1 + numbers_of(world.mean(updates)).abs())  # rounding of the subtraction
    assert not (movement[silent].abs() > 1e-9).any(), "what gets no noise must not move"
    return float((movement[~silent] / deviation[~silent]).norm())


# --- how far one client moves what is released ------------------------------------------------------------------------


@given(worlds(), st.integers(0, 99), st.sampled_from(["all", "first", "second", "head"]), st.none() | st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_no_client_moves_the_release_by_more_than_the_noise_covers(world: World, seed: int, where: str, at: int | None) -> None:
    """One over the noise multiplier in standard deviations is what the accountant takes for the worst; the others' uploads are
    anything."""
    jobs = world.jobs()
    updates = [moved(job, seed + index, "all", None) for index, job in enumerate(jobs)]
    for k, job in enumerate(jobs):
        updates[k] = moved(job, seed, where, at)
        assert in_noise(world, updates, k) <= (1 + 1e-6) / SIGMA


@given(worlds())
@settings(max_examples=25, deadline=None)
def test_in_each_place_some_client_moves_the_release_by_all_that_the_noise_covers(world: World) -> None:
    """The bound is reached on every slice and in the head, so that less noise would be too little, and more is not added."""
    jobs = world.jobs()
    slices = [(where, at) for where in ("first", "second") for at in range(max(rank for rank, _ in world.clients))]
    for where, at in [*slices, ("head", 0)]:
        reached = []
        for k in (k for k, (rank, _) in enumerate(world.clients) if rank > at):
            updates = unchanged(jobs)
            updates[k] = moved(jobs[k], 5, where, at)
            reached.append(in_noise(world, updates, k))
        assert max(reached) == pytest.approx(1 / SIGMA, rel=1e-4)


def test_the_size_of_the_noise_slice_by_slice() -> None:
    """Ranks 1 and 2 with 3 and 1 examples. Slice 0 is had by both, the larger weight is 3/4; slice 1 by one, whose weight is 1
    in an average over owners and 1/4 in one with zeros. The server's scaling is 8 / 2 = 4: what is applied is `4 B A`, so
    that `2 A` and `2 B` are of scaling 1, or, where B alone is averaged, `4 B`."""
    expected = {
        "rbla": ([0.75 / 2, 1 / 2], [0.75 / 2, 1 / 2]),
        "zeropad": ([0.75 / 2, 0.25 / 2], [0.75 / 2, 0.25 / 2]),
        "ffa_lora": ([0, 0], [0.75 / 4, 1 / 4]),
    }
    for method, (on_a, on_b) in expected.items():
        world, rng, rounds = World(method, (), ((1, 3), (2, 1)), 8.0, "standard", 0, 0), np.random.default_rng(0), 400
        updates = unchanged(world.jobs())
        mean, samples = world.mean(updates), [world.released(updates, rng) for _ in range(rounds)]
        noise_a = torch.stack([each.layers["first"].A - mean.layers["first"].A for each in samples])
        noise_b = torch.stack([each.layers["first"].B - mean.layers["first"].B for each in samples])
        head = torch.stack([each.tensors["head"] - mean.tensors["head"] for each in samples])
        assert noise_a.square().mean((0, 2)).sqrt().tolist() == pytest.approx([SIGMA * CLIP * x for x in on_a], rel=0.05)
        assert noise_b.square().mean((0, 1)).sqrt().tolist() == pytest.approx([SIGMA * CLIP * x for x in on_b], rel=0.06)
        assert float(head.square().mean().sqrt()) == pytest.approx(SIGMA * CLIP * 0.75, rel=0.06)
        assert abs(float(noise_b.mean())) < 4 * SIGMA * CLIP / math.sqrt(noise_b.numel()), "around nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", OFFERED)
def test_what_gets_noise_is_not_rounded_to_the_adapters_type_before(method: str, dtype: torch.dtype, monkeypatch) -> None:
    """A change of one unit in the last place, weighted 1/8, is less than that unit: rounded before the noise, it would be
    all of it or nothing, and a client would move the mean by up to eight times what the noise covers."""
    world = World(method, (), ((2, 1),) * 8, 2.0, "standard", 0, 3)
    state = as_type(world.state(), dtype)
    rule, jobs = (
        world.rule_of_the_server(),
        [Job(Client(f"client-{i}", 2), 1, partial(dispatched, world, dtype, i)) for i in range(8)],
    )
    seen: list[tuple[Adapter, object]] = []
    cover = central_noise.cover
    monkeypatch.setattr(central_noise, "cover", lambda mean, far, *more: seen.append((mean, far)) or cover(mean, far, *more))
    updates = [nudged(job, torch.Generator().manual_seed(i), 0.5) for i, job in enumerate(jobs)]  # half of all numbers
    for k, job in enumerate(jobs):
        base = [*updates[:k], ClientUpdate(job.download.adapter, 1, job.client.name), *updates[k + 1 :]]
        after = [aggregated(rule, state, jobs, each, Fixed(Ones())).adapter for each in (updates, base)]
        assert {tensor.dtype for each in after for layer in each.layers.values() for tensor in (layer.A, layer.B)} == {dtype}
        assert {tensor.dtype for each in after for tensor in each.tensors.values()} == {dtype}
        (one, far), (other, _) = seen[-2:]
        moved = [
            (getattr(one.layers[name], factor).double() - getattr(other.layers[name], factor).double()) / reach
            for name, factors in far.factors.items()
            for factor, reach in factors.items()
        ]
        moved += [(tensor.double() - other.tensors[name].double()) / far.tensors for name, tensor in one.tensors.items()]
        size = change.norm(job.download, updates[k].adapter)
        assert size > 0
        assert math.hypot(*(float(each.norm()) for each in moved)) <= size * (1 + 1e-6)


def as_type(state: ServerState, dtype: torch.dtype) -> ServerState:
    layers = {
        name: LoraLayer(layer.A.to(dtype), layer.B.to(dtype), layer.scaling) for name, layer in state.adapter.layers.items()
    }
    tensors = {name: tensor.to(dtype) for name, tensor in state.adapter.tensors.items()}
    return replace(state, adapter=Adapter(layers, tensors))


def dispatched(world: World, dtype: torch.dtype, index: int) -> Download:
    return world.rule_of_the_server().dispatch(as_type(world.state(), dtype), Client(f"client-{index}", 2))


def nudged(job: Job, draw: torch.Generator, share: float) -> ClientUpdate:
    """Some of the trained numbers moved by one unit in the last place."""

    def next_to(tensor: torch.Tensor) -> torch.Tensor:
        up = tensor * (1 + torch.finfo(tensor.dtype).eps)
        return torch.where(torch.rand(tensor.shape, generator=draw) < share, up, tensor)

    download, layers = job.download, {}
    for name, layer in download.adapter.layers.items():
        A, B = (next_to(getattr(layer, factor)) if factor in download.train else getattr(layer, factor) for factor in "AB")
        layers[name] = layer.with_factors(A, B)
    tensors = {name: next_to(tensor) for name, tensor in download.adapter.tensors.items()}
    return ClientUpdate(replace(download.adapter, layers=layers, tensors=tensors), job.num_examples, job.client.name)


def test_a_slice_that_nobody_of_the_cohort_has_gets_no_noise() -> None:
    world = World("rbla", (), ((3, 2), (1, 5)), 8.0, "standard", 0, 0)
    state, method, jobs = world.state(), world.rule_of_the_server(), world.jobs()[1:]
    after = aggregated(method, state, jobs, unchanged(jobs), Fixed(Ones())).adapter
    for name, layer in after.layers.items():
        assert torch.equal(layer.A[1:], state.adapter.layers[name].A[1:])
        assert not torch.equal(layer.A[0], state.adapter.layers[name].A[0])


# --- what weighs does not tell what was sent --------------------------------------------------------------------------


@pytest.mark.parametrize("method", OFFERED)
def test_who_sends_nothing_usable_counts_as_unchanged(method: str) -> None:
    """If the weights went by who came back, one client's failure would move all others' parts of the mean."""
    world = World(method, (), ((2, 3), (2, 9), (2, 1)), 8.0, "standard", 0, 0)
    jobs = world.jobs()
    updates = [moved(job, 7, "all", None) for job in jobs]
    still = [updates[0], unchanged(jobs)[1], updates[2]]
    found = world.released([updates[2], updates[0]], Ones())
    assert torch.equal(numbers_of(found), numbers_of(world.released(still, Ones())))


def test_only_what_got_noise_goes_on_from_the_round() -> None:
    class Hoarder(type(make("rbla"))):
        def aggregate(self, state, updates):
            after = super().aggregate(state, updates)
            return replace(after, extra={"kept": updates[0].adapter}, merged=updates[0].adapter)

    world = World("rbla", (), ((2, 3), (2, 9)), 8.0, "standard", 0, 0)
    jobs = world.jobs()
    after = aggregated(Hoarder(), world.state(), jobs, unchanged(jobs), Fixed(Ones()))
    assert (after.round, dict(after.extra), after.merged) == (1, {}, None)


# --- the clip, at the client and at the server ------------------------------------------------------------------------


def single(world: World, size: float) -> tuple[Download, Adapter]:
    """A client's download in float32, and itself with everything moved at random by `size`."""
    (job, *_), draw = world.jobs(), torch.Generator().manual_seed(3)
    layers = {name: replace(layer, A=layer.A.float(), B=layer.B.float()) for name, layer in job.download.adapter.layers.items()}
    start = replace(job.download.adapter, layers=layers, tensors={"head": job.download.adapter.tensors["head"].float()})
    trained = {
        name: layer.with_factors(
            layer.A + size * torch.randn(layer.A.shape, generator=draw),
            layer.B + size * torch.randn(layer.B.shape, generator=draw),
        )
        for name, layer in layers.items()
    }
    return replace(job.download, adapter=start), replace(start, layers=trained)


@given(worlds(), st.floats(-6, 6), st.floats(-9, 3))
@settings(max_examples=100, deadline=None)
def test_what_a_client_sends_passes_the_servers_check_also_after_rounding(world: World, size: float, clip: float) -> None:
    download, trained = single(world, 10**size)
    sent = change.clipped(download, trained, 10**clip)
    assert change.norm(download, sent) <= 10**clip
    if 10**clip > 1e-2 and change.norm(download, trained) > 10**clip:
        assert change.norm(download, sent) > 0.9 * 10**clip, "no more is cut off than has to be"


def test_the_norm_is_that_of_the_factors_at_scaling_one() -> None:
    """Scaling 4: 3 in A and 4 in B are 6 and 8 where both take it up, 10 in all; 16 in `4 B`, where only B is trained."""
    layer = LoraLayer(torch.zeros(2, 3), torch.zeros(4, 2), 4.0)
    to = layer.with_factors(layer.A.index_fill(0, torch.tensor([1]), 3**0.5), layer.B.index_fill(1, torch.tensor([0]), 2.0))
    start, end = Adapter({"fc": layer}, {"head": torch.zeros(1)}), Adapter({"fc": to}, {"head": torch.zeros(1)})
    both = Download(start, {"fc": (0, 1)}, rescale="both")
    assert change.norm(both, end) == pytest.approx(10.0)
    assert change.norm(both, replace(end, tensors={"head": torch.tensor([24.0])})) == pytest.approx(26.0)
    assert change.norm(replace(both, rescale="B", train=frozenset("B")), end) == pytest.approx(16.0)


def test_a_change_within_the_clip_is_sent_as_it_is_and_one_that_is_not_finite_not_at_all() -> None:
    download, trained = single(World("rbla", (), ((2, 3),), 8.0, "standard", 0, 0), 1e-2)
    sent = change.clipped(download, trained, 10.0)
    assert all(torch.allclose(sent.layers[name].B, trained.layers[name].B) for name in SHAPES)
    broken = replace(trained, tensors={"head": torch.full((3,), math.nan)})
    assert change.norm(download, change.clipped(download, broken, 10.0)) == 0


def config(**sections) -> Config:
    base = Config().replace(
        run={"rounds": 3}, model={"name": "digits-mlp"}, clients={"count": 6, "participation": 0.5, "ranks": (2, 4)},
        train={"local_steps": 2}, method={"name": "rbla"},
        privacy={"level": "client", "noise_at": "server", "epsilon": 8.0, "delta": 1e-3, "accountant": "rdp", "clip": 0.5},
    )  # fmt: skip
    return base.replace(**sections)


@pytest.fixture
def built() -> Iterator[tuple[Federation, list[Job], Plan, Mechanism]]:
    """A federation in round 1, its jobs, how they train, and under what key."""
    made = simulation.build(config(train={"learning_rate": 5.0, "local_steps": 20}))
    jobs, _ = asking.dispatch(made, loop.start(made), 1)
    yield made, jobs, plan_round(made.config.train, 1, 3, 0), Mechanism(made.privacy, b"k" * 32)
    made.close()


def test_the_server_rejects_what_is_not_clipped_and_does_not_say_by_how_much(built) -> None:
    made, jobs, plan, mechanism = built
    replies = list(made.engine.train(jobs, plan, mechanism))
    assert any(change.norm(job.download, reply.adapter) > 0.49 for job, reply in zip(jobs, replies, strict=True))
    cheat = replies[0]
    doubled = {name: layer.with_factors(layer.A * 3, layer.B + 3) for name, layer in cheat.adapter.layers.items()}
    replies[0] = replace(cheat, adapter=replace(cheat.adapter, layers=doubled))
    collected = intake.collect(replies, jobs, [], 1, made.upload_bound)
    rows = {row["client"]: (row["status"], row["reason"]) for row in collected.rows}
    assert rows.pop(cheat.client) == ("rejected", "its change since the download is larger than the clip norm, 0.5")
    assert set(rows.values()) == {("ok", "")}
    assert len(collected.updates) == len(jobs) - 1


def test_uploads_have_no_noise_and_a_client_that_fails_sends_no_change(built, monkeypatch) -> None:
    made, jobs, plan, mechanism = built
    first, again = (list(made.engine.train(jobs, plan, each)) for each in (mechanism, Mechanism(made.privacy)))
    assert all(torch.equal(numbers_of(a.adapter), numbers_of(b.adapter)) for a, b in zip(first, again, strict=True))

    def fails(*_):
        raise RunFailed("loss is nan at local step 2")

    monkeypatch.setattr(private_upload.local, "train", fails)
    for reply, job in zip(made.engine.train(jobs, plan, mechanism), jobs, strict=True):
        assert torch.equal(numbers_of(reply.adapter), numbers_of(job.download.adapter))


# --- which methods, and which plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OFFERED)
def test_a_run_spends_no_more_than_its_budget(tmp_path: Path, monkeypatch, method: str) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    summary = simulation.execute(config(method={"name": method}, clients={"ranks": (4,)}), tmp_path / "run")
    charged = {(row["round"], row["client"]) for row in lines(tmp_path / "run", "privacy.jsonl")}
    took_part = {(row["round"], row["client"]) for row in lines(tmp_path / "run", "clients.jsonl") if row["status"] == "ok"}
    assert charged == took_part, "one release for each round in the cohort"
    assert {row["steps"] for row in lines(tmp_path / "run", "privacy.jsonl")} == {1}
    assert 0 < summary["epsilon"] <= 8.0
    assert math.isfinite(summary["loss"])


def test_the_methods_are_those_that_are_linear_and_keep_nothing_with_clients() -> None:
    kinds = [kind for kind in REGISTRY.values() if kind.__module__.startswith("anyrank.methods.")]
    linear = [kind for kind in kinds if kind.traits.linear is not Holds.NEVER and not kind.reference and not kind.private]
    assert sorted(kind.name for kind in linear) == sorted(OFFERED)


@pytest.mark.parametrize("method", ["fedex", "fedsvd", "flexlora", "flora", "florist", "lora_fair", "raflora", "stayput"])
def test_methods_that_are_not_linear_are_refused_by_name_with_those_that_are(method: str) -> None:
    words = rf"{method}'s new factors are not affine.*fedavg \(equal ranks\), ffa_lora, rbla, rolora, zeropad"
    with pytest.raises(ConfigError, match=words):
        simulation.build(config(method={"name": method}, clients={"ranks": (4,)}))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"name": "fedavg"}}, "fedavg needs clients of one rank"),
        ({"method": {"name": "fedsa"}}, "stay with each client"),
        ({"method": {"name": "centralized"}, "clients": {"ranks": (4,)}}, "gathers all examples"),
        ({"method": {"name": "hetlora", "options": {"prune": False}}}, "hetlora's new factors are not affine"),
    ],
)
def test_other_refusals_say_what_is_wrong(sections: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulation.build(config(**sections))


def test_a_linear_method_that_does_not_say_its_weights_is_refused() -> None:
    class Quiet(type(make("rbla"))):
        name = "quiet"
        weights = None

    with pytest.raises(ConfigError, match="quiet does not say what weight a client has"):
        central_noise.check(Quiet(), (2, 4))


def test_a_trait_for_equal_ranks_is_not_taken_for_others() -> None:
    central_noise.check(make("fedavg"), (4, 4))
    with pytest.raises(ConfigError, match="fedavg's new factors are not affine"):
        central_noise.check(make("fedavg"), (2, 4))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"level": "example"}, "privacy.noise_at: expected 'client' with level = 'example'"),
        ({"level": "none", "epsilon": 0.0, "delta": 0.0}, "privacy.noise_at: expected level"),
        ({"noise_at": "both"}, "privacy.noise_at: expected one of client, server"),
    ],
)
def test_plans_that_mean_nothing_are_refused(asked: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PrivacyConfig(**{"level": "client", "noise_at": "server", "epsilon": 8.0, "delta": 1e-3} | asked)


def test_the_plan_costs_what_noise_at_the_client_costs() -> None:
    central, at_clients = (plan_privacy(config(privacy={"noise_at": at}), [20, 300]) for at in ("server", "client"))
    assert central.noise == at_clients.noise
    assert central.spending(20, 3) == at_clients.spending(20, 3)
    assert (central.upload_bound, at_clients.upload_bound) == (0.5, math.inf)


# --- the commands, and a run that is killed ---------------------------------------------------------------------------

CONFIG = """
[run]
name = "private"
rounds = 5
[model]
name = "digits-mlp"
[clients]
count = 8
participation = 0.5
ranks = [1, 2, 8]
[train]
local_steps = 3
[method]
name = "rbla"
[privacy]
level = "client"
noise_at = "server"
epsilon = 8.0
delta = 1e-3
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "private.toml").write_text(CONFIG)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(noise.SEED, "0123456789abcdef" * 2)
    return tmp_path


def test_a_killed_run_resumes_to_the_same_bytes(workplace: Path) -> None:
    status, said = command(workplace, "whole")
    assert status == 0, said
    for moment in ("while the clients of round 3 train", "after the logs, before the checkpoint", "right after the checkpoint"):
        out = moment.replace(" ", "-")
        assert command(workplace, out, prelude=PRELUDE + MOMENTS[moment])[0] == -signal.SIGKILL
        status, said = command(workplace, out, "--resume")
        assert status == 0, said
        assert files(workplace / out) == files(workplace / "whole")
        assert lines(workplace / out, "privacy.jsonl") == lines(workplace / "whole", "privacy.jsonl")


def test_resume_with_noise_elsewhere_is_refused(workplace: Path) -> None:
    moment = PRELUDE + MOMENTS["right after the checkpoint"]
    assert command(workplace, "begun", prelude=moment)[0] == -signal.SIGKILL
    arguments = ("--set", "privacy.noise_at=client", "--set", "method.name=ffa_lora")
    status, said = command(workplace, "begun", "--resume", *arguments)
    assert (status, "was started with" in said) == (2, True), said


def test_another_secret_gives_other_noise_to_the_same_uploads(workplace: Path, monkeypatch) -> None:
    arguments = ("--set", "run.rounds=1")
    assert command(workplace, "one", *arguments)[0] == 0
    monkeypatch.setenv(noise.SEED, "fedcba9876543210" * 2)
    assert command(workplace, "two", *arguments)[0] == 0
    assert files(workplace / "one") != files(workplace / "two")


@pytest.mark.parametrize("verb", ["privacy", "plan"])
def test_the_commands_say_where_the_noise_is(workplace: Path, verb: str) -> None:
    done = CliRunner().invoke(app, [verb, str(workplace / "private.toml")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "at the server" in " ".join(done.output.split())
