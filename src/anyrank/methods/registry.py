"""The methods by name. `register` is the one line that makes a method take part everywhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anyrank.errors import MethodError, nearest

if TYPE_CHECKING:
    from anyrank.methods.base import Method

REGISTRY: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound="type[Method]")


def register(method: _M) -> _M:
    """Class decorator: makes a method known by its `name` to the commands, the simulation and the conformance suite."""
    known = REGISTRY.get(method.name)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise MethodError(f"method '{method.name}' is registered already, by {known.__module__}; choose another name")
    REGISTRY[method.name] = method
    return method


def make(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method `name` with `options`; an unknown name or option is an error that names the nearest known one."""
    if name not in REGISTRY:
        raise MethodError(f"method '{name}': unknown; {nearest(name, REGISTRY)}")
    kind, options = REGISTRY[name], dict(options or {})
    hints = {field.name: hint for field in dataclasses.fields(kind) if (hint := typing.get_type_hints(kind)[field.name])}
    for option, value in options.items():
        if option not in hints:
            hint = nearest(option, hints) if hints else "it has no options"
            raise MethodError(f"method '{name}': unknown option '{option}'; {hint}")
        options[option] = _checked(name, option, value, hints[option])
    return kind(**options)


def taking_mixed_ranks() -> str:
    """The names of the methods that take clients of unequal rank, for an error's advice."""
    return ", ".join(sorted(name for name, kind in REGISTRY.items() if kind.traits.mixed_ranks and not kind.reference))


def load_file(path: str | Path) -> None:
    """Run a Python file that registers methods of its own (`[method] file = "..."`)."""
    path = Path(path)
    if not path.is_file():
        raise MethodError(f"method.file: no such file {path}; expected a Python file that registers a method")
    module = f"anyrank_user_methods_{path.stem}"
    spec = importlib.util.spec_from_file_location(module, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    spec.loader.exec_module(loaded)


def _checked(method: str, option: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        if value in typing.get_args(hint):
            return value
        expected = "one of " + ", ".join(map(repr, typing.get_args(hint)))
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    else:
        expected = hint.__name__
    raise MethodError(f"method '{method}': option {option} expects {expected}, got {value!r}")
