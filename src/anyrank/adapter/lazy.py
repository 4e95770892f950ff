"""Layers and tensors that are read each time they are asked for, so that memory holds one of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Lazy(Mapping[str, T]):
    """A mapping whose values are made on each access by `read(name)`, and are not kept.

    `outline`: values of the same names with shapes and types only, for everything that needs no numbers.
    """

    def __init__(self, outline: Mapping[str, T], read: Callable[[str], T]) -> None:
        self.outline, self._read = outline, read

    def __getitem__(self, name: str) -> T:
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.outline

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)


class Gathered(Lazy[T]):
    """A `Lazy` mapping that is put together value by value. `later`: whether any of them is made on access."""

    def __init__(self) -> None:
        self._makes: dict[str, Callable[[], T]] = {}
        self.later = False
        makes = self._makes  # and not `self`, which would then refer to itself
        super().__init__({}, lambda name: makes[name]())

    def add(self, name: str, value: T) -> None:
        self.outline[name], self._makes[name] = value, lambda: value

    def add_later(self, name: str, outline: T, make: Callable[[], T]) -> None:
        self.outline[name], self._makes[name], self.later = outline, make, True


def latest(values: Mapping[str, T]) -> Callable[[str], T]:
    """`values[name]`, which keeps the value that it gave last: one whose parts are asked for in turn is read once."""
    held: dict[str, T] = {}

    def read(name: str) -> T:
        if name not in held:
            held.clear()  # before the next one is read
            held[name] = values[name]
        return held[name]

    return read


def outlined(values: Mapping[str, T]) -> Mapping[str, T]:
    """`values` for asking names, shapes and types: nothing is read for it."""
    return values.outline if isinstance(values, Lazy) else values
