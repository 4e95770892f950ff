"""HetLoRA's rank self-pruning: what the client does, what the server remembers, and that both survive a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config
from anyrank.errors import MethodError
from anyrank.federation import guard
from anyrank.messages.plan import plan_round
from anyrank.messages.records import Client, ClientUpdate, Download, Pruning, Scaling, ServerState
from anyrank.methods import Method, make
from anyrank.runs.checkpoint import load_state, save_state
from anyrank.tasks.base import Examples, Task, TensorInputs
from anyrank.training import local
from anyrank.training.lora import LoraModel


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> LoraModel:
    """One linear layer `[3, 6]`, sixteen examples."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.fc(inputs)

    examples = Examples(TensorInputs(draw(16, 6)), torch.arange(16) % 3)
    return LoraModel(Task(module=Net(), targets=("fc",), train=examples, test=examples))


def download(pruning: Pruning | None, rank: int = 3) -> Download:
    layer = LoraLayer(draw(rank, 6, seed=1), draw(3, rank, seed=2), 0.5)
    return Download(Adapter({"fc": layer}), {"fc": tuple(range(rank))}, pruning=pruning)


def trained(model: LoraModel, pruning: Pruning | None, rank: int = 3, **train) -> ClientUpdate:
    config = replace(Config().train, optimizer="sgd", **{"learning_rate": 0.01, "local_steps": 5, "batch_size": 16} | train)
    return local.train(model, "ada", download(pruning, rank), np.arange(16), plan_round(config, 1, 1, 0))


def test_a_tail_that_shrank_is_dropped_and_nothing_else_changes(model: LoraModel) -> None:
    """gamma 2/3 of rank 3 keeps 2; under a strong penalty the third slice shrinks."""
    pressed = Pruning(gamma=0.67, penalty=1.0, min_rank=1)
    update = trained(model, pressed)
    assert update.adapter.ranks == {"fc": 2}
    assert update.adapter.layers["fc"].scaling == 0.5  # of what it trained with; the next download has that of its new rank
    assert guard.admit(update, download(pressed), "ada", 16).adapter.ranks == {"fc": 2}


def test_a_tail_that_grew_stays(model: LoraModel) -> None:
    """A negative penalty, which no method has, makes the tail grow for certain."""
    assert trained(model, Pruning(gamma=0.67, penalty=-1.0, min_rank=1)).adapter.ranks == {"fc": 3}


@pytest.mark.parametrize(("gamma", "min_rank"), [(0.67, 3), (1.0, 1)])
def test_where_there_is_no_tail_training_is_as_ever(model: LoraModel, gamma: float, min_rank: int) -> None:
    update, plain = trained(model, Pruning(gamma, 1.0, min_rank)), trained(model, None)
    assert torch.equal(update.adapter.layers["fc"].A, plain.adapter.layers["fc"].A)
    assert torch.equal(update.adapter.layers["fc"].B, plain.adapter.layers["fc"].B)


def test_one_step_follows_the_penalty(model: LoraModel) -> None:
    """With b = B[:, 2], a = A[2], the gradient of penalty * |b| |a| is penalty * |a| b / |b| for b, and |b| a / |a| for a."""
    with_penalty = trained(model, Pruning(0.67, 0.25, 1), local_steps=1).adapter
    plain, start = trained(model, None, local_steps=1).adapter.layers["fc"], download(None).adapter.layers["fc"]
    a, b = start.A[2], start.B[:, 2]
    assert with_penalty.ranks == {"fc": 3} or with_penalty.ranks == {"fc": 2}
    grown = trained(model, Pruning(0.67, -0.25, 1), local_steps=1).adapter.layers["fc"]  # of the other sign: it is not dropped
    torch.testing.assert_close(grown.B[:, 2] - plain.B[:, 2], 0.01 * 0.25 * a.norm() * b / b.norm())
    torch.testing.assert_close(grown.A[2] - plain.A[2], 0.01 * 0.25 * b.norm() * a / a.norm())
    torch.testing.assert_close(grown.A[:2], plain.A[:2])


def test_before_anything_is_learned_nothing_is_pruned(model: LoraModel) -> None:
    """In the first round B is zero: the tail cannot shrink, and its gradient is no NaN."""
    empty = replace(download(Pruning(0.67, 1.0, 1)), adapter=Adapter({"fc": LoraLayer(draw(3, 6), torch.zeros(3, 3), 0.5)}))
    config = replace(Config().train, optimizer="sgd", learning_rate=0.01, local_steps=3)
    update = local.train(model, "ada", empty, np.arange(16), plan_round(config, 1, 1, 0))
    assert update.adapter.ranks == {"fc": 3}
    assert torch.isfinite(update.adapter.layers["fc"].A).all()


# --- the server's side ---------------------------------------------------------------------------------------------------

ADA, BOB = Client("ada", 4), Client("bob", 4)


def start(method: Method) -> ServerState:
    layers = {name: LoraLayer(draw(4, 6, seed=3), draw(5, 4, seed=4), 1.0) for name in ("a", "b")}
    return method.init(Adapter(layers), Scaling(4.0), 0)


def pruned(state: ServerState, method: Method) -> ServerState:
    """Ada comes back with rank 3 in layer b, Bob as he was."""
    ada, bob = (method.dispatch(state, client).adapter for client in (ADA, BOB))
    layer = ada.layers["b"]
    ada = replace(ada, layers={**ada.layers, "b": layer.with_factors(layer.A[:3], layer.B[:, :3])})
    return method.aggregate(state, [ClientUpdate(ada, 1, "ada"), ClientUpdate(bob, 1, "bob")])


def test_a_pruned_client_gets_its_new_rank_from_then_on(tmp_path: Path) -> None:
    method = make("hetlora")
    state = pruned(start(method), method)
    save_state(state, tmp_path / "state")
    for held in (state, load_state(tmp_path / "state")):
        ada = method.dispatch(held, ADA)
        assert ada.adapter.ranks == {"a": 4, "b": 3}
        assert ada.adapter.layers["b"].scaling == pytest.approx(4 / 3)
        server = held.adapter.layers["b"]
        kept = server.scaling * server.B[:, :3] @ server.A[:3]
        torch.testing.assert_close(ada.adapter.layers["b"].delta(), kept)
        assert method.dispatch(held, BOB).adapter.ranks == {"a": 4, "b": 4}
        assert method.dispatch(held, Client("new", 4)).adapter.ranks == {"a": 4, "b": 4}
    assert ada.pruning == Pruning(gamma=0.99, penalty=0.001, min_rank=1)


def test_a_pruned_rank_stays_through_rounds_without_its_client() -> None:
    method = make("hetlora")
    state = pruned(start(method), method)
    for uploads in ([], [ClientUpdate(method.dispatch(state, BOB).adapter, 1, "bob")]):
        state = method.aggregate(state, uploads)
        assert method.dispatch(state, ADA).adapter.ranks == {"a": 4, "b": 3}


def test_pruning_can_be_left_out() -> None:
    method = make("hetlora", {"prune": False})
    state = start(method)
    assert method.dispatch(state, ADA).pruning is None
    uploads = [ClientUpdate(method.dispatch(state, client).adapter, 1, client.name) for client in (ADA, BOB)]
    assert method.aggregate(state, uploads).extra == {}


@pytest.mark.parametrize("wrong", [{"gamma": 0.0}, {"gamma": 1.5}, {"penalty": -1.0}, {"min_rank": 0}])
def test_options_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(MethodError, match="hetlora: expected gamma above 0 and at most 1, penalty of at least 0"):
        make("hetlora", wrong)
