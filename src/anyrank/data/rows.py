"""Rows of a source: CSV, TSV, JSON, JSON-lines and Parquet files, and Hugging Face datasets, each row with its place in words.

Nothing is repaired in silence: a row that is not what the header promises stops with its line number. Imports nothing heavy.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from anyrank.config.sections import DataConfig
from anyrank.data import hub
from anyrank.errors import DataError, nearest

# CSV as RFC 4180 has it; a TSV has no quoting: a quote in SST-2's TSV is part of the sentence.
DIALECTS = {
    ".csv": {"delimiter": ",", "quotechar": '"', "doublequote": True, "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}


def training_rows(config: DataConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """The training rows as they stand in the source, each with its place in words; what `load` reads, of any columns."""
    return _placed(Part(config.source, config.split, "train", "data.source", "data.split"), config)


def held_out_rows(config: DataConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """The same of the test source or split."""
    source, key = (config.test_source, "data.test_source") if config.test_source else (config.source, "data.source")
    return _placed(Part(source, config.test_split, "test", key, "data.test_split"), config)


def _placed(part: Part, config: DataConfig) -> list[tuple[str, Mapping[str, Any]]]:
    found = list(chosen(open_source(part, config), part))
    rows = [(f"{part.source}{each.where}, {each.unit} {number}", row) for each in found for number, row in each.rows]
    if not rows:
        raise DataError(f"{part.source}: expected rows of data, got none ({part.source_key})")
    return rows


@dataclass(frozen=True)
class Part:
    """What is wanted of a source: its `split`, or `default` where it has splits and none is named; errors say the keys."""

    source: str
    split: str
    default: str
    source_key: str
    split_key: str


@dataclass(frozen=True)
class Rows:
    """Rows with the number of each; `unit` is what is numbered. Objects of JSON may differ in their keys (`ragged`)."""

    rows: Sequence[tuple[int, Mapping[str, Any]]]
    unit: str
    ragged: bool = False
    where: str = ""

    @property
    def names(self) -> list[str]:
        """The columns that every row has."""
        return [name for name in self.rows[0][1] if not self.ragged or all(name in row for _, row in self.rows)]


Splits = Mapping[str, Callable[[], Rows]]  # a source without splits has one, called ""


def chosen(splits: Splits, part: Part) -> Iterator[Rows]:
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


def open_source(part: Part, config: DataConfig) -> Splits:
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


def _datasets(source: str, config: DataConfig) -> Splits:
    return {name: partial(_dataset_rows, dataset) for name, dataset in hub.splits(source).items()}


def _dataset_rows(dataset: Any) -> Rows:
    columns = hub.columns(dataset)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Rows(list(enumerate(rows)), "row")


def _table(source: str, config: DataConfig) -> Splits:
    rows = Rows(list(_delimited(Path(source), config)), "line")
    return {"": lambda: rows}


def _delimited(path: Path, config: DataConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or TSV with the line they start on; columns have the header's names, or `0`, `1`, … without one."""
    names: list[str] | None = None
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **DIALECTS[path.suffix.lower()])
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


def _json_lines(source: str, config: DataConfig) -> Splits:
    """One object a line, or a list of objects, told apart by the file's first character."""
    path = Path(source)
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        items = _items(str(path), _parsed(path, text))
        return {"": lambda: items}
    lines = enumerate(text.split("\n"), start=1)
    rows = Rows([(number, _object(path, number, line)) for number, line in lines if line.strip()], "line", ragged=True)
    return {"": lambda: rows}


def _json(source: str, config: DataConfig) -> Splits:
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


def _items(where: str, items: Sequence[Any]) -> Rows:
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
    return Rows(rows, "item", ragged=True)


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line.lstrip("\ufeff"))
    except ValueError as error:
        raise DataError(f"{path}, line {number}: expected one JSON object per line, or a list of objects: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
    return row


_READERS: Mapping[str, Callable[[str, DataConfig], Splits]] = {
    **dict.fromkeys(DIALECTS, _table),
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    ".json": _json,
    ".parquet": _datasets,
}


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


def short(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:37]}...")
