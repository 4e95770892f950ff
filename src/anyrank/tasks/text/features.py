"""The outputs of an encoder's frozen part for texts: computed once, kept on disk, given in padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from anyrank.data import cache as store
from anyrank.data.texts import Text
from anyrank.devices import all_cores
from anyrank.progress import Progress
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
    """A request for features: embeddings of `texts`, or the hidden states that layer `stop` takes."""

    texts: Sequence[Text]
    stop: int | None = None


@dataclass(frozen=True)
class Encode:
    """Computes features with `encoder`, or finds them in the folder `cache`; `progress(done, total)` counts texts.

    `on_disk`: the features stay in their file (a memory map), whatever their size.
    """

    encoder: Encoder
    cache: Path
    progress: Progress | None
    on_disk: bool = False

    def __call__(self, wanted: Mapping[str, Features]) -> dict[str, dict[str, Tensor]]:
        """`{part: tensors}`; see `_encode` for the tensors."""
        places = {part: ("features", _key(self.encoder, each)) for part, each in wanted.items()}
        found = {part: store.load(self.cache, *place, mapped=self.on_disk) for part, place in places.items()}
        missing = [part for part, tensors in found.items() if tensors is None]
        total, done = sum(len(wanted[part].texts) for part in missing), 0

        def step(number: int) -> None:
            nonlocal done
            done += number
            if self.progress is not None:
                self.progress(done, total)

        for part in missing:
            with all_cores():
                found[part] = _encode(self.encoder, wanted[part], step)
            store.store(self.cache, *places[part], found[part])
            if self.on_disk:
                found[part] = store.load(self.cache, *places[part], mapped=True)
        return found


def _key(encoder: Encoder, wanted: Features) -> dict[str, str]:
    pairs = isinstance(wanted.texts[0], tuple)
    texts = [text for pair in wanted.texts for text in pair] if pairs else wanted.texts
    more = {"device": encoder.device.type} if encoder.device.type != "cpu" else {}
    return more | {
        "format": _FORMAT,
        "model": encoder.source.digest,
        "max_length": str(encoder.max_length),
        "dtype": encoder.dtype_name,
        "features": "mean-pooled, length 1" if wanted.stop is None else f"input of layer {wanted.stop}",
        "pairs" if pairs else "texts": store.digest(texts),
    }


def _encode(encoder: Encoder, wanted: Features, step: Callable[[int], None]) -> dict[str, Tensor]:
    """Embeddings: `values` `[n, d]` float32. Hidden states: `values` `[tokens, d]` in the encoder's dtype, `lengths` `[n]`.

    Texts are sorted longest first, so that a batch has little padding and the largest batch comes first.
    """
    tokens = token_inputs(encoder.tokens(wanted.texts), encoder.pad)
    lengths = tokens.lengths
    starts, width = lengths.cumsum(0) - lengths, encoder.model.config.hidden_size
    pooled = wanted.stop is None
    dtype = torch.bfloat16 if encoder.bfloat16 and not pooled else torch.float32
    values = torch.empty(len(lengths) if pooled else int(lengths.sum()), width, dtype=dtype)
    for index in _batches(lengths):
        batch = tokens.batch(index)
        mask = batch["mask"]
        hidden = encoder.hidden(batch["inputs"], mask, batch.get("segments"), wanted.stop)
        if pooled:
            values[index] = pool(hidden, mask)
        else:
            rows = (starts[index, None] + torch.arange(mask.shape[1]))[mask]
            values[rows] = hidden[mask].to(dtype)
        step(len(index))
    return {"values": values} if pooled else {"values": values, "lengths": lengths}


def _batches(lengths: Tensor) -> Iterator[Tensor]:
    """Indices of texts, longest first, in batches of about `_BATCH_TOKENS` tokens."""
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        size = max(1, _BATCH_TOKENS // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size
