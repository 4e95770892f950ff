"""The methods by name. One line, `register`, makes a method available everywhere.

The library's own methods compute with torch. They are imported when a method is first looked up, and not before.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anyrank import own
from anyrank.errors import ConfigError, MethodError, nearest

if TYPE_CHECKING:
    from anyrank.methods.base import Method

    REGISTRY: dict[str, type[Method]]

# The files of this folder that register methods: a new method is one line here.
BUILT_IN = (
    "fedavg",
    "fedex",
    "fedsa",
    "fedsvd",
    "ffa_lora",
    "flexlora",
    "flora",
    "florist",
    "hetlora",
    "lora_fair",
    "raflora",
    "rbla",
    "references",
    "rolora",
    "stayput",
    "zeropad",
)
_OWN = "anyrank.methods."  # prefix of the modules of the library's own methods

_known: dict[str, type[Method]] = {}
_of_file: dict[str, dict[str, type[Method]]] = {}  # what each user's file has registered, by the name of its module
_M = TypeVar("_M", bound="type[Method]")


def __getattr__(name: str) -> Any:
    if name == "REGISTRY":
        return registered()
    raise AttributeError(f"module 'anyrank.methods.registry' has no attribute {name!r}")


def registered() -> dict[str, type[Method]]:
    """All methods by name, including the library's own."""
    for module in BUILT_IN:
        importlib.import_module(f"{_OWN}{module}")
    return _known


def register(method: _M) -> _M:
    """Class decorator: makes a method known by its `name` to the commands, the simulation and the conformance suite.

    A name that the library itself uses is refused. If two users' files register the same name, the file that was loaded last
    has it, so that two federations of one process may each have a method of that name.
    """
    known = (_known if method.__module__.startswith(_OWN) else registered()).get(method.name)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        from_another_file = own.is_own(known.__module__) and known.__module__ != method.__module__
        if not from_another_file:
            raise MethodError(f"method '{method.name}' is registered already, by {known.__module__}; choose another name")
    _known[method.name] = method
    return method


def make(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method `name` with `options`; an unknown name or option is an error that names the nearest known one."""
    kind = registered().get(name)
    if kind is None:
        raise unknown(name, _known)
    hints = typing.get_type_hints(kind)
    return kind(**checked(name, options or {}, {field.name: hints[field.name] for field in dataclasses.fields(kind)}))


def unknown(name: str, known: Mapping[str, Any]) -> MethodError:
    """The error for a name that is none of the `known` ones."""
    return MethodError(f"method '{name}': unknown; {nearest(name, known)}")


def checked(name: str, options: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The `options` of the method `name`, each of the type that `hints` has for it; `MethodError` for any other."""
    found = {}
    for option, value in options.items():
        if option not in hints:
            hint = nearest(option, hints) if hints else "it has no options"
            raise MethodError(f"method '{name}': unknown option '{option}'; {hint}")
        found[option] = _checked(name, option, value, hints[option])
    return found


def taking_mixed_ranks() -> list[str]:
    """The names of the methods that take clients of unequal rank, for an error's advice."""
    return [name for name, kind in registered().items() if kind.traits.mixed_ranks and not kind.reference]


def needs_one_rank(name: str, ranks: Iterable[int], others: Iterable[str]) -> ConfigError:
    """The error for clients of unequal `ranks` under a method that takes none such; `others` do."""
    return ConfigError(
        f"method.name: {name} needs clients of one rank, clients.ranks has {', '.join(map(str, sorted(set(ranks))))}; "
        f"set one rank, or use a method that takes mixed ranks: {', '.join(sorted(others))}"
    )


def no_secure_sum(name: str, sums: bool) -> ConfigError:
    """The error for `privacy.secure_sum = true`. `sums`: the method's new state follows from weighted sums of uploads."""
    if not sums:
        return ConfigError(
            f"privacy.secure_sum: {name}'s new factors do not follow from weighted sums of the clients' (it takes products, "
            "stacks or norms of each client's own), so the server has to see each upload; use false (docs/secure-summation.md)"
        )
    return ConfigError(
        f"privacy.secure_sum: sums are all that {name} needs, but no library that was tried keeps single uploads of mixed "
        "ranks from the server (docs/secure-summation.md has the figures); use false, and privacy.level for noise at clients"
    )


# --- methods in users' files ---------------------------------------------------------------------------------------------


def find_file(path: str | Path) -> Path:
    """The file of `[method] file`; `MethodError` if it does not exist."""
    path = Path(path)
    if not path.is_file():
        raise MethodError(f"method.file: no such file {path}; expected a Python file that registers a method")
    return path


def load_file(path: str | Path) -> None:
    """Execute a Python file that registers methods (`[method] file = "..."`).

    Each call executes it again, and its methods then have their names. If the file fails or registers nothing, this raises
    `MethodError` with the file and the line, and the registered methods stay as they were.
    """
    module = own.name_of(find_file(path))
    before = dict(registered())
    for name, kind in _of_file.get(module, {}).items():
        if _known.get(name) is kind:
            del _known[name]
    try:
        own.load(path, "method.file", MethodError)
        # Modules that it imports are executed only once and register nothing the second time, so their methods are remembered.
        found = _of_file.get(module, {}) | {name: kind for name, kind in _known.items() if before.get(name) is not kind}
        if not found:
            raise MethodError(f"method.file: {path} registers no method; put @anyrank.methods.register above its class")
    except MethodError:
        _known.clear()
        _known.update(before)
        raise
    _of_file[module] = found
    _known.update(found)


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
