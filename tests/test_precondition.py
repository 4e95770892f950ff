"""The preconditioned step: the change of the weight is the gradient of the weight, projected onto the frozen factor's rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from anyrank import simulation
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config
from anyrank.errors import ConfigError, ModelError
from anyrank.messages.plan import Plan, plan_round
from anyrank.messages.records import BOTH, Download, Scaling
from anyrank.methods import REGISTRY
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import PrivacyPlan
from anyrank.studies import audit
from anyrank.training import local, precondition, private_examples
from anyrank.training.lora import LoraModel
from test_models import Net, features
from test_private_training import task_of

OUT, WIDTH, COUNT, RATE = 5, 6, 12, 0.5
SCALING = Scaling(1.0, "constant")
ONLY_A, ONLY_B = frozenset("A"), frozenset("B")


def plan_of(**train) -> Plan:
    keys = {"optimizer": "sgd", "learning_rate": RATE, "batch_size": COUNT, "local_steps": 1, "precondition": True} | train
    return plan_round(Config().replace(train=keys).train, 1, 1, 0)


def random_layer(seed: int, rank: int, scaling: float) -> LoraLayer:
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, WIDTH, generator=draw), torch.randn(OUT, rank, generator=draw)
    return LoraLayer(A, B, scaling)


def model_of() -> LoraModel:
    torch.manual_seed(0)
    return LoraModel(task_of(Net(nn.Linear(WIDTH, OUT), OUT), features(COUNT, WIDTH)))


def download_of(layer: LoraLayer, model: LoraModel, train: frozenset[str]) -> Download:
    start = model.start(layer.rank, SCALING, 0)
    return Download(replace(start, layers={"target": layer}), {"target": tuple(range(layer.rank))}, train)


def weight_gradient(model: LoraModel, layer: LoraLayer) -> Tensor:
    """The gradient `[out, in]` of the mean loss by the weight itself, at the weight with the layer merged; no LoRA in it."""
    module, task = model.module, model.task
    model.apply(replace(model.start(1, SCALING, 0), layers={"target": layer.with_factors(0 * layer.A, 0 * layer.B)}))
    whole = (module.target.weight + layer.scaling * layer.B @ layer.A).detach().double().requires_grad_()
    inputs = task.train.inputs.values.double()
    hidden = torch.tanh(inputs @ whole.T + module.target.bias.double())
    logits = hidden @ module.head.weight.double().T + module.head.bias.double()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, task.train.labels), whole)
    return gradient


def product(layer: LoraLayer) -> Tensor:
    return layer.scaling * layer.B.double() @ layer.A.double()


def projector(rows: Tensor) -> Tensor:
    """The orthogonal projection `[n, n]` onto the rows of `rows` `[r, n]`, by an SVD."""
    _, _, Vt = torch.linalg.svd(rows.double(), full_matrices=False)
    return Vt.T @ Vt


def step(layer: LoraLayer, train: frozenset[str], **keys) -> LoraLayer:
    model = model_of()
    trained = local.train(model, "ada", download_of(layer, model, train), np.arange(COUNT), plan_of(**keys))
    model.close()
    return trained.adapter.layers["target"]


# --- against the dense definition -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 4), scaling=st.floats(0.1, 8.0))
def test_a_step_of_b_moves_the_weight_by_its_gradient_projected_onto_the_rows_of_a(
    seed: int, rank: int, scaling: float
) -> None:
    layer = random_layer(seed, rank, scaling)
    model = model_of()
    expected = -RATE * weight_gradient(model, layer) @ projector(layer.A)
    model.close()
    after = step(layer, ONLY_B)
    assert torch.equal(after.A, layer.A)
    found = product(after) - product(layer)
    assert float((found - expected).norm()) <= 2e-3 * float(expected.norm()) + 1e-6 * float(product(layer).norm())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 4), scaling=st.floats(0.1, 8.0))
def test_a_step_of_a_moves_it_by_the_gradient_projected_onto_the_columns_of_b(seed: int, rank: int, scaling: float) -> None:
    layer = random_layer(seed, rank, scaling)
    model = model_of()
    expected = -RATE * projector(layer.B.T) @ weight_gradient(model, layer)
    model.close()
    after = step(layer, ONLY_A)
    assert torch.equal(after.B, layer.B)
    found = product(after) - product(layer)
    assert float((found - expected).norm()) <= 2e-3 * float(expected.norm()) + 1e-6 * float(product(layer).norm())


def test_by_hand() -> None:
    """A = diag(2, 1), s = 3: the Gram matrix is diag(36, 9), so columns of the gradient are divided by 36 and by 9."""
    inverse = precondition.inverse(torch.diag(torch.tensor([2.0, 1.0])), torch.zeros(1, 2), 3.0, ONLY_B)
    torch.testing.assert_close(inverse(torch.tensor([[36.0, 9.0]])), torch.tensor([[1.0, 1.0]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("change", ["other rows of the same space", "another scaling"])
def test_the_step_depends_on_the_row_space_of_a_alone(change: str) -> None:
    layer, mix = random_layer(3, 3, 2.0), torch.tensor([[2.0, 0.3, 0.0], [0.0, 0.5, 0.1], [0.2, 0.0, 1.5]])
    other = {
        "other rows of the same space": LoraLayer(mix @ layer.A, layer.B @ torch.linalg.inv(mix), 2.0),
        "another scaling": LoraLayer(layer.A, layer.B / 4, 8.0),
    }[change]
    torch.testing.assert_close(product(step(layer, ONLY_B)), product(step(other, ONLY_B)), rtol=1e-3, atol=1e-4)
    plain, mixed = (product(step(each, ONLY_B, precondition=False)) - product(each) for each in (layer, other))
    assert float((plain - mixed).norm()) > 0.1 * float(plain.norm()), "without the preconditioner it depends on more"


def test_the_same_factor_without_the_key_is_the_plain_step() -> None:
    layer = random_layer(4, 2, 2.0)
    plain, other = step(layer, ONLY_B, precondition=False), step(layer, ONLY_B)
    inverse = precondition.inverse(layer.A, layer.B, layer.scaling, ONLY_B)
    torch.testing.assert_close(inverse(plain.B - layer.B), other.B - layer.B, rtol=1e-3, atol=1e-6)


# --- where the frozen factor has no inverse ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["zero", "two alike", "a zero row"])
def test_dependent_rows_leave_a_finite_step_within_the_space_that_there_is(rows: str) -> None:
    layer = random_layer(5, 2, 2.0)
    A = {
        "zero": 0 * layer.A,
        "two alike": layer.A[:1].expand(2, -1).clone(),
        "a zero row": layer.A * torch.tensor([[1.0], [0.0]]),
    }
    layer = layer.with_factors(A[rows], 0 * layer.B)
    after = step(layer, ONLY_B)
    assert torch.isfinite(after.B).all()
    model = model_of()
    expected = (
        -RATE
        * weight_gradient(model, layer)
        @ (projector(layer.A[:1]) if rows != "zero" else torch.zeros(WIDTH, WIDTH).double())
    )
    model.close()
    torch.testing.assert_close(product(after), expected, rtol=1e-2, atol=1e-5)


def test_both_factors_at_once_are_refused_before_training() -> None:
    asked = Config().replace(model={"name": "digits-mlp"}, train={"precondition": True})
    for name, kind in REGISTRY.items():
        config = asked.replace(method={"name": name, "options": {}}, clients={"ranks": (4,)})
        if len(kind.train) == 1:
            simulation.build(config).close()
        else:
            with pytest.raises(ConfigError, match=r"train\.precondition: [a-z_-]+ trains A and B together.*ffa_lora"):
                simulation.build(config)


def test_a_download_that_trains_both_is_the_clients_failure() -> None:
    """A method of one's own that claims to train B, and sends downloads that train both."""
    model, layer = model_of(), random_layer(0, 2, 1.0)
    with pytest.raises(ModelError, match=r"train\.precondition: expected a download that trains A or B"):
        local.train(model, "ada", download_of(layer, model, BOTH), np.arange(COUNT), plan_of())


def test_an_audit_refuses_it() -> None:
    private = {"level": "example", "noise_multiplier": 1.0, "delta": 1e-4}
    config = Config().replace(privacy=private, train={"optimizer": "sgd", "precondition": True}, method={"name": "ffa_lora"})
    with pytest.raises(ConfigError, match="precondition"):
        audit.audit(config, 10)


# --- under differential privacy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [ONLY_A, ONLY_B], ids=["A", "B"])
def test_it_is_post_processing_of_what_is_released(train: frozenset[str]) -> None:
    """From one key, a step with it is the step without it, noise included, times the inverse Gram matrix of a public factor."""
    model, layer = model_of(), random_layer(6, 3, 2.0)
    private_examples.check(model, (train,))
    privacy = PrivacyPlan("example", 0.0, 1e-5, 0.01, "pld", False, "exact", 4, 1, 1, 1, 1.0, {COUNT: 2.0})
    download = download_of(layer, model, train)

    def moved(**keys) -> Tensor:
        plan, mechanism = plan_of(**keys), Mechanism(privacy, bytes(32))
        trained = private_examples.train(model, "ada", download, COUNT, np.arange(COUNT), plan, mechanism)
        (kind,) = train
        return getattr(trained.adapter.layers["target"], kind) - getattr(layer, kind)

    inverse = precondition.inverse(layer.A, layer.B, layer.scaling, train)
    torch.testing.assert_close(moved(), inverse(moved(precondition=False)), rtol=1e-3, atol=1e-6)
