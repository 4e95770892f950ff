"""Private training: every example's own gradient, clipped over all that is trained, summed, and noise of the promised size."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config
from anyrank.errors import ModelError
from anyrank.messages.plan import plan_round
from anyrank.messages.records import BOTH, Download, Scaling
from anyrank.methods import REGISTRY
from anyrank.privacy.noise import Mechanism, SystemDraws
from anyrank.privacy.plan import PrivacyPlan
from anyrank.tasks.base import Examples, Task, TensorInputs
from anyrank.training import private_examples
from anyrank.training.lora import LoraModel
from anyrank.training.private_examples import PerExample
from test_models import KINDS, ONLY_MERGED, Net, build, features, trained_adapter

EVERY_SET = (BOTH, frozenset("A"), frozenset("B"))
EVERY_KIND = sorted(KINDS.keys() - {"embedding by frequency"}) + sorted(ONLY_MERGED)


def task_of(module: nn.Module, inputs: Tensor, targets=("target",), trained=()) -> Task:
    examples = Examples(TensorInputs(inputs), torch.arange(len(inputs)) % 3)
    return Task(module=module, targets=targets, train=examples, test=examples, trained=trained)


def download_of(model: LoraModel, train: frozenset[str] = BOTH) -> Download:
    adapter = trained_adapter(model)
    return Download(adapter, {name: tuple(range(layer.rank)) for name, layer in adapter.layers.items()}, train)


def alone(model: LoraModel, parameters: list[nn.Parameter], example: int) -> list[Tensor]:
    """One example's gradient by the ordinary way: the example by itself, through the model as it is loaded."""
    task, index = model.task, torch.tensor([example])
    losses = task.objective.losses(model.module(**task.train.inputs.batch(index)), task.train.labels[index])
    return list(torch.autograd.grad(losses.sum(), parameters))


# --- gradients example by example -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [BOTH, frozenset("A"), frozenset("B")], ids=["A and B", "A", "B"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_each_example_has_the_gradient_that_it_has_alone(kind: str, train: frozenset[str]) -> None:
    module, inputs = build(kind)
    model = LoraModel(task_of(module, inputs, trained=("head.weight", "head.bias")))
    parameters = model.load(download_of(model, train))
    together = PerExample(model, parameters).gradients(torch.arange(len(inputs)))
    assert len(together) == len(train) + 2
    for example in range(len(inputs)):
        for found, expected in zip(together, alone(model, parameters, example), strict=True):
            torch.testing.assert_close(found[example], expected, rtol=1e-4, atol=1e-6)
            assert expected.any(), "a gradient of zero would prove nothing"


def test_what_is_merged_into_the_base_model_is_in_every_gradient() -> None:
    module, inputs = build("linear on sequences")
    model = LoraModel(task_of(module, inputs))
    merged = Adapter({"target": trained_adapter(model, 2).layers["target"]})
    parameters = model.load(replace(download_of(model), merged=merged))
    together = PerExample(model, parameters).gradients(torch.arange(4))
    for found, expected in zip(together, alone(model, parameters, 2), strict=True):
        torch.testing.assert_close(found[2], expected, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    module, inputs = build("linear")
    model = LoraModel(task_of(module, inputs, trained=("head.weight", "head.bias")))
    download = download_of(model)
    parameters = model.load(download)
    before = module(inputs)
    PerExample(model, parameters).clipped(torch.arange(4), 1.0)
    assert torch.equal(module(inputs), before)
    assert torch.equal(model.read(download).layers["target"].A, download.adapter.layers["target"].A)


def test_opacus_finds_the_same_gradients() -> None:
    from opacus import GradSampleModule

    module, inputs = build("linear on sequences")
    model = LoraModel(task_of(module, inputs))
    download = download_of(model)
    ours = PerExample(model, model.load(download)).gradients(torch.arange(4))
    model.close()
    layer = download.adapter.layers["target"]
    theirs = get_peft_model(module, LoraConfig(r=3, lora_alpha=3 * layer.scaling, target_modules=["target"]))
    factors = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(layer.A if "lora_A" in name else layer.B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's words on Opacus' hooks
        hooked = GradSampleModule(theirs, loss_reduction="sum")
        nn.functional.cross_entropy(hooked(inputs=inputs), model.task.train.labels, reduction="sum").backward()
    for own, factor in zip(ours, factors.values(), strict=True):
        torch.testing.assert_close(own, factor.grad_sample, rtol=1e-4, atol=1e-6)


# --- clipping ---------------------------------------------------------------------------------------------------------


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


@pytest.mark.parametrize("clip_norm", [1e-4, 0.3, 1e4])
def test_an_example_counts_by_at_most_the_clip_norm_over_all_tensors_together(clip_norm: float) -> None:
    module, inputs = build("conv2d")
    model = LoraModel(task_of(module, inputs, trained=("head.weight", "head.bias")))
    parameters = model.load(download_of(model))
    sums = PerExample(model, parameters)
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for example in range(len(inputs)):
        one = sums.clipped(torch.tensor([example]), clip_norm)
        gradient = alone(model, parameters, example)
        kept = min(1.0, clip_norm / norm(gradient))
        assert norm(one) == pytest.approx(kept * norm(gradient), rel=1e-4)
        assert norm(one) <= clip_norm * (1 + 1e-5)
        expected = [total + kept * own for total, own in zip(expected, gradient, strict=True)]
    for parts in (1, 2):
        for found, total in zip(sums.clipped(torch.arange(len(inputs)), clip_norm, parts), expected, strict=True):
            torch.testing.assert_close(found.float(), total, rtol=1e-4, atol=1e-7)


def test_an_example_without_a_finite_gradient_counts_as_zero() -> None:
    module, inputs = build("linear")
    spoilt = inputs.clone()
    spoilt[1] = torch.inf
    model = LoraModel(task_of(module, spoilt))
    sums = PerExample(model, model.load(download_of(model)))
    with_it, without = sums.clipped(torch.arange(4), 1.0), sums.clipped(torch.tensor([0, 2, 3]), 1.0)
    for found, expected in zip(with_it, without, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# --- steps ------------------------------------------------------------------------------------------------------------

COUNT, BATCH, STEPS = 64, 16, 4


def plan_of(noise: float, clip_norm: float = 0.5, steps: int = STEPS, batch_size: int = BATCH) -> PrivacyPlan:
    return PrivacyPlan(
        "example", 0.0, 1e-5, clip_norm, "pld", False, "exact", batch_size, steps, 1, 1, 1.0, {COUNT: noise}
    )  # fmt: skip


@dataclass
class Recorded:
    """Draws that remember what was asked of them, and give chosen numbers."""

    uniform: list[np.ndarray]
    asked: list[int] = field(default_factory=list)

    def random(self, size: int) -> np.ndarray:
        return self.uniform.pop(0)

    def standard_normal(self, size: int) -> np.ndarray:
        self.asked.append(size)
        return np.ones(size)


def trained_by(mechanism: Mechanism, model: LoraModel, download: Download, **train) -> Adapter:
    keys = {"optimizer": "sgd", "learning_rate": 1.0, "batch_size": BATCH, "local_steps": STEPS} | train
    plan = plan_round(Config().replace(train=keys).train, 1, 1, 0)
    return private_examples.train(model, "ada", download, COUNT, np.arange(COUNT), plan, mechanism).adapter


@pytest.fixture
def toy() -> tuple[LoraModel, Download]:
    torch.manual_seed(0)
    model = LoraModel(task_of(Net(nn.Linear(6, 5), 5), features(COUNT, 6)))
    private_examples.check(model, EVERY_SET)
    return model, download_of(model)


def test_a_step_divides_by_the_expected_batch_whatever_was_drawn(toy, monkeypatch) -> None:
    """Three examples drawn, sixteen expected: the sum is divided by sixteen, and noise of one clip norm is added to it."""
    model, download = toy
    uniform = np.ones(COUNT)
    uniform[[3, 17, 40]] = 0.0
    draws = Recorded([uniform])
    monkeypatch.setattr(Mechanism, "draws", lambda self, round, client: draws)
    sums = PerExample(model, model.load(download)).clipped(torch.tensor([3, 17, 40]), 0.5)
    after = trained_by(Mechanism(plan_of(2.0, steps=1)), model, download).layers["target"]
    before = download.adapter.layers["target"]
    assert draws.asked == [before.A.numel(), before.B.numel()]
    for start, end, total in ((before.A, after.A, sums[0]), (before.B, after.B, sums[1])):
        torch.testing.assert_close(end, (start - (total + 2.0 * 0.5) / BATCH).float())


def test_an_empty_draw_is_a_step_of_noise_alone(toy, monkeypatch) -> None:
    model, download = toy
    draws = Recorded([np.ones(COUNT)] * STEPS)
    monkeypatch.setattr(Mechanism, "draws", lambda self, round, client: draws)
    monkeypatch.setattr(private_examples, "_losses", None)  # the model is not run
    after = trained_by(Mechanism(plan_of(2.0)), model, download).layers["target"]
    before = download.adapter.layers["target"]
    torch.testing.assert_close(after.A, before.A - STEPS * 2.0 * 0.5 / BATCH)
    torch.testing.assert_close(after.B, before.B - STEPS * 2.0 * 0.5 / BATCH)


def test_what_is_added_is_noise_of_the_promised_size(toy) -> None:
    """Over keys, the update minus its noiseless twin has the standard deviation lr * sigma * C / batch, per number and step."""
    model, download = toy
    noise, clip_norm = 3.0, 0.5
    added = []
    for key in range(60):
        # With the clip norm tiny, gradients hardly move anything, and what is left of the change is noise.
        mechanism = Mechanism(plan_of(noise * clip_norm / 1e-6, 1e-6), key.to_bytes(32, "big"))
        after = trained_by(mechanism, model, download).layers["target"]
        before = download.adapter.layers["target"]
        added.append(torch.cat([(after.A - before.A).flatten(), (after.B - before.B).flatten()]))
    added = torch.stack(added).double()
    expected = noise * clip_norm * STEPS**0.5 / BATCH
    count = added.numel()
    assert float(added.std()) == pytest.approx(expected, rel=4 / (2 * count) ** 0.5)  # four standard errors
    assert abs(float(added.mean())) < 4 * expected / count**0.5
    across = torch.corrcoef(added.T).fill_diagonal_(0)
    assert float(across.abs().max()) < 6 / len(added) ** 0.5, "each number has noise of its own"


def test_examples_are_drawn_one_by_one_with_the_sampling_rate(toy, monkeypatch) -> None:
    model, download = toy
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(
        PerExample,
        "clipped",
        lambda self, index, *_: drawn.append(index.numpy()) or [torch.zeros_like(p) for p in self.parameters],
    )
    for key in range(250):
        trained_by(Mechanism(plan_of(1.0), key.to_bytes(32, "big")), model, download)
    steps, rate = len(drawn), BATCH / COUNT
    sizes = np.array([len(index) for index in drawn])
    assert sizes.mean() == pytest.approx(BATCH, abs=4 * (COUNT * rate * (1 - rate) / steps) ** 0.5)
    assert sizes.var() == pytest.approx(COUNT * rate * (1 - rate), rel=4 * (2 / steps) ** 0.5)  # binomial, not of one size
    each = np.bincount(np.concatenate(drawn), minlength=COUNT) / steps
    assert abs(each - rate).max() < 5 * (rate * (1 - rate) / steps) ** 0.5
    assert len({len(set(index)) - len(index) for index in drawn}) == 1, "no example twice in a step"


def test_noise_is_a_function_of_key_round_and_client(toy) -> None:
    mechanism = Mechanism(plan_of(1.0), b"\x01" * 32)
    numbers = lambda mechanism, *names: mechanism.draws(*names).standard_normal(4).tolist()  # noqa: E731
    own = numbers(mechanism, 1, "ada")
    assert own == numbers(mechanism, 1, "ada")
    others = [
        numbers(mechanism, 2, "ada"),
        numbers(mechanism, 1, "bob"),
        numbers(Mechanism(plan_of(1.0), b"\x02" * 32), 1, "ada"),
        numbers(Mechanism(plan_of(1.0), b"\x01" + bytes(31)), 1, "ada"),  # a key differs in every bit that it has
        numbers(Mechanism(plan_of(1.0)), 1, "ada"),
    ]
    assert all(own != other for other in others)
    assert "\\x01" not in repr(mechanism)


def test_the_systems_noise_is_normal_and_never_the_same() -> None:
    from scipy.stats import kstest

    draws = SystemDraws()
    first, second = draws.standard_normal(20_000), draws.standard_normal(20_000)
    assert kstest(first, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 20_000**0.5
    assert kstest(draws.random(20_000), "uniform").pvalue > 1e-6


def test_fedprox_pulls_after_the_noise(toy, monkeypatch) -> None:
    """Two empty draws: the second step is pulled back by mu times what the first moved."""
    model, download = toy
    monkeypatch.setattr(Mechanism, "draws", lambda self, round, client: Recorded([np.ones(COUNT)] * 2))
    after = trained_by(Mechanism(plan_of(2.0, steps=2)), model, download, proximal_mu=0.25).layers["target"]
    moved = 2.0 * 0.5 / BATCH
    torch.testing.assert_close(after.A, download.adapter.layers["target"].A - moved - (moved - 0.25 * moved))


# --- nothing bypasses the clipping ------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One target, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.target, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.target(torch.tanh(self.target(inputs)))))


class Past(Twice):
    """A head whose weight is used past its own module too."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + nn.functional.linear(inputs, self.head.weight)


class Mixing(Twice):
    """Every example is moved by the mean of its batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs - inputs.mean(dim=0))


class Sideways(Twice):
    """A layer that sees words first and examples second."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.target(inputs.transpose(0, 1))).mean(dim=0))


class Shared(nn.Module):
    """A position that all examples look up together, once for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.head = nn.Embedding(7, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(inputs + self.place(torch.arange(7)[None])).mean(dim=1))


def tied() -> nn.Module:
    module = Twice()
    module.other = nn.Linear(6, 3)
    module.other.weight = module.head.weight
    return module


def normed(norm: nn.Module) -> nn.Module:
    module = Net(nn.Linear(6, 5), 5)
    module.target = nn.Sequential(nn.Linear(6, 5), norm)
    return module


@pytest.mark.parametrize(("make", "name", "shape"), [(Twice, "target", (4, 6)), (Shared, "place", (4, 7, 6))])
def test_a_target_that_is_run_twice_or_once_for_all_is_covered(make, name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = LoraModel(task_of(make(), features(*shape), (name,)))
    private_examples.check(model, [BOTH])
    parameters = model.load(download_of(model))
    together = PerExample(model, parameters).gradients(torch.arange(4))
    for found, expected in zip(together, alone(model, parameters, 1), strict=True):
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 7, 14])
def test_a_position_that_all_look_up_together_is_refused_where_b_alone_is_trained(count: int) -> None:
    """A's part of the look-up has no dimension of examples then: the gradients would be those of positions."""
    torch.manual_seed(0)
    model = LoraModel(task_of(Shared(), features(count, 7, 6), ("place",)))
    private_examples.check(model, private_examples.trained_by(BOTH))
    with pytest.raises(ModelError, match=r"^layer place, B: ") as refused:
        private_examples.check(model, private_examples.trained_by(frozenset("B")))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("train", EVERY_SET)
def test_no_set_of_factors_is_trained_privately_that_was_not_checked(train: frozenset[str]) -> None:
    torch.manual_seed(0)
    model = LoraModel(task_of(Net(nn.Linear(6, 5), 5), features(COUNT, 6)))
    private_examples.check(model, [other for other in EVERY_SET if other != train])
    with pytest.raises(ModelError, match="was not checked for that"):
        trained_by(Mechanism(plan_of(1.0), b"k" * 32), model, download_of(model, train))


def test_a_method_is_checked_for_all_that_it_trains() -> None:
    """RoLoRA says B and takes turns; a method of both factors is no such method."""
    assert set(private_examples.trained_by(BOTH)) == {BOTH}
    for name, kind in REGISTRY.items():
        if name != "rolora" and kind.train != BOTH:
            assert kind.train in private_examples.trained_by(kind.train)
    assert set(private_examples.trained_by(REGISTRY["rolora"].train)) == {frozenset("A"), frozenset("B")}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_what_is_covered_passes_the_check(kind: str) -> None:
    module, inputs = build(kind)
    private_examples.check(LoraModel(task_of(module, inputs, trained=("head.weight", "head.bias"))), EVERY_SET)


BYPASSES = {
    "examples moved by the batch": (Mixing, ("target",), (), r"layer target, A: its gradient .* depends on the batch"),
    "a head used past its module": (Past, ("target",), ("head.weight",), r"parameter head.weight: .* used past its own module"),
    "a head tied to another": (tied, ("target",), ("head.weight",), r"head.weight: is tied \(head.weight and other.weight"),
    "examples in the second place": (Sideways, ("target",), (), r"layer target, A"),
    "batch statistics": (
        lambda: normed(nn.BatchNorm1d(5, track_running_stats=False)), ("target.0",), (), r"layer target.1: BatchNorm1d",
    ),
    "a trained norm": (lambda: normed(nn.LayerNorm(5)), ("target.0",), ("target.1.weight",), r"target.1.weight.*LayerNorm"),
    "a head with LoRA": (Twice, ("target", "head"), ("head.weight",), r"Linear modules without LoRA"),
    "an embedding by frequency": (lambda: build("embedding by frequency")[0], ("target",), (), r"target: scale_grad_by_freq"),
}  # fmt: skip


@pytest.mark.parametrize("what", BYPASSES)
def test_what_would_bypass_clipping_is_refused_by_name(what: str) -> None:
    make, targets, trained, words = BYPASSES[what]
    torch.manual_seed(0)
    inputs = (
        features(4, 7, 6) if make is Sideways else torch.tensor([[0, 3], [9, 0]]) if "frequency" in what else features(4, 6)
    )
    with pytest.raises(ModelError, match=words):
        private_examples.check(LoraModel(task_of(make(), inputs, targets, trained)), [BOTH])


def test_batch_norm_with_its_running_statistics_mixes_nothing() -> None:
    torch.manual_seed(0)
    private_examples.check(LoraModel(task_of(normed(nn.BatchNorm1d(5)), features(4, 6), ("target.0",))), EVERY_SET)


def test_scaling_is_in_the_gradient() -> None:
    """Twice the scaling, twice the gradient of B while B is zero: nothing normalises it away."""
    module, inputs = build("linear")
    norms = []
    for alpha in (1.0, 2.0):
        model = LoraModel(task_of(module, inputs))
        adapter = model.start(2, Scaling(alpha, "constant"), 0)
        parameters = model.load(Download(adapter, {"target": (0, 1)}))
        norms.append(PerExample(model, parameters).gradients(torch.arange(4))[1].norm())
        model.close()
    torch.testing.assert_close(norms[1], 2 * norms[0])
