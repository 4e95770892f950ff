"""Checks of the values of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyrank.errors import ConfigError, nearest


def expect(holds: bool, where: str, expected: str, got: Any) -> None:
    if not holds:
        raise ConfigError(f"{where}: expected {expected}, got {got!r}")


def one_of(value: str, known: Sequence[str], where: str) -> None:
    if value not in known:
        raise ConfigError(f"{where}: expected one of {', '.join(known)}, got {value!r}; {nearest(value, known)}")
