"""Labelled texts, read from the rows of a source into one frozen table. No row is corrected silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from anyrank.config.sections import DataConfig
from anyrank.data.people import set_aside
from anyrank.data.rows import DIALECTS, Part, Rows, chosen, label_of, open_source, short, shown, spelt
from anyrank.data.split import _indices, ordered
from anyrank.errors import DataError, nearest

Text = str | tuple[str, str]  # one text, or a pair of them
CLOSED = True  # labels are classes


@dataclass(frozen=True, eq=False)
class Table:
    """Labelled texts. `labels` `[n]` int64: indices into `label_names`. `columns`: the other columns, `[n]` of str each."""

    texts: tuple[Text, ...]
    labels: np.ndarray
    label_names: tuple[str, ...]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: np.ndarray) -> Table:
        """The rows `index` `[m]`, in that order, with all the label names."""
        columns = {name: values[index] for name, values in self.columns.items()}
        return Table(tuple(self.texts[i] for i in index), self.labels[index], self.label_names, columns)


def load(config: DataConfig) -> Table:
    """All rows of `data.source`, or of its split `data.split`. The source is the path of

    * a `.csv` or `.tsv` file, with a header, or with numbered columns if `data.header` is false; `data.delimiter` is the
      character between columns, if it is not the usual one;
    * a `.jsonl`/`.ndjson` file (one object per line), or a `.json` file: the same, a list of objects, or an object of splits,
      each a list of objects or of `[text, label]` pairs;
    * a `.parquet` file, or a folder: a dataset that `datasets` has saved to disk, or data files as the hub has them;

    or a hub id, `owner/name` or `owner/name:config`. If a source has splits, `data.split` names one (default: train), or
    several as `one+other`. Text files are in `data.encoding`, with or without a byte order mark. `data.text` names one column,
    or two whose texts are a pair. Blanks around a label are dropped. Labels are in alphabetical order, or in order of their
    values if all are whole numbers; `data.label_names` gives them other names, in that order. Columns of JSON are the keys
    that every object has; values that are not text are written as in JSON. Raises `DataError` with the line, item or row for a
    ragged row, an empty text or an empty label, and for a source that cannot be read.
    """
    return _renamed(training(config), config)


def load_split(config: DataConfig) -> tuple[Table, Table]:
    """Training and held-out rows. Held out are `data.test_split` or `data.test_source` (if it has splits and none is named,
    its split `test`), or else a part of the training rows.

    That part is `data.test_fraction` of the rows, stratified by label; every label keeps at least one training row. It
    depends only on the labels and the fraction, not on the run seed, so that runs with different seeds are scored on the same
    examples. Raises `DataError`.
    """
    table = training(config)
    if len(table.label_names) < 2:
        raise DataError(f"{config.source}: expected at least two different labels, got only {table.label_names[0]!r}")
    if config.test_source or config.test_split:
        train, test = table, _held_out_rows(config, table.label_names)
    else:
        train, test = _divided(table, config)
    return _renamed(train, config), _renamed(test, config)


def _divided(table: Table, config: DataConfig) -> tuple[Table, Table]:
    chosen = set_aside(table, config)
    if not chosen.any():
        raise DataError(
            f"{config.source}: {len(table)} rows of {len(table.label_names)} labels leave none to hold out at "
            f"data.test_fraction = {config.test_fraction}; raise it, or give data.test_source"
        )
    return table.take(np.flatnonzero(~chosen)), table.take(np.flatnonzero(chosen))


def training(config: DataConfig) -> Table:
    """The training rows, with the labels' names from the source."""
    return _whole(Part(config.source, config.split, "train", "data.source", "data.split"), config)


def given_held_out(config: DataConfig) -> Table | None:
    """The rows of the test source or split, with the labels' names from there; `None` if neither is set."""
    return _whole(_held_out_part(config), config) if config.test_source or config.test_split else None


def together(tables: Sequence[Table]) -> dict[str, Any]:
    """The texts of all tables, one after the other."""
    return {"texts": tuple(text for table in tables for text in table.texts)}


def _whole(part: Part, config: DataConfig) -> Table:
    texts, names, columns = _read(part, config)
    label_names = ordered(names)
    return Table(texts, _indices(names, label_names), label_names, columns)


def _held_out_part(config: DataConfig) -> Part:
    source, key = (config.test_source, "data.test_source") if config.test_source else (config.source, "data.source")
    return Part(source, config.test_split, "test", key, "data.test_split")


def _held_out_rows(config: DataConfig, label_names: tuple[str, ...]) -> Table:
    """The rows of the test source or split; their labels are indices into the training labels."""
    part = _held_out_part(config)
    texts, names, columns = _read(part, config)
    unknown = sorted(set(names) - set(label_names))
    if unknown:
        raise DataError(
            f"{part.source}: label {unknown[0]!r} is not among the {len(label_names)} labels of {config.source} "
            f"({len(unknown)} such); {nearest(unknown[0], label_names)}; remove those rows or add training rows"
        )
    return Table(texts, _indices(names, label_names), label_names, columns)


def _renamed(table: Table, config: DataConfig) -> Table:
    """The table with the names in `data.label_names`, if they are given."""
    given, own = config.label_names, table.label_names
    if not given:
        return table
    if len(given) != len(own) or len(set(given)) != len(given):
        raise DataError(
            f"data.label_names: expected {len(own)} different names, for {', '.join(map(short, own[:5]))}"
            f"{', …' if len(own) > 5 else ''} of {config.source}, got {len(given)}: {', '.join(map(short, given[:5]))}"
        )
    return replace(table, label_names=given)


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(part: Part, config: DataConfig) -> tuple[tuple[Text, ...], list[str], dict[str, np.ndarray]]:
    """Texts, label names and other columns of the rows of a part."""
    parts = [_read_rows(rows, part, config) for rows in chosen(open_source(part, config), part)]
    common = [name for name in parts[0][2] if all(name in columns for _, _, columns in parts)]
    columns = {name: np.concatenate([columns[name] for _, _, columns in parts]) for name in common}
    return tuple(text for texts, _, _ in parts for text in texts), [name for _, names, _ in parts for name in names], columns


def _read_rows(found: Rows, part: Part, config: DataConfig) -> tuple[list[Text], list[str], dict[str, np.ndarray]]:
    source = f"{part.source}{found.where}"
    if not found.rows:
        empty = Path(part.source).is_file() and not Path(part.source).stat().st_size
        raise DataError(f"{source}: expected rows of data, got {'an empty file' if empty else 'none'} ({part.source_key})")
    first = list(found.rows[0][1])
    wanted = config.text if isinstance(config.text, tuple) else (config.text,)
    text = [_column(source, config, first, "text", name) for name in wanted]
    label = _column(source, config, first, "label", config.label)
    twice = next((name for name in (*text, label) if [*text, label].count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{source}: data.text and data.label mean column {twice!r} twice; expected different columns")
    where = f"{source}, {found.unit}"
    texts = [_texts(row, text, f"{where} {number}") for number, row in found.rows]
    labels = [label_of(row, label, f"{where} {number}") for number, row in found.rows]
    others = [name for name in found.names if name not in (*text, label)]
    return texts, labels, {name: np.array([spelt(row[name]) for _, row in found.rows], dtype=object) for name in others}


def _column(source: str, config: DataConfig, names: list[str], key: str, wanted: str | int) -> str:
    """The name of the column to which `wanted` (from `data.text` or `data.label`) refers."""
    listed = ", ".join(short(name) for name in names[:50]) + (", …" if len(names) > 50 else "")
    delimited = Path(source).suffix.lower() in DIALECTS
    if delimited and isinstance(wanted, int):
        if 0 <= wanted < len(names):
            return names[wanted]
        raise DataError(
            f"{source}: data.{key} = {wanted}: expected a column number from 0 to {len(names) - 1}; columns: {listed}"
        )
    if delimited and not config.header:
        raise DataError(f"{source}: data.{key}: expected a column number from 0 (data.header = false), got {wanted!r}")
    if wanted in names:
        return wanted
    hint = nearest(str(wanted), names)
    near = f"{hint} " if hint.startswith("did you mean") else ""  # else it lists the names, as the error does anyway
    without = "; a file without a header needs data.header = false and column numbers" if delimited else ""
    raise DataError(f"{source}: no column {wanted!r} for data.{key}; {near}columns: {listed}{without}")


def _texts(row: Mapping[str, Any], names: Sequence[str], where: str) -> Text:
    """The text of one column, or the pair of two."""
    found = tuple(_text(row, name, where) for name in names)
    return found if len(found) == 2 else found[0]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        got = "none" if value is None else "an empty one" if isinstance(value, str) else shown(value)
        raise DataError(f"{where}: expected a text in column {name!r}, got {got}; correct or remove the row")
    return value
