"""Digests of a task that was passed from Python: a run may be resumed only with the task with which it started."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyrank.tasks.base import Examples, OwnLoss, Task
from anyrank.tasks.inputs import pieces

_LETTERS = 16
_ITEMS = 256  # number of examples to read from a data set that makes items on request


def digest(task: Task) -> tuple[str, ...]:
    """`part digest`, for each part: the module's weights and structure, its trained parts, the examples, the loss.

    Tensors are read completely. From a data set that makes items on request, all labels and 256 evenly spaced items are read.
    """
    module = task.module
    weights = [(name, value) for name, value in sorted(module.state_dict().items()) if isinstance(value, Tensor)]
    return (
        f"module {_of([repr(type(module)), str(module)], weights)}",
        f"targets {_of([*task.targets, '/', *task.trained], ())}",
        f"train {_of_examples(task.train)}",
        f"test {_of_examples(task.test)}",
        f"loss {_of([_of_loss(task)], ())}",
    )


def _of_loss(task: Task) -> str:
    objective = task.objective
    return source(objective.function) if isinstance(objective, OwnLoss) else repr(objective)


def of_shards(shards: Iterable[tuple[str, np.ndarray]]) -> str:
    """A digest of the assignment of examples to clients."""
    return _of([], [(name, torch.from_numpy(np.array(rows))) for name, rows in shards])


def source(thing: Callable[..., Any] | type) -> str:
    """The source of a function or class; if it cannot be found, its name and bytecode."""
    if isinstance(thing, nn.Module):
        return repr(thing)
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        code = getattr(thing, "__code__", None)
        name = getattr(thing, "__qualname__", type(thing).__qualname__)
        return f"{name} {code.co_code.hex() if code else ''}"


def of_text(text: str) -> str:
    """A digest of a text."""
    return _of([text], ())


def _of_examples(examples: Examples) -> str:
    return _of([type(examples.inputs).__name__], [*pieces(examples.inputs, _ITEMS), ("labels", examples.labels)])


def _of(texts: Iterable[str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(f"{len(text)}\0{text}".encode())
    for name, value in tensors:
        value = value.detach().cpu().contiguous()
        total.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        total.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()) if value.numel() else b"")
    return total.hexdigest()[:_LETTERS]
