"""The laws that every engine keeps, by which the round loop stands."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from anyrank import simulation
from anyrank.config.sections import Config, PartitionConfig
from anyrank.federation import asking, loop
from anyrank.federation.federation import Federation
from anyrank.messages.records import ClientUpdate, Code, Failure, Job
from anyrank.tasks.base import Examples, Task
from anyrank.training import memory

ENGINES = {"process": simulation.in_process}
IID = PartitionConfig(kind="iid")
POISON = 37  # the example that cannot be read


class Rows:
    """Rows of which one raises when it is read, as a damaged picture does."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, error: type[BaseException] | None) -> None:
        self.x, self.y, self.error = x, y, error

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        if i == POISON and self.error:
            raise self.error("cannot be read")
        return self.x[i], int(self.y[i])


def task(error: type[BaseException] | None = None) -> Task:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=draw), torch.arange(60) % 3
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    train = Examples(Rows(x, y, None))
    object.__setattr__(train.inputs.items, "error", error)
    return Task(module=module, targets=("0",), train=train, test=Examples(x, y), trained=("2.bias",))


def built(engine: str, error: type[BaseException] | None = None, **sections) -> Federation:
    config = Config().replace(
        clients={"count": 4, "participation": 1.0, "ranks": (1, 3)},
        train={"local_epochs": 1, "local_steps": 0, "batch_size": 4},
        data={"partition": IID},
        **sections,
    )
    return simulation.build(config, task=task(error), engine=ENGINES[engine])


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


def replies(federation: Federation) -> list[ClientUpdate | Failure]:
    jobs, _ = asking.dispatch(federation, loop.start(federation), 1)
    return list(federation.engine.train(jobs, federation.plan(1)))


@pytest.mark.parametrize("stacking", ["never", "always"])
def test_one_reply_a_job_and_it_names_its_client(engine: str, stacking: str) -> None:
    federation = built(engine, run={"stacking": stacking})
    assert sorted(reply.client for reply in replies(federation)) == [f"client-{i}" for i in range(4)]
    federation.close()


@pytest.mark.parametrize("stacking", ["never", "always"])
@pytest.mark.parametrize("error", [ValueError, RuntimeError, MemoryError, OSError, KeyError, RecursionError])
def test_whatever_a_client_raises_costs_that_client(engine: str, stacking: str, error: type[BaseException]) -> None:
    federation, honest = built(engine, error, run={"stacking": stacking}), built(engine, run={"stacking": "never"})
    owner = next(i for i in range(4) if POISON in federation.engine.shards[f"client-{i}"])
    found, expected = ({reply.client: reply for reply in replies(each)} for each in (federation, honest))
    bad = found.pop(f"client-{owner}")
    assert isinstance(bad, Failure)
    assert bad.code is (Code.OUT_OF_MEMORY if error is MemoryError else Code.CRASHED)
    assert "\n" not in str(bad)
    assert len(found) == 3
    for name, reply in found.items():
        assert isinstance(reply, ClientUpdate)
        for layer, other in zip(reply.adapter.layers.values(), expected[name].adapter.layers.values(), strict=True):
            torch.testing.assert_close(layer.B, other.B, rtol=1e-4, atol=1e-6)
    assert federation.engine.model.can_stack()
    federation.close()
    honest.close()


def test_who_stops_the_process_is_not_taken_for_a_client_that_failed(engine: str) -> None:
    federation = built(engine, KeyboardInterrupt, run={"stacking": "never"})
    with pytest.raises(KeyboardInterrupt):
        replies(federation)
    federation.close()


def test_the_same_jobs_give_the_same_replies_bit_for_bit_in_any_company(engine: str) -> None:
    federation = built(engine, run={"stacking": "never"})
    state = loop.start(federation)
    jobs, _ = asking.dispatch(federation, state, 1)
    together = {reply.client: reply for reply in federation.engine.train(jobs, federation.plan(1))}
    for job in jobs:
        (alone,) = federation.engine.train([job], federation.plan(1))
        for name, layer in alone.adapter.layers.items():
            assert torch.equal(layer.A, together[job.client.name].adapter.layers[name].A)
            assert torch.equal(layer.B, together[job.client.name].adapter.layers[name].B)
        assert torch.equal(alone.adapter.tensors["2.bias"], together[job.client.name].adapter.tensors["2.bias"])
    federation.close()


def test_a_download_is_asked_for_when_it_is_sent(engine: str) -> None:
    federation = built(engine, run={"stacking": "never"})
    state, made = loop.start(federation), []

    def make(client):
        made.append(client.name)
        return federation.method.dispatch(state, client)

    clients = [federation.population.client(i) for i in range(4)]
    jobs = [Job(client, 15, partial(make, client)) for client in clients]
    stream: Iterator = iter(federation.engine.train(jobs, federation.plan(1)))
    assert made == []
    for number, reply in enumerate(stream, 1):
        assert made == [client.name for client in clients[:number]]
        assert reply.client == made[-1]
    federation.close()


def test_a_closed_engine_leaves_the_module_as_it_was(engine: str) -> None:
    own = task()
    own.module.train()
    before = {name: value.clone() for name, value in own.module.state_dict().items()}
    config = Config().replace(
        clients={"count": 3, "participation": 1.0, "ranks": (2,)},
        data={"partition": IID},
    )
    federation = simulation.build(config, task=own, engine=ENGINES[engine])
    state = loop.start(federation)
    replies(federation)
    federation.engine.evaluate(state.adapter, None)
    federation.close()
    federation.close()
    assert own.module.training
    assert all(torch.equal(value, before[name]) for name, value in own.module.state_dict().items())
    assert all(parameter.requires_grad for parameter in own.module.parameters())
    assert not any("forward" in vars(part) for part in own.module.modules())


def test_a_profile_times_each_client_and_counts_what_a_step_keeps(engine: str) -> None:
    federation = built(engine, run={"stacking": "never"})
    jobs, _ = asking.dispatch(federation, loop.start(federation), 1)
    profile = federation.engine.profile(jobs, federation.plan(1))
    assert profile.step_s.keys() == {job.client.name for job in jobs}
    assert all(seconds > 0 for seconds in profile.step_s.values())
    # At least the input of the adapted layer of one batch of four, float32: 4 * 5 numbers.
    assert profile.activations >= 4 * 5 * 4
    assert isinstance(memory.Kept(nn.Linear(1, 1)).peak, int)
    federation.close()


def test_a_stack_that_breaks_gives_what_each_client_gives_alone(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where training side by side fails in the middle, those who have not replied train one by one."""
    from anyrank.training import stacked

    federation = built(engine, run={"stacking": "always"})
    whole = stacked.train

    def broken(*arguments):
        yield next(iter(whole(*arguments)))
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(stacked, "train", broken)
    found = replies(federation)
    assert sorted(reply.client for reply in found) == [f"client-{i}" for i in range(4)]
    assert all(isinstance(reply, ClientUpdate) for reply in found)
    assert all(np.isfinite(reply.metrics["loss"]) for reply in found)
    federation.close()
