"""Digests of a task that was passed from Python: a run may be resumed only with the task with which it started."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import re
import types
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyrank.tasks.base import Examples, OwnLoss, Task
from anyrank.tasks.inputs import pieces

SPLIT = "split of examples over clients"
_LETTERS = 16
_ITEMS = 256  # number of examples to read from a data set that makes items on request


def digest(task: Task) -> tuple[str, ...]:
    """`part digest`, for each part: the module's weights and structure, its trained parts, the examples, the loss.

    Tensors are read completely. From a data set that makes items on request, all labels and 256 evenly spaced items are read.
    """
    return tuple(f"{part} {found[:_LETTERS]}" for part, found in _parts(task, _ITEMS).items())


def held(task: Task, shards: Any) -> dict[str, str]:
    """`{part: digest}` of all that a private run's releases are computed from: of every example, however it is read, of the
    base model, and of the split of examples over clients, `shards`."""
    parts = {_WORDS.get(part, part): found for part, found in _parts(task, None).items()}
    return {**parts, SPLIT: split(shards)}


def split(shards: Any) -> str:
    """A digest of the split of examples over clients: `shards`, a table of indices or the indices `[n]` of each client."""
    values = vars(shards) if hasattr(shards, "__dict__") else {str(i): np.asarray(own) for i, own in enumerate(shards)}
    texts = [f"{name}={value!r}" for name, value in sorted(values.items()) if not isinstance(value, np.ndarray)]
    arrays = [(name, torch.from_numpy(value.copy())) for name, value in sorted(values.items()) if isinstance(value, np.ndarray)]
    return _whole([type(shards).__name__, *texts], arrays)


_WORDS = {"module": "base model", "targets": "choice of layers", "train": "set of training examples", "test": "held-out set"}


def _parts(task: Task, items: int | None) -> dict[str, str]:
    """The digest of each part; of inputs that are made on request, `items` are read (`None`: all)."""
    module = task.module
    weights = sorted([*module.named_parameters(), *module.named_buffers()])  # buffers that are not saved, too
    figures = [f"{name}={source(value)}" for name, value in sorted(task.metrics.items())]
    columns, test_columns = (
        [f"{name}={list(values)}" for name, values in sorted(each.items())] for each in (task.columns, task.test_columns)
    )
    return {
        "module": _whole([*_structure(module), *sorted(_code(module))], weights),
        "targets": _whole([*task.targets, "/", *task.trained], ()),
        "train": _of_examples(task.train, [*task.label_names, *columns], items),
        "test": _of_examples(task.test, test_columns, items),
        "loss": _whole([_of_loss(task)], ()),
        "metrics": _whole(figures, ()),
    }


def _structure(module: nn.Module) -> list[str]:
    return [_steady(str(module)), str(type(module).__qualname__)]


def _code(module: nn.Module) -> set[str]:
    """What each kind of part that is not torch's own is written as, and what its plain attributes are."""
    own = [(name, part) for name, part in module.named_modules() if not type(part).__module__.startswith("torch.")]
    return {source(type(part)) for _, part in own} | {f"{name}:{_attributes(part)}" for name, part in own}


def _attributes(thing: Any) -> str:
    """The attributes of an object that are plain values or functions, in the order of their names."""
    hidden = ("_parameters", "_buffers", "_modules", "training", "_anyrank", "forward")
    held = {key: value for key, value in sorted(vars(thing).items()) if key not in hidden and "hook" not in key}
    return "; ".join(f"{key}={_value(value)}" for key, value in held.items())


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        return _of([], [("value", value)])
    if isinstance(value, (set, frozenset)):  # whose order is another one in each process
        return f"{type(value).__name__}({sorted(map(_value, value))})" if value else repr(value)
    if isinstance(value, (list, tuple, dict, str, bytes, int, float, complex, bool, type(None))):
        return _steady(repr(value))
    return source(value) if callable(value) else f"{type(value).__module__}.{type(value).__qualname__}"


def _steady(text: str) -> str:
    """A text without the addresses of objects, which are other ones in each process."""
    return re.sub(r"0x[0-9a-fA-F]{4,}|\b\d{12,}\b", "", text)


def _of_loss(task: Task) -> str:
    objective = task.objective
    return source(objective.function) if isinstance(objective, OwnLoss) else _steady(repr(objective))


def of_shards(shards: Iterable[tuple[str, np.ndarray]]) -> str:
    """A digest of the assignment of examples to clients."""
    return _of([], [(name, torch.from_numpy(np.array(rows))) for name, rows in shards])


def source(thing: Any) -> str:
    """What a function, a class or a callable object is: its code with its constants, what it holds, and its own state."""
    if isinstance(thing, functools.partial):
        held = "; ".join(f"{key}={_value(value)}" for key, value in sorted(thing.keywords.items()))
        return f"partial({source(thing.func)}; {[_value(value) for value in thing.args]}; {held})"
    if isinstance(thing, nn.Module):
        tensors = sorted([*thing.named_parameters(), *thing.named_buffers()])
        return f"{_steady(repr(thing))}; {_attributes(thing)}; {_of([], tensors)}"
    if isinstance(thing, type):
        return _text_of(thing)
    function = getattr(thing, "__func__", thing)
    if (code := getattr(function, "__code__", None)) is not None:
        cells = [_value(cell.cell_contents) for cell in function.__closure__ or () if _filled(cell)]
        owner = f"; {_attributes(thing.__self__)}" if hasattr(getattr(thing, "__self__", None), "__dict__") else ""
        return f"{_text_of_code(code)}; {cells}; {[_value(value) for value in function.__defaults__ or ()]}{owner}"
    if hasattr(thing, "__dict__") and not callable(getattr(thing, "__wrapped__", None)):
        return f"{source(type(thing))}; {_attributes(thing)}"
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _filled(cell: Any) -> bool:
    try:
        return bool(cell) and cell.cell_contents is not None
    except ValueError:
        return False


def _text_of_code(code: types.CodeType) -> str:
    """What a function is compiled to, with its constants and names, and those of the functions inside it."""
    constants = [_text_of_code(each) if isinstance(each, types.CodeType) else _steady(repr(each)) for each in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"


def _text_of(kind: type) -> str:
    """What a class says, or, where its text is not to be found, what its functions are compiled to."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        functions = {name: value.__code__ for name, value in sorted(vars(kind).items()) if hasattr(value, "__code__")}
        return f"{kind.__qualname__} " + "; ".join(f"{name}: {_text_of_code(code)}" for name, code in functions.items())


def of_text(text: str) -> str:
    """A digest of a text."""
    return _of([text], ())


def _of_examples(examples: Examples, texts: Sequence[str], items: int | None) -> str:
    read = itertools.chain(pieces(examples.inputs, items), [("labels", examples.labels)])
    return _whole([type(examples.inputs).__name__, *texts], read)


def _of(texts: Iterable[str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    return _whole(texts, tensors)[:_LETTERS]


def _whole(texts: Iterable[str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(f"{len(text)}\0{text}".encode())
    for name, value in tensors:
        value = value.detach().cpu().contiguous()
        total.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        total.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()) if value.numel() else b"")
    return total.hexdigest()
