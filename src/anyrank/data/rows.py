"""Rows of a source: CSV, TSV, JSON, JSON-lines and Parquet files, and Hugging Face datasets.

No row is corrected silently: a row that does not fit the header is an error with its line number. Imports nothing heavy.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from anyrank.config.sections import DataConfig
from anyrank.data import hub
from anyrank.errors import DataError, nearest, shortened
from anyrank.files import check_regular, parse_json, read_bounded

# CSV as RFC 4180 has it; a TSV has no quoting: a quote in SST-2's TSV is part of the sentence.
DIALECTS = {
    ".csv": {"delimiter": ",", "quotechar": '"', "doublequote": True, "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
_DELIMITERS = {";": ";", "\t": "\\t", "|": "|"}  # that tables have in the place of commas, as TOML writes them
_MOST_BYTES = 512 << 20  # of a text file; Parquet files, which are read in parts, may be larger
_MOST_ROWS, _MOST_COLUMNS = 10_000_000, 4096


def training_rows(config: DataConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """The training rows with all their columns, each with its place (file and line) for errors."""
    return _placed(Part(config.source, config.split, "train", "data.source", "data.split"), config)


def held_out_rows(config: DataConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """The same for the test source or split."""
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
    """A part of a source: its `split`, or `default` if it has splits and none is named. The keys are for errors."""

    source: str
    split: str
    default: str
    source_key: str
    split_key: str


@dataclass(frozen=True)
class Rows:
    """Rows with the number of each; `unit` says what is numbered. Objects of JSON may have different keys (`ragged`)."""

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
    """The rows of the requested splits."""
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
        if reader is not _datasets or not path.is_dir():
            check_regular(path)
        return reader(part.source, config)
    except FileNotFoundError:
        raise DataError(
            f"{part.source_key}: no such file: {path}; give its path, from the configuration's folder or absolute"
        ) from None
    except OSError as error:
        raise DataError(f"{part.source_key}: cannot read {path}: {error.strerror or error}") from None


def read_text(path: Path, config: DataConfig) -> str:
    """The text of a file in `data.encoding`, without a byte order mark. Raises `OSError`, and `DataError` for other bytes."""
    data = read_bounded(path, _MOST_BYTES)
    try:
        text = data.decode(config.encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        at = f"byte {error.start}: {error.reason}" if isinstance(error, UnicodeDecodeError) else str(error)
        usual = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        raise DataError(
            f"{path}: not {config.encoding.upper()} text ({at}); set data.encoding to the file's own, such as '{usual}', or "
            "save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}, line {line}: a NUL character, which no text has; if the file is UTF-16, set data.encoding = 'utf-16'"
        )
    return text


def _datasets(source: str, config: DataConfig) -> Splits:
    return {name: partial(_dataset_rows, dataset, source) for name, dataset in hub.splits(source).items()}


def _dataset_rows(dataset: Any, source: str) -> Rows:
    columns = hub.columns(dataset, source)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Rows(list(enumerate(rows)), "row")


def _table(source: str, config: DataConfig) -> Splits:
    rows = Rows(_bounded(source, _delimited(Path(source), config)), "line")
    return {"": lambda: rows}


def _bounded(source: str, rows: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """`rows` as a list, if they are not too many."""
    found = list(itertools.islice(rows, _MOST_ROWS + 1))
    if len(found) > _MOST_ROWS:
        raise DataError(f"{source}: expected at most {_MOST_ROWS:,} rows; take fewer of them")
    return found


def _delimited(path: Path, config: DataConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV or TSV with the line they start on; columns have the header's names, or `0`, `1`, … without one."""
    yield from delimited(path, read_text(path, config), config.header, config.delimiter)


def delimited(path: Path, text: str, header: bool, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows in the text of a CSV or TSV file; `delimiter`: empty for the usual one of the file's suffix."""
    dialect = DIALECTS[path.suffix.lower()] | ({"delimiter": delimiter} if delimiter else {})
    names: list[str] | None = None
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    line = 1
    try:
        for row in reader:
            if row and names is None:
                _check_header(path, row, header, dialect["delimiter"])
                names = row if header else [str(number) for number in range(len(row))]
                if header:
                    line, row = reader.line_num + 1, []
            if row and len(row) != len(names):
                raise DataError(f"{path}, line {line}: expected {len(names)} columns, got {len(row)}; correct or quote the row")
            if row:
                yield line, dict(zip(names, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        long = "texts of more characters are read from JSON lines (.jsonl); is a quote not closed?"
        mend = long if "field limit" in str(error) else "quote fields as RFC 4180 says"
        raise DataError(f"{path}, line {line}: not a valid row: {error}; {mend}") from None


def _check_header(path: Path, row: list[str], header: bool, delimiter: str) -> None:
    other = next((sign for sign in _DELIMITERS if len(row) == 1 and sign in row[0] and sign != delimiter), None)
    if other is not None:
        raise DataError(
            f"{path}, line 1: expected columns separated by {delimiter!r}, got one, {short(row[0])}; "
            f'set data.delimiter = "{_DELIMITERS[other]}"'
        )
    _check_width(f"{path}, line 1", row)
    seen: set[str] = set()
    twice = next((name for name in row if header and (name in seen or seen.add(name))), None)
    if twice is not None:
        raise DataError(
            f"{path}, line 1: column {short(twice)} is there twice; give each column its own name (or data.header = false)"
        )


def _check_width(where: str, columns: Sized) -> None:
    if len(columns) > _MOST_COLUMNS:
        raise DataError(
            f"{where}: expected at most {_MOST_COLUMNS:,} columns, got {len(columns):,}; keep those that are needed"
        )


def _json_lines(source: str, config: DataConfig) -> Splits:
    """One object per line, or a list of objects; the first character of the file tells which."""
    path = Path(source)
    text = read_text(path, config)
    if text.lstrip().startswith("["):
        items = _items(str(path), _parsed(path, text))
        return {"": lambda: items}
    lines = enumerate(text.split("\n"), start=1)
    rows = _bounded(source, ((number, _object(path, number, line)) for number, line in lines if line.strip()))
    return {"": lambda: Rows(rows, "line", ragged=True)}


def _json(source: str, config: DataConfig) -> Splits:
    """What `_json_lines` reads, or one object of splits."""
    text = read_text(Path(source), config).strip()
    try:
        splits = _parse(text) if text.startswith("{") else None
    except ValueError:  # more than one object, or none: lines, or a broken file, whose line is then named
        splits = None
    if splits and all(isinstance(items, list) for items in splits.values()):
        return {name: partial(_items, f"{source}, split {name}", items) for name, items in splits.items()}
    return _json_lines(source, config)


def _parsed(path: Path, text: str) -> Any:
    try:
        return _parse(text)
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None


def _items(where: str, items: Sequence[Any]) -> Rows:
    """Objects, or pairs `[text, label]`, which are objects with these keys."""
    rows = _bounded(where, ((number, _item(where, number, item)) for number, item in enumerate(items, start=1)))
    return Rows(rows, "item", ragged=True)


def _item(where: str, number: int, item: Any) -> dict[str, Any]:
    pair = isinstance(item, list) and len(item) == 2
    if not isinstance(item, dict) and not pair:
        raise DataError(
            f"{where}, item {number}: expected an object with a text and a label, or a pair [text, label], "
            f"got {type(item).__name__}"
        )
    row = dict(zip(("text", "label"), item, strict=True)) if pair else item
    _check_width(f"{where}, item {number}", row)
    return row


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = _parse(line.lstrip("\ufeff"))
    except ValueError as error:
        raise DataError(f"{path}, line {number}: expected one JSON object per line, or a list of objects: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
    _check_width(f"{path}, line {number}", row)
    return row


def _parse(text: str) -> Any:
    """The value in a JSON text. Raises `ValueError` also for halves of surrogate pairs, which no tokenizer accepts."""
    value = parse_json(text)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a surrogate pair, {error.object[error.start]!a}, is no character") from None
    return value


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
        got = "none" if value is None else "an empty one" if isinstance(value, str) else shown(value)
        raise DataError(f"{where}: expected a label (a name or a whole number) in column {name!r}, got {got}")
    return spelt(value).strip()


def spelt(value: Any) -> str:
    """A value as text: text as it is, no value as the empty text, anything else as in JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def shown(value: Any) -> str:
    """A value of a row in an error."""
    return shortened(repr(value), 100)


def short(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:37]}...")
