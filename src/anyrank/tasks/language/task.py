"""Instruction tuning of a causal language model: completions are learned from their prompts, LoRA inside the model.

The model is any that transformers loads as `AutoModelForCausalLM`, from a local folder or the hub, or the embedded one of
`anyrank.tasks.language.arithmetic`. The tokenizer reads prompt and completion as one text. Its leading tokens that are the same
for the prompt alone count as the prompt; all others are learned, followed by the token that ends the text. A token across the
boundary is therefore learned, and no token of the prompt alone has a loss. The tokenizer's chat template may write both.

Examples longer than `model.max_length` tokens are truncated at the end, and the task's note says how many. An example whose
prompt alone is too long is an error. Examples of a batch share rows, without seeing each other, if the model supports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from anyrank.config.sections import DataConfig, LoraConfig, ModelConfig, SiteConfig
from anyrank.data import instructions
from anyrank.data import sites as of_sites
from anyrank.data.instructions import Instruction, Instructions
from anyrank.errors import ConfigError, DataError, ModelError, nearest
from anyrank.tasks.base import Examples, Task, resolve_targets
from anyrank.tasks.language import arithmetic, decoder
from anyrank.tasks.language.decoder import Decoder, Pretrained
from anyrank.tasks.language.scoring import Completion, Questions
from anyrank.tasks.language.sequences import Encoded, Sequences
from anyrank.tasks.pretrained import first_line, quiet

Progress = Callable[[int, int], None]
_BY_LABEL = ("dirichlet", "pathological", "staircase")


def load(
    model: ModelConfig,
    data: DataConfig,
    lora: LoraConfig,
    folder: Path,
    progress: Progress | None = None,
    sites: Sequence[SiteConfig] = (),
) -> Task:
    """The instruction-tuning task of a configuration. `folder`: the cache of embedded models.

    Targets (`lora.target_modules`) are name endings as in PEFT; if none are given, PEFT's default for the architecture. The
    task does not depend on the run seed. Raises `ConfigError`, `DataError` and `ModelError`.
    """
    _check_head(model)
    train, test = _read(data, sites)
    if not sites:
        _check_partition(data, train)
    base = _base(model, data, folder, progress)
    targets = find_targets(base.model, lora.target_modules or base.targets or default_targets(base.model))
    module = Decoder(base.model).eval()
    writer = Writer(base, data.chat or data.format == instructions.MESSAGES, model.max_length)
    packs, encoded = decoder.packs(module, model.max_length), [writer.encoded(part.items) for part in (train, test)]
    sequences = [Sequences.of(part, writer.pad, packs) for part in encoded]
    return Task(
        name=f"instruction tuning ({'examples share rows' if packs else 'a row for each example'})",
        note=_told(encoded, model.max_length),
        module=module,
        targets=targets,
        train=Examples(sequences[0], torch.from_numpy(train.labels)),
        test=Examples(sequences[1], torch.from_numpy(test.labels)),
        label_names=train.label_names,
        head="frozen",
        base_model=base.name,
        peft={"task_type": "CAUSAL_LM"},
        columns=train.columns,
        test_columns=test.columns,
        objective=Completion(_questions(base, writer, test, sequences[1], module.generates)),
    )


def _read(data: DataConfig, sites: Sequence[SiteConfig]) -> tuple[Instructions, Instructions]:
    """Training and held-out instructions, in the requested numbers."""
    embedded = data.source == arithmetic.SOURCE
    train, test = arithmetic.load_split() if embedded else of_sites.load_split(instructions, data, sites)
    return train.limited(data.train_examples, "data.train_examples"), test.limited(data.test_examples, "data.test_examples")


def _base(model: ModelConfig, data: DataConfig, folder: Path, progress: Progress | None) -> Pretrained:
    if model.name == arithmetic.NAME:
        arithmetic.check_source(data.source)
        base = arithmetic.pretrained(folder, progress)
    else:
        base = decoder.load(model)
    if base.longest and model.max_length > base.longest:
        raise ModelError(f"model.max_length = {model.max_length}: {base.name} takes at most {base.longest} tokens; lower it")
    return base


def _questions(base: Pretrained, writer: Writer, test: Instructions, sequences: Sequences, generates: bool) -> Questions:
    choices = writer.choices(test.items)
    return Questions(
        items=test.items,
        sequences=sequences,
        choices=Sequences.of(choices, writer.pad, sequences.packs) if choices else None,
        decode=writer.decode,
        ends=base.ends,
        longest=base.longest,
        generates=generates,
        score=test.score,
        extract=test.extract,
    )


def _told(encoded: Sequence[Sequence[Encoded]], max_length: int) -> str:
    """The processing of the examples, in words."""
    cut, number = sum(each.cut for part in encoded for each in part), sum(map(len, encoded))
    return f"{cut:,} of {number:,} examples cut at {max_length} tokens" if cut else ""


def _check_head(model: ModelConfig) -> None:
    if model.head != "frozen":
        raise ConfigError(f"model.head: a causal language model has its own head, which stays frozen; got {model.head!r}")


def _check_partition(data: DataConfig, train: Instructions) -> None:
    if data.partition.kind in _BY_LABEL and len(np.unique(train.labels)) < 2:
        raise DataError(
            f"data.partition.kind = '{data.partition.kind}' splits by label and the examples of {data.source} have none; "
            "name a column in data.label, or use iid, quantity, column or sampled"
        )


# --- text to tokens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Writer:
    """Makes token ids of instructions, at most `max_length` of them, and text of token ids; `chat`: by the chat template."""

    base: Pretrained
    chat: bool
    max_length: int

    def __post_init__(self) -> None:
        if self.chat and not getattr(self.base.tokenizer, "chat_template", None):
            raise ModelError(f"{self.base.name}: its tokenizer has no chat template; remove data.chat, or give data.template")

    @property
    def pad(self) -> int:
        """The padding token. It is never read, so if the model has none, any id works."""
        pad = self.base.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def decode(self, tokens: Sequence[int]) -> str:
        return self.base.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def encoded(self, items: Sequence[Instruction]) -> list[Encoded]:
        """Prompt and completion of each item; too long ones are truncated. Raises `DataError` if a prompt leaves no space."""
        whole = self._whole(items, [item.completion for item in items])
        full = [each.prompt for each in whole if each.prompt >= self.max_length]
        if full:
            raise DataError(
                f"model.max_length = {self.max_length}: the prompts of {len(full):,} of {len(whole):,} examples leave no room "
                f"for a completion, the longest has {max(full):,} tokens; raise it, or remove those rows"
            )
        return [Encoded(each.ids[: self.max_length], each.prompt, len(each.ids) > self.max_length) for each in whole]

    def choices(self, items: Sequence[Instruction]) -> list[Encoded]:
        """Each item's prompt with each of its choices, one after another. All choices have the same prompt tokens."""
        repeated = [item for item in items for _ in item.choices]
        whole = self._whole(repeated, [choice for item in items for choice in item.choices])
        longest = max((len(each.ids) for each in whole), default=0)
        if longest > self.max_length:
            raise DataError(
                f"model.max_length = {self.max_length}: a held-out example with one of its options has {longest:,} tokens, and "
                "none may be cut; raise it"
            )
        found = iter(whole)
        groups = [[next(found) for _ in item.choices] for item in items]
        return [Encoded(each.ids, min(own.prompt for own in group)) for group in groups for each in group]

    def _whole(self, items: Sequence[Instruction], completions: Sequence[str]) -> list[Encoded]:
        """Each item's prompt with a completion, whatever its length."""
        if not items:
            return []
        write = self._said if self.chat else _written
        texts = [write(item, completion) for item, completion in zip(items, completions, strict=True)]
        given, all_ids = (self._ids([text[part] for text in texts]) for part in (0, 1))
        return [self._split(*each) for each in zip(given, all_ids, texts, strict=True)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        try:
            with quiet():
                return self.base.tokenizer(texts, add_special_tokens=not self.chat)["input_ids"]
        except Exception as error:  # tokenizers raises bare exceptions
            raise DataError(f"{self.base.name}: its tokenizer cannot read the data ({first_line(error)})") from None

    def _split(self, given: list[int], whole: list[int], texts: tuple[str, str]) -> Encoded:
        """The leading tokens that the prompt alone has too are the prompt; the rest is learned, up to the first end token."""
        shorter = min(len(given), len(whole))
        prompt = next((i for i in range(shorter) if given[i] != whole[i]), shorter)
        if not prompt:
            raise DataError(
                f"the prompt {texts[0][:60]!r} gives no token of {self.base.name}; give a prompt with text, or a template"
            )
        end = self.base.end
        learned = whole[prompt:]
        learned = learned[: learned.index(end) + 1] if end in learned else [*learned, end]
        return Encoded([*whole[:prompt], *learned], prompt)

    def _said(self, item: Instruction, completion: str) -> tuple[str, str]:
        """The chat up to the completion, and with it."""
        apply, answer = self.base.tokenizer.apply_chat_template, {"role": "assistant", "content": completion}
        try:
            prompt = apply(list(item.turns), add_generation_prompt=True, tokenize=False)
            return prompt, apply([*item.turns, answer], tokenize=False)
        except Exception as error:  # a template may raise anything
            raise DataError(f"{self.base.name}: its chat template rejects a conversation ({first_line(error)})") from None


def _written(item: Instruction, completion: str) -> tuple[str, str]:
    return item.prompt, item.prompt + completion


# --- targets ---------------------------------------------------------------------------------------------------------


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """PEFT's default name endings for this architecture."""
    kind = model.config.model_type
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known
    except ImportError:
        raise ModelError(
            "lora.target_modules: PEFT is needed for the default; pip install 'anyrank[peft]', or name them"
        ) from None
    if kind not in known:
        raise ModelError(f"lora.target_modules: PEFT has no default for '{kind}'; name them, e.g. {_leaves(model)[:3]}")
    return tuple(known[kind])


def find_targets(model: nn.Module, endings: Sequence[str]) -> tuple[str, ...]:
    """Full names of the model's linear and embedding layers that `endings` match. Raises `ModelError` if one has no match."""
    modules = dict(model.named_modules())
    for ending in endings:
        found = resolve_targets(model, [ending])
        wrong = [name for name in found if getattr(modules[name], "weight", None) is None or modules[name].weight.ndim != 2]
        if not found or wrong:
            what = f"{wrong[0]} is no linear or embedding layer" if wrong else f"matches no module of {type(model).__name__}"
            raise ModelError(f"lora.target_modules: '{ending}': {what}; {nearest(ending, _leaves(model))}")
    return resolve_targets(model, endings)


def _leaves(model: nn.Module) -> list[str]:
    """The last part of the names of modules with a matrix."""
    named = {name.rpartition(".")[2] for name, module in model.named_modules() if not [*module.children()] and _matrix(module)}
    return sorted(named)


def _matrix(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2
