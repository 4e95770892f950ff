"""A site's own file, `site.toml`: its data, its base model, and what it allows. It never leaves the site. No torch here.

The server's configuration has to fit inside. Every key has a default that is safe, apart from four that the operator decides:
`name`, `data.source`, the base model, and `privacy.level`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyrank.config.describe import COUNT, NOT_NEGATIVE, POSITIVE, key
from anyrank.config.sections import DEVICES, INSTRUCTIONS, PRIVACY_LEVELS, TASKS, DataConfig
from anyrank.config.sections.sites import fault_of
from anyrank.config.sections.values import expect, one_of
from anyrank.config.tables import read_section, read_toml
from anyrank.errors import ConfigError, shortened

_MB = 1_000_000
_PATHS = (("data", "source"), ("data", "test_source"), ("model", "folder"), ("store", "folder"))


@dataclass(frozen=True)
class SiteData:
    """`[data]`: the site's own examples. The server's configuration has no say in these keys."""

    source: str = key("", "The training examples: a file or a folder, read as `data.source` of a run is.", "a file or a folder")
    test_source: str = key("", "The site's held-out examples. Empty: `data.test_fraction` of the source.", "a file or a folder")
    text: str | int | tuple[str | int, ...] = key("text", "The column of texts, or a list of two for pairs.")
    image: str = key("image", "The array or column of images.")
    label: str | int = key("label", "The column or array of labels.")
    person: str = key("", "The column that names whose each example is. Needed for level person.")
    header: bool = key(True, "Whether the first row of a table has the names of its columns.")
    delimiter: str = key("", "The character between columns. Empty: the usual one of the file's kind.", "one character")
    encoding: str = key("utf-8", "The encoding of text files.")
    format: str = key("columns", "What the rows of a causal-lm source contain.", INSTRUCTIONS)
    prompt: str = key("prompt", "The column of prompts.")
    completion: str = key("completion", "The column of completions.")
    template: str = key("", "The training text, with columns in braces. Empty: the format's own.")
    chat: bool = key(False, "Whether the tokenizer's chat template makes the training text.")

    def __post_init__(self) -> None:
        expect(bool(self.source), "data.source", "the site's own training examples, a file or a folder", self.source)
        DataConfig(**vars(self))  # which checks each value


@dataclass(frozen=True)
class SiteModel:
    """`[model]`: the base model on this machine. The server's configuration cannot name another one."""

    folder: str = key("", "A local transformers folder with the base model.", "a folder; either folder or name")
    name: str = key("", "An embedded or packaged model, instead of a folder.", "a name; either folder or name")

    def __post_init__(self) -> None:
        given = f"folder={self.folder!r}, name={self.name!r}"
        expect(bool(self.folder) != bool(self.name), "model", "either folder or name", given)


@dataclass(frozen=True)
class SiteDevice:
    """`[device]`: where training runs."""

    kind: str = key("auto", "The device. auto: a GPU if torch finds one.", DEVICES)
    threads: int = key(1, "CPU threads.", "a whole number from 1 to 1024")

    def __post_init__(self) -> None:
        one_of(self.kind, DEVICES, "device.kind")
        expect(1 <= self.threads <= 1024, "device.threads", "a whole number from 1 to 1024", self.threads)


@dataclass(frozen=True)
class SiteLimits:
    """`[limits]`: the most that a server may ask for. What exceeds a limit is refused."""

    rank: int = key(64, "Largest rank of this site's adapter.", COUNT)
    largest_rank: int = key(256, "Largest rank in the whole federation, at which the start is made.", COUNT)
    steps: int = key(1_000, "Most local steps in a round, after epochs and the plan's factor.", COUNT)
    batch_size: int = key(256, "Most examples of one local step.", COUNT)
    rounds: int = key(1_000, "Most rounds of a run.", COUNT)
    max_length: int = key(1_024, "Most tokens that are read of one text.", COUNT)
    download_mb: float = key(1_000.0, "Most megabytes that a round may bring.", POSITIVE)
    upload_mb: float = key(1_000.0, "Most megabytes that a reply may have.", POSITIVE)
    seconds: float = key(3_600.0, "Most seconds of training in a round.", POSITIVE)
    memory_gb: float = key(
        0.0, "Most gigabytes of memory of the worker, where the system can limit it. 0: no limit.", NOT_NEGATIVE
    )

    def __post_init__(self) -> None:
        for name in ("rank", "largest_rank", "steps", "batch_size", "rounds", "max_length"):
            expect(getattr(self, name) >= 1, f"limits.{name}", COUNT, getattr(self, name))
        for name in ("download_mb", "upload_mb", "seconds"):
            expect(0 < getattr(self, name) <= 1e7, f"limits.{name}", f"{POSITIVE}, at most 1e7", getattr(self, name))
        expect(0 <= self.memory_gb <= 1e6, "limits.memory_gb", "a number from 0 to 1e6", self.memory_gb)

    @property
    def download_bytes(self) -> int:
        return int(self.download_mb * _MB)

    @property
    def upload_bytes(self) -> int:
        return int(self.upload_mb * _MB)


@dataclass(frozen=True)
class SitePrivacy:
    """`[privacy]`: the privacy that this site requires, and the budget that it grants for all runs together."""

    level: str = key(
        "",
        "What every run must protect: nothing, one example, all examples of one person, or all of the site. No default.",
        PRIVACY_LEVELS,
    )
    epsilon: float = key(0.0, "The epsilon that the site grants in all, over all runs, federations and attempts.", POSITIVE)
    delta: float = key(
        1e-5, "The probability with which the guarantee may fail.", "a number above 0, below 1 over the examples"
    )
    noise_multiplier: float = key(0.0, "The least noise that the site accepts. 0: any, as far as epsilon lasts.", NOT_NEGATIVE)
    clip: float = key(0.0, "The largest clip norm that the site accepts. 0: any.", NOT_NEGATIVE)
    exact_counts: bool = key(False, "Whether a private run may have the exact number of examples; else only the rounded one.")

    def __post_init__(self) -> None:
        if not self.level:
            raise ConfigError(
                f"privacy.level: expected one of {', '.join(PRIVACY_LEVELS)}, got nothing; say what every run must protect"
            )
        one_of(self.level, PRIVACY_LEVELS, "privacy.level")
        needed = self.level != "none"
        expect(0 <= self.epsilon < math.inf, "privacy.epsilon", POSITIVE, self.epsilon)
        expect(
            self.epsilon > 0 or not needed, "privacy.epsilon", "a number above 0, the budget of all runs together", self.epsilon
        )
        expect(0 < self.delta < 1, "privacy.delta", "a number above 0, below 1 over the number of examples", self.delta)
        expect(self.noise_multiplier >= 0, "privacy.noise_multiplier", NOT_NEGATIVE, self.noise_multiplier)
        expect(self.clip >= 0, "privacy.clip", NOT_NEGATIVE, self.clip)


@dataclass(frozen=True)
class SiteAccept:
    """`[accept]`: what this site takes part in, and what it reports."""

    methods: tuple[str, ...] = key((), "Methods that the site takes part in. Empty: all of the library's own that federate.")
    tasks: tuple[str, ...] = key((), "Tasks that the site takes part in. Empty: all of the library's own.", TASKS)
    base_model: str = key("", "SHA-256 that the base model's folder must have. Empty: any.", "64 hexadecimal digits")
    scores: bool = key(False, "Whether the site reports scores on its held-out examples, as sums. Never under privacy.")
    by_label: bool = key(False, "Whether these scores are also reported by label.")

    def __post_init__(self) -> None:
        for task in self.tasks:
            one_of(task, TASKS, "accept.tasks")
        right = not self.base_model or re.fullmatch(r"[0-9a-f]{64}", self.base_model)
        expect(bool(right), "accept.base_model", "64 hexadecimal digits, or empty", self.base_model)
        expect(self.scores or not self.by_label, "accept.by_label", "scores = true to be set too", self.by_label)


@dataclass(frozen=True)
class SiteStore:
    """`[store]`: the folder of own parts of adapters, the privacy ledger and the log. One worker at a time uses it."""

    folder: str = key("site-store", "The folder. It is made where it is missing.", "a folder")
    runs: int = key(64, "Most runs whose own parts are kept; a further one is refused.", COUNT)
    megabytes: float = key(4_000.0, "Most megabytes of own parts and kept replies.", POSITIVE)

    def __post_init__(self) -> None:
        expect(bool(self.folder), "store.folder", "a folder", self.folder)
        expect(self.runs >= 1, "store.runs", COUNT, self.runs)
        expect(0 < self.megabytes <= 1e9, "store.megabytes", f"{POSITIVE}, at most 1e9", self.megabytes)

    @property
    def most_bytes(self) -> int:
        return int(self.megabytes * _MB)


@dataclass(frozen=True)
class SiteFile:
    """A whole site file. `name`: the site's name, as the server's `[[sites]]` have it."""

    name: str = ""
    data: SiteData = field(default_factory=SiteData)
    model: SiteModel = field(default_factory=SiteModel)
    device: SiteDevice = field(default_factory=SiteDevice)
    limits: SiteLimits = field(default_factory=SiteLimits)
    privacy: SitePrivacy = field(default_factory=SitePrivacy)
    accept: SiteAccept = field(default_factory=SiteAccept)
    store: SiteStore = field(default_factory=SiteStore)

    def __post_init__(self) -> None:
        fault = fault_of(self.name)
        expect(not fault, "name", "the site's name in the federation, one that a folder can have", shortened(self.name, 100))
        named = bool(self.data.person) or self.privacy.level != "person"
        expect(named, "data.person", "the column that names whose each example is, for privacy.level = 'person'", "")


def load(path: str | Path) -> SiteFile:
    """The site file at `path`. Relative paths in it start at its folder. Raises `ConfigError`, in one line with the path."""
    path = Path(path)
    table = read_toml(path, "site file")
    for section, name in _PATHS:
        holder = table.get(section)
        if isinstance(holder, dict) and isinstance(holder.get(name), str) and holder[name]:
            holder[name] = os.path.abspath(path.parent / holder[name])
    if isinstance(table.get("store", {}), dict):
        table["store"] = {"folder": os.path.abspath(path.parent / SiteStore().folder)} | table.get("store", {})
    for section in ("data", "model", "privacy"):
        table.setdefault(section, {})  # so that the error names the key that is missing
    try:
        return read_section(SiteFile, table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def sections() -> dict[str, tuple[str, dict[str, Any]]]:
    """`{section: (what it is, {key: its field})}` of a site file, for documents and tests."""
    kinds = {each.name: each.default_factory for each in dataclasses.fields(SiteFile) if each.name != "name"}
    return {name: (kind.__doc__, {each.name: each for each in dataclasses.fields(kind)}) for name, kind in kinds.items()}
