"""How singular values may be asked for, and where. No torch here: a wrong name is told before torch is loaded."""

from __future__ import annotations

import typing
from typing import Literal

from anyrank.errors import MethodError, nearest

Algebra = Literal["auto", "qr", "gram", "randomized"]
ALGEBRAS: tuple[Algebra, ...] = typing.get_args(Algebra)
DEVICES = ("auto", "cpu", "cuda")  # Apple's has no float64


def check_algebra(name: str) -> None:
    if name not in ALGEBRAS:
        raise MethodError(f"algebra '{name}': unknown; {nearest(name, ALGEBRAS)}")


def check_device(name: str) -> None:
    if name not in DEVICES:
        raise MethodError(f"device '{name}': expected one that merges can use; {nearest(name, DEVICES)}")
