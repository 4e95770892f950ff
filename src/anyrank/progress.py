"""How long work reports that it goes on."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]


Progress = Callable[[int, int], None]
