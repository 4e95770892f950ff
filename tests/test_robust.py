"""Defences beside any method: their geometry by hand and against dense matrices, and what an attacker gains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank import methods, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config
from anyrank.errors import ConfigError
from anyrank.messages.records import Client, ClientUpdate, Download, Job, Scaling, ServerState
from anyrank.robust.base import Chain, Rule, TooFew
from anyrank.robust.geometric_median import GeometricMedian, weiszfeld
from anyrank.robust.krum import Krum, scores
from anyrank.robust.norm_bound import NormBound
from anyrank.robust.rules import rule_of
from anyrank.robust.steps import gram

SHAPES = {"first": (7, 5), "second": (4, 6)}
RANKS = (2, 3, 3, 3, 5, 5, 5, 1)


def adapter(rank: int, seed: int, scaling: float = 0.5) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    layers = {
        name: LoraLayer(torch.randn(rank, width, generator=draw, dtype=torch.float64),
                        torch.randn(out, rank, generator=draw, dtype=torch.float64), scaling)
        for name, (out, width) in SHAPES.items()
    }  # fmt: skip
    return Adapter(layers, {"head": torch.randn(3, generator=draw, dtype=torch.float64)})


def moved(start: Adapter, by: float, seed: int) -> Adapter:
    """`start`, its factors and head moved by random numbers of size `by`."""
    draw = torch.Generator().manual_seed(1000 + seed)
    noise = lambda like: by * torch.randn(like.shape, generator=draw, dtype=torch.float64)  # noqa: E731
    layers = {
        name: layer.with_factors(layer.A + noise(layer.A), layer.B + noise(layer.B)) for name, layer in start.layers.items()
    }
    return Adapter(layers, {name: tensor + noise(tensor) for name, tensor in start.tensors.items()})


EQUAL = (0.1,) * len(RANKS)


def cohort(sizes=EQUAL, ranks=RANKS) -> tuple[list[Job], list[ClientUpdate]]:
    jobs, updates = [], []
    for k, (rank, size) in enumerate(zip(ranks, sizes, strict=True)):
        download = Download(adapter(rank, k), {name: tuple(range(rank)) for name in SHAPES})
        jobs.append(Job(Client(f"c{k}", rank), 3 + k, lambda download=download: download))
        updates.append(ClientUpdate(moved(download.adapter, size, k), 3 + k, f"c{k}"))
    return jobs, updates


def dense(job: Job, update: ClientUpdate) -> torch.Tensor:
    """A client's step as one long vector, from the effective weights themselves."""
    before, after = job.download.adapter, update.adapter
    weights = [(after.layers[name].delta() - before.layers[name].delta()).flatten() for name in SHAPES]
    return torch.cat([*weights, after.tensors["head"] - before.tensors["head"]])


STATE = ServerState(0, 0, adapter(5, 99), Scaling(1.0, "constant"))


def test_the_gram_matrix_is_that_of_the_dense_steps() -> None:
    jobs, updates = cohort()
    vectors = torch.stack([dense(job, update) for job, update in zip(jobs, updates, strict=True)])
    torch.testing.assert_close(gram(jobs, updates), vectors @ vectors.T, rtol=1e-10, atol=1e-10)


def test_common_slices_are_those_that_everybody_has() -> None:
    """Of ranks 1 and more, slice 0 alone: the rest of an update does not count."""
    jobs, updates = cohort()
    layer = updates[4].adapter.layers["first"]
    A = layer.A.clone()
    A[1:] += 100.0
    loud = replace(updates[4], adapter=Adapter({**updates[4].adapter.layers, "first": layer.with_factors(A, layer.B)},
                                               updates[4].adapter.tensors))  # fmt: skip
    other = [*updates[:4], loud, *updates[5:]]
    torch.testing.assert_close(gram(jobs, other, common=True), gram(jobs, updates, common=True))
    assert not torch.allclose(gram(jobs, other), gram(jobs, updates))


RULES = [NormBound(2.0), GeometricMedian(), Krum(1, keep=1), Krum(2)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@given(order=st.permutations(range(len(RANKS))))
def test_the_order_of_replies_does_not_matter(rule: Rule, order: list[int]) -> None:
    jobs, updates = cohort((0.1, 0.1, 0.2, 0.1, 0.1, 5.0, 0.1, 0.1))
    first, second = rule.screen(STATE, jobs, updates), rule.screen(STATE, jobs, [updates[i] for i in order])
    assert first.refused == second.refused
    found = {update.client: update for update in second.updates}
    assert found.keys() == {update.client for update in first.updates}
    for update in first.updates:
        assert found[update.client].num_examples == pytest.approx(update.num_examples, rel=1e-6)
        torch.testing.assert_close(found[update.client].adapter.layers["first"].A, update.adapter.layers["first"].A)


@pytest.mark.parametrize("rule", [GeometricMedian(), Krum(2)], ids=str)
def test_nobody_gains_by_writing_the_same_product_otherwise(rule: Rule) -> None:
    """`(B G, G^-1 A)` is the same update. (Krum looks at single slices, so there it is scaled within them.)"""
    jobs, updates = cohort((0.1, 0.1, 0.2, 0.1, 0.1, 0.3, 0.1, 0.1))
    layer = updates[5].adapter.layers["second"]
    G = torch.diag(torch.tensor([1e3, 1e-3, 5.0, 0.1, 2.0], dtype=torch.float64))
    other = layer.with_factors(torch.linalg.inv(G) @ layer.A, layer.B @ G)
    again = replace(updates[5], adapter=Adapter({**updates[5].adapter.layers, "second": other}, updates[5].adapter.tensors))
    first = rule.screen(STATE, jobs, updates)
    second = rule.screen(STATE, jobs, [*updates[:5], again, *updates[6:]])
    assert first.refused == second.refused
    for one, two in zip(first.updates, second.updates, strict=True):
        assert one.num_examples == pytest.approx(two.num_examples, rel=1e-6)


# --- the geometric median ---------------------------------------------------------------------------------------------


def test_the_median_of_a_triangle_is_its_fermat_point() -> None:
    """Of an equilateral triangle it is the centre; of one with an angle of 120 degrees or more, that corner."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)
    shares = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(weiszfeld(corners @ corners.T, shares) @ corners, corners.mean(dim=0), rtol=0, atol=1e-6)
    wide = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.9, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(weiszfeld(wide @ wide.T, shares) @ wide, wide[0], rtol=0, atol=1e-3)


@given(st.integers(0, 10_000))
def test_no_point_near_it_is_nearer_to_all(seed: int) -> None:
    """The optimality of the median, by trying: the sum of distances grows whichever way one goes."""
    draw = np.random.default_rng(seed)
    points = torch.from_numpy(draw.normal(size=(7, 4)))
    shares = torch.from_numpy(draw.dirichlet(np.ones(7)))
    at = weiszfeld(points @ points.T, shares) @ points
    total = lambda z: float((shares * (points - z).norm(dim=1)).sum())  # noqa: E731
    for _ in range(10):
        assert total(at + 0.05 * torch.from_numpy(draw.normal(size=4))) >= total(at) - 1e-6


def test_without_attackers_it_is_near_the_mean_and_with_one_it_stays_there() -> None:
    jobs, updates = cohort()
    vectors = torch.stack([dense(job, update) for job, update in zip(jobs, updates, strict=True)])
    counts = torch.tensor([float(update.num_examples) for update in updates], dtype=torch.float64)

    def median(of: list[ClientUpdate]) -> torch.Tensor:
        kept = GeometricMedian().screen(STATE, jobs, of).updates
        by_name = {job.client.name: job for job in jobs}
        weights = torch.tensor([float(update.num_examples) for update in kept], dtype=torch.float64)
        found = torch.stack([dense(by_name[update.client], update) for update in kept])
        return (weights / weights.sum()) @ found

    mean = (counts / counts.sum()) @ vectors
    spread = float((vectors - mean).norm(dim=1).median())
    assert float((median(updates) - mean).norm()) < 0.5 * spread
    hostile = [*updates[:-1], replace(updates[-1], adapter=moved(jobs[-1].download.adapter, 1e6, 5))]
    assert float((median(hostile) - mean).norm()) < 2 * spread


# --- krum -------------------------------------------------------------------------------------------------------------


def test_krums_scores_by_hand() -> None:
    """Points 0, 1, 2, 10 on a line, two nearest others each: 1 + 4, 1 + 1, 1 + 4, 64 + 81."""
    line = torch.tensor([0.0, 1.0, 2.0, 10.0], dtype=torch.float64)
    assert scores(line[:, None] * line[None, :], nearest=2).tolist() == [5.0, 2.0, 5.0, 145.0]


def test_multi_krum_drops_those_that_are_far_away_and_says_so() -> None:
    jobs, updates = cohort((0.1, 0.1, 0.1, 9.0, 0.1, 0.1, 9.0, 0.1))
    kept = Krum(2).screen(STATE, jobs, updates)
    assert sorted(kept.refused) == ["c3", "c6"]
    assert len(kept.updates) == 6
    assert len(Krum(2, keep=1).screen(STATE, jobs, updates).updates) == 1


def test_krum_refuses_a_round_of_too_few() -> None:
    jobs, updates = cohort()
    with pytest.raises(TooFew, match="hostile = 3 needs 9 updates a round, got 8"):
        Krum(3).screen(STATE, jobs, updates)


def test_what_the_guard_rejects_is_one_hostile_client_less_for_krum() -> None:
    """Five uploads are what Krum needs for one hostile client. The guard rejects one: of the other four, none is left out."""
    jobs, updates = cohort((0.1, 0.1, 50.0, 0.1, 0.1), ranks=(3,) * 5)
    kept = Chain((NormBound(3.0, far=4.0), Krum(1))).screen(STATE, jobs, updates)
    assert (list(kept.rejected), kept.refused) == (["c2"], {})
    assert len(kept.updates) == 4
    with pytest.raises(TooFew):  # without the guard, the same four are too few
        Krum(1).screen(STATE, jobs, kept.updates)


# --- the norm bound ---------------------------------------------------------------------------------------------------


def test_a_long_step_is_shortened_to_the_bound_and_the_others_are_left_alone() -> None:
    jobs, updates = cohort((0.1, 0.1, 0.1, 50.0, 0.1, 0.1, 0.1, 0.1))
    kept = NormBound(3.0).screen(STATE, jobs, updates).updates
    norms = [float(dense(job, update).norm()) for job, update in zip(jobs, updates, strict=True)]
    bound = 3.0 * float(np.median([norms[k] for k in (1, 2, 3)]))  # three clients of rank 3: a class of their own
    assert 0.5 * bound < float(dense(jobs[3], kept[3]).norm()) <= bound * (1 + 1e-9)
    for k in (0, 1, 2, 4, 5, 6, 7):
        assert kept[k] is updates[k]


def test_honest_large_ranks_are_not_shortened_for_their_rank() -> None:
    """Three clients of rank 5 take steps five times as long as those of rank 1: each class has a median of its own."""
    jobs, updates = cohort((0.02,) * 3 + (0.4,) * 3, ranks=(1, 1, 1, 5, 5, 5))
    assert all(a is b for a, b in zip(NormBound(3.0).screen(STATE, jobs, updates).updates, updates, strict=True))


def test_an_update_that_is_far_out_is_rejected_and_does_not_hold_the_mean_back() -> None:
    jobs, updates = cohort((0.1, 0.1, 0.1, 50.0, 0.1, 0.1, 0.1, 0.1))
    kept = NormBound(3.0, far=4.0).screen(STATE, jobs, updates)
    assert kept.rejected == {"c3": "its step is more than 4 times as long as the median (guard.far)"}
    assert (kept.shortened, kept.refused) == ({}, {})
    assert [update.client for update in kept.updates] == ["c0", "c1", "c2", "c4", "c5", "c6", "c7"]


def test_a_client_that_trains_longer_may_move_further() -> None:
    """One pass over 100 examples in batches of 10 is ten steps, where the others take one: ten times the length is honest."""
    jobs, updates = cohort((0.1,) * 5 + (0.7,), ranks=(3,) * 6)
    reach = lambda num_examples: 10 if num_examples == 8 else 1  # noqa: E731 - the last client has 3 + 5 examples
    assert list(NormBound(3.0, far=4.0).screen(STATE, jobs, updates).rejected) == ["c5"]
    kept = NormBound(3.0, far=4.0, reach=reach).screen(STATE, jobs, updates)
    assert (kept.rejected, kept.shortened) == ({}, {})


# --- in a run ---------------------------------------------------------------------------------------------------------


class Hostile:
    """The engine in this process, one client of which multiplies what it changed."""

    def __init__(self, setting: simulation.Setting, who: str, times: float) -> None:
        self._engine, self._who, self._times = simulation.in_process(setting), who, times
        self.start, self.evaluate, self.close = self._engine.start, self._engine.evaluate, self._engine.close

    def train(self, jobs, plan, mechanism=None, deadline_s=None) -> Iterator:
        by_name = {job.client.name: job for job in jobs}
        for reply in self._engine.train(jobs, plan, mechanism):
            yield self._twisted(by_name[reply.client], reply) if reply.client == self._who else reply

    def _twisted(self, job: Job, reply: ClientUpdate) -> ClientUpdate:
        layers = {}
        for name, after in reply.adapter.layers.items():
            before = job.download.adapter.layers[name]
            layers[name] = after.with_factors(
                before.A + self._times * (after.A - before.A), before.B + self._times * (after.B - before.B)
            )
        return replace(reply, adapter=replace(reply.adapter, layers=layers))


OFF = {"norm": 0, "far": 0, "owner": 1}


def accuracy(tmp_path: Path, rule: str, times: float, method: str = "raflora", guard: dict | None = None) -> float:
    from anyrank.federation import loop
    from anyrank.runs.folder import RunDir

    config = Config().replace(
        run={"rounds": 6}, model={"name": "digits-mlp"}, clients={"count": 10, "participation": 1.0}, method={"name": method},
        robust={"rule": rule}, guard=guard or {},
    )  # fmt: skip
    federation = simulation.build(config, engine=lambda setting: Hostile(setting, "client-7", times))
    try:
        with RunDir.open(tmp_path / f"{rule}-{times}-{method}-{bool(guard)}", config) as store:
            return loop.run(federation, store)["accuracy"]
    finally:
        federation.close()


@pytest.mark.parametrize("method", ["raflora", "rbla", "stayput"])
def test_one_hostile_client_of_ten_ruins_a_run_and_not_one_under_a_rule(
    method: str, tmp_path: Path, monkeypatch, cache
) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    honest = accuracy(tmp_path, "none", 1.0, method, OFF)
    assert accuracy(tmp_path, "none", -300.0, method, OFF) < honest - 0.2
    for rule in ("geometric-median", "multi-krum"):
        assert accuracy(tmp_path, rule, -300.0, method, OFF) > honest - 0.1, rule
    assert accuracy(tmp_path, "none", -300.0, method) > honest - 0.1, "the guard"


REFUSED = {
    "an unknown rule": ({"robust": {"rule": "mean"}}, "expected one of none, geometric-median"),
    "a norm below one": ({"guard": {"norm": 0.5}}, "guard.norm: expected a number of at least 1, or 0 for no limit"),
    "a rule of the guard": ({"robust": {"rule": "norm-bound"}}, "set guard.norm instead"),
    "noise at the server": (
        {"robust": {"rule": "geometric-median"}, "method": {"name": "rbla"},
         "privacy": {"level": "client", "noise_at": "server", "noise_multiplier": 1.0, "delta": 1e-4}},
        "is computed for public weights",
    ),
    "no mean of uploads": ({"robust": {"rule": "krum"}, "method": {"name": "fedsa"}}, "fedsa makes no mean of uploads"),
    "more than a round has": (
        {"robust": {"rule": "krum", "hostile": 2}, "clients": {"count": 20, "participation": 0.25}},
        "krum with robust.hostile = 2 needs 7 updates a round, but 5 clients are asked; raise clients.participation",
    ),
    "a quorum that no round has": ({"rounds": {"least": 6}}, "rounds.least: expected at most 5, the clients that are asked"),
    "late replies under noise at the server": (
        {"rounds": {"late": "carry"}, "method": {"name": "rbla"},
         "privacy": {"level": "client", "noise_at": "server", "noise_multiplier": 1.0, "delta": 1e-4}},
        "rounds.late: with privacy.noise_at = 'server'",
    ),
    "weights by norms": ({"robust": {"rule": "geometric-median"}, "method": {"name": "hetlora"}}, "which hetlora does not use"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_rule_that_would_be_void_is_refused_in_one_line(what: str, monkeypatch, cache) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    sections, says = REFUSED[what]
    with pytest.raises(ConfigError, match=says):  # the value alone, or together with the method
        simulation.build(Config().replace(model={"name": "digits-mlp"}, **sections)).close()


def test_without_a_rule_nothing_is_done() -> None:
    jobs, updates = cohort()
    assert rule_of(Config().replace(guard=OFF), methods.make("raflora"), None).screen(STATE, jobs, updates).updates is updates
