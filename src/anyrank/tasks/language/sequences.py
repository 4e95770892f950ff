"""Prompts with their completions as token ids, given in batches: one example per row, or several in a row.

A batch is a table of `r` rows and `t` places, whose arguments of `Decoder.forward` are

* `inputs` `[r, t]`: token ids, padding at the end of a row;
* `owner` `[r, t]`: which example of the batch a token belongs to, -1 for padding;
* `positions` `[r, t]`: the token's place in its own example, from 0;
* `scored` `[r, t]` bool: whether the token belongs to a completion and therefore has a loss;
* `counts` `[b]`: the number of such tokens of each example;
* `packed`: present only if a row has several examples, which must not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: the first `prompt` ids are the prompt, the others its completion. `cut`: it was truncated."""

    ids: Sequence[int]
    prompt: int
    cut: bool = False


@dataclass(frozen=True, eq=False)
class Sequences:
    """Concatenated examples: `tokens` `[all tokens]` int32, `lengths` `[n]`, of which `prompts` `[n]` are prompts, int64.

    `packs`: examples may share rows, unless equal lengths are requested. Rows are as wide as the longest example, so that
    sharing them never costs attention more than padding would.
    """

    tokens: Tensor
    lengths: Tensor
    prompts: Tensor
    pad: int = 0
    packs: bool = False
    starts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", self.lengths.cumsum(0) - self.lengths)

    @classmethod
    def of(cls, encoded: Sequence[Encoded], pad: int, packs: bool) -> Sequences:
        """The examples `encoded`, in their order."""
        tokens = torch.tensor([token for each in encoded for token in each.ids], dtype=torch.int32)
        lengths = torch.tensor([len(each.ids) for each in encoded], dtype=torch.int64)
        return cls(tokens, lengths, torch.tensor([each.prompt for each in encoded], dtype=torch.int64), pad, packs)

    on_disk: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.lengths.nbytes + self.prompts.nbytes + self.starts.nbytes

    def part(self, index: np.ndarray) -> Sequences:
        """The examples `index` `[n]`, in that order."""
        chosen = torch.from_numpy(np.asarray(index, np.int64).copy())
        pieces = [
            self.tokens[start : start + length] for start, length in zip(self.starts[chosen], self.lengths[chosen], strict=True)
        ]
        return Sequences(torch.cat(pieces), self.lengths[chosen], self.prompts[chosen], self.pad, self.packs)

    def prompt(self, i: int) -> list[int]:
        """The token ids of the prompt of example `i`."""
        start = int(self.starts[i])
        return self.tokens[start : start + int(self.prompts[i])].tolist()

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor | bool]:
        index = index.cpu()
        lengths, prompts = self.lengths[index], self.prompts[index]
        width = int(lengths.max())
        rows, columns, height = _rows(lengths, width) if self.packs and not equal_lengths else _one_each(lengths)
        owner = torch.repeat_interleave(torch.arange(len(index)), lengths)
        position = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]
        places = (rows * width + columns)[owner] + position

        def table(values: Tensor, fill: int) -> Tensor:
            return torch.full((height * width,), fill, dtype=values.dtype).index_copy(0, places, values).view(height, width)

        batch = {
            "inputs": table(self.tokens[self.starts[index][owner] + position].long(), self.pad),
            "owner": table(owner, -1),
            "positions": table(position, 0),
            "scored": table((position >= prompts[owner]).long(), 0).bool(),
            "counts": lengths - prompts,
        }
        return batch | ({"packed": True} if height < len(index) else {})


def _one_each(lengths: Tensor) -> tuple[Tensor, Tensor, int]:
    """Row `[b]` and first column `[b]` of each example, and the number of rows: a row for each."""
    return torch.arange(len(lengths)), torch.zeros_like(lengths), len(lengths)


def _rows(lengths: Tensor, width: int) -> tuple[Tensor, Tensor, int]:
    """The same, with several examples per row: longest first, each into the first row with enough space."""
    rows, columns = torch.zeros_like(lengths), torch.zeros_like(lengths)
    taken: list[int] = []
    for i in lengths.argsort(descending=True, stable=True).tolist():
        length = int(lengths[i])
        row = next((row for row, used in enumerate(taken) if used + length <= width), len(taken))
        if row == len(taken):
            taken.append(0)
        rows[i], columns[i] = row, taken[row]
        taken[row] += length
    return rows, columns, len(taken)
