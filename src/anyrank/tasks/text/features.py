"""The outputs of an encoder's frozen part for texts: computed once, kept on disk, given in padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from anyrank.data import cache as store
from anyrank.data.texts import Text
from anyrank.devices import all_cores, spread
from anyrank.progress import Progress
from anyrank.tasks.frozen import Frozen, Step, Tensors, Wanted
from anyrank.tasks.text.encoder import Encoder, Tokens, pool

_BATCH_TOKENS = 1024  # small batches stay in the processor cache; larger ones measured slower
_FORMAT = "1"  # of the cached features; raise it when what is computed changes


@dataclass(frozen=True, eq=False)
class RaggedInputs:
    """Concatenated texts of different lengths: `values` `[tokens, …]`, `lengths` `[n]` int64.

    A batch is `inputs` `[b, t, …]` (float32, or int64 token ids) and `mask` `[b, t]` bool, `t` the longest text of the batch,
    and for pairs of texts, if the model distinguishes them, `segments` `[b, t]` (stored as `[tokens]` uint8): the text of each
    token. `packs`: the module takes a batch without padding, with texts concatenated: `inputs` `[tokens, …]`, `lengths` `[b]`
    and `segments` `[tokens]`. It gets such a batch unless equal lengths are requested.
    """

    values: Tensor
    lengths: Tensor
    pad: int = 0
    packs: bool = False
    segments: Tensor | None = None
    on_disk: bool = False
    starts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", self.lengths.cumsum(0) - self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        segments = 0 if self.segments is None else self.segments.nbytes
        return self.values.nbytes + self.lengths.nbytes + self.starts.nbytes + segments

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor | bool]:
        return self._packed(index) if self.packs and not equal_lengths else self._padded(index)

    def _packed(self, index: Tensor) -> dict[str, Tensor | bool]:
        lengths = self.lengths[index]
        ahead = self.starts[index] - (lengths.cumsum(0) - lengths)  # of each text's place in the batch
        places = torch.arange(int(lengths.sum())) + ahead.repeat_interleave(lengths)
        more = {} if self.segments is None else {"segments": self.segments[places].long()}
        return {"inputs": _wide(self.values.index_select(0, places)), "lengths": lengths, **more}

    def _padded(self, index: Tensor) -> dict[str, Tensor | bool]:
        lengths = self.lengths[index]
        place = torch.arange(int(lengths.max())).expand(len(index), -1)
        mask = place < lengths[:, None]
        places = (self.starts[index, None] + place).masked_fill(~mask, 0)
        rows = _wide(self.values[places])
        padding = ~mask.view(*mask.shape, *(1,) * (rows.ndim - 2))
        more = {} if self.segments is None else {"segments": self.segments[places].long().masked_fill(~mask, 0)}
        return {"inputs": rows.masked_fill(padding, self.pad), "mask": mask, **more}


def token_inputs(tokens: Tokens, pad: int, packs: bool = False) -> RaggedInputs:
    """Tokens for a model that runs from there."""
    lengths = torch.tensor([len(each) for each in tokens.ids])
    segments = None if tokens.segments is None else _flat(tokens.segments, torch.uint8)
    return RaggedInputs(_flat(tokens.ids, torch.int32), lengths, pad, packs, segments)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values.long()


def _flat(rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([each for row in rows for each in row], dtype=dtype)


@dataclass(frozen=True)
class Features:
    """A request for features: embeddings of `texts`, or the hidden states that layer `stop` takes.

    `groups`: numbers of texts, one after the other, that are encoded apart: the features of a group depend neither on other
    groups nor on the number of cores. Empty: all texts together.
    """

    texts: Sequence[Text]
    stop: int | None = None
    groups: tuple[int, ...] = ()

    def parts(self) -> Iterator[Features]:
        """Each group as a request of its own."""
        start = 0
        for size in self.groups:
            yield Features(self.texts[start : start + size], self.stop, (size,))
            start += size


@dataclass(frozen=True)
class Encode:
    """Computes features with `encoder`, or finds them in the folder `cache`; `progress(done, total)` counts texts.

    `on_disk`: the features stay in their file (a memory map), whatever their size.
    """

    encoder: Encoder
    cache: Path
    progress: Progress | None
    on_disk: bool = False

    def __call__(self, wanted: Mapping[str, Features]) -> dict[str, Tensors]:
        """`{part: tensors}`; see `_encode` for the tensors."""
        kept = Frozen(self.cache, "features", self.progress, self.on_disk)
        return kept({part: self._wanted(each) for part, each in wanted.items()})

    def _wanted(self, features: Features) -> Wanted:
        groups = tuple(self._wanted(part) for part in features.parts()) if len(features.groups) > 1 else ()
        compute = partial(_encode, self.encoder, features)
        return Wanted(_key(self.encoder, features), len(features.texts), compute, groups)


def _key(encoder: Encoder, wanted: Features) -> dict[str, str]:
    pairs = isinstance(wanted.texts[0], tuple)
    texts = [text for pair in wanted.texts for text in pair] if pairs else wanted.texts
    more = {"device": encoder.device.type} if encoder.device.type != "cpu" else {}
    if wanted.groups:  # other batches, each on one core: other last digits
        more["groups"] = " ".join(map(str, wanted.groups))
    return more | {
        "format": _FORMAT,
        "model": encoder.source.digest,
        "max_length": str(encoder.max_length),
        "dtype": encoder.dtype_name,
        "features": "mean-pooled, length 1" if wanted.stop is None else f"input of layer {wanted.stop}",
        "pairs" if pairs else "texts": store.digest(texts),
    }


def _encode(encoder: Encoder, wanted: Features, step: Step) -> dict[str, Tensor]:
    """Embeddings: `values` `[n, d]` float32. Hidden states: `values` `[tokens, d]` in the encoder's dtype, `lengths` `[n]`.

    Texts are sorted longest first, so that a batch has little padding and the largest batch comes first.
    """
    tokens = token_inputs(encoder.tokens(wanted.texts), encoder.pad)
    lengths = tokens.lengths
    starts, width = lengths.cumsum(0) - lengths, encoder.model.config.hidden_size
    pooled = wanted.stop is None
    dtype = torch.bfloat16 if encoder.bfloat16 and not pooled else torch.float32
    values = torch.empty(len(lengths) if pooled else int(lengths.sum()), width, dtype=dtype)

    def compute(index: Tensor) -> Tensor:
        batch = tokens.batch(index)
        mask = batch["mask"]
        hidden = encoder.hidden(batch["inputs"], mask, batch.get("segments"), wanted.stop)
        return pool(hidden, mask) if pooled else hidden[mask].to(dtype)

    def take(index: Tensor, computed: Tensor) -> None:
        if pooled:
            values[index] = computed
        else:
            place = torch.arange(int(lengths[index].max()))
            values[(starts[index, None] + place)[place < lengths[index, None]]] = computed
        step(len(index))

    if wanted.groups:
        spread(_batches(lengths), compute, take)
    else:
        with all_cores():
            for index in _batches(lengths):
                take(index, compute(index))
    return {"values": values} if pooled else {"values": values, "lengths": lengths}


def _batches(lengths: Tensor) -> Iterator[Tensor]:
    """Indices of texts, longest first, in batches of about `_BATCH_TOKENS` tokens."""
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        size = max(1, _BATCH_TOKENS // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size
