"""Instruction tuning: completions alone are learned, rows are shared without a trace, answers are right for the reason told."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anyrank import simulation
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import (
    ClientsConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    PartitionConfig,
    TrainConfig,
)
from anyrank.config.tables import load as load_config
from anyrank.data import instructions, partition
from anyrank.errors import ConfigError, DataError, ModelError
from anyrank.messages.records import Scaling
from anyrank.tasks import base
from anyrank.tasks.language import arithmetic, decoder, scoring
from anyrank.tasks.language import task as causal
from anyrank.tasks.language.sequences import Encoded, Sequences
from anyrank.tasks.place import place
from anyrank.training.lora import LoraModel

transformers = pytest.importorskip("transformers")

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ARCHITECTURES = {
    "llama": lambda common: transformers.LlamaConfig(**COMMON, **common, num_key_value_heads=2),
    "qwen2": lambda common: transformers.Qwen2Config(**COMMON, **common, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": lambda common: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=common["max_position_embeddings"], **common
    ),
    "mistral": lambda common: transformers.MistralConfig(**COMMON, **common, num_key_value_heads=2, sliding_window=4),
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = [("Add 2 and 3.", " It is 5."), ("Add 40 and 2, please; take your time.", " It is 42."), ("1+1?", " 2"), ("Go", " on")]


def make_tokenizer(folder, chat=True):
    """Byte-level BPE of single bytes and a few merges, so that any text can be read and a merge can cross the boundary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    merges = [("i", "t"), ("Ġ", "I"), (":", "Ġ"), ("a", "n"), ("an", "d")]
    pieces = [*special, *letters, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = TEMPLATE if chat else None
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_model(folder, architecture="llama", chat=True):
    """A small random decoder; weights large enough that every layer and every earlier token matters."""
    common = {"vocab_size": make_tokenizer(folder, chat), "max_position_embeddings": 1200, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = ARCHITECTURES[architecture](common | {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`{architecture: model folder}`; read only."""
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, name) for name in ARCHITECTURES}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    """Four prompts with their completions to train on, the same ones held out."""
    rows = [{"prompt": prompt, "completion": completion, "site": f"s{i % 2}"} for i, (prompt, completion) in enumerate(ROWS)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    return DataConfig(source=source, test_source=source, partition=PartitionConfig(kind="iid"))


def load(folder, data, targets=(), **options):
    settings = ModelConfig(path=str(folder), task="causal-lm", max_length=options.pop("max_length", 120), **options)
    return causal.load(settings, data, LoraConfig(target_modules=targets), None)


@functools.lru_cache
def whole(folder):
    """The tokenizer and the model of a folder as transformers has them: nothing of ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return transformers.AutoTokenizer.from_pretrained(folder), model


def alone(folder, prompt, completion):
    """The mean cross-entropy of a completion, its text alone through the whole model."""
    tokenizer, model = whole(folder)
    given, learned = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
    labels = torch.tensor([[-100] * len(given) + learned])  # transformers' own mark for tokens without loss
    with torch.no_grad():
        return model(input_ids=torch.tensor([given + learned]), labels=labels).loss


def losses(task, equal_lengths, index=None):
    index = torch.arange(len(task.train)) if index is None else index
    with torch.no_grad():
        return task.objective.losses(
            task.module(**task.train.inputs.batch(index, equal_lengths=equal_lengths)), task.train.labels[index]
        )


# --- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_of_each_example_is_the_models_own_over_its_completion(folders, data, architecture):
    task = load(folders[architecture], data, **({"max_length": 4 * 16} if architecture == "mistral" else {}))
    expected = torch.stack([alone(folders[architecture], *row) for row in ROWS])
    torch.testing.assert_close(losses(task, equal_lengths=True), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses(task, equal_lengths=False), expected, rtol=1e-4, atol=1e-5)


def test_a_loss_does_not_depend_on_who_shares_the_batch(folders, data):
    task = load(folders["llama"], data)
    for even in (False, True):
        together = losses(task, even)
        for i in range(len(ROWS)):
            torch.testing.assert_close(losses(task, even, torch.tensor([i]))[0], together[i], rtol=1e-4, atol=1e-5)


def test_examples_share_rows_only_where_the_model_keeps_them_apart(folders, data, monkeypatch):
    shared = load(folders["llama"], data)
    assert "examples share rows" in shared.name
    assert shared.train.inputs.batch(torch.arange(4))["inputs"].shape[0] == 2  # 19, 7 and 6 tokens beside 45
    assert "packed" not in shared.train.inputs.batch(torch.arange(4), equal_lengths=True)
    assert "a row for each example" in load(folders["mistral"], data).name  # each layer looks back 4 tokens, by its own mask
    blind = lambda self, owner: torch.zeros(len(owner), 1, owner.shape[1], owner.shape[1])  # noqa: E731
    monkeypatch.setattr(decoder.Decoder, "_apart", blind)
    assert "a row for each example" in load(folders["llama"], data).name


def test_rows_are_filled_longest_first_and_nothing_is_lost():
    encoded = [Encoded([10 + i] * length, 1) for i, length in enumerate((3, 6, 2, 4, 1))]
    batch = Sequences.of(encoded, pad=0, packs=True).batch(torch.arange(5))
    assert batch["inputs"].tolist() == [[11] * 6, [13] * 4 + [12] * 2, [10] * 3 + [14] + [0] * 2]
    assert batch["owner"].tolist() == [[1] * 6, [3] * 4 + [2] * 2, [0] * 3 + [4] + [-1] * 2]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert batch["counts"].tolist() == [2, 5, 1, 3, 0]
    assert batch["scored"].sum() == 11
    assert not batch["scored"][batch["positions"] == 0].any()  # the first token of each is its prompt
    even = Sequences.of(encoded, pad=0, packs=True).batch(torch.tensor([2, 0]), equal_lengths=True)
    assert even["inputs"].tolist() == [[12, 12, 0], [10, 10, 10]]
    assert "packed" not in even


def test_gradients_of_shared_rows_are_those_of_padded_ones(folders, data):
    task = load(folders["qwen2"], data)
    model = LoraModel(task)
    gradients = []
    for even in (False, True):
        draw = torch.Generator().manual_seed(0)
        layers = {
            name: LoraLayer(
                A=(torch.randn(2, target.width, generator=draw) / 8).requires_grad_(),
                B=(torch.randn(target.out, 2, generator=draw) / 8).requires_grad_(),
                scaling=1.0,
            )
            for name, target in model.targets.items()
        }
        model.apply(Adapter(layers))
        task.module(**task.train.inputs.batch(torch.arange(4), equal_lengths=even)).mean().backward()
        gradients.append([factor.grad for layer in layers.values() for factor in (layer.A, layer.B)])
    model.close()
    assert len(gradients[0]) == 8  # query and value of two layers
    for packed, padded in zip(*gradients, strict=True):
        assert padded.abs().max() > 1e-4
        torch.testing.assert_close(packed, padded, rtol=1e-3, atol=1e-6)


def written(folder, data, **options):
    """`(given text, learned text)` of each training example, as the tokenizer spells the task's tokens."""
    task, tokenizer = load(folder, data, **options), transformers.AutoTokenizer.from_pretrained(folder)
    spelt = []
    for i in range(len(task.train)):
        batch = task.train.inputs.batch(torch.tensor([i]))
        tokens, scored = batch["inputs"][0], batch["scored"][0]
        assert (scored.long().diff() >= 0).all()  # a completion is the end of its text
        spelt.append((tokenizer.decode(tokens[~scored]), tokenizer.decode(tokens[scored])))
    return spelt


def test_the_completion_and_the_end_are_learned_and_the_prompt_is_not(folders, data):
    assert written(folders["llama"], data) == [(prompt, f"{completion}<|end|>") for prompt, completion in ROWS]


def test_a_token_across_the_boundary_is_learned_whole(folders, tmp_path):
    rows = [{"prompt": "Say:", "completion": " yes"}, {"prompt": "Name", "completion": " it"}]  # ': ' is one token
    data = DataConfig(source=write_rows(tmp_path / "a.jsonl", rows), test_fraction=0.5)
    whole = replace(data, test_fraction=0.5, partition=PartitionConfig(kind="iid"), test_source=data.source)
    assert written(folders["llama"], whole) == [("Say", ": yes<|end|>"), ("Name", " it<|end|>")]


def test_a_chat_is_written_by_the_tokenizers_template_and_its_last_message_is_learned(folders, tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    source = write_rows(tmp_path / "chat.jsonl", [{"messages": chat}])
    data = DataConfig(source=source, test_source=source, format="messages", partition=PartitionConfig(kind="iid"))
    given = "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>2+2?<|end|><|assistant|>"
    assert written(folders["llama"], data) == [(given, "4<|end|>")]
    asked = write_rows(tmp_path / "rows.jsonl", [{"q": "2+2?", "a": "4"}])
    columns = replace(data, source=asked, test_source=asked, format="columns", prompt="q", completion="a", chat=True)
    assert written(folders["llama"], columns) == [("<|user|>2+2?<|end|><|assistant|>", "4<|end|>")]


def test_a_template_splits_where_the_completion_begins(folders, tmp_path):
    rows = [{"city": "Lima", "land": "Peru", "note": "{x}"}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    template = "{{q}} {city} {note}\n-> {land}!"
    data = DataConfig(
        source=source, test_source=source, prompt="city", completion="land", template=template, partition=PartitionConfig("iid")
    )
    assert written(folders["llama"], data) == [("{q} Lima {x}\n-> ", "Peru!<|end|>")]


def test_long_examples_are_cut_and_counted(folders, data):
    task = load(folders["llama"], data, max_length=44)
    whole = load(folders["llama"], data)
    assert whole.train.inputs.lengths.max() == 45
    assert "2 of 8 examples cut at 44 tokens" in task.note  # one of each part
    assert "cut" not in whole.name
    assert task.train.inputs.lengths.tolist() == [min(44, length) for length in whole.train.inputs.lengths.tolist()]
    with pytest.raises(DataError, match=r"max_length = 30: the prompts of 1 of 4 examples leave no room .* has 35 tokens"):
        load(folders["llama"], data, max_length=30)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "first"), [("llama", "model.layers.0.self_attn.q_proj"), ("gpt2", "transformer.h.0.attn.c_attn")]
)
def test_a_saved_adapter_is_one_of_the_model_as_peft_loads_it(folders, data, tmp_path, architecture, first):
    peft = pytest.importorskip("peft")
    folder = folders[architecture]
    task = load(folder, data)
    bare = transformers.AutoModelForCausalLM.from_pretrained(folder)
    usual = peft.get_peft_model(bare, peft.LoraConfig())  # PEFT's own choice of modules
    names = {name.removeprefix("base_model.model.").removesuffix(".lora_A") for name, _ in usual.named_modules()}
    assert set(task.targets) == {name for name in task.targets if name in names and f"{name}.lora_A.default" in names}
    assert task.targets[0] == first
    model, draw = LoraModel(task), torch.Generator().manual_seed(1)
    plain = losses(task, equal_lengths=True)
    layers = {
        name: LoraLayer(
            A=torch.randn(4, target.width, generator=draw) / 4, B=torch.randn(target.out, 4, generator=draw) / 4, scaling=2.0
        )
        for name, target in model.targets.items()
    }
    saved = Adapter(layers, config=model.start(4, Scaling(2.0), seed=0).config).save(tmp_path / "adapter")
    model.apply(Adapter(layers))
    adapted = losses(task, equal_lengths=True)
    written_on = decoder.go_on(task.module, [[20, 30, 40, 50]], 8, frozenset())
    model.close()
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(losses(task, equal_lengths=True), plain)
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(saved).eval()  # it finds the base model itself
    batch = task.train.inputs.batch(torch.arange(4), equal_lengths=True)
    with torch.no_grad():
        logits = reloaded(input_ids=batch["inputs"]).logits[:, :-1]
        tokens = reloaded.generate(torch.tensor([[20, 30, 40, 50]]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    each = F.cross_entropy(logits.transpose(1, 2), batch["inputs"][:, 1:], reduction="none") * batch["scored"][:, 1:]
    torch.testing.assert_close(adapted, each.sum(dim=1) / batch["counts"], rtol=1e-4, atol=1e-4)
    assert written_on == [tokens[0, 4:].tolist()]


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (("q_prj",), "'q_prj': matches no module of LlamaForCausalLM; did you mean 'q_proj'?"),
        (("self_attn",), "model.layers.0.self_attn is no linear or embedding layer"),
        (("norm",), "model.norm is no linear or embedding layer"),
    ],
)
def test_targets_that_cannot_be_are_refused(folders, data, targets, says):
    with pytest.raises(ModelError) as caught:
        load(folders["llama"], data, targets)
    assert says in str(caught.value)


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_greedy_generation_does_not_depend_on_who_shares_the_batch(folders, data):
    for architecture in ("llama", "gpt2", "mistral"):
        module = load(folders[architecture], data).module
        given = [[10, 20, 30], [40, 50, 60, 70, 80, 90, 95], [33]]
        together = decoder.go_on(module, given, 6, frozenset())
        for prompt, written_on in zip(given, together, strict=True):
            ids = list(prompt)
            with torch.no_grad():
                for _ in range(6):  # without a cache, without padding
                    ids.append(int(module.whole(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert written_on == ids[len(prompt) :]


def test_generation_ends_where_the_model_ends_a_text(folders, data):
    module = load(folders["llama"], data).module
    (free,) = decoder.go_on(module, [[10, 20, 30]], 6, frozenset())
    end = free[3]
    (stopped,) = decoder.go_on(module, [[10, 20, 30]], 6, frozenset([end]))
    assert stopped == free[: free.index(end)]


def scored(task, **options):
    objective = task.objective.under(EvalConfig(**options))
    return objective.score(task.module, task.test, batch_size=3)


def test_a_completion_is_exact_if_greedy_decoding_writes_it(folders, tmp_path, data):
    folder = folders["llama"]
    tokenizer, module = transformers.AutoTokenizer.from_pretrained(folder), load(folder, data).module
    (tokens,) = decoder.go_on(module, [tokenizer("Add 2 and 3.")["input_ids"]], 60, frozenset())
    rows = [{"prompt": "Add 2 and 3.", "completion": c} for c in ("something else", "and more")]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    task = load(folder, replace(data, source=source, test_source=source))
    assert scored(task, score="exact").correct.tolist() == [False, False]
    # The same sequence, with what the model writes in the place of the first completion:
    sequences = Sequences.of([Encoded([*task.test.inputs.prompt(0), *tokens], len(task.test.inputs.prompt(0)))], 0, False)
    _, exact = scoring.read(task.module, sequences, sequences, 1)
    assert exact.tolist() == [True]


def test_scores_tell_the_loss_of_every_held_out_example_in_its_order(folders, data):
    task = load(folders["llama"], data)
    expected = [float(alone(folders["llama"], *row)) for row in ROWS]
    for score in ("exact", "generate"):
        scores = scored(task, score=score, max_new_tokens=3)
        np.testing.assert_allclose(scores.losses, expected, rtol=1e-4)
        assert scores.labels.tolist() == [0, 0, 0, 0]


def test_the_likeliest_option_is_the_one_that_costs_least(folders, tmp_path):
    options = ("yes", "no", "it and it and it")
    rows = [{"prompt": f"Question {i}: ", "completion": options[i % 3]} for i in range(9)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    data = DataConfig(source=source, test_source=source, options=options, partition=PartitionConfig(kind="iid"))
    folder = folders["gpt2"]
    task, tokenizer = load(folder, data), transformers.AutoTokenizer.from_pretrained(folder)
    mean = np.array([[float(alone(folder, row["prompt"], option)) for option in options] for row in rows])
    counts = np.array([[len(tokenizer(option)["input_ids"]) + 1 for option in options]])
    right = np.arange(9) % 3
    likely = scored(task, score="likelihood").correct
    assert likely.tolist() == ((mean * counts).argmin(axis=1) == right).tolist()
    normal = scored(task, score="likelihood", length_normalized=True).correct
    assert normal.tolist() == (mean.argmin(axis=1) == right).tolist()
    assert likely.tolist() != normal.tolist()  # a long option costs more than it is unlikely
    # Metrics hold the option that was found likeliest against the right one, by the options' names in order.
    judged = base.judged(task, EvalConfig(score="likelihood", metrics=("macro_f1", "per_label")))
    found, names = base.score(judged, 3), sorted(options)
    chosen = (mean * counts).argmin(axis=1)
    assert [names[i] for i in found.predictions] == [options[i] for i in chosen]
    assert [names[i] for i in found.targets] == [options[i] for i in right]
    assert found.figures["per_label"] == {name: float((chosen == i)[right == i].mean()) for i, name in enumerate(options)}
    assert found.labels.tolist() == task.test.labels.tolist()


def test_what_is_scored_must_be_there(folders, data):
    task = load(folders["llama"], data)
    without = task.objective
    without = replace(without, questions=replace(without.questions, generates=False))
    with pytest.raises(ConfigError, match="the model has no cache of earlier tokens"):
        without.under(EvalConfig(score="generate"))
    with pytest.raises(ConfigError, match="no options to choose from"):
        scored(task, score="likelihood")
    with pytest.raises(ConfigError, match="metric 'macro_f1': is of predictions, and this task has losses"):
        base.judged(task, EvalConfig(score="exact", metrics=("macro_f1",)))
    with pytest.raises(ConfigError, match="eval.extract = 'number': nothing to extract in the answer ' on'"):
        scored(task, score="generate", extract="number")
    with pytest.raises(ConfigError, match="the longest prompt has 35 tokens and the model takes 1200 in all"):
        scored(task, score="generate", max_new_tokens=1166)
    with pytest.raises(ConfigError, match="eval.max_new_tokens: expected no value, because this key is only for causal-lm"):
        Config(eval=EvalConfig(max_new_tokens=5))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sells 16 - 3 - 4 = 9.\nShe makes 9 * 2 = $18.\n#### 18", "18"),
        ("#### 2,125", "2125"),
        ("#### -5 dollars, or 7", "-5"),
        ("so 16-3", "3"),  # a difference, no negative number
        ("it is $1,234.50 in all.", "1234.5"),
        ("18.00", "18"),
        ("#### none, 4 before", "4"),
        ("7 before\n#### none", None),
        ("no number", None),
        (".5", "0.5"),
        ("1,2,3", "3"),
        ("#### 5\nQuestion: 7\n#### 8", "5"),  # what is written after the answer is none of it
    ],
)
def test_the_number_of_an_answer(text, number):
    assert scoring.number_of(text) == number


@pytest.mark.parametrize(
    ("text", "options", "option"),
    [
        ("the correct answer is answer3", ("answer1", "answer2", "answer3"), "answer3"),
        ("True, not false", ("true", "false"), "true"),
        ("untrue", ("true", "false"), None),
        ("answer12", ("answer1", "answer12"), "answer12"),
        ("", ("a",), None),
    ],
)
def test_the_option_of_an_answer(text, options, option):
    assert scoring.option_of(text, options) == option


# --- real sets -------------------------------------------------------------------------------------------------------


def test_gsm8k_reads_learns_and_scores_as_published(folders, shared_data):
    gsm8k = shared_data / "gsm8k"
    data = DataConfig(
        source=str(gsm8k / "train.jsonl"),
        test_source=str(gsm8k / "test.jsonl"),
        format="gsm8k",
        train_examples=5,
        test_examples=4,
        partition=PartitionConfig(kind="iid"),
    )
    train, test = instructions.load_split(data)
    assert (len(train), len(test)) == (7473, 1319)
    assert not any("<<" in item.completion for item in (*train.items, *test.items))
    published = [json.loads(line)["answer"].split("####")[1] for line in (gsm8k / "test.jsonl").read_text().splitlines()]
    found = [scoring.number_of(item.reference) for item in test.items]
    assert [float(number) for number in found] == [float(answer.replace(",", "")) for answer in published]
    assert test.items[0].prompt.startswith("Question: Janet’s ducks lay 16 eggs per day.")
    assert test.items[0].prompt.endswith("\nAnswer: ")
    assert test.items[0].completion.startswith("Janet sells 16 - 3 - 4 = 9 duck eggs a day.\nShe makes 9 * 2 = $18 every")
    with pytest.raises(DataError, match="leave no room"):
        load(folders["llama"], data)
    task = load(folders["llama"], data, max_length=900)
    assert (len(task.train), len(task.test), task.label_names) == (5, 4, ("all",))
    assert "cut" not in task.name
    scores = scored(task, max_new_tokens=4)  # `auto` is what a set is usually scored by
    assert isinstance(task.objective.under(EvalConfig()).judge, scoring.Generate)
    assert not scores.correct.any()
    lines = {
        json.loads(line)["question"]: json.loads(line)["answer"] for line in (gsm8k / "test.jsonl").read_text().splitlines()
    }
    for item, loss in zip(task.objective.questions.items, scores.losses, strict=True):
        question = item.prompt.removeprefix("Question: ").removesuffix("\nAnswer: ")
        clean = re.sub("<<.*?>>", "", lines[question])
        # ' I' is one token of this tokenizer, across the boundary: then the text is parted before it
        given, learned = ("Answer:", f" {clean}") if clean.startswith("I") else ("Answer: ", clean)
        expected = alone(folders["llama"], f"Question: {question}\n{given}", learned)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_configuration_for_gsm8k_federates_it(folders, shared_data):
    gsm8k = shared_data / "gsm8k"
    smaller = [
        "model.max_length=900",
        "data.train_examples=40",
        "data.test_examples=2",
        "clients.ranks=[2,4]",
        "clients.count=4",
    ]
    paths = [f"model.path={folders['llama']}", f"data.source={gsm8k}/train.jsonl", f"data.test_source={gsm8k}/test.jsonl"]
    built = simulation.build(load_config(CONFIGS / "gsm8k.toml", [*smaller, *paths]))
    assert built.engine.model.targets.keys() == {f"model.layers.{i}.self_attn.{map}_proj" for i in (0, 1) for map in "qv"}
    assert built.facts.train_examples == 40
    assert built.engine.model.task.objective.judge == scoring.Generate(256, scoring.number_of)
    built.close()


def test_a_commonsense_set_is_scored_by_the_options_of_each_row(folders, shared_data):
    source = str(shared_data / "commonsense" / "ARC-Easy" / "test.json")
    data = DataConfig(source=source, format="commonsense", test_examples=6, train_examples=6, partition=PartitionConfig("iid"))
    train, test = instructions.load_split(data)
    assert len(train) + len(test) == 2376
    assert train.label_names == (
        "answer1/answer2/answer3",
        "answer1/answer2/answer3/answer4",
        "answer1/answer2/answer3/answer4/answer5",
    )
    four = next(item for item in train.items if len(item.options) == 4)
    assert four.choices == tuple(f"the correct answer is answer{i}" for i in (1, 2, 3, 4))
    assert four.completion == f"the correct answer is {four.reference}"
    task = load(folders["gpt2"], data, max_length=1000)
    judged = task.objective.under(EvalConfig())
    assert judged.judge == scoring.Likelihood(normalized=False)
    scores = judged.score(task.module, task.test, 4)
    for item, correct in zip(task.objective.questions.items, scores.correct, strict=True):
        costs = [float(alone(folders["gpt2"], item.prompt, choice)) * (len(choice) + 1) for choice in item.choices]  # bytes
        assert correct == (item.options[int(np.argmin(costs))] == item.reference)


# --- labels and partitions -------------------------------------------------------------------------------------------


def test_labels_are_a_column_or_the_options_or_none(folders, tmp_path, data):
    with pytest.raises(DataError, match="'dirichlet' splits by label and the examples of .* have none; name a column"):
        load(folders["llama"], replace(data, partition=PartitionConfig(kind="dirichlet")))
    task = load(folders["llama"], replace(data, partition=PartitionConfig(kind="column", column="site")))
    shards = partition.partition(PartitionConfig(kind="column", column="site"), task.train.labels, 2, 0, task.columns)
    assert [shard.tolist() for shard in shards] == [[0, 2], [1, 3]]
    named = load(folders["llama"], replace(data, label="site", partition=PartitionConfig(kind="dirichlet")))
    assert (named.train.labels.tolist(), named.label_names) == ([0, 1, 0, 1], ("s0", "s1"))
    with pytest.raises(DataError, match="no column 'sight' for data.label; did you mean 'site'"):
        load(folders["llama"], replace(data, label="sight"))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([{"prompt": "a"}], {}, "line 1: no value in column 'completion' (data.format = 'columns'); did you mean 'prompt'"),
        ([{"prompt": "a", "completion": " "}], {}, "line 1: expected a completion in column 'completion', got an empty one"),
        ([{"prompt": "", "completion": "b"}], {}, "the prompt '' gives no token"),
        ([{"prompt": "a", "completion": "b"}], {"template": "{prompt}"}, "expected the field {completion} exactly once"),
        ([{"prompt": "a", "completion": "b"}], {"template": "{prmpt}{completion}"}, "no column 'prmpt'"),
        ([{"prompt": "a", "completion": "b"}], {"template": "{prompt!r}{completion}"}, "expected plain fields"),
        ([{"prompt": "a", "completion": "b"}], {"template": "{prompt{completion}"}, "write braces that are not a field twice"),
        ([{"prompt": "a", "completion": "b"}], {"options": ("yes", "no")}, "expected one of data.options, yes, no, got 'b'"),
        ([{"prompt": "a", "completion": "b"}], {"train_examples": 2}, "data.train_examples = 2: the source has only 1"),
        ([{"messages": "hi"}], {"format": "messages"}, "line 1: expected messages as a list"),
        (
            [{"messages": [{"role": "user", "content": "hi"}]}],
            {"format": "messages"},
            "that end with a message of the assistant",
        ),
        ([{"question": "a"}], {"format": "gsm8k"}, "no value in column 'answer' (data.format = 'gsm8k')"),
        (
            [{"instruction": "a", "output": "b", "answer": "b"}],
            {"format": "commonsense"},
            "expected an instruction that ends with its options",
        ),
        (
            [{"instruction": "Answer format: yes/no", "output": "b", "answer": "no"}],
            {"format": "commonsense"},
            "expected an answer among yes, no and in the output, got 'no'",
        ),
    ],
)
def test_rows_that_are_no_instructions_stop_with_the_place_and_the_mend(folders, tmp_path, rows, options, says):
    source = write_rows(tmp_path / "rows.jsonl", rows)
    data = DataConfig(source=source, test_source=source, partition=PartitionConfig(kind="iid"), **options)
    with pytest.raises(DataError) as caught:
        load(folders["llama"], data)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_model_is_its_local_snapshot(folders, data, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(folders["llama"]))
    settings = ModelConfig(name="someone/some-model", task="causal-lm")
    assert causal.load(settings, data, LoraConfig(), None).base_model == "someone/some-model"


def test_a_narrow_model_learns_and_writes_nearly_the_same(folders, data):
    settings = ModelConfig(path=str(folders["llama"]), task="causal-lm", train_dtype="bfloat16")
    narrow = place(causal.load(settings, data, LoraConfig(), None), settings)
    assert narrow.module.get_parameter("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16
    assert narrow.module.get_parameter("model.norm.weight").dtype == torch.float32
    exact = losses(load(folders["llama"], data), equal_lengths=True)
    for even in (False, True):
        torch.testing.assert_close(losses(narrow, even), exact, rtol=0.05, atol=0)
    scores = scored(narrow, score="generate", max_new_tokens=2)
    np.testing.assert_allclose(scores.losses, exact, rtol=0.05)


def test_models_that_cannot_be_used_are_refused(folders, data, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load(tmp_path / "none", data)
    with pytest.raises(ModelError, match="takes at most 1200 tokens"):
        load(folders["llama"], data, max_length=1201)
    with pytest.raises(ConfigError, match="has its own head, which stays frozen"):
        load(folders["llama"], data, head="trained")
    with pytest.raises(ModelError, match="its tokenizer has no chat template"):
        load(make_model(tmp_path / "plain", chat=False), replace(data, chat=True))
    with pytest.raises(ModelError, match="its vocabulary covers only data.source = 'arithmetic'"):
        causal.load(ModelConfig(name="arithmetic-decoder", task="causal-lm"), data, LoraConfig(), tmp_path)
    with pytest.raises(ModelError, match="give model.name .* or model.path"):
        causal.load(ModelConfig(task="causal-lm"), data, LoraConfig(), tmp_path)


# --- the embedded task -----------------------------------------------------------------------------------------------


def solved(steps):
    """The value that worked steps come to, each checked and each going on from the last; `None` where one is wrong."""
    value = None
    for step in steps:
        left, operation, right, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups()
        if value is not None and int(left) != value:
            return None
        value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[operation]
        if value != int(result) or value < 0:
            return None
    return value


def test_problems_are_worked_out_rightly_and_families_are_their_operations():
    names = {word: i for i, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])}
    train, test = arithmetic.load_split()
    assert (len(train), len(test)) == (3000, 300)
    for part in (train, test):
        for item, label in zip(part.items, part.labels, strict=True):
            *steps, answer = item.completion.removeprefix(" ").split("\n")
            assert answer == f"#### {solved(steps)}"
            family = "".join(re.sub(r"[\d=]", "", step) for step in steps)
            assert arithmetic.FAMILIES[part.label_names[label]] == family
            told = [names[word] for word in re.findall(r"\w+", item.prompt) if word in names]
            worked = [int(steps[0].split(family[0])[0]), *(int(re.split(r"[-+*=]", step)[1]) for step in steps)]
            assert told == worked  # the numbers of the text, in its order
    assert np.bincount(test.labels).tolist() == [50] * 6
    assert not re.search(r"\d", "".join(item.prompt for item in train.items))


def test_the_tokenizer_of_the_embedded_task_reads_and_writes_every_text():
    tokenizer = arithmetic.make_tokenizer()
    rng = np.random.default_rng(0)
    texts = [arithmetic.small_talk(rng) for _ in range(200)]
    for telling in (arithmetic.PLAIN, arithmetic.RETOLD):
        texts += [
            "".join(arithmetic.problem(telling, operations, rng))
            for operations in arithmetic.FAMILIES.values()
            for _ in range(99)
        ]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) < 100


@pytest.fixture
def quick(monkeypatch):
    """The embedded decoder after a tenth of a second of training: of its kind, but good for nothing."""
    recipe = arithmetic.Recipe(steps=4, batch_size=4)
    full = arithmetic.pretrained
    monkeypatch.setattr(arithmetic, "pretrained", lambda folder, progress=None: full(folder, progress, recipe))
    return full, recipe


def test_the_embedded_decoder_is_made_once_and_always_the_same(quick, tmp_path):
    full, recipe = quick
    state, seen = torch.get_rng_state(), []
    made = full(tmp_path / "one", lambda done, total: seen.append((done, total)), recipe)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    again = full(tmp_path / "one", lambda done, total: pytest.fail("trained again"), recipe)
    torch.manual_seed(7)
    anew = full(tmp_path / "two", None, recipe)
    start = full(tmp_path / "three", None, replace(recipe, steps=1, learning_rate=1e-9))
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
        assert torch.equal(tensor, anew.model.state_dict()[name])
    assert not torch.equal(made.model.lm_head.weight, start.model.lm_head.weight)
    assert torch.equal(made.model.lm_head.weight, made.model.model.embed_tokens.weight)
    torch.set_rng_state(state)


def test_a_federation_of_mixed_ranks_learns_the_embedded_task(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path / "cache"))
    config = Config(
        model=ModelConfig(name="arithmetic-decoder", task="causal-lm"),
        data=DataConfig(source="arithmetic", train_examples=60, test_examples=6),
        clients=ClientsConfig(count=4, participation=0.5, ranks=(2, 8)),
        train=TrainConfig(local_steps=3, batch_size=4, learning_rate=1e-2),
        eval=EvalConfig(batch_size=4, max_new_tokens=3),
    ).replace(run={"rounds": 2, "name": "small"})
    rounds = []
    summary = simulation.execute(config, tmp_path / "run", on_round=rounds.append)
    assert rounds[1]["loss"] < rounds[0]["loss"]
    assert 0 <= summary["accuracy"] <= 1
    adapter = Adapter.load(tmp_path / "run" / "adapter")
    assert len(adapter.layers) == 21  # seven maps in each of three layers
    assert adapter.layers["model.layers.2.mlp.down_proj"].A.shape == (8, 160)
    alone = replace(config, run=replace(config.run, stacking="never"))
    simulation.execute(alone, tmp_path / "alone")
    other = Adapter.load(tmp_path / "alone" / "adapter")
    for name, layer in adapter.layers.items():  # side by side or one after another, padded or in shared rows
        torch.testing.assert_close(layer.delta(), other.layers[name].delta(), rtol=1e-2, atol=1e-4)
