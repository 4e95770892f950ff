"""Sources of text data: CSV, TSV, JSON and JSON-lines files with a text and a label column, read into one frozen table.

Nothing is repaired in silence: a row that is not what the header promises stops with its line number. Imports nothing heavy.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anyrank import keys
from anyrank.config import DataConfig
from anyrank.errors import DataError, nearest

# CSV as RFC 4180 has it; a TSV has no quoting: a quote in SST-2's TSV is part of the sentence.
_DIALECTS = {
    ".csv": {"delimiter": ",", "quotechar": '"', "doublequote": True, "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_JSON = (".jsonl", ".ndjson", ".json")
# The held-out examples of a file are the same for every run seed: runs that differ in their seed alone are then scored on
# the same examples, so that their difference is one of training and comparisons over seeds are paired.
_SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Table:
    """Labelled texts. `labels` `[n]` int64 index `label_names`; `columns`: the file's other columns, `[n]` of str each."""

    texts: tuple[str, ...]
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
    """All rows of `config.source`, a `.csv`, `.tsv`, `.jsonl`/`.ndjson` file (one object a line) or a `.json` list of objects.

    Files are UTF-8, with or without a byte order mark. A label's surrounding blanks are dropped; label names are in order of
    the alphabet, or of their value where all are whole numbers. Columns of JSON are the keys that every object has; values that
    are not text are spelt as JSON spells them. Raises `DataError` with the line for a ragged row, an empty text or label.
    """
    texts, names, columns = _read(Path(config.source), config, "data.source")
    label_names = ordered(names)
    return Table(texts, _indices(names, label_names), label_names, columns)


def load_split(config: DataConfig) -> tuple[Table, Table]:
    """Training and held-out rows: `config.source` and `config.test_source`, or a split of the source where there is none.

    The split holds out `test_fraction` of the rows, of each label as near to that share as whole numbers allow, and leaves
    every label at least one training row. It depends on the labels and the fraction alone, not on the run seed: runs over
    several seeds are scored on the same examples.
    """
    table = load(config)
    if len(table.label_names) < 2:
        raise DataError(f"{config.source}: expected at least two labels to tell apart, got only {table.label_names[0]!r}")
    if config.test_source:
        return table, _load_test(config, table.label_names)
    held_out = _held_out(table.labels, config.test_fraction)
    if not held_out.any():
        raise DataError(
            f"{config.source}: {len(table)} rows of {len(table.label_names)} labels leave none to hold out at "
            f"data.test_fraction = {config.test_fraction}; raise it, or give data.test_source"
        )
    return table.take(np.flatnonzero(~held_out)), table.take(np.flatnonzero(held_out))


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct names in order: by value where all are whole numbers, else by the alphabet.

    >>> ordered(["10", "9", "9"]), ordered(["b", "a", "10"])
    (('9', '10'), ('10', 'a', 'b'))
    """
    distinct = set(names)
    whole = all(re.fullmatch(r"[+-]?[0-9]+", name) for name in distinct)
    return tuple(sorted(distinct, key=lambda name: (int(name), name) if whole else name))


def _load_test(config: DataConfig, label_names: tuple[str, ...]) -> Table:
    texts, names, columns = _read(Path(config.test_source), config, "data.test_source")
    unknown = sorted(set(names) - set(label_names))
    if unknown:
        raise DataError(
            f"{config.test_source}: label {unknown[0]!r} is not among the {len(label_names)} labels of {config.source} "
            f"({len(unknown)} such); {nearest(unknown[0], label_names)}; remove those rows or add training rows"
        )
    return Table(texts, _indices(names, label_names), label_names, columns)


def _indices(names: Iterable[str], label_names: tuple[str, ...]) -> np.ndarray:
    index = {name: i for i, name in enumerate(label_names)}
    return np.array([index[name] for name in names], dtype=np.int64)


def _held_out(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Which rows `[n]` bool are held out: per label the share's floor, the rest of the total by largest remainder."""
    counts = np.bincount(labels)
    exact = counts * fraction
    take = np.floor(exact).astype(np.int64)
    missing = round(len(labels) * fraction) - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:missing]] += 1
    take = np.minimum(take, counts - 1)
    rng, held_out = keys.rng(_SPLIT_SEED, "test-split"), np.zeros(len(labels), dtype=bool)
    for label, number in enumerate(take):
        held_out[rng.permutation(np.flatnonzero(labels == label))[:number]] = True
    return held_out


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, config: DataConfig, key: str) -> tuple[tuple[str, ...], list[str], dict[str, np.ndarray]]:
    """Texts, label names and other columns of a file's rows."""
    unit, rows = _rows(path, config, key)
    if not rows:
        raise DataError(f"{path}: expected rows of data, got {'an empty file' if not path.stat().st_size else 'none'} ({key})")
    names = [name for name in rows[0][1] if unit == "column" or all(name in row for _, row in rows)]
    first = list(rows[0][1])
    text, label = (_column(path, config, first, key) for key in ("text", "label"))
    if text == label:
        raise DataError(f"{path}: data.text and data.label are both column {text!r}; expected two columns")
    where = f"{path}, {'item' if unit == 'item' else 'line'}"
    texts = tuple(_text(row, text, f"{where} {number}") for number, row in rows)
    labels = [_label(row, label, f"{where} {number}") for number, row in rows]
    others = [name for name in names if name not in (text, label)]
    return texts, labels, {name: np.array([_spelt(row[name]) for _, row in rows], dtype=object) for name in others}


def _rows(path: Path, config: DataConfig, key: str) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
    """`(unit, [(number, row)])`: `unit` is `column` for delimited files, `key` for JSON lines, `item` for a JSON list."""
    suffix = path.suffix.lower()
    if suffix not in _DIALECTS and suffix not in _JSON:
        known = ", ".join((*_DIALECTS, *_JSON))
        raise DataError(f"{key}: expected a file ending in {known}, got {str(path)!r}")
    try:
        return ("column", list(_delimited(path, config))) if suffix in _DIALECTS else _json(path)
    except FileNotFoundError:
        raise DataError(f"{key}: no such file: {path}; give its path, from the configuration's folder or absolute") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{key}: cannot read {path}: {error.strerror}") from None


def _delimited(path: Path, config: DataConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or TSV with the line they start on; columns have the header's names, or `0`, `1`, … without one."""
    names: list[str] | None = None
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **_DIALECTS[path.suffix.lower()])
        line = 1
        try:
            for row in reader:
                if row and names is None:
                    names = row if config.header else [str(number) for number in range(len(row))]
                    _check_header(path, names)
                    if config.header:
                        line, row = reader.line_num + 1, []
                if row and len(row) != len(names):
                    raise DataError(
                        f"{path}, line {line}: expected {len(names)} columns, got {len(row)}; mend or quote the row"
                    )
                if row:
                    yield line, dict(zip(names, row, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: not a valid row: {error}; quote fields as RFC 4180 says") from None


def _check_header(path: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"{path}, line 1: column {twice!r} is there twice; give each column its own name (or data.header = false)"
        )


def _json(path: Path) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
    """A list of objects, or one object a line, told apart by the file's first character."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        first = next((line for line in file if line.strip()), "").lstrip()
        file.seek(0)
        if first.startswith("["):
            return "item", _items(path, file.read())
        rows = [(number, _object(path, number, line)) for number, line in enumerate(file, start=1) if line.strip()]
    return "key", rows


def _items(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        items = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise DataError(f"{path}, item {number}: expected an object with a text and a label, got {type(item).__name__}")
    return list(enumerate(items, start=1))


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line.lstrip("\ufeff"))
    except ValueError as error:
        raise DataError(f"{path}, line {number}: expected one JSON object a line, or a list of objects: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
    return row


def _column(path: Path, config: DataConfig, names: list[str], key: str) -> str:
    """The name of the column that `data.text` or `data.label` means."""
    wanted = getattr(config, key)
    listed = ", ".join(_short(name) for name in names)
    delimited = path.suffix.lower() in _DIALECTS
    if delimited and isinstance(wanted, int):
        if 0 <= wanted < len(names):
            return names[wanted]
        raise DataError(
            f"{path}: data.{key} = {wanted}: expected a column number from 0 to {len(names) - 1}; columns: {listed}"
        )
    if delimited and not config.header:
        raise DataError(f"{path}: data.{key}: expected a column number from 0 (data.header = false), got {wanted!r}")
    if wanted in names:
        return wanted
    hint = nearest(str(wanted), names)
    near = f"{hint} " if hint.startswith("did you mean") else ""  # else it lists the names, as the error does anyway
    without = "; a file without a header needs data.header = false and column numbers" if delimited else ""
    raise DataError(f"{path}: no column {wanted!r} for data.{key}; {near}columns: {listed}{without}")


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        got = "none" if value is None else "an empty one" if isinstance(value, str) else repr(value)
        raise DataError(f"{where}: expected a text in column {name!r}, got {got}; remove or mend the row")
    return value


def _label(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, (str, int)) or not str(value).strip():
        got = "none" if value is None else "an empty one" if isinstance(value, str) else repr(value)
        raise DataError(f"{where}: expected a label (a name or a whole number) in column {name!r}, got {got}")
    return _spelt(value).strip()


def _spelt(value: Any) -> str:
    """Text as it is, nothing as the empty text, anything else as JSON spells it."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:37]}...")
