"""Fewer bits for factors that are only read: the sum in the base model that a download may have. Trained factors stay exact.

`bfloat16`: each number is rounded to bfloat16, `|x - y| <= 0.004 |x| + 2^-133`. Numbers of two bytes are sent as they are.

`int8`: each slice (row j of A, column j of B) has a step, its largest number over 127, and each number is a whole number of
steps from -127 to 127: `|x - y| <= step_j / 2`, apart from the rounding of the layer's own number type.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anyrank.errors import FrameError

Reduced = Literal["", "bfloat16", "int8"]
_STEPS = 127
_SIZES = {
    "": lambda factor, rank: factor.nbytes,
    "bfloat16": lambda factor, rank: factor.numel() * min(factor.itemsize, 2),
    "int8": lambda factor, rank: factor.numel() + 8 * rank,
}
_SLICES = {"A": (-1, 1), "B": (1, -1)}  # the form in which one number per slice meets a factor


def check(reduced: str) -> None:
    """Raise `FrameError` for a reduction that does not exist."""
    if reduced not in _SIZES:
        raise FrameError(f"reduced: expected bfloat16, int8 or nothing, got {reduced!r}")


def nbytes(factor: Tensor, rank: int, reduced: str) -> int:
    """Bytes of a factor of `rank` slices in a frame."""
    check(reduced)
    return _SIZES[reduced](factor, rank)


def rounded(factor: Tensor) -> Tensor:
    """A factor in bfloat16, or as it is if its numbers have two bytes."""
    return _finite(factor if factor.itemsize <= 2 else factor.to(torch.bfloat16))


def steps(name: str, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Factor `name` (`A` `[r, in]` or `B` `[out, r]`) in whole numbers of steps, int8, and the steps `[r]`, float64."""
    wide = _finite(factor).double()
    largest = wide.abs().amax(dim=1 if name == "A" else 0)
    step = largest / _STEPS
    step = torch.where(_STEPS * step < largest, torch.nextafter(step, torch.full_like(step, torch.inf)), step)
    counts = wide / torch.where(step > 0, step, 1.0).view(_SLICES[name])
    return counts.round().to(torch.int8), step


def from_steps(name: str, counts: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of `steps`, in `dtype`."""
    largest = torch.finfo(dtype).max
    return (counts.double() * step.view(_SLICES[name])).clamp(-largest, largest).to(dtype)


def _finite(factor: Tensor) -> Tensor:
    if not torch.isfinite(factor).all():
        raise FrameError(f"reduced: expected numbers that {factor.dtype} can hold, got infinite ones or NaN; send it exactly")
    return factor
