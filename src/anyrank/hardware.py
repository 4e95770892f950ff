"""Where and in what numbers a task is computed: the one place that moves modules and batches.

A task that is placed on a device hands out its batches there; adapters stay with the server, on the CPU and in float32, and go
to the device when a client loads them (`models.LoraModel`).
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyrank.config import ModelConfig
from anyrank.errors import ModelError
from anyrank.tasks.base import Examples, Inputs, Task


def find(name: str, asked: str = "model.device") -> torch.device:
    """The device that is `asked` for: `auto` is a GPU where torch sees one. Raises `ModelError` for one it does not."""
    seen = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in seen.items() if there))
    if not seen[name]:
        raise ModelError(
            f"{asked} = '{name}': torch {torch.__version__} sees no such device; install a build of torch for it, or set "
            f"{asked} to 'cpu' or 'auto'"
        )
    return torch.device(name)


def place(task: Task, model: ModelConfig) -> Task:
    """`task` on `model.device`, its frozen part in `model.train_dtype`; the task itself where both are as it is made.

    bfloat16: the base model's matrices are held in it and products are made in it (`torch.autocast`); adapters, heads that are
    trained, norms and biases are float32, and so are the outputs.
    """
    device = find(model.device)
    if model.train_dtype == "bfloat16":
        _narrow(task, device)
    if device.type == "cpu":
        return task
    parts = {name: _on(getattr(task, name), device) for name in ("train", "test")}
    return replace(task, module=task.module.to(device), **parts)


@dataclass(frozen=True, eq=False)
class DeviceInputs:
    """Inputs that are held where they are and handed out on `device`."""

    inputs: Inputs
    device: torch.device

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes

    def batch(self, index: Tensor, even: bool = False) -> dict[str, Tensor | bool]:
        batch = self.inputs.batch(index, even)
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _on(examples: Examples, device: torch.device) -> Examples:
    return Examples(DeviceInputs(examples.inputs, device), examples.labels.to(device))


def _narrow(task: Task, device: torch.device) -> None:
    for name, parameter in task.module.named_parameters():
        if parameter.ndim >= 2 and name not in task.trained:
            parameter.data = parameter.data.bfloat16()
    forward = task.module.forward

    @functools.wraps(forward)
    def narrow(*arguments: object, **batch: object) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            outputs = forward(*arguments, **batch)
        return outputs.float()

    task.module.forward = narrow


# --- memory ----------------------------------------------------------------------------------------------------------


class Kept:
    """Counts the bytes that forward passes keep for their gradients, but for parameters and buffers of the module.

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
    """Let the layers of a transformers model keep their inputs alone, and run again where their gradient is asked for.

    transformers' own switch works in training mode, where dropout is; here nothing drops out, so the layers that transformers
    marks for it are wrapped from outside. Raises `ModelError` where no layer that holds one of `targets` is so marked.
    """
    layers = {name: layer for name, layer in module.named_modules() if _is_layer(layer)}
    if not any(target.startswith(f"{name}.") for name in layers for target in targets):
        raise ModelError(
            "train.gradient_checkpointing: there is no transformers layer (GradientCheckpointingLayer, transformers 4.53 or "
            f"newer) around {', '.join(targets[:3])}, so nothing could be run again; leave it out"
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
