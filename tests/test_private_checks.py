"""One example's gradient is its own, whatever the numbers, the lengths of others, and what a forward pass writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from anyrank.config.sections import Config
from anyrank.errors import ConfigError, ModelError
from anyrank.messages.records import BOTH
from anyrank.tasks.base import Examples, Task, TensorInputs
from anyrank.tasks.load import load_task
from anyrank.tasks.text import encoder
from anyrank.tasks.text.features import RaggedInputs
from anyrank.training import private_checks, private_examples
from anyrank.training.lora import LoraModel
from anyrank.training.private_examples import PerExample
from test_models import features
from test_private_training import download_of, norm

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3}
LENGTHS = (5, 5, 5, 3, 4, 7, 9, 12, 20, 60)  # the first three are of one length


class Read(nn.Module):
    """A classifier of texts, by the names that a task's inputs have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=inputs, attention_mask=mask.long()).logits


class Seen(Read):
    """A classifier of pictures."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(pixel_values=inputs).logits


def bert() -> nn.Module:
    settings = transformers.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=80, num_labels=3)
    return Read(transformers.BertForSequenceClassification(settings))


def llama() -> nn.Module:
    more = {"vocab_size": 50, "num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 3}
    return Read(transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, **more)))


def vit() -> nn.Module:
    settings = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=3)
    return Seen(transformers.ViTForImageClassification(settings))


MODELS = {"BERT": bert, "Llama": llama, "ViT": vit}


def opened(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, lengths=LENGTHS) -> LoraModel:
    torch.manual_seed(0)
    module = make().to(dtype).eval()
    if isinstance(module, Seen):
        inputs = TensorInputs(torch.randn(len(lengths), 3, 16, 16).to(dtype))
    else:
        tokens = torch.randint(1, 50, (sum(lengths),), dtype=torch.int32)
        inputs = RaggedInputs(tokens, torch.tensor(lengths))
    examples = Examples(inputs, torch.arange(len(lengths)) % 3)
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    targets = tuple(name for name in names if name.endswith(("query", "value", "q_proj", "v_proj")))
    return LoraModel(Task(module=module, targets=targets, train=examples, test=examples))


@pytest.mark.parametrize("kind", MODELS)
def test_an_example_that_is_removed_does_not_move_the_others(kind: str) -> None:
    """All of them are clipped, so that each counts by one clip: the sum of the others moves by less than 1e-5 clips, whichever
    is removed; the longest is the padding of all others."""
    model = opened(MODELS[kind])
    private_examples.check(model, [BOTH])
    sums, clip = PerExample(model, model.load(download_of(model))), 1e-3
    everyone = torch.arange(len(LENGTHS))
    whole = sums.clipped(everyone, clip)
    for gone in range(len(LENGTHS)):
        own, others = (sums.clipped(index, clip) for index in (everyone[gone : gone + 1], everyone[everyone != gone]))
        assert norm(own) == pytest.approx(clip, rel=1e-5)
        assert norm([a - b - c for a, b, c in zip(whole, own, others, strict=True)]) < 1e-5 * clip
    model.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODELS)
def test_numbers_in_which_it_would_are_refused_before_training(kind: str, dtype: torch.dtype) -> None:
    model = opened(MODELS[kind], dtype)
    with pytest.raises(ModelError, match=rf"^parameter model\..*: is {str(dtype)[6:]}, .* expected float32") as refused:
        private_examples.check(model, [BOTH])
    assert "\n" not in str(refused.value)
    assert not model.probed
    model.close()


class Own(nn.Module):
    """A user's module in float32, with something about it."""

    def __init__(self) -> None:
        super().__init__()
        self.target, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.register_buffer("kept", torch.zeros(5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.about(torch.tanh(self.target(inputs))))

    def about(self, hidden: Tensor) -> Tensor:
        return hidden


class Cast(Own):
    def about(self, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.linear(hidden, torch.eye(5)).float()


class Half(Own):
    def about(self, hidden: Tensor) -> Tensor:
        return (hidden.half() * 1.5).float()


class Counting(Own):
    def about(self, hidden: Tensor) -> Tensor:
        self.kept += 1
        return hidden


class Averaging(Own):
    """A buffer that is another one after each pass: the running mean of what passes."""

    def about(self, hidden: Tensor) -> Tensor:
        self.kept = (0.9 * self.kept + 0.1 * hidden.mean(dim=0)).detach()
        return hidden


class Power(Own):
    """A step of power iteration a pass, as spectral norms take it."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.ones_(self.kept)

    def about(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            self.kept.copy_(nn.functional.normalize(self.head.weight.T @ (self.head.weight @ self.kept), dim=0))
        return hidden


class Running(Own):
    """Batch statistics that are kept, in evaluation mode too."""

    def about(self, hidden: Tensor) -> Tensor:
        nn.functional.batch_norm(hidden.detach(), self.kept, torch.ones(5), training=True)
        return hidden


class Renormed(nn.Module):
    """A table whose rows a look-up scales down where they are too long."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.target, self.head = nn.Embedding(9, 6, max_norm=0.1), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        places = (inputs[:, 0].abs() * 3).long().clamp_max(8)
        return self.head(torch.tanh(self.target(self.table(places))))


WRITES = {
    Cast: r"^Cast: computes in bfloat16|^layer target: computes in bfloat16",
    Half: r"^layer target: computes in float16",
    Counting: r"^buffer kept: a forward pass changes it",
    Averaging: r"^buffer kept: a forward pass changes it",
    Power: r"^buffer kept: a forward pass changes it",
    Running: r"^buffer kept: a forward pass changes it",
    Renormed: r"^parameter table.weight: a forward pass changes it",
}


def own(kind: type[nn.Module]) -> LoraModel:
    torch.manual_seed(0)
    examples = Examples(TensorInputs(features(8, 6)), torch.arange(8) % 3)
    return LoraModel(Task(module=kind(), targets=("target",), train=examples, test=examples))


@pytest.mark.parametrize("kind", WRITES, ids=lambda kind: kind.__name__)
def test_what_a_forward_pass_narrows_or_writes_is_refused_by_name(kind: type[nn.Module]) -> None:
    model = own(kind)
    with pytest.raises(ModelError, match=WRITES[kind]) as refused:
        private_examples.check(model, [BOTH])
    assert "\n" not in str(refused.value)
    assert not model.probed
    model.close()


def test_a_module_that_does_nothing_of_the_kind_passes() -> None:
    model = own(Own)
    private_examples.check(model, [BOTH])
    assert model.probed == {BOTH}
    model.close()


def test_nothing_is_left_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    model = own(Own)
    private_examples.check(model, [BOTH])
    assert not [part for part in model.module.modules() if part._forward_pre_hooks]
    assert torch.ones(2).half().dtype == torch.float16  # nobody looks any more
    model.close()


class Padded(nn.Module):
    """A mean over all places of a batch, padding included: an example's depends on the longest one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.target, self.head = nn.Embedding(50, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.target((self.table(inputs) * mask[..., None]).mean(dim=1))))


def test_a_mean_over_padding_is_found_where_the_first_examples_are_of_one_length() -> None:
    torch.manual_seed(0)
    inputs = RaggedInputs(torch.randint(1, 50, (sum(LENGTHS),), dtype=torch.int32), torch.tensor(LENGTHS))
    examples = Examples(inputs, torch.arange(len(LENGTHS)) % 3)
    model = LoraModel(Task(module=Padded(), targets=("target",), train=examples, test=examples))
    with pytest.raises(ModelError, match=r"^layer target, A: its gradient for one example depends on the batch"):
        private_examples.check(model, [BOTH])
    model.close()


def test_only_numbers_below_32_bits_are_narrow() -> None:
    narrow = {torch.float16, torch.bfloat16, torch.float8_e5m2}
    every = (*narrow, torch.float32, torch.float64, torch.int8, torch.bool, torch.uint8)
    assert {dtype for dtype in every if private_checks.narrow(torch.zeros(1, dtype=torch.uint8).to(dtype))} == narrow


# --- configurations ---------------------------------------------------------------------------------------------------

ASKED = {"epsilon": 3.0, "delta": 1e-5}


@pytest.mark.parametrize("level", ["example", "person"])
@pytest.mark.parametrize("key", ["dtype", "train_dtype"])
def test_a_configuration_in_bfloat16_is_refused(level: str, key: str) -> None:
    sections = {"data": {"person": "who"}, "model": {key: "bfloat16"}, "privacy": {"level": level, **ASKED}}
    with pytest.raises(ConfigError, match=rf"^model\.{key}: expected 'float32'.*, got 'bfloat16'"):
        Config().replace(**sections)
    Config().replace(**sections | {"privacy": {}})
    Config().replace(**sections | {"privacy": {"level": "client", **ASKED}})


def test_frozen_features_of_protected_examples_are_float32_on_any_device(tmp_path: Path, cache: Path, monkeypatch) -> None:
    """In bfloat16, an example's features would depend by rounding on those that are encoded with it."""
    from site_world import make_world

    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    monkeypatch.setattr(encoder, "has_bfloat16", lambda device: True)
    make_world(tmp_path)
    common = {"model": {"task": "text-classification", "path": str(tmp_path / "model")}, "lora": {"target_modules": ()}}
    found = Config().replace(**common, data={"source": str(tmp_path / "county.csv")})
    assert "bfloat16" in load_task(found).name
    assert "float32" in load_task(found.replace(privacy={"level": "example", **ASKED})).name
