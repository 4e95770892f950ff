"""Text classification with a pretrained transformers encoder, in one of two shapes that `lora.target_modules` chooses.

(A third form, a transformers classifier with its own head, is in `tasks.text.own_head`.)

* Empty, or `map`: every text is embedded once by the frozen encoder, and LoRA adapts a map above it that starts as the
identity: `logits = head(20 · normalize(map(e)))`, `e` the mean over the last hidden states of a text's tokens, of length 1.
This is the default for every encoder: a federation then takes seconds, and the adapter belongs to the map, not to the encoder.
* Modules of the encoder (`query`, `encoder.layer.5.attention.self.value`, …): `logits = head(20 · normalize(mean(hidden)))`,
  with LoRA inside. Everything below the first adapted layer is frozen, so it runs once for each text and its hidden states are
  kept. This needs an encoder whose layers can be run one by one (`encoder.LAYERS`: BERT, RoBERTa and similar models,
  DistilBERT; compared with the whole model when it is loaded). With other encoders, or if layer 0 is adapted, the whole model
  runs from the token ids at every step. The task's name says which.

The outputs of the frozen encoder are kept on disk, under a key made of its weights, tokenizer, texts, length and dtype.
`model.dtype` is for this frozen part only; everything that is trained, and everything above it, is float32.

The tokenizer joins the two texts of a pair. Texts longer than `model.max_length` tokens are truncated. Padding is masked out of
attention and mean, so a model without a padding token needs none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank import keys
from anyrank.config.sections import DataConfig, LoraConfig, ModelConfig, SiteConfig
from anyrank.data import sites as of_sites
from anyrank.data import texts as sources
from anyrank.errors import ModelError
from anyrank.progress import Progress
from anyrank.tasks.base import Examples, Inputs, Task, TensorInputs
from anyrank.tasks.text.encoder import (
    POOLER,
    Encoder,
    as_arguments,
    embed_packed,
    find_source,
    named_targets,
    pool,
    pool_rows,
    run_layers,
    run_packed,
)
from anyrank.tasks.text.features import Encode, Features, RaggedInputs, token_inputs

MAP = "map"
LOGIT_SCALE = 20.0  # cosines are in [-1, 1]: this is the inverse temperature of the softmax over them
_HEAD_SEED = 0  # a random frozen head belongs to the task, not to the run: it is the same for every run seed


def load(
    model: ModelConfig,
    data: DataConfig,
    lora: LoraConfig,
    cache: Path,
    progress: Progress | None = None,
    sites: Sequence[SiteConfig] = (),
) -> Task:
    """The text task of a configuration. `cache`: the folder of frozen features; `progress(done, total)` counts texts encoded.

    Head (`model.head`), on vectors of length 1 times 20: `label-names`: the label names' own embeddings, a frozen zero-shot
    head; `frozen`: random rows of length 1, the same for every seed; `trained`: a linear layer that starts at zero.
    The task does not depend on the run seed. Raises `DataError` and `ModelError`.
    """
    train, test = of_sites.load_split(sources, data, sites)
    source = find_source(model)
    head = _Head(model.head, len(train.label_names))
    texts = {"train": Features(train.texts, groups=of_sites.groups(train.columns))}
    texts["test"] = Features(test.texts, groups=of_sites.groups(test.columns))
    if model.head == "label-names":
        names = as_words(train.label_names)
        texts["names"] = Features(names, groups=(len(names),) if sites else ())
    encode = Encode(Encoder(source, model), cache, progress, on_disk=model.features == "disk")
    if lora.target_modules in ((), (MAP,)):
        built = _on_map(encode, texts, head)
    else:
        built = _in_encoder(encode, texts, head, lora.target_modules)
    return Task(
        name=f"text classification ({built.how})",
        module=built.module.eval(),
        targets=built.targets,
        train=Examples(built.inputs["train"], torch.from_numpy(train.labels)),
        test=Examples(built.inputs["test"], torch.from_numpy(test.labels)),
        label_names=train.label_names,
        head=model.head,
        base_model=source.name,
        peft=built.peft,
        trained=("head.weight", "head.bias") if model.head == "trained" else (),
        columns=train.columns,
        test_columns=test.columns,
    )


_ENCODER = {"task_type": "FEATURE_EXTRACTION"}  # PEFT's task type for a bare encoder


@dataclass(frozen=True)
class _Built:
    """A module, the names of its targets, its inputs by part (`train`, `test`), how it was made, in words, and entries
    for the adapter's config.
    """

    module: nn.Module
    targets: tuple[str, ...]
    inputs: Mapping[str, Inputs]
    how: str
    peft: Mapping[str, Any] = field(default_factory=dict)


def _on_map(encode: Encode, texts: Mapping[str, Features], head: _Head) -> _Built:
    """LoRA on a map above the embeddings of `texts` (`train`, `test` and, for a zero-shot head, `names`)."""
    found = encode(texts)
    embedded = {part: tensors["values"] for part, tensors in found.items()}
    module = MapClassifier(head.build(embedded["train"].shape[1], embedded.get("names")))
    inputs = {part: TensorInputs(embedded[part], on_disk=encode.on_disk) for part in ("train", "test")}
    return _Built(module, (MAP,), inputs, f"LoRA on a map of frozen embeddings, {encode.encoder.dtype_name}")


def _in_encoder(encode: Encode, texts: Mapping[str, Features], head: _Head, endings: Sequence[str]) -> _Built:
    """LoRA on modules of the encoder; the layers below the first adapted one run once for each text."""
    encoder = encode.encoder
    targets = _targets(encoder.model, endings)
    first = _first_layer(targets, encoder.layers)
    wanted = {"names": texts["names"]} if "names" in texts else {}
    if first:
        wanted |= {part: replace(texts[part], stop=first) for part in ("train", "test")}
    found = encode(wanted)
    packs = encoder.packs
    inputs = {
        part: RaggedInputs(**found[part], packs=packs, on_disk=encode.on_disk)
        if first
        else token_inputs(encoder.tokens(texts[part].texts), encoder.pad, packs)
        for part in ("train", "test")
    }
    classifier = head.build(encoder.model.config.hidden_size, found["names"]["values"] if "names" in texts else None)
    if encoder.layers is None:
        how = "LoRA in the encoder, the whole model from token ids: its layers cannot be run apart"
        return _Built(WholeClassifier(encoder.model, classifier), targets, inputs, how, _ENCODER)
    how = f"LoRA from layer {first} on, {f'frozen prefix {encoder.dtype_name}' if first else 'from token ids'}"
    return _Built(SplitClassifier(encoder.model, encoder.layers, first, classifier), targets, inputs, how, _ENCODER)


# --- modules ---------------------------------------------------------------------------------------------------------


class MapClassifier(nn.Module):
    """`head(20 · normalize(map(e)))` of embeddings `inputs` `[b, d]`; `map` starts, and without LoRA stays, the identity."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.map = nn.Linear(head.in_features, head.in_features, bias=False)
        nn.init.eye_(self.map.weight)
        self.head = head
        self.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(LOGIT_SCALE * F.normalize(self.map(inputs), dim=1))


class SplitClassifier(nn.Module):
    """The layers of an encoder from `first` on, mean pooling and a head, under the encoder's own module names.

    `inputs`: hidden states `[b, t, d]` that layer `first` takes, or token ids `[b, t]` where `first` is 0; `mask` `[b, t]`
    bool; `segments` `[b, t]`: the text of a pair to which a token belongs. Or the same without padding, with texts
    concatenated: `inputs` `[tokens, d]` or `[tokens]`, `segments` `[tokens]`, and the number of tokens of each text, `lengths`
    `[b]`. This is only for layers that support it (`Encoder.packs`), and not for stacked clients, whose parts of a batch must
    have one size.

    The encoder is taken apart: its layers below `first` are released, and the other layers keep their names and numbers, so
    that an adapter of this module is an adapter of the encoder (`AutoModel`) as PEFT loads it.
    """

    def __init__(self, encoder: nn.Module, layers: str, first: int, head: nn.Linear) -> None:
        super().__init__()
        unused = {POOLER, "embeddings"} if first else {POOLER}
        _adopt(self, encoder, unused)
        for number in range(first):
            encoder.get_submodule(layers)[number] = nn.Identity()
        self.head = head
        self._layers, self._first = layers, first
        self.requires_grad_(False)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        layers = self.get_submodule(self._layers)[self._first :]
        if lengths is None:
            hidden = inputs if self._first else self.embeddings(**as_arguments(inputs, segments))
            pooled = pool(run_layers(layers, hidden, mask), mask)
        else:
            rows = inputs if self._first else embed_packed(self.embeddings, inputs, lengths, segments)
            pooled = pool_rows(run_packed(layers, rows, lengths), lengths)
        return self.head(LOGIT_SCALE * pooled)


class WholeClassifier(nn.Module):
    """A whole encoder from token ids `inputs` `[b, t]` with `mask` `[b, t]` bool and `segments`, mean pooling and a head.

    For architectures that cannot be run layer by layer. The encoder's modules keep their names, as in `SplitClassifier`.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        _adopt(self, encoder, {POOLER})
        self.head = head
        self._encoder = (encoder,)  # in a tuple, so that its modules are not registered under a second name
        self.requires_grad_(False)

    def forward(self, inputs: Tensor, mask: Tensor, segments: Tensor | None = None) -> Tensor:
        hidden = self._encoder[0](**as_arguments(inputs, segments), attention_mask=mask.long()).last_hidden_state
        return self.head(LOGIT_SCALE * pool(hidden, mask))


def _adopt(module: nn.Module, encoder: nn.Module, unused: set[str]) -> None:
    """Register the encoder's children in `module` under their own names."""
    for name, child in encoder.named_children():
        if name == "head":
            raise ModelError("model: the encoder has a module 'head' of its own; choose another model, or LoRA on the map")
        if name not in unused:
            module.add_module(name, child)


# --- heads -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    """The classification head: `kind` as in `model.head`, for `classes` classes."""

    kind: str
    classes: int

    def build(self, width: int, names: Tensor | None) -> nn.Linear:
        """A linear layer `[classes, width]`, frozen like the whole module; `names`: the label names' embeddings."""
        head = nn.Linear(width, self.classes, bias=self.kind == "trained")
        with torch.no_grad():
            if self.kind == "trained":
                head.weight.zero_()
                head.bias.zero_()
            elif self.kind == "frozen":
                rows = torch.randn(self.classes, width, generator=keys.generator(_HEAD_SEED, "head"))
                head.weight.copy_(F.normalize(rows, dim=1))
            else:
                head.weight.copy_(names)
        return head


def as_words(label_names: Sequence[str]) -> tuple[str, ...]:
    """Label names as words: `card_arrival`, `card-arrival` and `CardArrival` are all "card arrival"."""
    spoken: dict[str, str] = {}
    for name in label_names:
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_\-\s]+", " ", name).strip().lower()
        if not re.search(r"[^\W\d]", words):
            raise ModelError(
                f"model.head = 'label-names': label {name!r} has no word to embed; use head = 'trained' or 'frozen', "
                "or give the labels names"
            )
        if words in spoken:
            raise ModelError(
                f"model.head = 'label-names': labels {spoken[words]!r} and {name!r} both become {words!r}; rename one, "
                "or use head = 'trained'"
            )
        spoken[words] = name
    return tuple(spoken)


# --- targets ---------------------------------------------------------------------------------------------------------


def _targets(encoder: nn.Module, endings: Sequence[str]) -> tuple[str, ...]:
    """Full names of the encoder's modules that `endings` match, without the pooler, which is not used."""
    if MAP in endings:
        raise ModelError(
            f"lora.target_modules: '{MAP}' is above the encoder and excludes other modules; remove the others, or it"
        )
    return named_targets(encoder, endings, (POOLER,), "pooling is the mean: a pooler is not used")


def _first_layer(targets: Sequence[str], layers: str | None) -> int:
    """The number of the lowest layer that has a target; 0 if a target is before the layers or they cannot be run one by one."""
    numbers = [re.match(rf"{re.escape(layers)}\.(\d+)\.", name) for name in targets] if layers else [None]
    return min((int(number[1]) if number else 0) for number in numbers)
