"""Self-attention of texts of different lengths over their tokens only, without a padded batch.

The tokens of a batch are concatenated, `[tokens, d]`. For attention, texts of about the same length form a block, whose width
is their length rounded up to a multiple of 16. A processor's vector instructions then leave no remainder, which would cost
more than the padding. In a padded batch, every text would cost the square of the longest text's length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_WIDTH = 16  # a block's width is a multiple of it: float32 numbers in a vector of 512 bits
_SCORES = 2**20  # in one block, or in one text: 4 MB at a time


@dataclass(frozen=True, eq=False)
class Block:
    """A block of texts. A row is one head's part of one token, `[d / heads]`; rows go by text, head, token.

    `rows` `[texts * heads * width]`: the batch's row for each place, for padding one of the same text; `real`
    `[texts * heads, width, 1]`: 0 for padding, else 1; `bias` `[texts * heads, 1, width]`: added to scores, -inf for padding,
    else 0.
    """

    rows: Tensor
    real: Tensor
    bias: Tensor

    def take(self, values: Tensor) -> Tensor:
        """The block's rows of `values` `[all rows, d / heads]`, in float32 or wider: `[texts * heads, width, d / heads]`."""
        wide = torch.promote_types(values.dtype, torch.float32)
        return values.index_select(0, self.rows).to(wide).view(*self.real.shape[:2], -1)


@dataclass(frozen=True, eq=False)
class Layout:
    """The blocks of a batch, and the place of each row `[tokens * heads]` in their concatenation."""

    blocks: tuple[Block, ...]
    places: Tensor

    @classmethod
    def of(cls, lengths: Tensor, heads: int) -> Layout:
        """The layout of texts of `lengths` `[texts]` int64, at least 1, on their device."""
        device, sizes = lengths.device, lengths.cpu().numpy()
        starts, head = sizes.cumsum() - sizes, np.arange(heads)[:, None]
        blocks, taken, real = [], [], []
        for texts, width in _alike(sizes, heads):
            place = np.arange(width)
            inside = place < sizes[texts, None]
            rows = ((starts[texts, None] + place * inside)[:, None] * heads + head).ravel()
            inside = inside.repeat(heads, axis=0)
            bias = np.where(inside, np.float32(0), np.float32(-np.inf))[:, None]
            parts = (rows, inside[:, :, None].astype(np.float32), bias)
            blocks.append(Block(*(torch.from_numpy(part).to(device) for part in parts)))
            taken.append(rows)
            real.append(inside.ravel())
        held = np.concatenate(real).nonzero()[0]
        places = np.empty_like(held)
        places[np.concatenate(taken)[held]] = held
        return cls(tuple(blocks), torch.from_numpy(places).to(device))

    def rows(self, values: Tensor) -> Tensor:
        """`values` `[tokens, d]` as rows `[tokens * heads, d / heads]`."""
        return values.reshape(len(self.places), -1)

    def join(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """The results of the blocks without padding, in the shape and dtype of `like` `[tokens, d]`."""
        rows = torch.cat([part.flatten(0, 1) for part in parts])
        return rows.index_select(0, self.places).view(like.shape).to(like.dtype)


def _alike(sizes: np.ndarray, heads: int) -> Iterator[tuple[np.ndarray, int]]:
    """Indices of the texts of each block, and the block's width."""
    widths = -(-sizes // _WIDTH) * _WIDTH
    for width in np.unique(widths).tolist():
        texts, most = (widths == width).nonzero()[0], max(1, _SCORES // (heads * width**2))
        yield from ((texts[at : at + most], width) for at in range(0, len(texts), most))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """`softmax(q k' / sqrt(d / heads)) v` of each head and text: `[tokens, d]`, in the shape of the projections.

    Computed in float32 if the projections are narrower. Each text is separate: nothing of one enters another's result, not even
    NaN.
    """
    return _Attention.apply(q, k, v, layout)


class _Attention(torch.autograd.Function):
    """Keeps probabilities if they take no more memory than a projection; those of longer texts are recomputed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        found, kept = [], []
        with torch.autocast(q.device.type, enabled=False):
            for block in layout.blocks:
                Q, K, V = (block.take(layout.rows(each)) for each in (q, k, v))
                P = _probabilities(Q, K, block.bias)
                found.append(torch.bmm(P, V))
                kept += [Q, K, V, P if P.shape[2] <= V.shape[2] else None]
        ctx.layout = layout
        ctx.save_for_backward(*kept)
        return layout.join(found, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        kept, layout = ctx.saved_tensors, ctx.layout
        wanted, rows = ctx.needs_input_grad[:3], layout.rows(gradient)
        found: tuple[list[Tensor], ...] = ([], [], [])
        for place, block in enumerate(layout.blocks):
            Q, K, V, P = kept[4 * place : 4 * place + 4]
            P = _probabilities(Q, K, block.bias) if P is None else P
            G = block.take(rows).mul_(block.real)
            for parts, part in zip(found, _gradients(Q, K, V, P, G, wanted), strict=True):
                parts.append(part)
        return *(layout.join(parts, gradient) if asked else None for parts, asked in zip(found, wanted, strict=True)), None


def _probabilities(Q: Tensor, K: Tensor, bias: Tensor) -> Tensor:
    """The attention weights of a block, `[texts * heads, width, width]`; zero for padding."""
    return torch.baddbmm(bias.to(Q.dtype), Q, K.mT, alpha=Q.shape[2] ** -0.5).softmax(dim=-1)


def _gradients(
    Q: Tensor, K: Tensor, V: Tensor, P: Tensor, G: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Q, K and V, those that are `wanted`, from the gradient `G` of `P V`."""
    for_q, for_k, for_v = wanted
    dV = torch.bmm(P.mT, G) if for_v else None
    if not (for_q or for_k):
        return None, None, dV
    dS = torch.ops.aten._softmax_backward_data(torch.bmm(G, V.mT), P, -1, P.dtype).mul_(Q.shape[2] ** -0.5)
    return torch.bmm(dS, K) if for_q else None, torch.bmm(dS.mT, Q) if for_k else None, dV
