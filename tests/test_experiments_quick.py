"""The quick way of the experiments trains as the library does: the same samples, the same noise, the same uploads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anyrank import simulation
from anyrank.config.sections import Config, PartitionConfig
from anyrank.federation import asking, loop
from anyrank.privacy.noise import Mechanism

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
KEY = b"a key that is known to these tests"


@pytest.fixture(autouse=True)
def _paths(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


def config(method: str, **train) -> Config:
    return Config().replace(
        model={"name": "digits-mlp"}, method={"name": method}, clients={"count": 3, "participation": 1.0, "ranks": (4,)},
        train={"optimizer": "sgd", "learning_rate": 0.5, "batch_size": 32, "local_steps": 4} | train,
        privacy={"level": "example", "noise_multiplier": 0.5, "delta": 1e-4, "clip": 0.3}, run={"rounds": 3},
        data={"partition": PartitionConfig(kind="quantity", alpha=5.0, min_examples=64)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "train"), [("fedavg", {}), ("rolora", {}), ("ffa_lora", {"precondition": True}), ("fedsvd", {"momentum": 0.9})]
)
def test_the_quick_way_gives_the_library_s_uploads(method: str, train: dict) -> None:
    import quick

    built = simulation.build(config(method, **train))
    state, mechanism, moved = loop.start(built), Mechanism(built.privacy, KEY), 0.0
    for round in (1, 2, 3):
        jobs, _ = asking.dispatch(built, state, round)
        ours = {each.client: each for each in built.engine.train(jobs, built.plan(round), mechanism)}
        theirs = quick.train(built.engine.model, jobs, built.engine.shards, built.plan(round), mechanism)
        assert [each.client for each in theirs] == [job.client.name for job in jobs]
        for job, other in zip(jobs, theirs, strict=True):
            own = ours[other.client]
            assert other.num_examples == own.num_examples
            for name, layer in own.adapter.layers.items():
                start, found = job.download.adapter.layers[name], other.adapter.layers[name]
                torch.testing.assert_close(found.A, layer.A, rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(found.B, layer.B, rtol=1e-3, atol=1e-5)
                moved += float((layer.B - start.B).norm() + (layer.A - start.A).norm())
        state = built.method.aggregate(state, list(ours.values()))
    assert moved > 1, "uploads that did not move would prove nothing"
    built.close()


@pytest.mark.parametrize(("labels", "clients"), [(2, 3), (2, 20), (10, 3), (77, 20)])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_skewed_shards_are_a_split_into_equal_parts_of_the_asked_skew(labels: int, clients: int, share: float) -> None:
    import ffa

    kinds = np.random.default_rng(1).integers(0, labels, 4000)
    shards = list(ffa.skewed(kinds, clients, share, 3))
    assert sorted(np.concatenate(shards).tolist()) == list(range(4000)), "each example with one client"
    assert max(map(len, shards)) - min(map(len, shards)) <= labels, "but for rounding, label by label"
    held = -(-labels // clients)  # the most labels that a client has of its own
    own = [np.sort(np.bincount(kinds[each], minlength=labels))[-held:].sum() / len(each) for each in shards]
    spare = clients % labels if labels < clients else 0  # clients without labels of their own
    assert share - 0.2 < np.mean(sorted(own)[spare:]) < share + 0.05, "equal sizes cost some of it"
