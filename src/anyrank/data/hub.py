"""Datasets of Hugging Face's `datasets`: saved to disk, in Parquet, in a folder of data files, or on the hub.

`datasets` is imported when such a source is opened. No code of a dataset is run. A hub id is looked up in the local cache and
downloaded if it is missing, with a progress bar; HF_HUB_OFFLINE=1 forbids the download.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyrank.errors import DataError, in_a_line
from anyrank.files import check_regular

if TYPE_CHECKING:
    from datasets import Dataset

_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+|[\w.-]+(?=:))(:(?P<config>[\w.-]+))?")
_NO_SPLITS = ""
_MOST_BYTES, _BATCH = 2 << 30, 250  # of a table in memory; rows that are read at once


def is_id(source: str) -> bool:
    """Whether `source` is written as a hub id: `owner/name`, `owner/name:config` or `name:config`.

    >>> [is_id(source) for source in ("owner/name", "glue:sst2", "owner/name:en", "name", "a/b/c")]
    [True, True, True, False, False]
    """
    return _ID.fullmatch(source) is not None


def splits(source: str) -> Mapping[str, Dataset]:
    """`{split: dataset}` of a folder, a `.parquet` file or a hub id; the one split of a source without splits is called ''.

    A folder is one that `save_to_disk` wrote, or one of data files as on the hub. Raises `DataError` if it cannot be opened.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: Parquet files and datasets need the package datasets; pip install 'anyrank[hub]'") from None
    try:
        with _quiet(datasets):
            found = _open(datasets, source)
    except Exception as error:  # errors of datasets, the hub client, pyarrow and the system have no common base
        what = "check the name and the network" if not Path(source).exists() else "check what is in it"
        raise DataError(f"{source}: datasets cannot open it ({in_a_line(error)}); {what}") from None
    return found if isinstance(found, Mapping) else {_NO_SPLITS: found}


def _open(datasets: Any, source: str) -> Any:
    path = Path(source)
    if path.suffix.lower() == ".parquet" and not path.is_dir():
        check_regular(path)
        return datasets.Dataset(_parquet(path))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(source)
    if path.is_dir():
        return datasets.load_dataset(source)
    name = _ID.fullmatch(source)
    return datasets.load_dataset(name["name"], name["config"])


def _parquet(path: Path) -> Any:
    """The table in a Parquet file, which is read in parts: a small file may hold a large table."""
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        batches, size = [], 0
        for stored in file.iter_batches(batch_size=_BATCH):
            batch = pyarrow.RecordBatch.from_pydict({name: _decoded(stored[name]) for name in stored.schema.names})
            size += batch.nbytes
            if size > _MOST_BYTES:
                raise OSError(f"expected a table of at most {_MOST_BYTES:,} bytes; give the folder of a larger one")
            batches.append(batch)
        named = file.schema_arrow.metadata
        table = pyarrow.Table.from_batches(batches) if batches else file.schema_arrow.empty_table()
        return table.replace_schema_metadata(named)


def _decoded(column: Any) -> Any:
    """A column in full: one that is stored as a dictionary may say a long text many times in little space."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def columns(dataset: Dataset, source: str) -> dict[str, list[Any]]:
    """The columns of plain values, `{name: [n]}`; class labels by their names, `None` if a row has none.

    `source`: of the dataset, for errors. Raises `DataError` for a dataset whose values cannot be read.
    """
    try:
        return _columns(dataset)
    except Exception as error:  # damaged files fail here, too, in as many ways
        raise DataError(f"{source}: datasets cannot read its rows ({in_a_line(error)}); check what is in it") from None


def _columns(dataset: Dataset) -> dict[str, list[Any]]:
    from datasets import ClassLabel, Value

    plain = {name: feature for name, feature in dataset.features.items() if isinstance(feature, (Value, ClassLabel))}
    values = dataset.select_columns(list(plain))[:]
    named = {name: feature.names for name, feature in plain.items() if isinstance(feature, ClassLabel)}
    for name, names in named.items():
        values[name] = [None if label is None or label < 0 else names[label] for label in values[name]]
    return {name: values[name] for name in plain}


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No log lines of `datasets` and the hub client, and a progress bar only for downloads."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
