"""Sources of text data, read into one frozen table: CSV, TSV, JSON, JSON-lines and Parquet files, and Hugging Face datasets.

Nothing is repaired in silence: a row that is not what the header promises stops with its line number. Imports nothing heavy.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anyrank.config.sections import DataConfig
from anyrank.data import hub
from anyrank.data.split import _indices, held_out, ordered
from anyrank.errors import DataError, nearest

# CSV as RFC 4180 has it; a TSV has no quoting: a quote in SST-2's TSV is part of the sentence.
_DIALECTS = {
    ".csv": {"delimiter": ",", "quotechar": '"', "doublequote": True, "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}


Text = str | tuple[str, str]  # one text, or a pair of them


@dataclass(frozen=True, eq=False)
class Table:
    """Labelled texts. `labels` `[n]` int64 index `label_names`; `columns`: the source's other columns, `[n]` of str each."""

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
    """All rows of `data.source`, or of its `data.split`: the path of

    * a `.csv` or `.tsv` file, with a header or, where `data.header` is false, with columns that go by their number;
    * a `.jsonl`/`.ndjson` file (one object a line), or a `.json` file: the same, a list of objects, or an object of splits,
      each a list of objects or of `[text, label]` pairs;
    * a `.parquet` file, or a folder: a dataset that `datasets` has saved to disk, or data files as the hub has them;

    or a hub id, `owner/name` or `owner/name:config`. Where a source has splits, `data.split` names one (else `train`), or
    several as `one+other`. Text files are UTF-8, with or without a byte order mark. `data.text` names one column, or two whose
    texts are a pair. A label's surrounding blanks are dropped; labels are in order of the alphabet, or of their value where all
    are whole numbers, and `data.label_names` gives them other names, in that order. Columns of JSON are the keys that every
    object has; values that are not text are spelt as JSON spells them. Raises `DataError` with the line, item or row for a
    ragged row, an empty text or label.
    """
    return _renamed(_training(config), config)


def load_split(config: DataConfig) -> tuple[Table, Table]:
    """Training and held-out rows: the latter are `data.test_split` or `data.test_source` (of this, its split `test`, where it
    has splits and none is named), or else a split of the training rows.

    That split holds out `test_fraction` of the rows, of each label as near to that share as whole numbers allow, and leaves
    every label at least one training row. It depends on the labels and the fraction alone, not on the run seed: runs over
    several seeds are scored on the same examples.
    """
    table = _training(config)
    if len(table.label_names) < 2:
        raise DataError(f"{config.source}: expected at least two different labels, got only {table.label_names[0]!r}")
    if config.test_source or config.test_split:
        train, test = table, _held_out_rows(config, table.label_names)
    else:
        train, test = _divided(table, config)
    return _renamed(train, config), _renamed(test, config)


def _divided(table: Table, config: DataConfig) -> tuple[Table, Table]:
    chosen = held_out(table.labels, config.test_fraction)
    if not chosen.any():
        raise DataError(
            f"{config.source}: {len(table)} rows of {len(table.label_names)} labels leave none to hold out at "
            f"data.test_fraction = {config.test_fraction}; raise it, or give data.test_source"
        )
    return table.take(np.flatnonzero(~chosen)), table.take(np.flatnonzero(chosen))


def _training(config: DataConfig) -> Table:
    """The training rows under their labels' own names."""
    texts, names, columns = _read(_Part(config.source, config.split, "train", "data.source", "data.split"), config)
    label_names = ordered(names)
    return Table(texts, _indices(names, label_names), label_names, columns)


def _held_out_rows(config: DataConfig, label_names: tuple[str, ...]) -> Table:
    """The rows of the test source or split, with their labels counted as the training rows' are."""
    source, key = (config.test_source, "data.test_source") if config.test_source else (config.source, "data.source")
    texts, names, columns = _read(_Part(source, config.test_split, "test", key, "data.test_split"), config)
    unknown = sorted(set(names) - set(label_names))
    if unknown:
        raise DataError(
            f"{source}: label {unknown[0]!r} is not among the {len(label_names)} labels of {config.source} "
            f"({len(unknown)} such); {nearest(unknown[0], label_names)}; remove those rows or add training rows"
        )
    return Table(texts, _indices(names, label_names), label_names, columns)


def _renamed(table: Table, config: DataConfig) -> Table:
    """The table with `data.label_names` for its labels' own, where they are given."""
    given, own = config.label_names, table.label_names
    if not given:
        return table
    if len(given) != len(own) or len(set(given)) != len(given):
        raise DataError(
            f"data.label_names: expected {len(own)} different names, for {', '.join(map(_short, own[:5]))}"
            f"{', …' if len(own) > 5 else ''} of {config.source}, got {len(given)}: {', '.join(map(_short, given[:5]))}"
        )
    return replace(table, label_names=given)


# --- reading ---------------------------------------------------------------------------------------------------------


def training_rows(config: DataConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """The training rows as they stand in the source, each with its place in words; what `load` reads, of any columns."""
    return _placed(_Part(config.source, config.split, "train", "data.source", "data.split"), config)


def held_out_rows(config: DataConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """The same of the test source or split."""
    source, key = (config.test_source, "data.test_source") if config.test_source else (config.source, "data.source")
    return _placed(_Part(source, config.test_split, "test", key, "data.test_split"), config)


def _placed(part: _Part, config: DataConfig) -> list[tuple[str, Mapping[str, Any]]]:
    found = list(_chosen(_open(part, config), part))
    rows = [(f"{part.source}{each.where}, {each.unit} {number}", row) for each in found for number, row in each.rows]
    if not rows:
        raise DataError(f"{part.source}: expected rows of data, got none ({part.source_key})")
    return rows


@dataclass(frozen=True)
class _Part:
    """What is wanted of a source: its `split`, or `default` where it has splits and none is named; errors say the keys."""

    source: str
    split: str
    default: str
    source_key: str
    split_key: str


@dataclass(frozen=True)
class _Rows:
    """Rows with the number of each; `unit` is what is numbered. Objects of JSON may differ in their keys (`ragged`)."""

    rows: Sequence[tuple[int, Mapping[str, Any]]]
    unit: str
    ragged: bool = False
    where: str = ""

    @property
    def names(self) -> list[str]:
        """The columns that every row has."""
        return [name for name in self.rows[0][1] if not self.ragged or all(name in row for _, row in self.rows)]


_Splits = Mapping[str, Callable[[], _Rows]]  # a source without splits has one, called ""


def _read(part: _Part, config: DataConfig) -> tuple[tuple[Text, ...], list[str], dict[str, np.ndarray]]:
    """Texts, label names and other columns of a part's rows."""
    parts = [_read_rows(rows, part, config) for rows in _chosen(_open(part, config), part)]
    common = [name for name in parts[0][2] if all(name in columns for _, _, columns in parts)]
    columns = {name: np.concatenate([columns[name] for _, _, columns in parts]) for name in common}
    return tuple(text for texts, _, _ in parts for text in texts), [name for _, names, _ in parts for name in names], columns


def _read_rows(found: _Rows, part: _Part, config: DataConfig) -> tuple[list[Text], list[str], dict[str, np.ndarray]]:
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


def _chosen(splits: _Splits, part: _Part) -> Iterator[_Rows]:
    """The rows of the splits that are wanted."""
    if "" in splits:
        if part.split:
            raise DataError(f"{part.split_key} = {part.split!r}: {part.source} has no splits; leave it out")
        yield splits[""]()
        return
    for name in (part.split or part.default).split("+"):
        if name not in splits:
            raise DataError(f"{part.split_key}: {part.source} has no split {name!r}; {nearest(name, splits)}")
        yield replace(splits[name](), where=f", split {name}")


def _open(part: _Part, config: DataConfig) -> _Splits:
    """The splits of a source, each of which can be read."""
    path = Path(part.source)
    reader = _READERS.get(path.suffix.lower())
    try:
        if reader is None and (path.is_dir() or (not path.exists() and hub.is_id(part.source))):
            return _datasets(part.source, config)
        if reader is None:
            known = ", ".join(_READERS)
            raise DataError(f"{part.source_key}: expected a file ending in {known}, a folder or a hub id, got {part.source!r}")
        if not path.exists():
            raise FileNotFoundError
        return reader(part.source, config)
    except FileNotFoundError:
        raise DataError(
            f"{part.source_key}: no such file: {path}; give its path, from the configuration's folder or absolute"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{part.source_key}: cannot read {path}: {error.strerror}") from None


def _datasets(source: str, config: DataConfig) -> _Splits:
    return {name: partial(_dataset_rows, dataset) for name, dataset in hub.splits(source).items()}


def _dataset_rows(dataset: Any) -> _Rows:
    columns = hub.columns(dataset)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return _Rows(list(enumerate(rows)), "row")


def _table(source: str, config: DataConfig) -> _Splits:
    rows = _Rows(list(_delimited(Path(source), config)), "line")
    return {"": lambda: rows}


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
                        f"{path}, line {line}: expected {len(names)} columns, got {len(row)}; correct or quote the row"
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


def _json_lines(source: str, config: DataConfig) -> _Splits:
    """One object a line, or a list of objects, told apart by the file's first character."""
    path = Path(source)
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        items = _items(str(path), _parsed(path, text))
        return {"": lambda: items}
    lines = enumerate(text.split("\n"), start=1)
    rows = _Rows([(number, _object(path, number, line)) for number, line in lines if line.strip()], "line", ragged=True)
    return {"": lambda: rows}


def _json(source: str, config: DataConfig) -> _Splits:
    """What `_json_lines` reads, or one object of splits."""
    text = Path(source).read_text(encoding="utf-8-sig").strip()
    try:
        splits = json.loads(text) if text.startswith("{") else None
    except ValueError:  # more than one object, or none: lines, or a broken file, whose line is then named
        splits = None
    if splits and all(isinstance(items, list) for items in splits.values()):
        return {name: partial(_items, f"{source}, split {name}", items) for name, items in splits.items()}
    return _json_lines(source, config)


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None


def _items(where: str, items: Sequence[Any]) -> _Rows:
    """Objects, or pairs `[text, label]`, which are objects with these keys."""
    rows = []
    for number, item in enumerate(items, start=1):
        pair = isinstance(item, list) and len(item) == 2
        if not isinstance(item, dict) and not pair:
            raise DataError(
                f"{where}, item {number}: expected an object with a text and a label, or a pair [text, label], "
                f"got {type(item).__name__}"
            )
        rows.append((number, dict(zip(("text", "label"), item, strict=True)) if pair else item))
    return _Rows(rows, "item", ragged=True)


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line.lstrip("\ufeff"))
    except ValueError as error:
        raise DataError(f"{path}, line {number}: expected one JSON object per line, or a list of objects: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
    return row


_READERS: Mapping[str, Callable[[str, DataConfig], _Splits]] = {
    **dict.fromkeys(_DIALECTS, _table),
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    ".json": _json,
    ".parquet": _datasets,
}


def _column(source: str, config: DataConfig, names: list[str], key: str, wanted: str | int) -> str:
    """The name of the column that `wanted`, of `data.text` or `data.label`, means."""
    listed = ", ".join(_short(name) for name in names)
    delimited = Path(source).suffix.lower() in _DIALECTS
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
        got = "none" if value is None else "an empty one" if isinstance(value, str) else repr(value)
        raise DataError(f"{where}: expected a text in column {name!r}, got {got}; correct or remove the row")
    return value


def label_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """The label of a row at the place `where`: a name or a whole number, without the blanks around it."""
    value = row.get(name)
    if not isinstance(value, (str, int)) or not str(value).strip():
        got = "none" if value is None else "an empty one" if isinstance(value, str) else repr(value)
        raise DataError(f"{where}: expected a label (a name or a whole number) in column {name!r}, got {got}")
    return spelt(value).strip()


def spelt(value: Any) -> str:
    """Text as it is, nothing as the empty text, anything else as JSON spells it."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:37]}...")
