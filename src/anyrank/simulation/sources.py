"""The data sets of a run in this process, as their ledgers know them, and whether its held-out examples are apart from them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyrank.config.sections import HANDED_IN, Config, DataConfig, ModelConfig
from anyrank.data import images, instructions, texts
from anyrank.errors import AnyRankError, ConfigError, RunError
from anyrank.federation.cohort import Population
from anyrank.files import check_regular, walk
from anyrank.privacy.datasets import SHARED, DataSet, Source
from anyrank.runs.names import CONFIG, IDENTITY, METRICS, PRIVACY, SUMMARY
from anyrank.tasks import digest
from anyrank.tasks.base import Task
from anyrank.tasks.inputs import FieldInputs, TensorInputs

EMBEDDED = ("digits", "arithmetic")  # sources that come with the package
_READERS = {"text-classification": texts, "image-classification": images, "causal-lm": instructions}
_AT_ONCE = 4096  # rows of tensors
_PIECE = 1 << 20
_MOST = 2 << 30  # bytes of a folder, or file, of which every byte is read


@dataclass(frozen=True)
class Division:
    """How the examples of a run are divided: the count that each client `declared`, and a digest of the `split`."""

    declared: Mapping[str, int] = field(default_factory=dict)
    split: str = ""

    @classmethod
    def of(cls, population: Population, split: str) -> Division:
        """The division of a federation's clients."""
        return cls({population.name(i): int(size) for i, size in enumerate(population.sizes)}, split)


def sources(config: Config, task: Task | None = None, division: Division | None = None) -> Callable[[], Sequence[Source]]:
    """A function that gives the data sets of a configuration, or of a `task` that was handed in, and of the `division` of its
    examples if it is known. They are read when they are first asked for."""
    return functools.cache(functools.partial(_sources, config, task, division or Division()))


def _sources(config: Config, task: Task | None, division: Division) -> tuple[Source, ...]:
    if config.sites:
        own = [(site.name, replace(config.data, source=site.source, test_source="")) for site in config.sites]
        found = [(name, data, _read(config.model, data)) for name, data in own]
        return tuple(
            Source(read, _group(config, read, "site", name, _text(data), _count(division, name)), frozenset({name}))
            for name, data, read in found
        )
    if _is_own(config):
        data = _of_task(config, task) if task is not None else _of_file(config)
        order = digest.digest(task)[2] if task is not None else ""
    else:
        data, order = _read(config.model, config.data), ""
    clients = _text((config.clients.count, config.clients.names, config.run.seed))
    more = (_of_code(config.data.partition.file), division.split, _text(division.declared))
    return (Source(data, _group(config, data, order, clients, *more), None),)


def _count(division: Division, site: str) -> str:
    """What a site declared. The rows of a site's own source are all with it, whatever the other sites have."""
    return str(division.declared.get(site, ""))


def _group(config: Config, data: DataSet, *more: str) -> str:
    """What runs have in common that give each example to the same client, and each client the same declared count: the division
    itself, what it depends on, the unit of counts, and the rows in their order with their labels, as the files have them."""
    shared = SHARED if config.data.partition.kind == "sampled" and not config.sites else ""
    version = importlib.metadata.version("anyrank")
    own = (_text(config.data), config.model.task, _of_code(config.model.file), config.privacy.counts, version)
    unit = (config.privacy.level, str(config.model.pretrained))  # a model that is pretrained here takes some of the examples
    return shared + _digest(data.files, data.rows, *own, *unit, *more)


def _text(value: Any) -> str:
    return json.dumps(asdict(value) if isinstance(value, DataConfig) else value, sort_keys=True)


def _of_code(path: str) -> str:
    """The digest of a file of the user's own; empty if there is none."""
    return _of_files(Path(path)) if path else ""


def named(source: str, config: Config | None = None) -> DataSet:
    """The data set of a file, a folder, or an embedded source, read as `config` says. Raises `RunError` if there is none."""
    _check_named(source)
    if config is not None:
        try:
            return _read(config.model, replace(config.data, source=source))
        except AnyRankError:  # its rows have other columns: its files are known
            pass
    return DataSet(source, *_place(source))


def _check_named(source: str) -> None:
    """Raise `RunError` for what is no data, or has none."""
    if source in EMBEDDED:
        return
    path, wanted = Path(source), f"expected a configuration, a file or folder of data, or one of {', '.join(EMBEDDED)}"
    if not source or not os.path.exists(path):
        raise RunError(f"--spent {source or repr(source)}: {wanted}")
    if (path / CONFIG).is_file() and any((path / name).exists() for name in (IDENTITY, METRICS, PRIVACY, SUMMARY)):
        raise RunError(f"--spent {source}: is a run folder; give its data, or its configuration ({path / CONFIG})")
    if not _has_rows(path):
        raise RunError(f"--spent {source}: has no rows; {wanted}")


def _has_rows(path: Path) -> bool:
    """Whether there may be rows in a file or folder: its files are not all empty, and a table is not only a line of names."""
    try:
        if path.is_dir():
            return any(each.stat().st_size or not each.is_file() for each in walk(path))  # a pipe is refused when it is read
        check_regular(path)
        if path.suffix not in (".csv", ".tsv"):
            return path.stat().st_size > 0
        with open(path, "rb") as file:
            start = file.read(_PIECE)
        return len(start) == _PIECE or len(start.strip().splitlines()) > 1
    except OSError as error:
        raise _unreadable(path, error) from None


def _is_own(config: Config) -> bool:
    """Whether a task is the user's own, and reads examples that the configuration need not name."""
    return bool(config.model.file) or config.model.task == HANDED_IN


def _read(model: ModelConfig, data: DataConfig) -> DataSet:
    """The data set of `data.source`, with its rows where they can be read."""
    path, files = _place(data.source)
    return _rows(model, data, path, files)


@functools.lru_cache(maxsize=32)
def _rows(model: ModelConfig, data: DataConfig, path: str, files: str) -> DataSet:
    """A data set whose `files` have this digest: the same files are read once, whatever the number of runs."""
    reader = None if data.source in EMBEDDED else _READERS.get(model.task)
    if reader is None:
        return DataSet(data.source, path, files or _digest("source", data.source))
    return DataSet.of_rows(data.source, path, files, _ROWS[reader](reader.training(replace(data, label_names=()))))


def _place(source: str) -> tuple[str, str]:
    """The path of a source, and the digest of its files; each empty if there is none."""
    if source in EMBEDDED:
        return "", _digest("embedded", source)
    path = Path(source)
    return (str(path.resolve()), _of_files(path)) if path.exists() else ("", "")  # a hub id is no path


def _of_files(path: Path) -> str:
    """The digest of the contents of a file, or of all files in a folder, whatever their names and order.

    Of more than 2 GB, the digest is of each file's size, first and last MB, so that it takes no longer than a run's start.
    """
    try:
        found = list(walk(path)) if path.is_dir() else [path]
        whole = sum(each.stat().st_size for each in found) <= _MOST
        return _digest("files", *sorted(_of_one(each, whole) for each in found))
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> RunError:
    at = error.filename or path
    return RunError(f"{at}: cannot be read ({error.strerror or error}); correct that, and give the command again")


def _of_one(path: Path, whole: bool) -> str:
    check_regular(path)  # a pipe or a device has no end
    with open(path, "rb") as file:
        if whole:
            return hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        total = hashlib.sha256(str(size).encode() + file.read(_PIECE))
        file.seek(max(0, size - _PIECE))
        total.update(file.read(_PIECE))
        return total.hexdigest()


# --- rows ------------------------------------------------------------------------------------------------------------
# A row is what a model reads of an example. Its label is no part of it: rows with other labels are of the same people.


def _of_texts(table: texts.Table) -> Iterator[bytes]:
    return (json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass") for text in table.texts)


def _of_images(held: images.Images) -> Iterator[bytes]:
    return (held.pixels.raw(i) for i in held.rows.tolist())


def _of_instructions(held: instructions.Instructions) -> Iterator[bytes]:
    for item in held.items:
        yield json.dumps([item.prompt, list(item.turns), item.completion], ensure_ascii=False).encode("utf-8", "surrogatepass")


_ROWS = {texts: _of_texts, images: _of_images, instructions: _of_instructions}


def _of_file(config: Config) -> DataSet:
    """The data set of a task of the user's own that other processes load: by its code, and by the source that it is given."""
    path, files = _place(config.data.source) if config.data.source not in EMBEDDED else ("", "")
    name = config.model.file if not files else config.data.source
    return DataSet(name, path, files or _digest("code", _of_code(config.model.file), _text(config.data)))


def _of_task(config: Config, task: Task) -> DataSet:
    """The training examples of a task of the user's own, by their tensors."""
    name = task.name or config.model.task
    if not isinstance(task.train.inputs, (TensorInputs, FieldInputs)):  # items are made on request: some of them are read
        return DataSet(name, "", _digest("items", digest.digest(task)[2]), "", len(task.train))
    return DataSet.of_rows(name, "", "", _of_tensors(task))


def _of_tensors(task: Task) -> Iterator[bytes]:
    for index in torch.arange(len(task.train)).split(_AT_ONCE):
        batch = sorted(task.train.inputs.batch(index).items())
        parts = [np.ascontiguousarray(value.detach().cpu().reshape(len(index), -1).numpy()) for _, value in batch]
        yield from (b"".join(part[row].tobytes() for part in parts) for row in range(len(index)))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


# --- held-out examples -------------------------------------------------------------------------------------------------


def check_held_out(config: Config) -> None:
    """Raise `ConfigError` for a private run that would score examples held out of a private source: scores have no noise."""
    if config.privacy.level == "none" or config.eval.where != "server" or _is_own(config):
        return
    if config.data.test_source or (config.data.source in EMBEDDED and not config.sites):
        return
    for site in config.sites:
        if not (site.test_source or _has_held_out(config, site.source)):
            raise _lacking(f"sites.{site.name}.test_source", f"of sites.{site.name}.source")
    if not config.sites and not _has_held_out(config, config.data.source):
        raise _lacking("data.test_source", "of data.source")


def _has_held_out(config: Config, source: str) -> bool:
    """Whether a source has held-out examples of its own: a split that is named, or, of pictures, one that is there."""
    if config.data.test_split:
        return True
    pictures = config.model.task == "image-classification"
    return pictures and images.given_held_out(replace(config.data, source=source)) is not None


def _lacking(key: str, of: str) -> ConfigError:
    either = f"{key} (or data.test_source, for all sites)" if key.startswith("sites") else key
    return ConfigError(
        f"{key}: expected held-out examples that are not private, got none: data.test_fraction {of} would be scored, and "
        f"scores are published without noise; give {either}, or eval.where = 'sites' to score nothing"
    )
