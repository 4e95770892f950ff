"""Small random transformers models with a word-level tokenizer: every architecture's real code, in milliseconds."""

from __future__ import annotations

import torch
import transformers

SENTENCE = "where is my card what the rate of exchange top up failed again please help me with it now pay bill"
WORDS = SENTENCE.split()
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
ARCHITECTURES = {
    "bert": lambda common: transformers.BertConfig(**SIZES, **common),
    "roberta": lambda common: transformers.RobertaConfig(**SIZES, **common, pad_token_id=0, type_vocab_size=1),
    "distilbert": lambda common: transformers.DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=48, **common),
    "electra": lambda common: transformers.ElectraConfig(**SIZES, **common, embedding_size=16),
    "gpt2": lambda common: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=common["vocab_size"], n_positions=80, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda common: transformers.LlamaConfig(**SIZES, **common, num_key_value_heads=2, bos_token_id=1, eos_token_id=2),
}


def make_tokenizer(folder, pad=True):
    """A word-level tokenizer that frames texts in [CLS] … [SEP], and pairs as BERT does; returns its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS), "arrival", "-", "_"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    framed = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.post_processor = processors.TemplateProcessing(*framed)
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | ({"pad_token": "[PAD]"} if pad else {})
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return len(vocabulary)


def settings_of(folder, architecture="bert", pad=True):
    """A small model's configuration, after its tokenizer is in `folder`; weights will be large, so that every layer matters."""
    common = {"vocab_size": make_tokenizer(folder, pad), "max_position_embeddings": 80, "initializer_range": 0.3}
    return ARCHITECTURES[architecture](common)


def make_model(folder, architecture="bert", pad=True, seed=0):
    """A small random encoder (or headless decoder) with its tokenizer in `folder`."""
    settings = settings_of(folder, architecture, pad)
    torch.manual_seed(seed)
    transformers.AutoModel.from_config(settings).save_pretrained(folder)
    return folder


def make_classifier(folder, architecture="bert", labels=("a", "b", "c"), seed=0):
    """A small random classifier for `labels` (a number of them: unnamed), with its tokenizer in `folder`."""
    settings = settings_of(folder, architecture)
    settings.num_labels = labels if isinstance(labels, int) else len(labels)
    if not isinstance(labels, int):
        settings.id2label = dict(enumerate(labels))
        settings.label2id = {label: i for i, label in enumerate(labels)}
    settings.pad_token_id = 0
    torch.manual_seed(seed)
    transformers.AutoModelForSequenceClassification.from_config(settings).save_pretrained(folder)
    return folder
