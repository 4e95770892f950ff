"""When an answer is correct: by the exact completion, by the generated text, or by the most likely of the options.

Answers are compared by what is extracted from them (`EXTRACTS`), with small functions of a text and the options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from decimal import Decimal
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from anyrank.config.sections import EvalConfig
from anyrank.data.instructions import Instruction
from anyrank.data.split import ordered
from anyrank.errors import ConfigError
from anyrank.messages.records import Scores
from anyrank.tasks.base import NOTHING, Examples, Inputs
from anyrank.tasks.language.decoder import Decoder, go_on
from anyrank.tasks.language.sequences import Sequences

Extract = Callable[[str, Sequence[str]], str | None]
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")  # 16-3 is 16 and 3, not 16 and -3
_MARK = "####"


# --- extracting an answer --------------------------------------------------------------------------------------------


def text_of(text: str, options: Sequence[str] = ()) -> str | None:
    """The whole text, with every run of white space replaced by one blank.

    >>> text_of(" the  sun\\n")
    'the sun'
    """
    return " ".join(text.split()) or None


def number_of(text: str, options: Sequence[str] = ()) -> str | None:
    """The first number after `####`, as GSM8K marks an answer, or else the last number; without separators or needless zeros.

    >>> number_of("He has 3.\\n#### 1,080"), number_of("So it is $18.00."), number_of("None.")
    ('1080', '18', None)
    """
    marked = text.partition(_MARK)[2] if _MARK in text else ""
    found = _NUMBER.findall(marked)[:1] or ([] if _MARK in text else _NUMBER.findall(text)[-1:])
    return f"{Decimal(found[0].replace(',', '')).normalize() + 0:f}" if found else None


def option_of(text: str, options: Sequence[str]) -> str | None:
    """The option that is named first, as a separate word in upper or lower case.

    >>> option_of("The correct answer is answer12, not answer1", ("answer1", "answer12"))
    'answer12'
    """
    found = [(match.start(), option) for option in options if (match := _word(option).search(text))]
    return min(found)[1] if found else None


def _word(option: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(option)}(?!\w)", re.IGNORECASE)


EXTRACTS: Mapping[str, Extract] = MappingProxyType({"text": text_of, "number": number_of, "option": option_of})


# --- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Questions:
    """The held-out examples of a task: `items`, their `sequences` of token ids, and facts about the model.

    `choices`: a sequence for each option of each item, one after another. `decode` makes a text of token ids, `ends` are the
    tokens that end a text, and the model takes at most `longest` tokens, if that is known; `generates`: the model has a cache
    for generation. `score` and `extract` are the meaning of `auto`.
    """

    items: Sequence[Instruction]
    sequences: Sequences
    choices: Sequences | None
    decode: Callable[[Sequence[int]], str]
    ends: frozenset[int]
    longest: int | None
    generates: bool
    score: str
    extract: str

    def __len__(self) -> int:
        return len(self.items)

    def part(self, index: np.ndarray) -> Questions:
        """The questions `index` `[n]`, in that order."""
        items, choices = [self.items[i] for i in index.tolist()], self.choices
        if choices is not None:
            ends = np.cumsum([len(item.options) for item in self.items])
            choices = choices.part(np.concatenate([np.arange(ends[i] - len(self.items[i].options), ends[i]) for i in index]))
        return replace(self, items=items, sequences=self.sequences.part(index), choices=choices)


class Judged(NamedTuple):
    """Which questions are `correct` `[n]` bool; for questions with options also the most likely one, `predictions` `[n]`, and
    the
    right one, `targets` `[n]`, both as places in `names`, the list of all options."""

    correct: np.ndarray
    predictions: np.ndarray | None = None
    targets: np.ndarray | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exact:
    """A completion is correct if each of its tokens is the most likely one, as in greedy decoding."""

    gives: ClassVar[frozenset[str]] = frozenset({"losses"})

    def __call__(self, decoder: Decoder, questions: Questions, exact: np.ndarray, batch_size: int) -> Judged:
        return Judged(exact)


@dataclass(frozen=True)
class Likelihood:
    """A question is correct if its most likely option is the right one, by the sum over the completion's tokens or
    (`normalized`) by their mean; in a tie, the first option counts."""

    normalized: bool
    gives: ClassVar[frozenset[str]] = frozenset({"losses", "predictions"})

    def __call__(self, decoder: Decoder, questions: Questions, exact: np.ndarray, batch_size: int) -> Judged:
        choices = questions.choices
        losses, _ = read(decoder, choices, choices, batch_size)
        totals = losses if self.normalized else losses * (choices.lengths - choices.prompts).numpy()
        ends = np.cumsum([len(item.options) for item in questions.items])
        likeliest = [int(own.argmin()) for own in np.split(totals, ends[:-1])]
        right = [item.options.index(option_of(item.reference, item.options)) for item in questions.items]
        names = ordered(option for item in questions.items for option in item.options)
        place = {name: i for i, name in enumerate(names)}
        predictions, targets = (
            np.array([place[item.options[i]] for item, i in zip(questions.items, chosen, strict=True)])
            for chosen in (likeliest, right)
        )
        return Judged(np.array(likeliest) == np.array(right), predictions, targets, tuple(names))


@dataclass(frozen=True)
class Generate:
    """A question is correct if the same answer is extracted from the reference and from the text that the model generates
    greedily, in at most `limit` tokens."""

    limit: int
    extract: Extract
    gives: ClassVar[frozenset[str]] = frozenset({"losses"})

    def __call__(self, decoder: Decoder, questions: Questions, exact: np.ndarray, batch_size: int) -> Judged:
        right = np.zeros(len(questions), dtype=bool)
        for index in by_length(questions.sequences.prompts, batch_size):
            prompts = [questions.sequences.prompt(i) for i in index.tolist()]
            for i, tokens in zip(index.tolist(), go_on(decoder, prompts, self.limit, questions.ends), strict=True):
                item = questions.items[i]
                right[i] = self.extract(questions.decode(tokens), item.options) == self.extract(item.reference, item.options)
        return Judged(right)


Judge = Exact | Likelihood | Generate


def _exact(questions: Questions, config: EvalConfig) -> Judge:
    return Exact()


def _likelihood(questions: Questions, config: EvalConfig) -> Judge:
    if questions.choices is None:
        raise ConfigError("eval.score = 'likelihood': the data has no options to choose from; name them in data.options")
    return Likelihood(config.length_normalized)


def _generate(questions: Questions, config: EvalConfig) -> Judge:
    if not questions.generates:
        raise ConfigError(
            "eval.score = 'generate': the model has no cache of earlier tokens (past_key_values); choose another model"
        )
    name = questions.extract if config.extract == "auto" else config.extract
    empty = next((item for item in questions.items if EXTRACTS[name](item.reference, item.options) is None), None)
    if empty is not None:
        raise ConfigError(
            f"eval.extract = '{name}': nothing to extract in the answer {empty.reference[-60:]!r}; choose another"
        )
    longest = int(questions.sequences.prompts.max())
    if questions.longest and longest + config.max_new_tokens > questions.longest:
        raise ConfigError(
            f"eval.max_new_tokens = {config.max_new_tokens}: the longest prompt has {longest} tokens and the model takes "
            f"{questions.longest} in all; lower it, or model.max_length"
        )
    return Generate(config.max_new_tokens, EXTRACTS[name])


_JUDGES: Mapping[str, Callable[[Questions, EvalConfig], Judge]] = MappingProxyType(
    {"exact": _exact, "likelihood": _likelihood, "generate": _generate}
)


@dataclass(frozen=True, eq=False)
class Completion:
    """The module gives each example's loss itself: the mean cross-entropy over the tokens of its completion. `judge`
    decides which held-out `questions` are correct."""

    questions: Questions
    judge: Judge = field(default_factory=Exact)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs

    @property
    def gives(self) -> frozenset[str]:
        return self.judge.gives

    def score(self, module: nn.Module, examples: Examples, batch_size: int, of: Set[str] = NOTHING) -> Scores:
        losses, exact = read(module, examples.inputs, self.questions.sequences, batch_size)
        found = self.judge(module, self.questions, exact, batch_size)
        labels = examples.labels.cpu().numpy()  # kinds of questions; predictions are compared with the right options
        return Scores(found.correct, losses, labels, found.predictions, targets=found.targets, names=found.names)

    def part(self, index: np.ndarray) -> Completion:
        """The objective of some of the held-out questions."""
        return replace(self, questions=self.questions.part(index))

    def under(self, config: EvalConfig) -> Completion:
        name = self.questions.score if config.score == "auto" else config.score
        return replace(self, judge=_JUDGES[name](self.questions, config))


@torch.inference_mode()
def read(decoder: Decoder, inputs: Inputs, sequences: Sequences, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Each example's loss `[n]` float64, and whether each token of its completion is the most likely one `[n]` bool; `inputs`
    give the `sequences` in batches."""
    losses, exact = np.zeros(len(sequences)), np.zeros(len(sequences), dtype=bool)
    for index in by_length(sequences.lengths, batch_size):
        batch_losses, batch_exact = decoder.read(**inputs.batch(index))
        losses[index.numpy()], exact[index.numpy()] = batch_losses.double().cpu().numpy(), batch_exact.cpu().numpy()
    return losses, exact


def by_length(lengths: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches of examples of similar length, the longest first."""
    yield from lengths.argsort(descending=True, stable=True).split(batch_size)
