"""The errors of the library: one line with what was expected, what was found, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AnyRankError(Exception):
    """Base of every error that `anyrank` raises on purpose. Its text is one line for the user."""


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


def in_a_line(error: BaseException) -> str:
    """An error in one line: the type and the first line of its text; for an `AnyRankError`, only the text.

    >>> in_a_line(ValueError("out of range"))
    'ValueError: out of range'
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
    if isinstance(error, AnyRankError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause that names the known word nearest to `word`, or all known words if none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
