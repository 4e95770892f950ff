"""Read and check the arguments of commands: configurations, methods, folders, ranks, options, budgets.

Errors that can be found without torch are found here, before a command imports torch.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyrank import config as configs
from anyrank.algebra import names
from anyrank.config.sections import Config, PrivacyConfig
from anyrank.devices import cores
from anyrank.errors import AdapterError, ConfigError, MethodError, RunError, shortened
from anyrank.studies import variants

if TYPE_CHECKING:
    from anyrank.messages.records import ClientUpdate
    from anyrank.studies.variants import Cell


def configuration(path: Path, overrides: Sequence[str], own_method: bool = True) -> Config:
    """The configuration in a file, with its method's name, options and ranks checked as far as that needs no torch.

    `own_method = False`: where its methods are named apart (`cells`). A method from a file is known when that has run.
    """
    chosen = configs.load(path, overrides)
    if own_method or chosen.method.file:
        variants.check_method(chosen)
    return chosen


def cells(config: Config, labels: str, seeds: int, out: Path) -> list[Cell]:
    """The runs of `METHOD[:KEY=VALUE][@RANK],...`, each with its method checked as in `configuration`."""
    planned = variants.make_cells(config, [label.strip() for label in labels.split(",")], seeds, out)
    variants.check_methods(planned)
    return planned


def updates(words: Sequence[str]) -> list[tuple[str, int]]:
    """Folders with their numbers of examples, each from `CLIENT_DIR[=EXAMPLES]`; without numbers, all weigh the same.

    Any positive numbers will do: where one is no whole number, all become the smallest whole numbers of the same ratios, so
    that equal ratios give equal results. Raises `AdapterError` for anything else, and where only some folders have one.
    """
    pairs = [_folder_and_examples(word) for word in words]
    lacking = [folder for folder, examples in pairs if not examples]
    if 0 < len(lacking) < len(pairs):
        raise AdapterError(f"{lacking[0]}: no examples given, while others have them; give all folders =EXAMPLES, or none")
    weights = _whole([_weight(folder, text) if text else Fraction(1) for folder, text in pairs])
    for (folder, text), weight in zip(pairs, weights, strict=True):
        if weight > _MOST_EXAMPLES:
            raise AdapterError(
                f"{folder}={shortened(text, 50)}: expected examples, or weights, whose ratios are those of whole numbers of at "
                f"most {_MOST_EXAMPLES}; round them"
            )
    return [(folder, weight) for (folder, _), weight in zip(pairs, weights, strict=True)]


_NUMBER = re.compile(r"[0-9]{1,30}(\.[0-9]{0,30})?(e[+-]?[0-9]{1,2})?|\.[0-9]{1,30}(e[+-]?[0-9]{1,2})?", re.ASCII)
_MOST_EXAMPLES = 2**53  # beyond it, float64 does not tell neighbours apart


def _weight(folder: str, text: str) -> Fraction:
    found = Fraction(text) if _NUMBER.fullmatch(text) else Fraction(0)
    if found <= 0:
        told = shortened(text, 50)
        raise AdapterError(
            f"{folder}={told}: expected its number of examples, at least 1, or a positive weight such as 0.25, got {told!r}"
        )
    return found


def _whole(weights: Sequence[Fraction]) -> list[int]:
    """The weights as whole numbers: as they are if they are, else the smallest ones of the same ratios."""
    if all(weight.denominator == 1 for weight in weights):
        return [int(weight) for weight in weights]
    together = math.lcm(*(weight.denominator for weight in weights))
    counts = [int(weight * together) for weight in weights]
    return [count // math.gcd(*counts) for count in counts]


def jobs(count: int) -> int:
    """The runs at a time that are asked for, by default one a core. Raises `ConfigError` for a number below 0."""
    if count < 0:
        raise ConfigError(f"--jobs {count}: expected a whole number of at least 1, or 0 for one a core")
    return count or cores()


def to_merge(folders: Sequence[str | Path], out: Path, algebra: str, device: str) -> None:
    """Raise what a merge of these adapter folders would raise, as far as that needs no torch."""
    names.check_algebra(algebra)
    names.check_device(device)
    adapters(folders)
    if out.exists():
        raise RunError(f"{out}: exists already; name a new folder, or remove this one")


def adapters(folders: Sequence[str | Path]) -> None:
    """Raise `AdapterError` for a folder that is not there, or is none of an adapter."""
    for folder in map(Path, folders):
        if not (folder / "adapter_config.json").is_file():
            what = "no adapter_config.json in it" if folder.is_dir() else "no such folder"
            raise AdapterError(f"{folder}: {what}; expected a PEFT adapter folder, as save_pretrained writes it")


def opened(updates: Sequence[tuple[str, int]]) -> list[ClientUpdate]:
    """Stored adapters with their examples, as a merge takes them."""
    from anyrank.adapter.stored import open_adapter
    from anyrank.messages.records import ClientUpdate

    return [ClientUpdate(open_adapter(folder), examples, folder) for folder, examples in updates]


def _folder_and_examples(word: str) -> tuple[str, str]:
    folder, equals, examples = word.rpartition("=")
    if not equals or os.path.isdir(word):  # a folder may have the sign in its own name
        return word, ""
    if not examples:
        raise AdapterError(f"{word}: expected a whole number of at least 1 after '=', got nothing")
    return folder, examples


def ranks(text: str) -> list[int]:
    """The ranks in `4,8,...`, each a whole number of at least 1."""
    words = [word.strip() for word in text.split(",")] if text else []
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 19 and int(word) > 0):
            text, word = shortened(text, 50), shortened(word, 50)
            raise AdapterError(f"--ranks {text}: expected ranks of at least 1, such as 4,8, got {word!r}")
    return [int(word) for word in words]


def options(words: Sequence[str]) -> dict[str, Any]:
    """The options in `KEY=VALUE` words; each value is read as TOML, or else as text."""
    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (equals and key.isidentifier()):
            raise MethodError(f"--option {word}: expected KEY=VALUE, e.g. split=balanced")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            found[key] = text
    return found


def budget(
    examples: int, batch_size: int, steps: int, epsilon: float, noise_multiplier: float, delta: float, accountant: str
) -> dict[str, Any]:
    """The privacy figures for options given without a configuration; `ConfigError` if they are not possible."""
    if not (examples and batch_size and steps):
        raise ConfigError("anyrank privacy: expected a configuration, or all of --examples, --batch-size and --steps")
    asked = PrivacyConfig("example", epsilon=epsilon, delta=delta, noise_multiplier=noise_multiplier, accountant=accountant)
    from anyrank.studies import budget as budgets

    return budgets.of_steps(examples, batch_size, steps, asked)
