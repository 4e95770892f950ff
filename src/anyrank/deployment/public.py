"""What of a configuration sites are told, and what of it a server over sites keeps: no path, no file, no source, no code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from anyrank.config.sections import HANDED_IN, Config
from anyrank.config.sections.sites import AT_THE_SITE
from anyrank.config.tables import to_table
from anyrank.errors import ConfigError
from anyrank.federation.checks import check_secure_sum
from anyrank.methods import Method

# The keys that sites are told, by section. A key that stands here or in `WITHHELD` has been thought about; a test asks for it.
PUBLIC: Mapping[str, tuple[str, ...]] = {
    "run": ("name", "seed", "rounds", "threads", "stacking"),
    "model": ("name", "task", "head", "pretrained", "max_length", "dtype", "train_dtype"),
    "data": (
        *("test_fraction", "text", "image", "label", "person", "label_names", "header", "delimiter", "encoding", "format"),
        "prompt",
        *("completion", "template", "chat", "options", "rotate"),
    ),
    "lora": ("alpha", "scaling", "target_modules"),
    "train": (
        *("optimizer", "learning_rate", "final_learning_rate", "schedule", "momentum", "weight_decay", "batch_size"),
        *("accumulation_steps", "gradient_checkpointing", "local_steps", "local_epochs", "proximal_mu", "precondition"),
    ),
    "method": ("name",),  # and its options
    "privacy": (
        *("level", "epsilon", "delta", "clip", "noise_multiplier", "max_rounds", "accountant", "counts", "secure", "noise_at"),
        *("secure_sum", "examples_per_person", "noise", "bands"),
    ),
    "eval": ("every", "batch_size", "score", "extract", "max_new_tokens", "length_normalized", "where", "by_label"),
}
# The other keys of these sections, and whole sections: of other clients, of the server alone, of one machine, or a path or
# code.
WITHHELD: Mapping[str, tuple[str, ...]] = {
    "run": ("label", "engine", "workers", "worker_memory_gb"),
    "model": ("path", "features", "device", "file", "handed_in"),
    "data": ("source", "test_source", "split", "test_split", "train_examples", "test_examples", "partition"),
    "method": ("file", "handed_in"),
    "privacy": ("ceiling",),  # a site's own grant says what may be spent
    "eval": ("metrics", "file"),
}
WHOLLY_WITHHELD = ("clients", "rounds", "guard", "robust", "sites")


def public(config: Config) -> dict[str, Any]:
    """The table of the configuration as sites get it: without paths, files, code, and without what is of other clients. Each
    site adds its own data and folder of the base model. Keys that are not in it have their defaults."""
    table = to_table(config)
    told = {section: {key: table[section][key] for key in keys} for section, keys in PUBLIC.items()}
    return told | {"method": {"name": config.method.name, **config.method.options}}


def kept(config: Config) -> Config:
    """The configuration as a server over sites keeps it: it knows neither sources nor the folder of a base model."""
    sites = tuple(dataclasses.replace(site, source=AT_THE_SITE, test_source="") for site in config.sites)
    return dataclasses.replace(config, sites=sites, model=dataclasses.replace(config.model, path=""))


def check(config: Config, method: Method) -> None:
    """Raise `ConfigError` for what no federation over sites can have."""
    if not config.sites:
        raise ConfigError("sites: expected a table [[sites]] for each site, got none; a run without sites is `anyrank run`")
    check_secure_sum(config, method)
    if config.eval.where != "sites":
        raise ConfigError("eval.where: expected 'sites', since the server has no held-out examples, got 'server'")
    if method.pools_data:
        raise ConfigError(f"method.name: {method.name} gathers all examples in one place, which sites do not allow")
    code = {"model.file": config.model.file, "method.file": config.method.file, "method": config.method.handed_in}
    named = next((key for key, value in code.items() if value), "")
    if named or config.model.task == HANDED_IN:
        raise ConfigError(f"{named or 'model.task'}: sites run no code of others; use a task and a method that the package has")
    if _is_path(config.model.name):
        raise ConfigError(f"model.name: expected a name that all sites know, got a path, {config.model.name!r}; use model.path")
    if config.data.test_source:
        raise ConfigError("data.test_source: the server has no held-out examples; each site names its own, in its own file")


def check_labels(config: Config) -> None:
    """Raise `ConfigError` where sites would number their labels differently: each of them has its own examples only."""
    if config.model.task != "causal-lm" and not config.data.label_names:
        raise ConfigError("data.label_names: expected the labels of all sites, since no site knows those of others, got none")


def _is_path(name: str) -> bool:
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    return absolute or name.startswith((".", "~")) or "\\" in name
