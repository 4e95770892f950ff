"""Less memory, other numbers, another device: the same training to rounding, and nothing left behind."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anyrank import devices, simulation
from anyrank.config.sections import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from anyrank.errors import ConfigError, ModelError
from anyrank.messages.plan import plan_round
from anyrank.messages.records import Download, Pruning, Scaling
from anyrank.studies import forecast
from anyrank.tasks.base import Classification, Examples, Task, TensorInputs
from anyrank.tasks.place import place
from anyrank.tasks.text import own_head
from anyrank.tasks.text import task as text
from anyrank.training import local, memory
from anyrank.training.lora import LoraModel

transformers = pytest.importorskip("transformers")
from tiny import WORDS, make_classifier, make_model  # noqa: E402 - needs transformers

QUERY = ("layer.1.attention.self.query", "layer.2.attention.self.query")


class Net(nn.Module):
    """Two linear layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.high(torch.tanh(self.low(inputs)))))


def small(trained: tuple[str, ...] = ("head.weight", "head.bias")) -> Task:
    torch.manual_seed(0)
    examples = Examples(TensorInputs(torch.randn(23, 6)), torch.arange(23) % 3)
    known = {"label_names": ("a", "b", "c"), "objective": Classification()}
    return Task(module=Net(), targets=("low", "high"), train=examples, test=examples, trained=trained, **known)


def sent(model: LoraModel, rank: int = 4) -> Download:
    """A download whose factors are all away from zero."""
    start, draw = model.start(rank, Scaling(2.0), seed=0), torch.Generator().manual_seed(1)
    layers = {
        name: layer.with_factors(*(torch.randn(f.shape, generator=draw) / 8 for f in (layer.A, layer.B)))
        for name, layer in start.layers.items()
    }
    return Download(replace(start, layers=layers), {name: tuple(range(rank)) for name in layers})


def trained(task: Task, config: TrainConfig, examples: int = 23, pruning: Pruning | None = None) -> dict[str, Tensor]:
    """What one client's round makes of all it trains, by name, with its loss."""
    model = LoraModel(task, config.gradient_checkpointing)
    try:
        download = replace(sent(model), pruning=pruning)
        update = local.train(model, "client", download, np.arange(examples), plan_round(config, 1, 1, seed=0))
    finally:
        model.close()
    factors = {f"{name}.{kind}": getattr(layer, kind) for name, layer in update.adapter.layers.items() for kind in "AB"}
    return factors | dict(update.adapter.tensors) | {"loss": torch.tensor(update.metrics["loss"])}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol)


# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize(
    "options",
    [{"local_epochs": 2}, {"local_steps": 3, "momentum": 0.9}, {"local_epochs": 1, "proximal_mu": 0.5}],
    ids=["epochs", "momentum", "proximal"],
)
def test_a_batch_in_parts_gives_the_update_of_the_whole(parts: int, options: dict) -> None:
    """23 examples in batches of 8, the last of 7; in 3 parts of 3, 3 and 2, and 3, 3 and 1: each counts by its examples."""
    whole = TrainConfig(optimizer="sgd", learning_rate=0.5, batch_size=8, **options)
    expected = trained(small(), whole)
    assert_same(trained(small(), replace(whole, accumulation_steps=parts)), expected)
    assert (expected["low.A"] - sent(LoraModel(small())).adapter.layers["low"].A).abs().max() > 0.01


def test_parts_keep_the_penalty_of_pruning_whole() -> None:
    pruning = Pruning(gamma=0.5, penalty=1.0, min_rank=1)
    config = TrainConfig(optimizer="sgd", learning_rate=0.1, batch_size=8, local_steps=1)
    whole, parts = (trained(small(), replace(config, accumulation_steps=n), pruning=pruning) for n in (1, 4))
    assert_same(parts, whole)
    without = trained(small(), config)
    assert whole["low.A"].shape != without["low.A"].shape or (whole["low.A"] - without["low.A"]).abs().max() > 1e-3


def test_no_part_is_larger_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, batch = [], TensorInputs.batch
    monkeypatch.setattr(
        TensorInputs, "batch", lambda self, index, equal_lengths=False: sizes.append(len(index)) or batch(self, index)
    )
    trained(small(), TrainConfig(batch_size=8, accumulation_steps=3, local_epochs=1))
    assert sizes == [3, 3, 2, 3, 3, 2, 3, 3, 1]


def test_who_splits_batches_does_not_stack_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path))
    monkeypatch.setattr("anyrank.training.stacked.train", lambda *arguments: pytest.fail("stacked"))
    config = Config().replace(run={"rounds": 1, "stacking": "always"}, model={"name": "digits-mlp"})
    simulation.execute(config.replace(train={"accumulation_steps": 2, "local_steps": 1}), tmp_path / "run")


def test_more_parts_than_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match="train.accumulation_steps: expected a whole number from 1 to train.batch_size = 4"):
        TrainConfig(batch_size=4, accumulation_steps=5)


# --- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory):
    """`{name: task}` around real transformers layers: taken apart above a frozen prefix, whole, and decoders."""
    root, draw = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    rows = [f"{' '.join(draw.choice(WORDS, draw.integers(1, 9)))},{'abc'[i % 3]}" for i in range(30)]
    (root / "rows.csv").write_text("\n".join(["text,label", *rows, ""]))
    data = DataConfig(source=str(root / "rows.csv"))
    encoder = ModelConfig(path=str(make_model(root / "bert")), task="text-classification", dtype="float32")
    made = {"above a prefix": text.load(encoder, data, LoraConfig(target_modules=QUERY), root / "cache")}
    made["a map"] = text.load(encoder, data, LoraConfig(), root / "cache")
    for name in ("distilbert", "llama", "gpt2"):
        model = ModelConfig(path=str(make_classifier(root / name, name)), task="text-classification", head="model-trained")
        made[name] = own_head.load(model, data, LoraConfig(target_modules=("q_lin",) if name[0] == "d" else ()), root)
    return made


WITH_LAYERS = ["above a prefix", "distilbert", "llama", "gpt2"]
TRAIN = TrainConfig(optimizer="sgd", learning_rate=0.1, batch_size=8, local_steps=3)


def held(task: Task, checkpointing: bool) -> int:
    """Bytes that a pass over 8 examples keeps for its gradient."""
    model, kept = LoraModel(task, checkpointing), memory.Kept(task.module)
    model.load(sent(model))
    with kept.watch():
        outputs = task.module(**task.train.inputs.batch(torch.arange(8), equal_lengths=True))
    assert outputs.requires_grad
    outputs.sum().backward()
    assert kept.now == 0  # the gradient is made, and nothing is kept for it any more
    model.close()
    return kept.peak


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_layers_that_are_run_again_give_the_same_update(tasks, name: str) -> None:
    again = trained(tasks[name], replace(TRAIN, gradient_checkpointing=True))
    assert_same(again, trained(tasks[name], TRAIN))
    assert_same(trained(tasks[name], replace(TRAIN, gradient_checkpointing=True, accumulation_steps=2)), again)


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_layers_that_are_run_again_keep_little(tasks, name: str) -> None:
    assert held(tasks[name], checkpointing=True) < 0.5 * held(tasks[name], checkpointing=False)


def test_layers_are_as_they_were_when_a_run_ends(tasks) -> None:
    module = tasks["llama"].module
    LoraModel(tasks["llama"], checkpointing=True).close()
    assert not any("forward" in vars(part) for part in module.modules())


@pytest.mark.parametrize("name", ["a map", "small"])
def test_where_no_layer_can_be_run_again_it_is_refused(tasks, name: str) -> None:
    task = small() if name == "small" else tasks[name]
    with pytest.raises(ModelError, match=r"train.gradient_checkpointing: there is no transformers layer .* around (map|low)"):
        LoraModel(task, checkpointing=True)
    assert not any("forward" in vars(part) for part in task.module.modules())  # nothing is left of the attempt


def test_what_is_kept_is_counted_by_storage() -> None:
    """x · w keeps x and w; tanh keeps its output; a view of what is kept adds nothing, nor does a parameter."""
    module, x = nn.Linear(4, 4, bias=False), torch.randn(8, 4)
    kept = memory.Kept(module)
    with kept.watch():
        y = torch.tanh(module(x))
        total = (y[:4] * y[4:]).sum()
    assert kept.now == kept.peak == 2 * 8 * 4 * 4  # x, and y for all its uses; four bytes a number
    total.backward()
    assert kept.now == 0


def test_a_plan_counts_memory_by_the_options(tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyrank.simulation.building.load_task", lambda config, progress: copy.deepcopy(tasks["llama"]))
    config = Config().replace(
        run={"stacking": "never"},
        model={"task": "text-classification", "head": "model-trained"},
        clients={"count": 2, "ranks": (2, 4)},
        train={"batch_size": 8},
    )
    memory = lambda **keys: forecast.cost(config.replace(train=keys))["memory_bytes"]["activations"]  # noqa: E731
    whole = memory()
    assert memory(accumulation_steps=8) < whole / 3
    assert memory(gradient_checkpointing=True) < whole / 2
    narrow = place(copy.deepcopy(tasks["llama"]), ModelConfig(train_dtype="bfloat16"))
    sizes = [sum(tensor.nbytes for tensor in task.module.state_dict().values()) for task in (tasks["llama"], narrow)]
    assert sizes[1] < 0.55 * sizes[0]


# --- bfloat16 --------------------------------------------------------------------------------------------------------


def test_bfloat16_halves_the_base_and_leaves_what_is_trained_alone() -> None:
    exact = small()
    narrow = place(small(), ModelConfig(train_dtype="bfloat16"))
    dtypes = {name: parameter.dtype for name, parameter in narrow.module.named_parameters()}
    matrices = {"low.weight", "high.weight"}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == matrices
    batch = narrow.train.inputs.batch(torch.arange(23))
    assert narrow.module(**batch).dtype == torch.float32
    torch.testing.assert_close(narrow.module(**batch), exact.module(**batch), rtol=0, atol=0.02)
    assert not torch.equal(narrow.module(**batch), exact.module(**batch))
    update = trained(narrow, TRAIN)
    assert {value.dtype for name, value in update.items()} == {torch.float32}
    before = sent(LoraModel(small())).adapter.layers["high"].A
    change, expected = update["high.A"] - before, trained(exact, TRAIN)["high.A"] - before
    assert float((change - expected).norm() / expected.norm()) < 0.1  # bfloat16 keeps about three digits
    assert float(change.abs().max()) > 0


@pytest.mark.parametrize("name", [None, "above a prefix", "llama"])
def test_small_steps_are_not_lost_in_bfloat16(tasks, name: str | None) -> None:
    """A step of 1e-6 is below bfloat16's spacing at 0.1, and above float32's: adapters that were bfloat16 would stand still."""
    task = tasks[name] if name else small()
    narrow = place(replace(task, module=copy.deepcopy(task.module)), ModelConfig(train_dtype="bfloat16"))
    tiny_steps = trained(narrow, TrainConfig(optimizer="adamw", learning_rate=1e-6, batch_size=8, local_steps=1), 20)
    model = LoraModel(narrow)
    before = sent(model).adapter
    for layer in before.layers:
        moved = (tiny_steps[f"{layer}.A"] - before.layers[layer].A).abs()
        assert 5e-7 < float(moved.max()) < 2e-6


# --- devices ---------------------------------------------------------------------------------------------------------


def test_cpu_and_float32_leave_a_task_as_it_is() -> None:
    task = small()
    assert place(task, ModelConfig()) is task


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(ModelError, match=f"model.device = '{name}': torch .* sees no such device") as caught:
            devices.find(name)
        assert "\n" not in str(caught.value)
    assert devices.find("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.find("auto") == torch.device("cuda")
    with pytest.raises(ConfigError, match="model.device: expected one of auto, cpu, cuda, mps"):
        ModelConfig(device="gpu")


PRETEND = '''
"""A device that torch only pretends to have: no numbers, but every mix of devices is an error, as on a real one."""
import sys
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
if register is None:
    sys.exit(77)
register("pretend")
device = torch.device("pretend")

from anyrank.config import ModelConfig, TrainConfig
from anyrank.messages.plan import plan_round
from anyrank.messages.records import Client, Job
from anyrank.tasks import place as placing
from anyrank.training import local, stacked
from anyrank.training.lora import LoraModel
from test_hardware import sent, small

placing.find = lambda name: device
torch.Tensor.__float__ = lambda tensor: 0.0  # a pretended loss has no number
torch.Tensor.tolist = lambda tensor: [0.0] * len(tensor)
torch.Tensor.item = lambda tensor: 1  # of a step's number
torch.nn.Module.to = lambda module, where: module  # pretended parameters are made where they belong, for they cannot move
with FakeTensorMode():
    with device:
        task = small()
    here = small()
    try:
        task.module(here.train.inputs.values)
    except RuntimeError as error:
        assert "pretend" in str(error), error
    else:
        raise AssertionError("devices were mixed, and nobody noticed")
    task = placing.place(type(here)(**{**vars(here), "module": task.module}), ModelConfig())
    model = LoraModel(task)
    first = sent(model)
    assert {layer.A.device.type for layer in first.adapter.layers.values()} == {"cpu"}
    assert {parameter.device.type for parameter in model.load(first)} == {"pretend"}
    for options in ({}, {"proximal_mu": 0.1}, {"accumulation_steps": 2}, {"optimizer": "sgd", "momentum": 0.9}):
        round = plan_round(TrainConfig(local_steps=2, batch_size=4, **options), 1, 1, seed=0)
        updates = [local.train(model, "client", first, np.arange(9), round)]
        if "accumulation_steps" not in options:
            jobs = [Job(Client(f"c{i}", 4), 9, lambda: first) for i in range(2)]
            updates += stacked.train(model, jobs, [np.arange(9), np.arange(5)], round)
        for update in updates:
            held = [value for layer in update.adapter.layers.values() for value in (layer.A, layer.B)]
            assert {value.device.type for value in [*held, *update.adapter.tensors.values()]} == {"cpu"}
    model.apply(first.adapter, first.adapter)
    batch = task.test.inputs.batch(torch.arange(5))
    assert task.objective.losses(task.module(**batch), task.test.labels[torch.arange(5)]).device.type == "pretend"
'''


def test_nothing_is_left_on_another_device() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRETEND], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip("this torch cannot register a device of Python's own (2.9 or newer can)")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
@pytest.mark.parametrize("options", [{}, {"train_dtype": "bfloat16"}])
def test_a_gpu_trains_what_the_cpu_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path))
    config = Config().replace(run={"rounds": 5}, model={"name": "digits-mlp"})
    here = simulation.execute(config, tmp_path / "cpu")
    there = simulation.execute(config.replace(model={"device": "cuda", **options}), tmp_path / "cuda")
    assert there["accuracy"] == pytest.approx(here["accuracy"], abs=0.05)
