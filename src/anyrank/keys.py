"""Keyed random numbers: every draw of a run has a key that is a pure function of the run seed and of the draw's name.

Two draws with different names are independent, and the order of draws does not matter. Only the seed has to be stored to
resume a run.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key(seed: int, *names: str | int) -> int:
    """A 63-bit key for what `names` describes, e.g. `key(seed, "local", round, client)`.

    >>> key(0, "local", 3, "client-1") == key(0, "local", 3, "client-1")
    True
    >>> key(0, "ab", "c") == key(0, "a", "bc")
    False
    """
    text = "\x1f".join([f"{type(name).__name__}:{name}" for name in (seed, *names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the key of `names`."""
    return np.random.Generator(np.random.PCG64(key(seed, *names)))


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A torch CPU generator for the key of `names`."""
    import torch

    return torch.Generator().manual_seed(key(seed, *names))
