"""A whole classifier computes what transformers does, starts from its own head or a new one, and its adapters are PEFT's."""

import csv
import shutil

import numpy as np
import pytest
import torch

from anyrank import simulation
from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config, DataConfig, LoraConfig, ModelConfig
from anyrank.data import texts
from anyrank.errors import AnyRankError, ConfigError, ModelError
from anyrank.messages.records import Scaling
from anyrank.tasks.text import own_head
from anyrank.training.lora import LoraModel

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
from tiny import WORDS, make_classifier, make_model, settings_of  # noqa: E402 - needs transformers

ARCHITECTURES = ("bert", "roberta", "distilbert", "electra", "gpt2", "llama")
LABELS = ("top_up", "card", "Exchange")  # in the order of the model's outputs, which is not the alphabet's
TARGETS = {"distilbert": ("q_lin", "v_lin")}  # for which PEFT has no default


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`{architecture: classifier folder}`; read only."""
    root = tmp_path_factory.mktemp("classifiers")
    return {name: make_classifier(root / name, name, LABELS) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """40 rows with texts of 1 to 8 words in two columns, one of three labels in another case than the model's, and a site."""
    path, draw = tmp_path_factory.mktemp("data") / "rows.csv", np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "reply", "label", "site"])
        for i in range(40):
            texts = [" ".join(draw.choice(WORDS, draw.integers(1, 9))) for _ in range(2)]
            writer.writerow([*texts, LABELS[i % 3].lower(), f"s{i % 4}"])
    return str(path)


def load(folder, source, head="model", targets=None, **keys):
    model = ModelConfig(path=str(folder), task="text-classification", head=head)
    lora = LoraConfig(target_modules=TARGETS.get(folder.name, ()) if targets is None else targets)
    return own_head.load(model, DataConfig(source=source, **keys), lora, folder)


def refusal(*arguments, error=ModelError, **options):
    with pytest.raises(error) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(source, columns=("text",)):
    with open(source, newline="") as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


def logits(task):
    with torch.no_grad():
        return task.module(**task.train.inputs.batch(torch.arange(len(task.train))))


def alone(model, folder, rows):
    """The logits of each row alone through a model as transformers or PEFT has it: nothing padded, nothing of ours."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    told = "token_type_ids" if "type_vocab_size" in model.config.to_dict() and model.config.type_vocab_size > 1 else ""
    wanted = {"input_ids", told}
    with torch.no_grad():
        encoded = [{k: v for k, v in tokenizer(*row, return_tensors="pt").items() if k in wanted} for row in rows]
        return torch.cat([model.eval()(**each).logits for each in encoded])


def training_texts(source, columns=("text",)):
    """The texts of the training examples, each as the tuple of its columns."""
    train, _ = texts.load_split(DataConfig(source=source, text=columns if len(columns) == 2 else columns[0]))
    return [text if isinstance(text, tuple) else (text,) for text in train.texts]


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_model_for_each_text_alone(folders, source, architecture):
    task = load(folders[architecture], source)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folders[architecture])
    expected = alone(model, folders[architecture], training_texts(source))
    torch.testing.assert_close(logits(task), expected, atol=1e-4, rtol=0)
    assert expected.std(dim=0).min() > 0.01  # texts differ
    assert task.trained == ()


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_pairs_go_in_as_the_tokenizer_joins_them(folders, source, architecture):
    task = load(folders[architecture], source, text=("text", "reply"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folders[architecture])
    rows = training_texts(source, ("text", "reply"))
    torch.testing.assert_close(logits(task), alone(model, folders[architecture], rows), atol=1e-4, rtol=0)
    told = "segments" in task.train.inputs.batch(torch.arange(2))
    assert told == (architecture == "bert")  # the others have no embedding for which text a token is of


def test_labels_count_in_the_order_of_the_models_outputs(folders, source):
    task = load(folders["bert"], source)
    assert task.label_names == ("top_up", "card", "exchange")
    by_text = {row[0]: row[1] for row in rows_of(source, ("text", "label"))}
    expected = [task.label_names.index(by_text[text]) for (text,) in training_texts(source)]
    assert task.train.labels.tolist() == expected
    assert sorted(set(task.columns["site"])) == ["s0", "s1", "s2", "s3"]


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["model", "model-trained"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_adapter_gives_the_same_logits_as_peft_loads_it(folders, source, tmp_path, architecture, head):
    task = load(folders[architecture], source, head)
    model, draw = LoraModel(task), torch.Generator().manual_seed(1)
    start, plain = model.start(4, Scaling(2.0), seed=0), logits(task)
    layers = {
        name: layer.with_factors(*(torch.randn(factor.shape, generator=draw) / 4 for factor in (layer.A, layer.B)))
        for name, layer in start.layers.items()
    }
    tensors = {name: value + torch.randn(value.shape, generator=draw) for name, value in start.tensors.items()}
    assert bool(tensors) == (head == "model-trained")
    adapter = Adapter(layers, tensors, start.config)
    model.apply(adapter)
    adapted = logits(task)
    assert (adapted - plain).abs().max() > 0.01
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folders[architecture])
    reloaded = peft.PeftModel.from_pretrained(base, adapter.save(tmp_path / "adapter"))
    expected = alone(reloaded, folders[architecture], training_texts(source))
    torch.testing.assert_close(adapted, expected, atol=1e-4, rtol=0)


def test_a_part_without_the_head_loads_too(folders, source, tmp_path):
    """What goes into the base model has no head in it, though the adapter it comes from has: PEFT must not look for one."""
    start = LoraModel(load(folders["bert"], source, "model-trained")).start(4, Scaling(2.0), seed=0)
    assert start.config["task_type"] == "SEQ_CLS"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folders["bert"])
    plain = alone(base, folders["bert"], training_texts(source))
    reloaded = peft.PeftModel.from_pretrained(base, Adapter(start.layers, {}, start.config).save(tmp_path / "part"))
    assert torch.equal(alone(reloaded, folders["bert"], training_texts(source)), plain)  # B is still zero


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - TARGETS.keys()))
def test_adapters_go_where_peft_puts_them_by_default(folders, source, architecture):
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folders[architecture])
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", fan_in_fan_out=architecture == "gpt2"))
    names = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name in theirs.state_dict() if "lora_A" in name}
    assert set(load(folders[architecture], source).targets) == names


def test_a_run_leaves_a_classifier_that_peft_loads(folders, source, tmp_path):
    config = Config().replace(
        run={"rounds": 2},
        model={"path": str(folders["bert"]), "task": "text-classification", "head": "model-trained"},
        data={"source": source},
        clients={"count": 4, "participation": 1.0, "ranks": (2, 4)},
        train={"local_steps": 2, "batch_size": 4},
        eval={"batch_size": 64},
    )
    summary = simulation.execute(config, tmp_path / "run")
    assert "its own head, trained" in summary["task"]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folders["bert"])
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    named = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run" / "adapter")  # finds the base itself
    task = load(folders["bert"], source, "model-trained")
    model = LoraModel(task)
    model.apply(Adapter.load(tmp_path / "run" / "adapter"))
    for theirs in (reloaded, named):
        torch.testing.assert_close(logits(task), alone(theirs, folders["bert"], training_texts(source)), atol=1e-4, rtol=0)
    start = model.start(2, Scaling(2.0), seed=0).tensors["classifier.weight"]
    assert not torch.equal(start, Adapter.load(tmp_path / "run" / "adapter").tensors["classifier.weight"])


# --- heads -----------------------------------------------------------------------------------------------------------


def test_its_own_head_is_what_a_trained_one_starts_from(folders, source):
    task = load(folders["roberta"], source, "model-trained")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folders["roberta"])
    assert set(task.trained) == {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
    for name in task.trained:
        assert torch.equal(task.module.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize("labels", [("neutral", "positive", "negative"), ("yes", "no")])
def test_a_head_for_other_labels_is_made_anew_and_said_so(source, tmp_path, labels):
    folder = make_classifier(tmp_path / "bert", "bert", labels)
    assert "no head for the data's 3 labels (card, exchange, top_up)" in refusal(folder, source)
    one, other = (load(folder, source, "model-trained") for _ in range(2))
    assert "its head made anew for 3 labels, trained" in one.name
    assert one.label_names == ("card", "exchange", "top_up")
    assert set(one.trained) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(one.module.classifier.weight, other.module.classifier.weight)  # no draw of the process
    assert 0.2 < float(one.module.classifier.weight.std()) < 0.4  # as wide as transformers draws: 0.3
    assert one.module.classifier.bias.abs().max() == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(one.module.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


@pytest.mark.parametrize("own", [3, ("negative", "neutral", "positive")])
def test_labels_that_are_only_counted_are_told_by_their_order(tmp_path, own):
    """Unnamed outputs take any labels; numbered labels fit any names."""
    names = ("x", "y", "z") if own == 3 else ("0", "1", "2")
    rows = "text,label\n" + "".join(f"{WORDS[i]} card,{names[i % 3]}\n" for i in range(12))
    (tmp_path / "rows.csv").write_text(rows)
    task = load(make_classifier(tmp_path / "bert", "bert", own), str(tmp_path / "rows.csv"))
    assert task.label_names == names
    assert "its own head, frozen" in task.name


def test_an_encoder_without_a_pooler_trains_a_new_one(source, tmp_path):
    folder = make_model(tmp_path / "bert")
    transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    task = load(folder, source, "model-trained")
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} < set(task.trained)
    assert "made anew" in task.name
    assert "no head" in refusal(folder, source)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_models_that_do_not_choose_one_label_are_refused(folders, source, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    settings = transformers.AutoConfig.from_pretrained(folder)
    settings.problem_type = "multi_label_classification"
    settings.save_pretrained(folder)
    assert "got one for multi_label_classification" in refusal(folder, source)


def test_a_model_that_is_no_classifier_is_refused(source, tmp_path):
    folder = tmp_path / "vision"
    settings_of(folder)
    transformers.ViTConfig().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert "cannot load a sequence classifier" in refusal(folder, source)


def test_weights_that_lack_a_layer_are_not_filled_up_at_random(folders, source, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.attention.self.query.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "the weights lack bert.encoder.layer.1.attention.self.query.weight" in refusal(folder, source, "model-trained")


def test_a_decoder_must_know_its_padding(folders, source, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    settings_of(folder, "llama", pad=False)
    settings = transformers.AutoConfig.from_pretrained(folder)
    settings.pad_token_id = None
    settings.save_pretrained(folder)
    assert "names a padding token" in refusal(folder, source)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ((), "PEFT has no default for the architecture 'distilbert'; name them"),
        (("q_lim",), "did you mean 'q_lin'?"),
        (("classifier",), "the head gets no LoRA"),
    ],
)
def test_targets_that_cannot_be_are_refused(folders, source, targets, says):
    assert says in refusal(folders["distilbert"], source, targets=targets)


def test_longer_than_the_model_is_refused(folders, source):
    model = ModelConfig(path=str(folders["gpt2"]), task="text-classification", head="model", max_length=81)
    with pytest.raises(ModelError, match="takes at most 80 tokens"):
        own_head.load(model, DataConfig(source=source), LoraConfig(), folders["gpt2"])


def test_only_texts_have_a_models_own_head():
    with pytest.raises(ConfigError, match="'model' is only for text-classification"):
        Config().replace(model={"head": "model"})
    assert issubclass(ConfigError, AnyRankError)
