"""The embedded language task: a small decoder that has learned to solve plain sums, and then meets other phrasings of them.

The base model, a Llama of three layers and about ninety words and signs, is pretrained when it is needed on generated problems
in digits (about a minute on one core) and kept in the cache:

    Tom has 7 coins. Tom gets 5 more. How many coins?  →  7+5=12, #### 12

Clients then teach it the same sums in number words, with other verbs and in other sentences; the base model has met these words
only without a meaning for a sum:

    First seven coins, then Tom buys five. Total?

Problems are of six families by the operations they take; the answer is still computed in digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank import keys
from anyrank.data import cache
from anyrank.data.instructions import Instruction, Instructions
from anyrank.errors import ModelError
from anyrank.tasks.language.decoder import Pretrained
from anyrank.tasks.language.sequences import Encoded, Sequences
from anyrank.tasks.pretrained import without_extra

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAME, SOURCE = "arithmetic-decoder", "arithmetic"
Progress = Callable[[int, int], None]
_SEED = 0  # of base model and problems, which are the same for every run seed
_TRAIN, _TEST = 3000, 300
_PEOPLE = ("Tom", "Ann", "Ben", "Eva", "Sam", "Mia", "Leo", "Zoe")
_ITEMS = ("apples", "coins", "books", "cards", "pens", "eggs")
_DIGITS = tuple("0123456789")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PAD, _END = "<pad>", "<end>"
FAMILIES = {"add": "+", "subtract": "-", "multiply": "*", "add twice": "++", "add, subtract": "+-", "multiply, add": "*+"}
_ACT: Mapping[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


# --- problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Telling:
    """A phrasing of sums: sentences with `{who}`, `{what}` and numbers `{a}`, `{b}`, and the numbers' names."""

    start: str
    product: str
    changes: Mapping[str, tuple[str, ...]]
    question: str
    numbers: tuple[str, ...]


PLAIN = Telling(
    start="{who} has {a} {what}.",
    product="{who} has {a} boxes of {b} {what}.",
    changes={"+": (" {who} gets {b} more.",), "-": (" {who} loses {b}.",)},
    question=" How many {what}?",
    numbers=_DIGITS,
)
RETOLD = Telling(
    start="First {a} {what}",
    product="{who} packs {a} bags, {b} {what} each",
    changes={
        "+": (", then {who} buys {b}", ", then {who} finds {b}"),
        "-": (", then {who} eats {b}", ", then {who} sells {b}"),
    },
    question=". Total?",
    numbers=_WORDS,
)


def problem(telling: Telling, operations: str, rng: np.random.Generator) -> tuple[str, str]:
    """A problem that takes `operations` one after another on numbers from 1 to 9, and its solution step by step."""
    who, what = (str(rng.choice(words)) for words in (_PEOPLE, _ITEMS))
    value = int(rng.integers(2, 10))
    opening = telling.product if operations[0] == "*" else telling.start
    text, steps, first = "", [], telling.numbers[value]
    for operation in operations:
        other = int(rng.integers(1, min(value, 10) if operation == "-" else 10))
        sentence = "" if operation == "*" else str(rng.choice(telling.changes[operation]))
        text += sentence.format(who=who, b=telling.numbers[other])
        result = _ACT[operation](value, other)
        steps.append(f"{value}{operation}{other}={result}")
        if operation == "*":
            opening = opening.replace("{b}", telling.numbers[other])
        value = result
    told = opening.format(who=who, what=what, a=first) + text + telling.question.format(what=what)
    return told, " " + "\n".join([*steps, f"#### {value}"])


def small_talk(rng: np.random.Generator) -> str:
    """The words of the other phrasing in sentences without sums, so that the base model knows the words only."""
    start = int(rng.integers(len(_WORDS) - 4))
    who, what, verb = (str(rng.choice(words)) for words in (_PEOPLE, _ITEMS, ("buys", "finds", "eats", "sells", "packs")))
    said = f"Total: {' '.join(_WORDS[start : start + 5])}.", f"First {who} {verb} {what}, then bags, each."
    return said[int(rng.integers(2))]


def load_split() -> tuple[Instructions, Instructions]:
    """The problems that clients hold, and those held out; labels are their families."""
    return _problems("train", _TRAIN), _problems("test", _TEST)


def _problems(part: str, number: int) -> Instructions:
    rng = keys.rng(_SEED, "arithmetic", part)
    labels = np.arange(number, dtype=np.int64) % len(FAMILIES)
    told = [problem(RETOLD, tuple(FAMILIES.values())[label], rng) for label in labels]
    items = tuple(Instruction(prompt, completion, completion) for prompt, completion in told)
    return Instructions(items, labels, tuple(FAMILIES), score="generate", extract="number")


# --- the base model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How the base model is made: AdamW with a warm-up and a cosine, on plain problems and some other sentences. Raise
    `version` when problems, network or training change.
    """

    version: int = 1
    width: int = 64
    layers: int = 3
    heads: int = 4
    steps: int = 1200
    batch_size: int = 32
    learning_rate: float = 4e-3
    warm_up: int = 50
    small_talk: float = 0.1  # share of examples
    prompt_weight: float = 0.1  # of a prompt's token in the loss, beside a completion's


def pretrained(folder: Path, progress: Progress | None = None, recipe: Recipe = Recipe()) -> Pretrained:
    """The decoder with its tokenizer, from the cache `folder` if the same recipe and torch made it before.

    `progress(done, total)` counts training steps. Raises `ModelError` if transformers is not installed.
    """
    tokenizer = make_tokenizer()
    model = _network(recipe, len(tokenizer))
    key = {"model": NAME, "torch": torch.__version__, "recipe": str(recipe)}
    found = cache.load(folder, NAME, key)
    if found is None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same bytes for any number of threads of the caller
        try:
            _train(model, tokenizer, recipe, progress)
        finally:
            torch.set_num_threads(threads)
        cache.store(folder, NAME, key, {name: parameter.data for name, parameter in model.named_parameters()})
    else:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(found[name])
    return Pretrained(NAME, tokenizer, model.eval().requires_grad_(False), TARGETS)


def make_tokenizer() -> Any:
    """A tokenizer of words with the blank before them, single digits and signs; what it writes is the text as it was."""
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise without_extra() from None
    pieces = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    vocabulary = {_PAD: 0, _END: 1}
    for text in _every_word():
        for piece, _ in pieces.pre_tokenize_str(text):
            vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, clean_up_tokenization_spaces=False
    )


def _every_word() -> Iterator[str]:
    """Texts that have every piece there is, in a fixed order."""
    yield from (f"{word} {word}" for word in (*_PEOPLE, *_ITEMS, *_WORDS))
    yield from ("".join(_DIGITS), "+-*=#\n .,:?", "Total: packs bags, each")
    for telling in (PLAIN, RETOLD):
        for text in (telling.start, telling.product, telling.question, *telling.changes["+"], *telling.changes["-"]):
            yield text.format(who="Tom", what="eggs", a="1", b="2")


def _network(recipe: Recipe, words: int) -> nn.Module:
    """A Llama with weights drawn by the recipe's own key."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=words,
        hidden_size=recipe.width,
        intermediate_size=5 * recipe.width // 2,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):  # its own start is drawn from torch's global state: leave that as it is
        model = LlamaForCausalLM(config)
    draw = keys.generator(_SEED, "arithmetic", "start")
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


def _train(model: nn.Module, tokenizer: Any, recipe: Recipe, progress: Progress | None) -> None:
    sequences = _corpus(tokenizer, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step, index in enumerate(torch.arange(len(sequences)).split(recipe.batch_size)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _share(recipe, step)
        _loss(model, sequences, index, recipe.prompt_weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, recipe.steps)


def _share(recipe: Recipe, step: int) -> float:
    """The share of the learning rate at a step: up within the warm-up, down along a cosine."""
    return min(1.0, (step + 1) / recipe.warm_up) * (1 + math.cos(math.pi * step / recipe.steps)) / 2


def _corpus(tokenizer: Any, recipe: Recipe) -> Sequences:
    """All training texts of the base model, in order."""
    rng, families = keys.rng(_SEED, "arithmetic", "pretraining"), tuple(FAMILIES.values())
    texts = []
    for _ in range(recipe.steps * recipe.batch_size):
        talk = rng.random() < recipe.small_talk
        texts.append((small_talk(rng), "") if talk else problem(PLAIN, families[int(rng.integers(len(families)))], rng))
    prompts, completions = (tokenizer([text[part] for text in texts])["input_ids"] for part in (0, 1))
    end = [tokenizer.eos_token_id]
    encoded = [Encoded(ids + learned + end, len(ids)) for ids, learned in zip(prompts, completions, strict=True)]
    return Sequences.of(encoded, tokenizer.pad_token_id, packs=False)


def _loss(model: nn.Module, sequences: Sequences, index: Tensor, prompt_weight: float) -> Tensor:
    """Cross-entropy over all tokens but a row's first, a prompt's with little weight."""
    batch = sequences.batch(index)
    real, scored = batch["owner"][:, 1:] >= 0, batch["scored"][:, 1:]
    logits = model(input_ids=batch["inputs"], use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits[real], batch["inputs"][:, 1:][real], reduction="none")
    weights = torch.where(scored[real], 1.0, prompt_weight)
    return (losses * weights).sum() / weights.sum()


def check_source(source: str) -> None:
    """Raise `ModelError` if the embedded decoder is used with other data than its own."""
    if source != SOURCE:
        raise ModelError(f"model.name = '{NAME}': its vocabulary covers only data.source = '{SOURCE}', got {source!r}")
