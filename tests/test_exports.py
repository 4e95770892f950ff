"""What is exported applies what the adapter applied: the same logits by PEFT, and by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from anyrank.adapter.adapter import Adapter
from anyrank.aggregation.aggregates import aggregate_folders
from anyrank.aggregation.exports import export
from anyrank.errors import AnyRankError

TOKENS = torch.tensor([[1, 5, 7, 9, 3], [2, 2, 8, 1, 0]])


def llama(tied: bool = False) -> PreTrainedModel:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, **heads, tie_word_embeddings=tied))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2))


def bert() -> PreTrainedModel:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, initializer_range=0.4, **sizes)
    )


MODELS = {
    "llama": (llama, AutoModelForCausalLM, {"target_modules": ["q_proj", "down_proj"]}),
    "llama patterns": (
        llama,
        AutoModelForCausalLM,
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 9}, "use_rslora": True},
    ),
    "llama embedding": (llama, AutoModelForCausalLM, {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied, head adapted": (lambda: llama(True), AutoModelForCausalLM, {"target_modules": ["lm_head", "q_proj"]}),
    "tied, embedding adapted": (lambda: llama(True), AutoModelForCausalLM, {"target_modules": ["embed_tokens"]}),
    "gpt2": (gpt2, AutoModelForCausalLM, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "bert": (bert, AutoModelForSequenceClassification, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert biases": (bert, AutoModelForSequenceClassification, {"target_modules": ["query"], "bias": "lora_only"}),
}


def base(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    MODELS[name][0]().save_pretrained(folder / "base")
    return folder / "base"


def client(folder: Path, name: str, seed: int, rank: int) -> Path:
    """An adapter as after training, in a folder of its own."""
    _, auto, options = MODELS[name]
    model = get_peft_model(auto.from_pretrained(folder / "base"), LoraConfig(r=rank, lora_alpha=6, **options))
    draw = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    model.save_pretrained(folder / f"client-{seed}")
    return folder / f"client-{seed}"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def by_peft(folder: Path, name: str, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(MODELS[name][1].from_pretrained(folder / "base"), adapter))


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_has_the_logits_of_the_adapter_on_its_base(name: str, tmp_path: Path) -> None:
    """Without merging by PEFT, whose merge of a tied embedding changes both ends."""
    base(tmp_path, name)
    adapter = client(tmp_path, name, 1, 3)
    export(adapter, tmp_path / "model", "merged")
    found = logits(MODELS[name][1].from_pretrained(tmp_path / "model"))
    assert torch.allclose(found, by_peft(tmp_path, name, adapter), atol=2e-6)
    assert not torch.allclose(found, logits(MODELS[name][1].from_pretrained(tmp_path / "base")), atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "llama patterns", "gpt2"])
@pytest.mark.parametrize("format", ["peft", "vllm"])
def test_one_adapter_has_the_logits_of_the_parts_that_it_is_made_of(name: str, format: str, tmp_path: Path) -> None:
    """FLoRA: the base update is merged, then the adapter loaded; the export needs the base model alone."""
    base(tmp_path, name)
    aggregate_folders([client(tmp_path, name, 1, 2), client(tmp_path, name, 2, 5)], "flora", tmp_path / "merge")
    below = PeftModel.from_pretrained(MODELS[name][1].from_pretrained(tmp_path / "base"), tmp_path / "merge" / "base-update")
    wanted = logits(PeftModel.from_pretrained(below.merge_and_unload(), tmp_path / "merge" / "global"))
    done = export(tmp_path / "merge" / "global", tmp_path / "one", format, tmp_path / "merge" / "base-update")
    assert torch.allclose(by_peft(tmp_path, name, tmp_path / "one"), wanted, atol=2e-6)
    assert done["missed"] == 0
    export(tmp_path / "merge" / "global", tmp_path / "model", "merged", tmp_path / "merge" / "base-update")
    assert torch.allclose(logits(MODELS[name][1].from_pretrained(tmp_path / "model")), wanted, atol=2e-6)


def test_a_server_that_reads_one_alpha_gets_one(tmp_path: Path) -> None:
    """What such a server applies: alpha / r of the file for each layer, whatever patterns there are."""
    base(tmp_path, "llama patterns")
    adapter = client(tmp_path, "llama patterns", 1, 4)
    export(adapter, tmp_path / "one", "vllm")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    before, after = Adapter.load(adapter), Adapter.load(tmp_path / "one")
    for name, layer in after.layers.items():
        assert layer.rank == config["r"] == 4
        applied = config["lora_alpha"] / config["r"] * layer.B @ layer.A
        assert torch.allclose(applied, before.layers[name].delta(), atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_a_cut_is_the_best_one_and_its_loss_is_reported(rank: int, tmp_path: Path) -> None:
    """Against the singular value decomposition of the dense update (Eckart and Young)."""
    base(tmp_path, "llama")
    adapter = client(tmp_path, "llama", 1, 5)
    done = export(adapter, tmp_path / "cut", rank=rank)
    before, after = Adapter.load(adapter), Adapter.load(tmp_path / "cut")
    lost = whole = 0.0
    for name, layer in before.layers.items():
        dense = layer.delta().double()
        values = torch.linalg.svdvals(dense)
        best = float(values[rank:].square().sum())
        assert float((after.layers[name].delta().double() - dense).square().sum()) == pytest.approx(best, rel=1e-3, abs=1e-9)
        lost, whole = lost + best, whole + float(values.square().sum())
    assert done["missed"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3, abs=1e-5)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    """The weights of the merged model are those of the sum in float64, rounded to the model's own numbers."""
    torch.manual_seed(0)
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = client(tmp_path, "llama", 1, 3)
    export(adapter, tmp_path / "model", "merged")
    start = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").named_parameters())
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").named_parameters())
    for name, layer in Adapter.load(adapter).layers.items():
        wide = start[f"{name}.weight"].double() + layer.scaling * (layer.B.double() @ layer.A.double())
        assert found[f"{name}.weight"].dtype == torch.bfloat16
        assert torch.equal(found[f"{name}.weight"], wide.to(torch.bfloat16))


def _cases(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    base(folder, "llama")
    adapter = client(folder, "llama", 1, 2)
    (folder / "quantised").mkdir()
    config = json.loads((folder / "base" / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "quantised" / "config.json").write_text(json.dumps(quantised))
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(folder / "other")
    (folder / "taken").mkdir()
    bert().save_pretrained(folder / "bert")
    head = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(folder / "bert"),
        LoraConfig(target_modules=["query"], task_type="SEQ_CLS"),
    )
    head.save_pretrained(folder / "head")
    return {
        "format": ({"format": "gguf"}, "format: expected one of peft, vllm, merged"),
        "exists": ({"out": folder / "taken"}, "taken: exists already"),
        "no base": ({"format": "merged", "base": str(folder / "nowhere")}, "nowhere: cannot be opened as the base model"),
        "other base": ({"format": "merged", "base": str(folder / "other")}, "expected a weight of shape|no such layer"),
        "quantised": ({"format": "merged", "base": str(folder / "quantised")}, "its weights are quantised"),
        "rank": ({"rank": 10**9}, "expected ranks of at most"),
        "a rank above all": ({"rank": 3}, "rank: expected at most 2, at which nothing is lost, got 3"),
        "negative rank": ({"rank": -1}, "expected ranks of at least 1"),
        "a head in vllm": ({"adapter": folder / "head", "format": "vllm"}, "trained tensors beside its factors"),
        "no adapter": ({"adapter": folder / "none"}, "no such folder"),
        "its own name": ({"adapter": adapter, "out": adapter}, "exists already"),
    }


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    for name, (given, says) in _cases(tmp_path).items():
        before = sorted(path for path in tmp_path.rglob("*"))
        with pytest.raises(AnyRankError, match=says) as raised:
            export(**{"adapter": tmp_path / "client-1", "out": tmp_path / "out"} | given)
        assert "\n" not in str(raised.value), name
        assert sorted(path for path in tmp_path.rglob("*")) == before, name


def test_the_command_takes_runs_and_adapters_and_names_what_it_cannot_do(anyrank: Any, tmp_path: Path) -> None:
    assert anyrank("run", "digits.toml", "--out", "run", "--set", "method.name=flora").returncode == 0
    done = anyrank("export", "run", "--out", "one", "--format", "vllm", "--json")
    found = json.loads(done.stdout)
    assert found["base_update"].endswith("run/base-update"), "the part for the base model lies beside the adapter"
    whole = Adapter.load(tmp_path / "one")
    parts = [Adapter.load(tmp_path / "run" / part) for part in ("adapter", "base-update")]
    for name, layer in whole.layers.items():
        assert torch.allclose(layer.delta(), sum(part.layers[name].delta() for part in parts), atol=1e-5)
    wrong = {
        ("run", "--format", "merged"): "the run's model (digits-mlp) is not one of transformers",
        ("run", "--format", "onnx"): "--format: expected one of peft, vllm, merged, got onnx",
        ("run", "--rank", "-4"): "--rank: expected a rank of at least 1",
        ("run/config.toml",): "is neither a run folder",
        ("nowhere",): "is neither a run folder",
        ("run", "--out", "run"): "exists already",
        ("run", "--out", "a/b/c"): "is not there; make it first",
        ("merge",): "is a merge of adapters; name one of its folders, such as merge/global",
    }
    (tmp_path / "merge" / "global").mkdir(parents=True)
    (tmp_path / "merge" / "global" / "adapter_config.json").write_text("{}")
    for arguments, says in wrong.items():
        done = anyrank("export", "--out", "two", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), arguments
        assert says in done.stderr
        assert not (tmp_path / "two").exists()
