"""A task on the device and in the number type that its configuration names."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyrank.config.sections import ModelConfig
from anyrank.devices import find
from anyrank.tasks.base import Examples, Inputs, Task


def place(task: Task, model: ModelConfig) -> Task:
    """`task` on `model.device`, its frozen part in `model.train_dtype`; the same object if nothing has to change.

    bfloat16: the base model's matrices are stored in it and products are computed in it (`torch.autocast`); adapters, trained
    heads, norms, biases and outputs are float32.
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
    """Inputs that stay where they are; their batches are on `device`."""

    inputs: Inputs
    device: torch.device

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes

    @property
    def on_disk(self) -> bool:
        return self.inputs.on_disk

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor | bool]:
        batch = self.inputs.batch(index, equal_lengths)
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def where_it_is(task: Task) -> Task:
    """`task` with its examples handed out on the device that its module is on."""
    device = next((parameter.device for parameter in task.module.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        return task
    return replace(task, train=_on(task.train, device), test=_on(task.test, device))


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
