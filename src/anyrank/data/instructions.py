"""Instructions: prompts and completions for training, made from the rows of a source.

A template is a text with `{column}` fields. The part before the field of the completion is the prompt. That field and all that
follows it is the completion, which has the loss.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from anyrank import keys
from anyrank.config.sections import DataConfig
from anyrank.data import rows as sources
from anyrank.data.people import set_aside
from anyrank.data.split import ordered
from anyrank.errors import DataError, nearest

Row = Mapping[str, Any]
Fields = Mapping[str, str]
_SEED = 0  # which examples a limit keeps is the same for every run seed
_DEFAULT_LABEL = "label"
CLOSED = False  # labels are kinds of questions, not answers: held-out examples may be of other kinds
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # calculator annotations in GSM8K's answers, e.g. <<48/2=24>>
_ANSWER_FORMAT = re.compile(r"Answer format: (\w+(?:/\w+)+)\s*$")


@dataclass(frozen=True)
class Instruction:
    """A prompt and the completion to train on.

    The correct answer is extracted from `reference`. `options`: the answers to choose from, if there are any; `choices`: the
    completion for each of them. `turns`: the earlier messages of a chat, if a chat template makes the prompt.
    """

    prompt: str
    completion: str
    reference: str
    options: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    turns: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Instructions:
    """Instructions with `labels` `[n]` int64, indices into `label_names`. `columns`: the other columns of the source, `[n]` of
    str each. `score`, `extract`: the usual way to score instructions of this format.
    """

    items: tuple[Instruction, ...]
    labels: np.ndarray
    label_names: tuple[str, ...]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    score: str = "exact"
    extract: str = "text"

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: np.ndarray) -> Instructions:
        """The instructions `index` `[m]`, in that order, with all the label names."""
        columns = {name: values[index] for name, values in self.columns.items()}
        return replace(self, items=tuple(self.items[i] for i in index), labels=self.labels[index], columns=columns)

    def limited(self, number: int, key: str) -> Instructions:
        """`number` of them, drawn at random, the same for every run seed; all of them if it is 0."""
        if number > len(self):
            raise DataError(f"{key} = {number}: the source has only {len(self)} such examples; lower it, or leave it out")
        drawn = keys.rng(_SEED, "instructions", key).permutation(len(self))[:number]
        return self.take(np.sort(drawn)) if number else self


@dataclass(frozen=True)
class Template:
    """A text with fields, as pairs of a literal and a field: `prompt` before the completion's field, `learned` from it on."""

    prompt: tuple[tuple[str, str], ...]
    learned: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str, completion: str) -> Template:
        """The template `text`; its completion begins with the field `completion`. Raises `DataError`.

        >>> Template.parse("Q: {q}\\nA: {a}", "a").filled({"q": "1+1", "a": "2"})
        ('Q: 1+1\\nA: ', '2')
        """
        try:
            parts = [(literal, name, spec or conversion) for literal, name, spec, conversion in string.Formatter().parse(text)]
        except ValueError as error:
            raise DataError(f"data.template: {error}; write braces that are not a field twice: {{{{ and }}}}") from None
        if any(extra for _, _, extra in parts):
            raise DataError("data.template: expected plain fields, {column}, without ':' or '!'")
        names = [name for _, name, _ in parts]
        if names.count(completion) != 1:
            raise DataError(
                f"data.template: expected the field {{{completion}}} exactly once, at the beginning of the completion, "
                f"got it {names.count(completion)} times"
            )
        at = names.index(completion)
        before = [*((literal, name or "") for literal, name, _ in parts[:at]), (parts[at][0], "")]
        return cls(tuple(before), (("", completion), *((literal, name or "") for literal, name, _ in parts[at + 1 :])))

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for _, name in (*self.prompt, *self.learned) if name)

    def filled(self, fields: Fields) -> tuple[str, str]:
        """Prompt and completion with the values of `fields`."""
        prompt, learned = (
            "".join(literal + (fields[name] if name else "") for literal, name in part) for part in (self.prompt, self.learned)
        )
        return prompt, learned


# --- formats of rows -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How to read the rows of one kind of data set.

    `columns`: the columns that a row must have. `fields`: the values for a template. `template`, `chat`: the default template,
    without and with a chat template. `completion`, `reference`: the fields of the completion and of the correct answer.
    `variants`: the options of a row, and the value of the completion's field for each. `score`, `extract`: the usual scoring.
    """

    columns: tuple[str, ...]
    fields: Callable[[Row], dict[str, str]]
    template: str
    chat: str
    completion: str
    reference: str
    variants: Callable[[Fields], tuple[tuple[str, ...], tuple[str, ...]]]
    score: str
    extract: str


def _plain(row: Row) -> dict[str, str]:
    return {name: sources.spelt(value) for name, value in row.items()}


def _no_options(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (), ()


def _columns(config: DataConfig) -> Format:
    """Rows with a column of prompts and a column of completions; all rows have the options `data.options`."""
    options = config.options

    def variants(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
        given = fields[config.completion].strip()
        if options and given not in options:
            raise DataError(f"expected one of data.options, {', '.join(options)}, got {given!r}")
        return options, tuple(fields[config.completion].replace(given, option) for option in options)

    both = f"{{{config.prompt}}}{{{config.completion}}}"
    score, extract = ("likelihood", "option") if options else ("exact", "text")
    columns = (config.prompt, config.completion)
    return Format(columns, _plain, both, both, config.completion, config.completion, variants, score, extract)


def without_calculator(answer: str) -> str:
    """A GSM8K answer without its calculator annotations.

    >>> without_calculator("48/2 = <<48/2=24>>24 clips\\n#### 24")
    '48/2 = 24 clips\\n#### 24'
    """
    return _CALCULATOR.sub("", answer)


def _gsm8k(config: DataConfig) -> Format:
    """Grade-school mathematics: `question`, and an `answer` in steps that ends in `#### number`; annotations are removed."""

    def fields(row: Row) -> dict[str, str]:
        return _plain(row) | {"answer": without_calculator(sources.spelt(row["answer"]))}

    template = "Question: {question}\nAnswer: {answer}"
    columns = ("question", "answer")
    return Format(columns, fields, template, "{question}{answer}", "answer", "answer", _no_options, "generate", "number")


def answer_format(instruction: str) -> tuple[str, ...]:
    """The options at the end of a commonsense instruction of LLM-Adapters.

    >>> answer_format("Is ice cold?\\n\\nAnswer format: true/false")
    ('true', 'false')
    """
    found = _ANSWER_FORMAT.search(instruction)
    return tuple(found[1].split("/")) if found else ()


def _commonsense(config: DataConfig) -> Format:
    """LLM-Adapters' commonsense sets (Hu et al. 2023): `instruction`, ending in its options, `input`, `output`, `answer`."""

    def fields(row: Row) -> dict[str, str]:
        spelt = {"input": ""} | _plain(row)
        return spelt | {"instruction": "\n".join(text for text in (spelt["instruction"], spelt["input"]) if text)}

    def variants(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
        options, given = answer_format(fields["instruction"]), fields["answer"]
        head, answer, tail = fields["output"].rpartition(given) if given else ("", "", "")
        if not options:
            raise DataError("expected an instruction that ends with its options, 'Answer format: one/other'")
        if fields["answer"] not in options or not answer:
            raise DataError(f"expected an answer among {', '.join(options)} and in the output, got {fields['answer']!r}")
        return options, tuple(f"{head}{option}{tail}" for option in options)

    columns = ("instruction", "output", "answer")
    template = "### Instruction:\n{instruction}\n\n### Response:\n{output}"
    chat = "{instruction}{output}"
    return Format(columns, fields, template, chat, "output", "answer", variants, "likelihood", "option")


FORMATS: Mapping[str, Callable[[DataConfig], Format]] = MappingProxyType(
    {"columns": _columns, "gsm8k": _gsm8k, "commonsense": _commonsense}
)
MESSAGES = "messages"
ROLES = ("system", "user", "assistant")


# --- reading ---------------------------------------------------------------------------------------------------------


def load_split(config: DataConfig) -> tuple[Instructions, Instructions]:
    """Training and held-out instructions, from the sources that `anyrank.data.texts.load` reads.

    Held out are `data.test_source` or `data.test_split`, or else `data.test_fraction` of the rows, stratified by label and the
    same for every run seed. The label of a row is its column `data.label`, if there is one; else its options (`true/false`);
    else all rows have one label. Raises `DataError` with the place of the row.
    """
    train = _reading(config)(sources.training_rows(config), config)
    if not (config.test_source or config.test_split):
        return _divided(_labelled(train, ordered(train.names)), config)
    test = _reading(config)(sources.held_out_rows(config), config)
    names = ordered([*train.names, *test.names])
    return _labelled(train, names), _labelled(test, names)


def training(config: DataConfig) -> Instructions:
    """All instructions of `data.source`."""
    found = _reading(config)(sources.training_rows(config), config)
    return _labelled(found, ordered(found.names))


def given_held_out(config: DataConfig) -> Instructions | None:
    """The instructions of the test source or split; `None` if neither is set."""
    if not (config.test_source or config.test_split):
        return None
    found = _reading(config)(sources.held_out_rows(config), config)
    return _labelled(found, ordered(found.names))


def together(parts: Sequence[Instructions]) -> dict[str, Any]:
    """The items of all parts, one after the other."""
    return {"items": tuple(item for part in parts for item in part.items)}


def _divided(whole: Instructions, config: DataConfig) -> tuple[Instructions, Instructions]:
    chosen = set_aside(whole, config)
    if not chosen.any():
        raise DataError(
            f"{config.source}: {len(whole)} rows leave none to hold out at data.test_fraction = {config.test_fraction}; "
            "raise it, or give data.test_source"
        )
    return whole.take(np.flatnonzero(~chosen)), whole.take(np.flatnonzero(chosen))


def _reading(config: DataConfig) -> Callable[[Sequence[tuple[str, Row]], DataConfig], _Read]:
    return _read_messages if config.format == MESSAGES else _read_rows


@dataclass(frozen=True, eq=False)
class _Read:
    """Instructions, and the name of the label of each."""

    items: tuple[Instruction, ...]
    names: list[str]
    columns: Mapping[str, np.ndarray]
    score: str = "exact"
    extract: str = "text"


def _labelled(read: _Read, names: tuple[str, ...]) -> Instructions:
    place = {name: i for i, name in enumerate(names)}
    labels = np.array([place[name] for name in read.names], dtype=np.int64)
    return Instructions(read.items, labels, names, read.columns, read.score, read.extract)


def _read_rows(rows: Sequence[tuple[str, Row]], config: DataConfig) -> _Read:
    form = FORMATS[config.format](config)
    template = Template.parse(config.template or (form.chat if config.chat else form.template), form.completion)
    known = form.fields(_having(rows[0], form.columns, config))
    unknown = next((name for name in template.fields if name not in known), None)
    if unknown is not None:
        raise DataError(f"data.template: no column {unknown!r} in {rows[0][0]}; {nearest(unknown, known)}")
    items = tuple(_instruction(row, form, template, config) for row in rows)
    others = _others(rows, {*template.fields, *form.columns})
    return _Read(items, _names(rows, items, config), others, form.score, form.extract)


def _having(row: tuple[str, Row], columns: Sequence[str], config: DataConfig) -> Row:
    where, values = row
    lacking = next((name for name in columns if values.get(name) is None), None)
    if lacking is not None:
        raise DataError(
            f"{where}: no value in column {lacking!r} (data.format = '{config.format}'); {nearest(lacking, values)}"
        )
    return values


def _instruction(row: tuple[str, Row], form: Format, template: Template, config: DataConfig) -> Instruction:
    where, fields = row[0], form.fields(_having(row, form.columns, config))
    try:
        prompt, completion = template.filled(fields)
        options, values = form.variants(fields)
    except KeyError as error:
        raise DataError(f"{where}: no value in column {error} of data.template; correct or remove the row") from None
    except DataError as error:
        raise DataError(f"{where}: {error}; correct or remove the row") from None
    if not fields[form.completion].strip():
        raise DataError(f"{where}: expected a completion in column {form.completion!r}, got an empty one; remove the row")
    choices = tuple(template.filled({**fields, form.completion: value})[1] for value in values)
    turns = ({"role": "user", "content": prompt},) if config.chat else ()
    return Instruction(prompt, completion, fields[form.reference], options, choices, turns)


def _read_messages(rows: Sequence[tuple[str, Row]], config: DataConfig) -> _Read:
    """Chats: lists of messages with `role` and `content`; the last message, by the assistant, is the completion."""
    items = tuple(_chat(where, _having((where, row), (MESSAGES,), config)[MESSAGES]) for where, row in rows)
    return _Read(items, _names(rows, items, config), _others(rows, {MESSAGES}))


def _chat(where: str, messages: Any) -> Instruction:
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise DataError(
            f"{where}: expected messages as a list of objects with a 'role' ({', '.join(ROLES)}) and a text 'content'"
        )
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise DataError(
            f"{where}: expected messages that end with a message of the assistant, which is the training target; remove the row"
        )
    turns = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    return Instruction("", turns[-1]["content"], turns[-1]["content"], turns=turns[:-1])


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)


def _names(rows: Sequence[tuple[str, Row]], items: Sequence[Instruction], config: DataConfig) -> list[str]:
    """The name of the label of each row."""
    wanted = str(config.label)
    if all(wanted in row for _, row in rows):
        return [sources.label_of(row, wanted, where) for where, row in rows]
    if wanted != _DEFAULT_LABEL:
        raise DataError(f"{rows[0][0]}: no column {wanted!r} for data.label; {nearest(wanted, rows[0][1])}")
    return ["/".join(item.options) or "all" for item in items]


def _others(rows: Sequence[tuple[str, Row]], used: set[str]) -> dict[str, np.ndarray]:
    """The columns that all rows have and that are not used in a prompt or completion."""
    shared = [name for name in rows[0][1] if name not in used and all(name in row for _, row in rows)]
    return {name: np.array([sources.spelt(row[name]) for _, row in rows], dtype=object) for name in shared}
