"""A site's worker: the bytes of a federation in one process, its file, its store, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anyrank import devices
from anyrank.adapter.adapter import Adapter
from anyrank.federation import asking
from anyrank.messages import calls, wire
from anyrank.messages.records import ServerState
from anyrank.methods.registry import REGISTRY
from anyrank.simulation import building

pytest.importorskip("transformers")
from site_world import RANKS, Asked, in_one_process, make_world, request, setup, site_file, table

METHODS = sorted(
    name for name, kind in REGISTRY.items() if kind.__module__.startswith("anyrank.methods.") and not kind.pools_data
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYRANK_CACHE", str(cache))
        patch.setattr(devices, "cores", lambda: 1)
        yield make_world(tmp_path_factory.mktemp("sites"))


def same(one: Adapter, other: Adapter, parts: str = "ABt") -> bool:
    layers = one.layers.keys() == other.layers.keys() and all(
        torch.equal(getattr(one.layers[name], factor), getattr(other.layers[name], factor))
        for name in one.layers
        for factor in "AB"
        if factor in parts
    )
    return layers and ("t" not in parts or all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors))


def in_process(config, rounds: int) -> list[ServerState]:
    """The states of a federation in one process, from the start on."""
    federation = building.build(config)
    lora = config.lora
    from anyrank.messages.records import Scaling

    start = federation.engine.start(max(config.clients.ranks), Scaling(lora.alpha, lora.scaling), config.run.seed)
    states = [federation.method.init(start, Scaling(lora.alpha, lora.scaling), config.run.seed)]
    for round in range(1, rounds + 1):
        jobs, _ = asking.dispatch(federation, states[-1], round)
        updates = list(federation.engine.train(jobs, federation.plan(round)))
        states.append(federation.method.aggregate(states[-1], updates))
    federation.close()
    return states


@pytest.mark.parametrize("method", METHODS)
def test_site_workers_give_the_bytes_of_one_process(world: Path, tmp_path: Path, method: str) -> None:
    public = table(method, rank=0 if REGISTRY[method].traits.mixed_ranks else 4)
    config = in_one_process(world, public)
    expected = in_process(config, 3)
    federation = building.build(config)
    sites = {name: Asked(site_file(world, name, f"{method}-{name}")) for name in RANKS}
    for site in sites.values():
        assert site.ask(setup(public))[0].header.kind == calls.READY
    (start,) = sites["county"].ask(calls.start_frame(max(config.clients.ranks), expected[0].scaling, 7, "winter"))
    state = federation.method.init(calls.adapter_of(start)[0], expected[0].scaling, 7)
    assert same(state.adapter, expected[0].adapter)
    for round in range(1, 4):
        jobs, _ = asking.dispatch(federation, state, round)
        updates = []
        for job in jobs:
            (reply,) = sites[job.client.name].ask(*request(job, federation.plan(round)))
            updates.append(wire.reply_of(reply, job.download))
            assert reply.header.kind == wire.UPDATE
        state = federation.method.aggregate(state, updates)
    assert same(state.adapter, expected[-1].adapter)
    if state.merged or expected[-1].merged:
        assert same(state.merged, expected[-1].merged)
    private = federation.method.private
    for name, site in sites.items():
        kept = site.desk.store.own(site.desk.held.key, 4) if private else None
        if private:  # each site has what the server of a simulation keeps for it
            assert same(kept, expected[-1].extra[name], "".join(part[0] for part in sorted(private)))
        site.close()
    federation.close()
