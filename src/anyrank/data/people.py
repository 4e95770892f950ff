"""Whose each example is: a column of the data names a person for each of them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from anyrank.config.sections import DataConfig
from anyrank.data.split import held_out
from anyrank.errors import DataError, nearest

# What tables write where nobody is named. Examples of several persons under one such name would share one person's clip.
_NOBODY = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>", "nat"})
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0+")  # a whole number that a table with gaps keeps as a float
_SPLIT_KEY = b"anyrank held-out person\0"


class Part(Protocol):
    """A `Table`, `Images` or `Instructions`."""

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def columns(self) -> Mapping[str, np.ndarray]: ...


def ids(columns: Mapping[str, np.ndarray], column: str) -> list[str]:
    """The person of each example, `[n]`: two examples are of one person if the texts in `column` are equal, without the blanks
    around them and in Unicode's composed form (NFC); `12.0` is `12`.

    Raises `DataError` for a column that the data does not have, and for examples that name nobody. No error says a name.
    """
    if column not in columns:
        hint = nearest(column, columns) if columns else "the data has no columns beside those that are read"
        raise DataError(f"data.person: no column {column!r} that all examples have, beside those that the model reads; {hint}")
    found = [_spelt(value) for value in columns[column]]
    missing = sum(name.casefold() in _NOBODY for name in found)
    if missing:
        raise DataError(
            f"data.person: {missing} of {len(found)} examples name nobody in column {column!r}; fill or remove these rows"
        )
    return found


def _spelt(value: Any) -> str:
    text = unicodedata.normalize("NFC", str(value)).strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def numbers(names: Sequence[str]) -> np.ndarray:
    """The person of each example as a number from 0, `[n]` int64, in the order of their first examples.

    >>> numbers(["b", "a", "b"]).tolist()
    [0, 1, 0]
    """
    place: dict[str, int] = {}
    return np.array([place.setdefault(name, len(place)) for name in names], dtype=np.int64)


def set_aside(part: Part, data: DataConfig, *of: str) -> np.ndarray:
    """A mask `[n]` bool of the examples that are held out: `data.test_fraction` of them, by label (`of`: as for `held_out`).

    With `data.person`, all examples of a person are held out, or none, by a draw of the person's own: whether one is held out
    depends on the person's name alone, and the share is that of the persons, on average. Raises `DataError` if none is left.
    """
    if not data.person:
        return held_out(part.labels, data.test_fraction, *of)
    names = ids(part.columns, data.person)
    chosen = {name: _draw(name) < data.test_fraction for name in set(names)}
    mask = np.array([chosen[name] for name in names], dtype=bool)
    if mask.all():
        raise DataError(
            f"{data.source}: {len(chosen)} persons leave none to train on at data.test_fraction = {data.test_fraction}; lower "
            "it, or give data.test_source"
        )
    return mask


def _draw(name: str) -> float:
    """A number in [0, 1) that is the same for this name in all runs and at all sites."""
    digest = hashlib.sha256(_SPLIT_KEY + name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def check_apart(training: Sequence[str], held: Sequence[str], column: str) -> None:
    """Raise `DataError` if a person has training examples and held-out ones, which nothing protects."""
    both = len(set(training) & set(held))
    if both:
        raise DataError(
            f"data.test_source: {both} persons of column {column!r} (data.person) have held-out examples and training "
            "examples, and held-out examples are not protected; remove their rows from one of the two"
        )
