"""Memory of local training: counting the bytes kept for gradients, and gradient checkpointing.

A task on a device gives its batches on that device. Adapters stay with the server, on the CPU and in float32, and are moved to
the device when a client loads them (`training.lora.LoraModel`).
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyrank.errors import ModelError

# --- memory ----------------------------------------------------------------------------------------------------------


class Kept:
    """Count the bytes that forward passes keep for their gradients, without parameters and buffers of the module.

    `peak` is the most that was kept at a time; views of one storage count once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.now = self.peak = 0
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        self._views: Counter[int] = Counter()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda saved: saved.tensor):
            yield

    def add(self, storage: torch.UntypedStorage, views: int) -> None:
        place = storage.data_ptr()
        if place in self._own:
            return
        before = self._views[place]
        self._views[place] += views
        self.now += storage.nbytes() * (bool(self._views[place]) - bool(before))
        self.peak = max(self.peak, self.now)


class _Saved:
    """A tensor kept for a gradient, counted for as long as it is."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.kept.add(self.tensor.untyped_storage(), -1)


# --- gradient checkpointing ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkpointed(module: nn.Module, targets: Sequence[str]) -> Iterator[None]:
    """Let the layers of a transformers model keep only their inputs, and run again when their gradient is needed.

    The switch in transformers works only in training mode, which turns on dropout. Dropout is never used here, so the layers
    that transformers marks for checkpointing are wrapped from outside. Raises `ModelError` if no marked layer contains one of
    `targets`.
    """
    layers = {name: layer for name, layer in module.named_modules() if _is_layer(layer)}
    if not any(target.startswith(f"{name}.") for name in layers for target in targets):
        raise ModelError(
            "train.gradient_checkpointing: there is no transformers layer (GradientCheckpointingLayer, transformers 4.53 or "
            f"newer) around {', '.join(targets[:3])}, so it would have no effect; remove the key"
        )
    for layer in layers.values():
        layer.forward = _again(layer.forward)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _is_layer(module: nn.Module) -> bool:
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def _again(forward: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(forward)
    def run(*arguments: object, **options: object) -> object:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)

    return run
