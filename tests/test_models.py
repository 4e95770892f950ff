"""LoRA by hooks against PEFT's own layers: the same logits and the same gradients, and a module that is left as it was."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.errors import ModelError
from anyrank.messages.records import Download, Scaling
from anyrank.tasks.base import Examples, Task, TensorInputs
from anyrank.training.lora import LoraModel


class Net(nn.Module):
    """One target of a given kind, `target`, then a head."""

    def __init__(self, target: nn.Module, width: int) -> None:
        super().__init__()
        self.target, self.head = target, nn.Linear(width, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found = torch.tanh(self.target(inputs))
        found = found.flatten(2).mean(dim=2) if found.ndim == 4 else found  # of an image: the mean over its places
        return self.head(found.mean(dim=1) if found.ndim == 3 else found)  # of a text: the mean over its words


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


TOKENS = torch.tensor([[0, 3, 3, 7], [9, 0, 0, 1]])
KINDS = {
    "linear": (lambda: nn.Linear(6, 5), 5, features(4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), 5, features(4, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 5), 5, features(4, 7, 6)),
    "conv1d": (lambda: Conv1D(5, 6), 5, features(4, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), 5, features(2, 3, 7, 6)),
    "conv2d of one point": (lambda: nn.Conv2d(3, 5, 1), 5, features(2, 3, 4, 4)),
    "embedding": (lambda: nn.Embedding(10, 5), 5, TOKENS),
    "embedding with padding": (lambda: nn.Embedding(10, 5, padding_idx=0), 5, TOKENS),
    "embedding by frequency": (lambda: nn.Embedding(10, 5, scale_grad_by_freq=True), 5, TOKENS),
}
# PEFT's own forward pass cannot do these; the change of the weight can.
ONLY_MERGED = {
    "conv2d dilated": (lambda: nn.Conv2d(3, 5, (3, 2), dilation=(2, 1)), 5, features(2, 3, 7, 6)),
    "conv2d padded to the same size": (lambda: nn.Conv2d(3, 5, (3, 1), padding="same", bias=False), 5, features(2, 3, 7, 6)),
}


def build(kind: str) -> tuple[Net, Tensor]:
    make, width, inputs = (KINDS | ONLY_MERGED)[kind]
    torch.manual_seed(3)
    return Net(make(), width), inputs


def task(module: nn.Module, inputs: Tensor, targets=("target",), trained=()) -> Task:
    examples = Examples(TensorInputs(inputs), torch.zeros(len(inputs), dtype=torch.long))
    return Task(module=module, targets=targets, train=examples, test=examples, trained=trained)


def trained_adapter(model: LoraModel, rank: int = 3) -> Adapter:
    """The model's own start, moved: every factor is random, none is zero."""
    start, draw = model.start(rank, Scaling(2.0, "standard"), seed=0), torch.Generator().manual_seed(1)
    layers = {
        name: layer.with_factors(
            0.5 * torch.randn(layer.A.shape, generator=draw), 0.5 * torch.randn(layer.B.shape, generator=draw)
        )
        for name, layer in start.layers.items()
    }
    return replace(start, layers=layers)


def download(adapter: Adapter, train: set[str] | None = None, merged: Adapter | None = None) -> Download:
    slices = {name: tuple(range(layer.rank)) for name, layer in adapter.layers.items()}
    return Download(adapter, slices, train=frozenset(train or {"A", "B"}), merged=merged)


def merge(module: Net, *layers: LoraLayer) -> Net:
    """A plain copy of `module` whose target's weight has the changes added: the definition, without LoRA."""
    module = copy.deepcopy(module)
    weight = module.target.weight
    for layer in layers:
        change = layer.delta()
        in_by_out = isinstance(module.target, (nn.Embedding, Conv1D))
        weight.data += change.T if in_by_out else change.reshape(weight.shape)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_peft(kind, tmp_path):
    base, inputs = build(kind)
    ours = LoraModel(task(copy.deepcopy(base), inputs))
    adapter = trained_adapter(ours)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), adapter.save(tmp_path), is_trainable=True).eval()

    ours.load(download(adapter))
    logits, expected = ours.module(inputs), theirs(inputs)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)

    (logits**2).sum().backward()
    (expected**2).sum().backward()
    factors = {n.split(".lora_")[1]: p.grad.flatten(1) for n, p in theirs.named_parameters() if "lora_" in n}
    A, B, _ = ours._active["target"][0]
    for name, gradient in factors.items():
        found = (A if name.removeprefix("embedding_").startswith("A") else B).grad
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS | ONLY_MERGED)
def test_applying_an_adapter_is_adding_its_change_to_the_weight(kind):
    base, inputs = build(kind)
    model = LoraModel(task(copy.deepcopy(base), inputs))
    adapter = trained_adapter(model)
    model.apply(adapter)
    expected = merge(base, adapter.layers["target"])(inputs)
    assert (expected - base(inputs)).abs().max() > 1e-2
    torch.testing.assert_close(model.module(inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
def test_what_is_merged_is_a_second_change_of_the_weight(kind):
    base, inputs = build(kind)
    model = LoraModel(task(copy.deepcopy(base), inputs))
    adapter, merged = trained_adapter(model, rank=2), trained_adapter(model, rank=4)
    expected = merge(base, adapter.layers["target"], merged.layers["target"])(inputs)
    model.apply(adapter, merged)
    torch.testing.assert_close(model.module(inputs), expected, rtol=0, atol=1e-5)
    parameters = model.load(download(adapter, merged=merged))
    assert len(parameters) == 2  # the merged factors are not trained
    torch.testing.assert_close(model.module(inputs), expected, rtol=0, atol=1e-5)
    model.apply(adapter)  # and the next adapter comes without it
    torch.testing.assert_close(model.module(inputs), merge(base, adapter.layers["target"])(inputs), rtol=0, atol=1e-5)


def test_a_bfloat16_module_takes_a_float32_adapter_as_peft_does(tmp_path):
    base, inputs = build("linear")
    base, inputs = base.bfloat16(), inputs.bfloat16()
    model = LoraModel(task(copy.deepcopy(base), inputs))
    start = trained_adapter(model)
    single = {n: LoraLayer(layer.A.float(), layer.B.float(), layer.scaling) for n, layer in start.layers.items()}
    adapter = replace(start, layers=single)
    model.apply(adapter)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), adapter.save(tmp_path)).eval()
    found = model.module(inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, theirs(inputs), rtol=0, atol=0.02)  # bfloat16 keeps about three digits


@pytest.mark.parametrize(("train", "count"), [({"A"}, 1), ({"B"}, 1), ({"A", "B"}, 2)])
def test_only_what_the_download_names_is_trained_and_only_that_moves(train, count):
    base, inputs = build("linear")
    model = LoraModel(task(base, inputs))
    sent = download(trained_adapter(model), train)
    before = {name: getattr(sent.adapter.layers["target"], name).clone() for name in "AB"}
    parameters = model.load(sent)
    assert len(parameters) == count
    (model.module(inputs) ** 2).sum().backward()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.1 * parameter.grad
    after = model.read(sent).layers["target"]
    for name in "AB":
        assert torch.equal(getattr(after, name), before[name]) == (name not in train)
        assert torch.equal(getattr(sent.adapter.layers["target"], name), before[name])  # the download itself never moves


def test_an_adapter_read_after_loading_is_the_one_that_was_loaded():
    base, inputs = build("conv2d")
    model = LoraModel(task(base, inputs, trained=("head.weight", "head.bias")))
    adapter = trained_adapter(model)
    tensors = {"head.weight": torch.full((3, 5), 0.5), "head.bias": torch.full((3,), -1.0)}
    adapter = replace(adapter, tensors=tensors)
    parameters = model.load(download(adapter))
    found = model.read(download(adapter))
    was, now = adapter.layers["target"], found.layers["target"]
    assert torch.equal(now.A, was.A)
    assert torch.equal(now.B, was.B)
    assert (now.scaling, now.kind, now.kernel) == (was.scaling, "conv2d", (3, 2))
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {n: t.tolist() for n, t in tensors.items()}
    assert [tuple(p.shape) for p in parameters] == [(3, 18), (5, 3), (3,), (3, 5)]  # A, B, then the head by name


def test_closing_leaves_the_module_as_it_was():
    base, inputs = build("linear")
    pristine, state = base(inputs).detach(), copy.deepcopy(base.state_dict())
    model = LoraModel(task(base, inputs, trained=("head.weight",)))
    adapter = replace(trained_adapter(model), tensors={"head.weight": torch.zeros(3, 5)})
    model.load(download(adapter))
    assert not torch.equal(base(inputs), pristine)
    model.close()
    assert torch.equal(base(inputs), pristine)
    assert {name: value.tolist() for name, value in base.state_dict().items()} == {n: v.tolist() for n, v in state.items()}


def test_scoring_trains_nothing():
    base, inputs = build("linear")
    model = LoraModel(task(base, inputs, trained=("head.weight",)))
    adapter = trained_adapter(model)
    model.load(download(adapter))
    model.apply(adapter)
    assert not model.module(inputs).requires_grad


# --- the start of a run ----------------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(300, 100), nn.Embedding(200, 80)
        self.conv = nn.Conv2d(8, 60, (5, 4))


def wide() -> tuple[LoraModel, Adapter]:
    model = LoraModel(task(Wide(), torch.zeros(1, 300), targets=("conv", "fc", "table")))
    return model, model.start(50, Scaling(8.0, "rslora"), seed=0)


@pytest.mark.parametrize(("layer", "width"), [("fc", 300), ("conv", 8 * 5 * 4)])
def test_a_starts_uniform_as_in_peft_and_b_zero(layer, width):
    # Kaiming with a = sqrt(5): bound sqrt(6 / ((1 + 5) * in)) = 1 / sqrt(in), spread bound / sqrt(3).
    _, start = wide()
    A, bound = start.layers[layer].A, 1 / math.sqrt(width)
    peft = get_peft_model(Wide(), LoraConfig(r=50, target_modules=[layer])).base_model.model.get_submodule(layer)
    theirs = peft.lora_A["default"].weight.detach()
    for found in (A, theirs):
        assert 0.98 * bound < found.abs().max() <= bound
        assert float(found.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert abs(float(found.mean())) < 0.05 * bound
    assert start.layers[layer].B.abs().max() == 0
    assert start.layers[layer].scaling == pytest.approx(8 / math.sqrt(50))


def test_an_embedding_starts_with_a_zero_and_b_normal_as_in_peft():
    _, start = wide()
    layer = start.layers["table"]
    assert layer.A.shape == (50, 200)
    assert layer.A.abs().max() == 0
    assert float(layer.B.std()) == pytest.approx(1.0, rel=0.05)
    assert abs(float(layer.B.mean())) < 0.05
    assert layer.B.abs().max() > 3  # normal, not uniform


def test_a_start_changes_nothing_yet():
    base, inputs = build("linear")
    pristine = base(inputs).detach()
    model = LoraModel(task(base, inputs))
    model.apply(model.start(3, Scaling(2.0), seed=0))
    assert torch.equal(model.module(inputs), pristine)


def test_the_start_is_a_function_of_seed_and_layer():
    model, start = wide()
    again, other = model.start(50, Scaling(8.0), seed=0), model.start(50, Scaling(8.0), seed=1)
    assert torch.equal(start.layers["fc"].A, again.layers["fc"].A)
    assert not torch.equal(start.layers["fc"].A, other.layers["fc"].A)
    rows = min(start.layers["fc"].A.shape[1], start.layers["conv"].A.shape[1])
    assert not torch.allclose(start.layers["fc"].A[:, :rows] / 160**0.5, start.layers["conv"].A[:, :rows] / 300**0.5)


# --- what cannot carry LoRA ------------------------------------------------------------------------------------------


def test_a_rank_above_the_smaller_side_of_a_layer_names_the_layer():
    model, _ = wide()
    model.check_rank(60)  # conv: out 60, in 160
    with pytest.raises(ModelError, match=r"rank 61: expected at most 60, the smaller side of layer conv \[60, 160\]"):
        model.check_rank(61)


@pytest.mark.parametrize("module", [nn.LayerNorm(6), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding_mode="circular")])
def test_a_module_that_is_no_plain_linear_map_is_refused(module):
    with pytest.raises(ModelError, match="layer target: expected a Linear, Conv1D, Embedding or plain Conv2d"):
        LoraModel(task(Net(module, 6), torch.zeros(1, 6)))
