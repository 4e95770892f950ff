"""Embedded base models: a small network, trained for seconds when it is needed, kept in the cache, always the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank import keys
from anyrank.data import cache

Progress = Callable[[int, int], None]
_SEED = 0  # the base model is the same for every run seed


@dataclass(frozen=True)
class Recipe:
    """How a base model is trained: AdamW on all its parameters for `epochs`. `name` keys its draws; raise `version` when the
    networks or this code change.
    """

    name: str
    version: int
    epochs: int
    batch_size: int = 64
    learning_rate: float = 2e-3

    def __str__(self) -> str:
        return f"{self.version} {_SEED} {self.epochs} {self.batch_size} {self.learning_rate}"


def pretrained(
    recipe: Recipe,
    name: str,
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    folder: Path,
    source: str = "",
    progress: Progress | None = None,
) -> nn.Module:
    """`module` trained on `images` `[n, …]` with `labels` `[n]`; from the cache `folder` if the same recipe, data and torch
    made it before. `source`: an identifier of the data; `progress(done, total)` counts images.
    """
    key = {"model": name, "torch": torch.__version__, "recipe": str(recipe)} | ({"source": source} if source else {})
    found = cache.load(folder, name, key)
    if found is None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same bytes for any number of threads of the caller
        try:
            _train(recipe, module, images, labels, progress)
        finally:
            torch.set_num_threads(threads)
        cache.store(folder, name, key, module.state_dict())
    else:
        module.load_state_dict(found)
    return module


def randomise(module: nn.Module, draw: torch.Generator) -> None:
    """A start drawn from `draw` alone: weights after Glorot, positions near zero, norms the identity, biases zero."""
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if name == "position":
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
            elif parameter.ndim >= 2:
                fans = sum(parameter.shape[:2]) * parameter.shape[2:].numel()
                bound = (6 / fans) ** 0.5
                parameter.copy_((torch.rand(parameter.shape, generator=draw) * 2 - 1) * bound)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def _train(recipe: Recipe, module: nn.Module, images: Tensor, labels: Tensor, progress: Progress | None) -> None:
    draw, done = keys.generator(_SEED, recipe.name, "pretraining"), 0
    randomise(module, draw)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, fused=True)
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(labels), generator=draw).split(recipe.batch_size):
            F.cross_entropy(module(images[index]), labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += len(index)
            if progress is not None:
                progress(done, len(labels) * recipe.epochs)
