"""The errors of the library: one line with what was expected, what was found, where, and what to do."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

_LONGEST = 2000  # characters of an error: names in it may be anybody's, and of any length
_COMPARED, _COMPARED_LENGTH = 2000, 200  # names, and characters of each, that are compared with a misspelt one


def printable(text: str) -> str:
    r"""`text` in one line that leaves a terminal as it is: control characters and marks that turn the direction of writing
    are shown as they are written in Python.

    >>> print(printable("a\x1b[31m\n\u202eb"))
    a\x1b[31m\n\u202eb
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def _shown(letter: str) -> str:
    # Cc: controls; Cf: formats, such as the marks of direction; Cs: halves of a pair; Zl, Zp: ends of lines.
    if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or letter in "\u200c\u200d":  # joiners of scripts
        return letter
    return ascii(letter)[1:-1]


def shortened(text: str, longest: int) -> str:
    """`text`, or its beginning and its end, in `longest` characters.

    >>> shortened("abcdefgh", 5)
    'ab…gh'
    """
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


class AnyRankError(Exception):
    """Base of every error that `anyrank` raises on purpose. Its text is one line for a person, whatever names are in it."""

    def __str__(self) -> str:
        return printable(shortened(super().__str__(), _LONGEST))


class AdapterError(AnyRankError):
    """An adapter, a layer or an adapter folder is not what it should be."""


class MethodError(AnyRankError):
    """A method is unknown, was given a wrong option, or refuses the clients it was given."""


class ConfigError(AnyRankError):
    """A configuration key, value or combination is wrong."""


class DataError(AnyRankError):
    """A data source or a partition of it is wrong."""


class ModelError(AnyRankError):
    """A base model, its LoRA targets or its head is wrong."""


class RunError(AnyRankError):
    """A run folder cannot be used as asked."""


class RunFailed(AnyRankError):
    """A run, or one client's training, cannot continue. The last checkpoint remains."""


class FrameError(AnyRankError):
    """A frame cannot be written, or what was received is not the frame that was expected."""


class DeployError(AnyRankError):
    """A federation's file, a party's kit, or a server that runs cannot be used as asked."""


def in_a_line(error: BaseException) -> str:
    r"""Somebody else's error in one line: its kind and the first line that it says; one of ours in its own words.

    >>> in_a_line(ValueError("out of range"))
    'ValueError: out of range'
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
    if isinstance(error, AnyRankError):
        return text
    return f"{type(error).__name__}: {printable(text)}" if text else type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause that names the known word nearest to `word`, or all known words if none is near."""
    known = sorted(known)
    compared = [name for name in known[:_COMPARED] if len(name) <= _COMPARED_LENGTH]
    close = difflib.get_close_matches(word[:_COMPARED_LENGTH], compared, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
