"""A pretrained causal language model with its tokenizer: loaded, run on completions, and used to generate from a prompt.

transformers is imported when a model is loaded; no code of a model folder is run, and nothing here trains.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank.config.sections import ModelConfig
from anyrank.errors import ModelError
from anyrank.tasks.language.sequences import Encoded, Sequences
from anyrank.tasks.pretrained import first_line, quiet, snapshot, weight_files, without_extra

_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")
# Layers with a limited attention window use their own mask, which a mask from here would replace.
_WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A causal language model as transformers knows it, frozen, with its tokenizer; `targets` are its default LoRA
    modules (empty: PEFT's default).
    """

    name: str
    tokenizer: Any
    model: nn.Module
    targets: tuple[str, ...] = ()

    @property
    def end(self) -> int:
        """The token at the end of completions."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(f"{self.name}: its tokenizer has no end-of-sequence token (eos_token); set it there")
        return self.tokenizer.eos_token_id

    @property
    def ends(self) -> frozenset[int]:
        """All tokens that end a generated text: the tokenizer's, and those in the model's settings."""
        named = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return frozenset([self.end, *(named if isinstance(named, list) else [] if named is None else [named])])

    @property
    def longest(self) -> int | None:
        """The number of tokens for which the model has positions, if it is known."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load(config: ModelConfig) -> Pretrained:
    """The model of a local folder (`model.path`) or of a hub id (`model.name`), in evaluation mode, its matrices in
    `model.train_dtype`.

    Raises `ModelError` if none is named, and for a folder without a complete causal language model.
    """
    if not (config.name or config.path):
        raise ModelError("model: give model.name (arithmetic-decoder or a hub id) or model.path, a transformers folder")
    folder = Path(config.path) if config.path else snapshot(config.name, _PATTERNS)
    name = config.path or config.name
    weight_files(folder, name)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise without_extra() from None
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **local
            )
    except Exception as error:  # transformers raises nearly every kind
        raise ModelError(f"{folder}: transformers cannot load a causal language model ({first_line(error)})") from None
    missing = sorted(report["missing_keys"])  # transformers fills them at random
    if missing:
        raise ModelError(
            f"{folder}: the weights lack {missing[0]} ({len(missing)} in all); the files belong to different models"
        )
    for parameter in model.parameters():  # as `tasks.place` has them, without a float32 copy of a narrow model on the way
        narrow = config.train_dtype == "bfloat16" and parameter.ndim >= 2
        parameter.data = parameter.data.to(torch.bfloat16 if narrow else torch.float32)
    return Pretrained(name, tokenizer, model.eval().requires_grad_(False))


# --- the module ------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A causal language model that gives the loss of completions, under the model's own module names.

    Its forward pass takes a batch of `Sequences.batch` and gives the mean cross-entropy over the tokens of each example's
    completion, `[b]`: an example's loss does not depend on other examples of the batch or on their lengths.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        self._model = (model,)  # in a tuple, so that its modules are not registered under a second name
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self.requires_grad_(False)

    @property
    def whole(self) -> nn.Module:
        """The language model itself, whose modules these are."""
        return self._model[0]

    @property
    def generates(self) -> bool:
        """Whether the model has a cache of earlier tokens."""
        return "past_key_values" in self._takes

    def forward(
        self, inputs: Tensor, owner: Tensor, positions: Tensor, scored: Tensor, counts: Tensor, packed: bool = False
    ) -> Tensor:
        logits, chosen = self._logits(inputs, owner, positions, scored, packed)
        losses = F.cross_entropy(logits.float(), inputs.to(logits.device)[chosen], reduction="none")
        return _by_example(losses, owner, positions, chosen, len(counts)).sum(dim=1) / counts.to(losses.device)

    def read(
        self, inputs: Tensor, owner: Tensor, positions: Tensor, scored: Tensor, counts: Tensor, packed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The loss of each example, `[b]`, and whether every token of its completion is the most likely one, `[b]` bool:
        whether
        greedy decoding would write exactly the completion."""
        logits, chosen = self._logits(inputs, owner, positions, scored, packed)
        wanted = inputs.to(logits.device)[chosen]
        losses = F.cross_entropy(logits.float(), wanted, reduction="none")
        wrong = (logits.argmax(dim=1) != wanted).float()
        tables = (_by_example(values, owner, positions, chosen, len(counts)) for values in (losses, wrong))
        total, errors = (table.sum(dim=1) for table in tables)
        return total / counts.to(losses.device), errors == 0

    def _logits(self, inputs: Tensor, owner: Tensor, positions: Tensor, scored: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
        """Logits `[s, vocabulary]` of the scored tokens, each from the token before it, and the places of these, `[r, t]` bool.

        Padding is after all tokens, where causal attention never looks: a batch of one example per row needs no mask.
        """
        device = next(self.parameters()).device
        call: dict[str, Any] = {"input_ids": inputs.to(device), "use_cache": False}
        if packed:
            call |= {"attention_mask": self._apart(owner.to(device)), "position_ids": positions.to(device)}
        columns = (
            scored[:, 1:].any(dim=0).nonzero().squeeze(1)
        )  # the vocabulary is large, so only the needed logits are computed
        if "logits_to_keep" in self._takes:
            logits = self._run(call | {"logits_to_keep": columns.to(device)}).logits
        else:
            logits = self._run(call).logits[:, columns.to(device)]
        return logits[scored[:, columns + 1].to(device)], scored.to(device)

    def step(self, ids: Tensor, mask: Tensor, kept: Any) -> tuple[Tensor, Any]:
        """Logits `[b, vocabulary]` of the token after `ids` `[b, t]`, and the cache for the next step.

        `kept`: the cache of the previous step, or `None`; `mask` `[b, all tokens so far]`: 0 for padding in front.
        """
        call: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": kept, "use_cache": True}
        if "position_ids" in self._takes:
            call["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            call["logits_to_keep"] = 1
        output = self._run(call)
        return output.logits[:, -1], output.past_key_values

    def _run(self, call: Mapping[str, Any]) -> Any:
        """The model's own output; products in bfloat16 where its matrices are."""
        weight = next(self.parameters())
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype == torch.bfloat16):
            return self.whole(**call)

    def _apart(self, owner: Tensor) -> Tensor:
        """The additive attention mask, `[r, 1, t, t]`: zero if a token looks back at a token of its own example."""
        dtype, places = next(self.parameters()).dtype, torch.arange(owner.shape[1], device=owner.device)
        seen = (owner[:, :, None] == owner[:, None, :]) & (places[:, None] >= places)
        return torch.zeros(seen.shape, dtype=dtype, device=owner.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _by_example(values: Tensor, owner: Tensor, positions: Tensor, chosen: Tensor, examples: int) -> Tensor:
    """`values` `[s]` of the chosen tokens as a row for each example, `[b, t]`; zero elsewhere."""
    table = values.new_zeros(examples, owner.shape[1])
    return table.index_put((owner.to(values.device)[chosen], positions.to(values.device)[chosen]), values)


@torch.no_grad()
def packs(decoder: Decoder, max_length: int) -> bool:
    """Whether examples can share rows: tested on three short ones, compared with a row for each.

    Layers whose attention window is shorter than `max_length` tokens are excluded, because short examples would not show it.
    """
    settings = decoder.whole.config.get_text_config()
    if any((getattr(settings, name, None) or max_length) < max_length for name in _WINDOWS):
        return False
    size = settings.vocab_size
    probe = [Encoded([(7 * i + 3 * j + 1) % size for j in range(length)], 1) for i, length in enumerate((9, 5, 4))]
    together, index = Sequences.of(probe, 0, packs=True), torch.arange(3)
    apart = decoder(**together.batch(index, equal_lengths=True))
    try:
        shared = decoder(**together.batch(index))
    except (AttributeError, TypeError, ValueError, RuntimeError):  # no such mask, no such positions
        return False
    tolerance = 1e-4 if apart.dtype == torch.float32 and next(decoder.parameters()).dtype == torch.float32 else 2e-2
    return torch.allclose(shared, apart, rtol=tolerance, atol=tolerance)


# --- generation ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def go_on(decoder: Decoder, prompts: Sequence[Sequence[int]], limit: int, ends: frozenset[int]) -> list[list[int]]:
    """The model's greedy output after each prompt: the most likely tokens, at most `limit`, up to one of `ends`.

    Prompts of one call are one batch, padded in front; keys and values of earlier tokens are cached.
    """
    device, width = next(decoder.parameters()).device, max(map(len, prompts))
    pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= pads[:, None]).long()
    stops = torch.tensor(sorted(ends), device=device)
    written, done, kept = [], torch.zeros(len(prompts), dtype=torch.bool, device=device), None
    for _ in range(limit):
        logits, kept = decoder.step(ids, mask, kept)
        ids = logits.argmax(dim=1, keepdim=True)
        written.append(ids)
        done |= torch.isin(ids[:, 0], stops)
        if done.all():
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return [_up_to(row, ends) for row in torch.cat(written, dim=1).tolist()]


def _up_to(tokens: list[int], ends: frozenset[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]
