"""PEFT's folders in and out, proven by PEFT itself: the same change of every weight, and the same forward pass."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer as PeftLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from anyrank.adapter import adapter as adapter_module
from anyrank.adapter.adapter import Adapter, iter_names
from anyrank.adapter.layer import LoraLayer
from anyrank.errors import AdapterError, RunFailed

# --- models that PEFT adapts, each with something that is easy to get wrong --------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.v(self.q(x)))


class Tower(nn.Module):
    """Names where one is the ending, or the beginning, of another: layers.1, layers.10, decoder.layers.1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(11))
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Block() for _ in range(2))
        self.score = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.layers, *self.decoder.layers):
            x = block(x)
        return self.score(x)


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, (3, 2), stride=(2, 1), padding=(1, 0))
        self.point = nn.Conv2d(7, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.point(torch.relu(self.conv(x)))).mean(dim=(2, 3)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 5, padding_idx=0), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x).mean(dim=1))


def bert() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=3, **sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2))


Case = tuple[Callable[[], nn.Module], dict[str, Any], str]
CASES: dict[str, Case] = {
    "one rank": (Tower, {"r": 2, "lora_alpha": 8, "target_modules": ["q"]}, "features"),
    "ranks and alphas by name": (
        Tower,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["q", "v"],
            "rank_pattern": {"^layers.1.q": 1, "decoder.layers.1.q": 4, r"layers\.1\d\.q": 3, r"layers\.[23]\.v": 5},
            "alpha_pattern": {"layers.10.q": 7, "^layers.1.q": 5, "decoder.layers.[01].q": 11},
        },
        "features",
    ),
    "rslora": (
        Tower,
        {"r": 3, "lora_alpha": 5, "target_modules": ["q"], "use_rslora": True, "rank_pattern": {"layers.2.q": 2}},
        "features",
    ),
    "head": (Tower, {"r": 2, "target_modules": ["q"], "modules_to_save": ["score"]}, "features"),
    "conv2d": (Vision, {"r": 3, "lora_alpha": 4, "target_modules": ["conv", "point"]}, "images"),
    "conv2d with head": (Vision, {"r": 2, "target_modules": ["conv"], "modules_to_save": ["head"]}, "images"),
    "embedding": (Words, {"r": 2, "lora_alpha": 6, "target_modules": ["table", "out"]}, "tokens"),
    "bert": (bert, {"r": 2, "task_type": "SEQ_CLS", "target_modules": ["query", "value"], "lora_alpha": 4}, "tokens"),
    "gpt2": (gpt2, {"r": 2, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "lora_alpha": 6}, "tokens"),
}
INPUTS = {
    "features": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),
    "images": torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(2)),
    "tokens": torch.tensor([[0, 3, 5, 7], [2, 10, 0, 1]]),
}


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = model.eval()(inputs)
    return getattr(found, "logits", found)


def trained_peft(base: nn.Module, options: dict[str, Any], **how: Any) -> PeftModel:
    """PEFT's own model of `base`, with every trained parameter at a random value, as after training."""
    model = get_peft_model(base, LoraConfig(**options), **how)
    draw = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def peft_load(base: nn.Module, folder: Path, **how: Any) -> PeftModel:
    """What PEFT makes of a folder; a warning that keys are missing or unexpected is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return PeftModel.from_pretrained(base, folder, **how)


def build(name: str) -> tuple[nn.Module, dict[str, Any], Tensor]:
    torch.manual_seed(0)
    make, options, inputs = CASES[name]
    return make().eval(), options, INPUTS[inputs]


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_peft_is_read_as_what_peft_applies(name, tmp_path):
    base, options, _ = build(name)
    model = trained_peft(base, options)
    model.save_pretrained(tmp_path)
    loaded = Adapter.load(tmp_path)
    applied = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, PeftLayer)}
    assert loaded.layers.keys() == applied.keys()
    for layer, module in applied.items():
        change = module.get_delta_weight("default")
        if type(module.get_base_layer()).__name__ in ("Conv1D", "Embedding"):
            change = change.T  # both hold their weight as [in, out]
        assert loaded.layers[layer].rank == module.r["default"]
        torch.testing.assert_close(loaded.layers[layer].delta(), change.detach().flatten(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("carried", [True, False], ids=["config carried", "layers only"])
@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_we_write_gives_the_same_forward_pass_in_peft(name, carried, tmp_path):
    base, options, inputs = build(name)
    pristine = copy.deepcopy(base)
    model = trained_peft(base, options)
    model.save_pretrained(tmp_path / "theirs")
    loaded = Adapter.load(tmp_path / "theirs")
    (loaded if carried else Adapter(loaded.layers, loaded.tensors)).save(tmp_path / "ours")
    expected = forward(model, inputs)
    assert (expected - forward(pristine, inputs)).abs().max() > 1e-3  # the adapter matters
    torch.testing.assert_close(forward(peft_load(pristine, tmp_path / "ours"), inputs), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_reading_back_what_we_wrote_changes_nothing(name, tmp_path):
    base, options, _ = build(name)
    trained_peft(base, options).save_pretrained(tmp_path / "theirs")
    first = Adapter.load(tmp_path / "theirs")
    second = Adapter.load(first.save(tmp_path / "ours"))
    assert second.ranks == first.ranks
    for layer, was in first.layers.items():
        now = second.layers[layer]
        assert torch.equal(now.A, was.A)
        assert torch.equal(now.B, was.B)
        assert (now.kind, now.kernel) == (was.kind, was.kernel)
        assert now.scaling == pytest.approx(was.scaling, rel=1e-12)
    assert {n: t.tolist() for n, t in second.tensors.items()} == {n: t.tolist() for n, t in first.tensors.items()}
    assert second.config == first.config


def test_bfloat16_stays_bfloat16_on_the_way_through(tmp_path):
    base, options, inputs = build("one rank")
    base, inputs = base.bfloat16(), inputs.bfloat16()
    pristine = copy.deepcopy(base)
    model = trained_peft(base, options, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path / "theirs")
    loaded = Adapter.load(tmp_path / "theirs")
    assert {layer.A.dtype for layer in loaded.layers.values()} == {torch.bfloat16}
    loaded.save(tmp_path / "ours")
    again = peft_load(pristine, tmp_path / "ours", autocast_adapter_dtype=False)
    assert torch.equal(forward(again, inputs), forward(model, inputs))


def test_trained_biases_pass_through(tmp_path):
    base, options, inputs = build("one rank")
    pristine = copy.deepcopy(base)
    model = trained_peft(base, options | {"bias": "lora_only"})
    model.save_pretrained(tmp_path / "theirs")
    Adapter.load(tmp_path / "theirs").save(tmp_path / "ours")
    again = peft_load(pristine, tmp_path / "ours")
    torch.testing.assert_close(forward(again, inputs), forward(model, inputs), rtol=0, atol=1e-6)


def test_any_scaling_survives_the_folder(tmp_path):
    # Neither alpha / r nor alpha / sqrt(r) of these is a whole number; one layer differs from the other.
    layers = {
        "layers.0.q": LoraLayer(torch.ones(3, 6), torch.ones(6, 3), 1 / 7),
        "layers.1.q": LoraLayer(torch.ones(3, 6), torch.ones(6, 3), 0.3),
        "layers.10.q": LoraLayer(torch.ones(2, 6), torch.ones(6, 2), 1e-4),
    }
    for config in ({}, {"use_rslora": True}):
        again = Adapter.load(Adapter(layers, {}, config).save(tmp_path / str(len(config))))
        for name, layer in layers.items():
            assert again.layers[name].scaling == pytest.approx(layer.scaling, rel=1e-12)


def test_layers_may_share_memory(tmp_path):
    # What a copy between layers, or a view into one large tensor, looks like to the file format.
    A, B = torch.arange(12.0).reshape(2, 6), torch.arange(12.0).reshape(6, 2)
    shared = Adapter({"layers.0.q": LoraLayer(A, B, 1.0), "layers.1.q": LoraLayer(A, B, 1.0)})
    again = Adapter.load(shared.save(tmp_path))
    assert torch.equal(again.layers["layers.0.q"].A, A)
    assert torch.equal(again.layers["layers.1.q"].A, A)


def test_a_module_whose_name_ends_like_an_adapted_one_stays_as_it_was(tmp_path):
    base, _, inputs = build("one rank")
    A, B = torch.full((2, 6), 0.1), torch.full((6, 2), 0.2)
    Adapter({"layers.1.q": LoraLayer(A, B, 0.5)}).save(tmp_path)
    expected = copy.deepcopy(base)
    expected.layers[1].q.weight.data += 0.5 * B @ A  # and not decoder.layers.1.q
    found = forward(PeftModel.from_pretrained(base, tmp_path), inputs)
    torch.testing.assert_close(found, forward(expected, inputs), rtol=0, atol=1e-6)


# --- the records -----------------------------------------------------------------------------------------------------


def test_a_layers_change_is_scaling_times_b_times_a():
    # 0.5 * [[1], [2]] @ [[3, 4]] = [[1.5, 2], [3, 4]]
    layer = LoraLayer(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]]), 0.5)
    assert layer.delta().tolist() == [[1.5, 2.0], [3.0, 4.0]]
    assert (layer.rank, layer.shape) == (1, (2, 2))


@pytest.mark.parametrize(
    ("A", "B", "says"),
    [
        (torch.ones(6), torch.ones(6, 2), r"A: expected a two-dimensional .* \(6,\)"),
        (torch.ones(2, 6), torch.ones(6, 2, 1), r"B: expected a two-dimensional .* \(6, 2, 1\)"),
        (torch.ones(2, 6), torch.ones(6, 1), r"share rank .* A .*\(2, 6\) and B .*\(6, 1\)"),  # would broadcast
        (torch.ones(2, 6).int(), torch.ones(6, 2).int(), r"floating .* torch\.int32"),
        (torch.ones(2, 6), torch.ones(6, 2).double(), r"share rank and dtype, .* torch\.float32 .* torch\.float64"),
        (torch.ones(0, 6), torch.ones(6, 0), r"no empty side, .* \(0, 6\)"),
    ],
)
def test_a_layer_of_the_wrong_shape_is_never_born(A, B, says):
    with pytest.raises(AdapterError, match=says):
        LoraLayer(A, B, 1.0)


@pytest.mark.parametrize("scaling", [0, -1.0, float("nan"), float("inf")])
def test_a_scaling_is_a_positive_number(scaling):
    with pytest.raises(AdapterError, match=r"scaling: expected a positive number, got"):
        LoraLayer(torch.ones(2, 6), torch.ones(6, 2), scaling)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(AdapterError, match=r"linear, conv2d, embedding, got 'conv3d'"):
        LoraLayer(torch.ones(2, 6), torch.ones(6, 2), 1.0, "conv3d")


def test_clients_that_adapt_other_modules_are_told_apart():
    layer = LoraLayer(torch.ones(2, 6), torch.ones(6, 2), 1.0)
    one, two = Adapter({"q": layer, "v": layer}), Adapter({"q": layer})
    assert list(iter_names({"ada": one, "bob": one})) == ["q", "v"]
    with pytest.raises(AdapterError, match="layer v: ada has it, bob does not"):
        list(iter_names({"ada": one, "bob": two}))
    with pytest.raises(AdapterError, match="layer v: bob has it, ada does not"):
        list(iter_names({"ada": two, "bob": one}))


# --- folders that cannot be read: one line that names the place and the mend -----------------------------------------

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


@pytest.fixture
def folder(tmp_path) -> Path:
    A, B = torch.ones(2, 6), torch.ones(6, 2)
    return Adapter({"layers.0.q": LoraLayer(A, B, 1.0), "layers.1.q": LoraLayer(A.clone(), B.clone(), 1.0)}).save(
        tmp_path / "ada"
    )


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({PREFIX + new: tensors.pop(PREFIX + old)})


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({PREFIX + key: value})


A0, A1, B1 = "layers.0.q.lora_A.weight", "layers.1.q.lora_A.weight", "layers.1.q.lora_B.weight"
BAD_WEIGHTS = {
    "nan": (put(A1, torch.full((2, 6), torch.nan)), r"layers\.1\.q: contains NaN .* diverged"),
    "infinity": (put(B1, torch.full((6, 2), torch.inf)), r"layers\.1\.q: contains NaN or infinite"),
    "rank": (put(A1, torch.ones(3, 6)), r"layer layers\.1\.q: adapter_config\.json says rank 2, A has 3 rows"),
    "partner": (lambda t: t.pop(PREFIX + B1), r"layer layers\.1\.q: factor B is missing; save the adapter again"),
    "other partner": (lambda t: t.pop(PREFIX + A0), r"layer layers\.0\.q: factor A is missing"),
    "unknown": (
        put("layers.1.q.lora_magnitude_vector", torch.ones(6)),
        r"lora_magnitude_vector.* not supported; train without",
    ),
    "one dimension": (put(A1, torch.ones(6)), r"layer layers\.1\.q: A: expected a two-dimensional"),
    "three dimensions": (put(B1, torch.ones(6, 2, 1)), r"layer layers\.1\.q: B: expected a two-dimensional"),
    "integers": (put(A1, torch.ones(2, 6, dtype=torch.int32)), r"layer layers\.1\.q: A: expected .* floating .* torch\.int32"),
    "ranks differ": (put(B1, torch.ones(6, 1)), r"layer layers\.1\.q: A \[rank, in\] and B \[out, rank\] must share rank"),
    "empty": (lambda t: t.clear(), r"contains no LoRA factors"),
    "no lora": (lambda t: (t.clear(), t.update({"score.weight": torch.ones(2)})), r"contains no LoRA factors"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_one_error_that_names_folder_and_layer(name, folder):
    change, says = BAD_WEIGHTS[name]
    edit_weights(folder, change)
    with pytest.raises(AdapterError, match=says) as error:
        Adapter.load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


BAD_CONFIG = {
    "not lora": ({"peft_type": "IA3"}, "expected peft_type 'LORA', got 'IA3'; only LoRA"),
    "no type": ({"peft_type": None}, "expected peft_type 'LORA', got None"),
    "dora": ({"use_dora": True}, "use_dora is set.* train without it"),
    "lora bias": ({"lora_bias": True}, "lora_bias is set"),
    "rank": ({"r": 5}, r"layer layers\.0\.q: adapter_config\.json says rank 5, A has 2 rows"),
    "rank of one layer": ({"rank_pattern": {"1.q": 7}}, r"layer layers\.1\.q: adapter_config\.json says rank 7"),
    "alpha zero": ({"lora_alpha": 0}, r"layers\.0\.q: scaling: expected a positive number, got 0"),
    "alpha negative": ({"lora_alpha": -4}, r"layers\.0\.q: scaling: expected a positive number, got -2"),
    "alpha nan": ({"lora_alpha": float("nan")}, r"layers\.0\.q: scaling: expected a positive number, got nan"),
    "alpha missing": ({"lora_alpha": None}, r"layers\.0\.q: lora_alpha: expected a number .* got None"),
    "alpha of one layer": ({"alpha_pattern": {"1.q": "big"}}, r"layers\.1\.q: lora_alpha: expected a number .* got 'big'"),
    "pattern is no table": ({"rank_pattern": [8]}, r"rank_pattern: expected .* got \[8\]"),
    "pattern is no regex": ({"alpha_pattern": {"(q": 8}}, r"alpha_pattern: .*'\(q'"),
}


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_a_bad_config_is_one_error_that_names_folder_and_mend(name, folder):
    changes, says = BAD_CONFIG[name]
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=says) as error:
        Adapter.load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / CONFIG).unlink(), "no adapter_config.json in it; expected a PEFT adapter folder"),
        (lambda f: (f / WEIGHTS).unlink(), "no adapter_model.safetensors; save the adapter with PEFT's save_pretrained"),
        (lambda f: (f / CONFIG).write_text('{"peft_type": '), "not readable as JSON .* save the adapter again"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "not readable as JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "expected peft_type 'LORA', got 'list'"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), "not a readable safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "not a readable safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04K\x01."), "not a readable safetensors file"),
    ],
    ids=["no config", "no weights", "half a config", "no text", "a list", "truncated", "empty file", "a pickle in disguise"],
)
def test_a_missing_or_broken_file_is_one_error_that_names_it(spoil, says, folder):
    spoil(folder)
    with pytest.raises(AdapterError, match=says) as error:
        Adapter.load(folder)
    assert str(folder) in str(error.value)


def test_a_missing_folder_is_said_to_be_missing(tmp_path):
    with pytest.raises(AdapterError, match="no such folder; expected a PEFT adapter folder"):
        Adapter.load(tmp_path / "nowhere")


def test_pickled_weights_are_refused_and_never_opened(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(a))
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(AdapterError, match=r"pickled weights \(adapter_model\.bin\).* safe_serialization=True"):
        Adapter.load(folder)
    assert opened == []


# --- writing whole or not at all -------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def other_adapter() -> Adapter:
    return Adapter({"layers.0.q": LoraLayer(torch.zeros(1, 6), torch.zeros(6, 1), 3.0)})


def test_weights_that_fail_to_write_leave_the_old_folder_as_it_was(folder, monkeypatch):
    before = snapshot(folder)

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(adapter_module, "save_file", half)
    with pytest.raises(RunFailed, match="disk full"):
        other_adapter().save(folder)
    assert snapshot(folder) == before


def test_a_config_that_fails_to_write_leaves_the_old_folder_as_it_was(folder, monkeypatch):
    before, write_text = snapshot(folder), Path.write_text

    def half(path, text, *args, **kwargs):
        write_text(path, text[: len(text) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(RunFailed, match="disk full"):
        other_adapter().save(folder)
    assert snapshot(folder) == before


def test_saving_over_an_adapter_replaces_it(folder):
    other_adapter().save(folder)
    assert Adapter.load(folder).ranks == {"layers.0.q": 1}
    assert sorted(snapshot(folder)) == [CONFIG, WEIGHTS]
