"""Clients trained side by side end where they end when trained one by one, but for float rounding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anyrank import simulation
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config
from anyrank.errors import ConfigError
from anyrank.federation import asking, loop
from anyrank.federation.federation import Federation
from anyrank.messages.plan import plan_round
from anyrank.messages.records import Client, ClientUpdate, Download, Failure, Job, Scaling
from anyrank.tasks.base import Examples, Task, TensorInputs
from anyrank.training import local, stacked
from anyrank.training.lora import LoraModel

MLP = Config().replace(model={"name": "digits-mlp"}, clients={"count": 8, "participation": 1.0, "ranks": (1, 2, 5, 16)})


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def replies(config: Config, stacking: str, round: int = 2) -> dict[str, ClientUpdate | Failure]:
    """What the clients of a round send, from a state that one real round has reached (so that B is not zero).

    With GELU for ReLU: the slope of ReLU jumps at zero. An activation that is zero but for rounding (2e-7 the one way, -8e-8
    the other, where others are 1) then counts in one gradient and not in the other, and no bound on rounding says how far
    the two ways end apart.
    """
    built = simulation.build(config)
    with mock.patch.object(torch.nn.functional, "relu", torch.nn.functional.gelu):
        return _replies(built, config, stacking, round)


def _replies(built: Federation, config: Config, stacking: str, round: int) -> dict[str, ClientUpdate | Failure]:
    state = loop.start(built)
    for number in (1, round):
        jobs, _ = asking.dispatch(built, state, number)
        plan = plan_round(config.train, number, 5, 0)
        engine = replace(built.engine, stacking=stacking if number == round else "never")
        got = list(engine.train(jobs, plan))
        if number == 1:
            state = built.method.aggregate(state, got)
    built.close()
    return {reply.client: reply for reply in got}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"train": {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9}},
        {"train": {"weight_decay": 0.1}},
        {"train": {"proximal_mu": 0.5, "optimizer": "sgd", "learning_rate": 0.05}},
        {"train": {"local_steps": 0, "local_epochs": 2, "batch_size": 32}, "data": {}},
        {"method": {"name": "ffa_lora"}},
        {
            "method": {"name": "ffa_lora"},
            "train": {"precondition": True, "optimizer": "sgd", "learning_rate": 0.05, "proximal_mu": 0.5},
        },
        {
            "method": {"name": "rolora"},
            "train": {"precondition": True, "optimizer": "sgd", "learning_rate": 0.05, "proximal_mu": 0.5},
        },
        {"lora": {"scaling": "standard", "alpha": 16.0}},
        {"model": {"name": "digits-transformer"}},
        {"method": {"name": "flora"}},
        {"method": {"name": "fedex"}, "clients": {"count": 8, "participation": 1.0, "ranks": (4,)}},
        {"method": {"name": "stayput", "options": {"true_point": True, "rotate": True}}, "train": {"weight_decay": 0.1}},
        {"model": {"name": "digits-mlp", "head": "trained"}, "train": {"proximal_mu": 0.5}},
        {
            "model": {"name": "digits-mlp", "head": "trained"},
            "method": {"name": "fedsa"},
            "train": {"local_steps": 0, "local_epochs": 2},
        },
    ],
    ids=[
        *(
            "adamw",
            "momentum",
            "weight decay",
            "fedprox",
            "unequal epochs",
            "only B",
            "preconditioned B",
            "preconditioned A",
            "alpha over r",
            "transformer",
        ),
        *("one sum in the base", "a sum of rank 64", "sums of their own", "trained head", "heads of their own"),
    ],
)
def test_side_by_side_equals_one_by_one(change: dict) -> None:
    config = MLP.replace(**change)
    one_by_one, side_by_side = replies(config, "never"), replies(config, "always")
    assert one_by_one.keys() == side_by_side.keys()
    assert len(one_by_one) == 8
    for client, update in one_by_one.items():
        other = side_by_side[client]
        assert other.num_examples == update.num_examples
        assert other.metrics["steps"] == update.metrics["steps"]
        assert other.metrics["loss"] == pytest.approx(update.metrics["loss"], rel=1e-5)
        for name, layer in update.adapter.layers.items():
            stack = other.adapter.layers[name]
            assert stack.scaling == layer.scaling
            torch.testing.assert_close(stack.A, layer.A, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(stack.B, layer.B, rtol=1e-3, atol=1e-5)
        assert other.adapter.tensors.keys() == update.adapter.tensors.keys()
        for name, tensor in update.adapter.tensors.items():
            torch.testing.assert_close(other.adapter.tensors[name], tensor, rtol=1e-3, atol=1e-5)


def test_epochs_of_unequal_clients_are_unequal() -> None:
    """What the case above is about: clients that leave the stack at different steps."""
    config = MLP.replace(train={"local_steps": 0, "local_epochs": 2, "batch_size": 32})
    steps = {reply.metrics["steps"] for reply in replies(config, "always").values()}
    assert len(steps) > 2


def test_a_stack_is_cut_where_memory_would_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replies(MLP, "always")
    monkeypatch.setattr(stacked, "MOST_EXAMPLES", 3 * MLP.train.batch_size)  # three clients at a time
    cut = replies(MLP, "always")
    for client, update in whole.items():
        for name, layer in update.adapter.layers.items():
            torch.testing.assert_close(cut[client].adapter.layers[name].B, layer.B, rtol=1e-3, atol=1e-5)


def test_a_client_that_diverges_leaves_the_others_alone() -> None:
    """One client starts from factors so large that its loss overflows; the others end as they would without it."""
    built = simulation.build(MLP)
    jobs, _ = asking.dispatch(built, loop.start(built), 1)
    layer = jobs[3].download.adapter.layers["fc1"]
    huge = layer.with_factors(layer.A * 1e30, layer.B + 1e30)
    download = replace(
        jobs[3].download, adapter=replace(jobs[3].download.adapter, layers={**jobs[3].download.adapter.layers, "fc1": huge})
    )
    broken = [*jobs[:3], Job(jobs[3].client, jobs[3].num_examples, lambda: download), *jobs[4:]]
    plan = plan_round(MLP.train, 1, 5, 0)
    engine = replace(built.engine, stacking="always")
    good = {reply.client: reply for reply in engine.train(jobs, plan)}
    bad = {reply.client: reply for reply in engine.train(broken, plan)}
    built.close()
    name = jobs[3].client.name
    assert isinstance(bad[name], Failure)
    assert "lower train.learning_rate" in bad[name].reason
    for client in good.keys() - {name}:
        for layer_name, layer in good[client].adapter.layers.items():
            torch.testing.assert_close(bad[client].adapter.layers[layer_name].B, layer.B, rtol=1e-3, atol=1e-6)


class Net(nn.Module):
    """A strided convolution and a linear map under a head; nothing in it is square."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1))
        self.fc, self.norm, self.head = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.fc(torch.tanh(self.conv(inputs)).mean(dim=(2, 3))))))


def images(trained: tuple[str, ...] = (), targets: tuple[str, ...] = ("conv", "fc")) -> LoraModel:
    torch.manual_seed(0)
    examples = Examples(TensorInputs(torch.randn(60, 2, 6, 7)), torch.randint(3, (60,)))
    return LoraModel(Task(module=Net(), targets=targets, train=examples, test=examples, trained=trained))


def jobs_on(model: LoraModel) -> list[Job]:
    """Three clients of ranks 1, 3, 4 with sums of their own in the base: the first with none, the others in one layer."""
    start, draw = model.start(4, Scaling(8.0), 0), torch.Generator().manual_seed(1)

    def some(layer: LoraLayer, rank: int) -> LoraLayer:
        A, B = (torch.randn(shape, generator=draw) / 4 for shape in ((rank, layer.shape[1]), (layer.shape[0], rank)))
        return replace(layer, A=A, B=B, scaling=8 / rank)

    found = []
    for index, (rank, where) in enumerate([(1, ""), (3, "fc"), (4, "conv")]):
        adapter = replace(start, layers={name: some(layer, rank) for name, layer in start.layers.items()})
        merged = Adapter({where: some(start.layers[where], 2)}) if where else None
        slices = {name: tuple(range(rank)) for name in start.layers}
        found.append(Job(Client(f"client-{index}", rank), 20, partial(Download, adapter, slices, merged=merged)))
    return found


def test_convolutions_and_sums_for_some_layers_side_by_side() -> None:
    model = images(trained=("head.weight",))
    jobs, plan = jobs_on(model), plan_round(replace(MLP.train, local_steps=4), 1, 5, 0)
    shards = [np.arange(20 * place, 20 * place + 20 - place) for place in range(len(jobs))]
    assert stacked.possible(model, jobs)
    side_by_side = {reply.client: reply for reply in stacked.train(model, jobs, shards, plan)}
    for job, own in zip(jobs, shards, strict=True):
        expected, found = local.train(model, job.client.name, job.download, own, plan), side_by_side[job.client.name]
        assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)
        for name, layer in expected.adapter.layers.items():
            assert found.adapter.layers[name].kind == layer.kind
            torch.testing.assert_close(found.adapter.layers[name].delta(), layer.delta(), rtol=1e-3, atol=1e-5)
            assert (layer.delta() - job.download.adapter.layers[name].delta()).abs().max() > 1e-3, "it has trained"
        torch.testing.assert_close(found.adapter.tensors["head.weight"], expected.adapter.tensors["head.weight"])


def test_the_cohorts_heads_are_gone_when_the_model_is_scored() -> None:
    model = images(trained=("head.weight",))
    start = model.start(2, Scaling(8.0), 0)
    model.apply(start)
    before = model.module(model.task.test.inputs.values)
    list(stacked.train(model, jobs_on(model), [np.arange(20)] * 3, plan_round(MLP.train, 1, 5, 0)))
    model.apply(start)
    assert torch.equal(model.module(model.task.test.inputs.values), before)


@pytest.mark.parametrize("trained", ["norm.weight", "fc.bias"])
def test_what_cannot_be_stacked_goes_one_by_one(trained: str) -> None:
    """A parameter of a layer that is not linear, or of one that has LoRA on it."""
    model = images(trained=(trained,))
    assert not stacked.possible(model, jobs_on(model))
    assert stacked.possible(images(), jobs_on(images()))


def test_the_choice_is_a_matter_of_size_and_can_be_forced(tmp_path: Path) -> None:
    built = simulation.build(MLP)
    assert stacked.worthwhile(built.engine.model)
    built.close()
    big = torch.nn.Linear(1000, 1000)
    assert not stacked.worthwhile(type("Model", (), {"module": big})())
    with pytest.raises(ConfigError, match=r"run.stacking: expected one of auto, always, never, got 'maybe'"):
        MLP.replace(run={"stacking": "maybe"})


def test_losses_are_means_over_each_clients_own_batch() -> None:
    """Clients of 3 and 40 examples, batches of 16: the small one's mean is over its 3, repeats weigh nothing."""
    built = simulation.build(MLP)
    jobs, _ = asking.dispatch(built, loop.start(built), 1)
    examples = [np.arange(3), np.arange(40)]
    pair = [replace(jobs[0], num_examples=3), replace(jobs[1], num_examples=40)]
    plan = plan_round(replace(MLP.train, local_steps=1), 1, 5, 0)
    told = {reply.client: reply.metrics["loss"] for reply in stacked.train(built.engine.model, pair, examples, plan)}
    task = built.engine.model.task
    built.engine.model.apply(jobs[0].download.adapter)  # B is zero at the start: every client sees the base model
    with torch.no_grad():
        index = torch.arange(3)
        expected = task.objective.losses(task.module(**task.train.inputs.batch(index)), task.train.labels[index]).mean()
    built.close()
    assert told[jobs[0].client.name] == pytest.approx(float(expected), rel=1e-6)
