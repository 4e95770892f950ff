"""What is typed for `anyrank aggregate` and `anyrank privacy`, read: folders with their examples, ranks, options, budgets."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyrank.adapter.stored import open_adapter
from anyrank.config.sections import PrivacyConfig
from anyrank.errors import AdapterError, ConfigError, MethodError
from anyrank.messages.records import ClientUpdate
from anyrank.studies import budget as budgets


def updates(words: Sequence[str]) -> list[ClientUpdate]:
    """`CLIENT_DIR[=EXAMPLES]` each: stored adapters with the examples that weigh them; all weigh the same if none says.

    Raises `AdapterError` where examples are no whole number of at least 1, or are given for some folders only.
    """
    pairs = [_folder_and_examples(word) for word in words]
    lacking = [folder for folder, examples in pairs if not examples]
    if 0 < len(lacking) < len(pairs):
        raise AdapterError(f"{lacking[0]}: no examples given, while others have them; give all folders =EXAMPLES, or none")
    found = []
    for folder, text in pairs:
        if text and not (text.isascii() and text.isdigit() and int(text) > 0):
            raise AdapterError(f"{folder}={text}: expected a whole number of at least 1 as its examples, got {text!r}")
        found.append(ClientUpdate(open_adapter(folder), int(text or 1), folder))
    return found


def _folder_and_examples(word: str) -> tuple[str, str]:
    folder, equals, examples = word.rpartition("=")
    if not equals or Path(word).is_dir():  # a folder may have the sign in its own name
        return word, ""
    if not examples:
        raise AdapterError(f"{word}: expected a whole number of at least 1 after '=', got nothing")
    return folder, examples


def ranks(text: str) -> list[int]:
    """`4,8,...`, each a whole number of at least 1."""
    words = [word.strip() for word in text.split(",")] if text else []
    for word in words:
        if not (word.isascii() and word.isdigit() and int(word) > 0):
            raise AdapterError(f"--ranks {text}: expected ranks of at least 1, such as 4,8, got {word!r}")
    return [int(word) for word in words]


def options(words: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` each, the value as TOML reads it, or as text."""
    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (equals and key.isidentifier()):
            raise MethodError(f"--option {word}: expected KEY=VALUE, e.g. split=balanced")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = text
    return found


def budget(
    examples: int, batch_size: int, steps: int, epsilon: float, noise_multiplier: float, delta: float, accountant: str
) -> dict[str, Any]:
    """The figures of steps that are asked for without a configuration; `ConfigError` for what cannot be."""
    if not (examples and batch_size and steps):
        raise ConfigError("anyrank privacy: expected a configuration, or all of --examples, --batch-size and --steps")
    asked = PrivacyConfig("example", epsilon, delta, noise_multiplier=noise_multiplier, accountant=accountant)
    return budgets.of_steps(examples, batch_size, steps, asked)
