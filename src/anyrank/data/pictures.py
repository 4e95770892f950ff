"""Images as pictures (PNG, JPEG, …): in folders, one for each class, and in Hugging Face datasets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anyrank.config.sections import DataConfig
from anyrank.data import hub
from anyrank.data.pixels import HELD_OUT, Rows, Splits, file_bytes
from anyrank.errors import DataError, nearest

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class _Pictures:
    """Encoded pictures (PNG, JPEG, …): `raw(i)` gives the bytes of one, `where(i)` its name."""

    number: int
    raw: Callable[[int], bytes]
    where: Callable[[int], str]

    def __len__(self) -> int:
        return self.number

    def read(self, i: int) -> np.ndarray:
        return _decode(self.raw(i), self.where(i))


def _decode(data: bytes, where: str) -> np.ndarray:
    """A picture as grey `[h, w]` or colour `[h, w, 3]`; a palette is looked up, transparency is dropped."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("reading pictures needs the package Pillow; pip install pillow") from None
    try:
        with Image.open(io.BytesIO(data)) as picture:
            deep = picture.mode.startswith(("I", "F"))
            pixels = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not readable as an image: {first_line(error)}; repair or remove it") from None
    if deep:
        raise DataError(f"{where}: expected 8 bits per channel, got mode {picture.mode}; save it with 8 bits")
    return pixels


def picture_folder(path: Path, config: DataConfig) -> Splits:
    folders = {folder.name: folder for folder in _folders(path)}
    if "train" in folders and set(HELD_OUT) & set(folders):
        return {name: partial(_classes, folder) for name, folder in folders.items()}
    return {"": partial(_classes, path)}


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _classes(root: Path) -> Rows:
    """Every picture below each folder of `root`, in the order of names."""
    files: list[Path] = []
    names: list[str] = []
    for folder in _folders(root):
        own = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and not file.name.startswith("."))
        if not own:
            raise DataError(f"{folder}: expected pictures ({', '.join(_SUFFIXES)}) of class {folder.name!r}, got none")
        files += own
        names += [folder.name] * len(own)
    if not files:
        raise DataError(
            f"{root}: expected a folder for each class with its pictures in it, IDX files, or a saved dataset; got none of them"
        )
    pictures = _Pictures(len(files), lambda i: file_bytes(files[i]), lambda i: str(files[i]))
    return Rows(pictures, names, _metadata(root, [file.relative_to(root).as_posix() for file in files]))


def _metadata(root: Path, names: Sequence[str]) -> Mapping[str, np.ndarray]:
    """The columns of `metadata.csv` for the pictures `names`, where there is such a file."""
    path = root / "metadata.csv"
    if not path.is_file():
        return {}
    try:
        reader = csv.DictReader(io.StringIO(file_bytes(path).decode("utf-8-sig"), newline=""), restval="")
        rows = {row.get("file_name"): row for row in reader}
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as CSV in UTF-8: {error}") from None
    if "file_name" not in (reader.fieldnames or ()):
        raise DataError(f"{path}: expected a column 'file_name', got {', '.join(reader.fieldnames or ['no columns'])}")
    missing = [name for name in names if name not in rows]
    if missing:
        raise DataError(f"{path}: no row for {missing[0]} ({len(missing)} pictures without one); add it or remove the file")
    others = [name for name in reader.fieldnames if name != "file_name"]
    return {other: np.array([rows[name][other] for name in names], dtype=object) for other in others}


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


def dataset_source(source: Path | str, config: DataConfig) -> Splits:
    """The splits of a dataset on disk, in Parquet or on the hub."""
    return {name: partial(_dataset_split, dataset, str(source), config) for name, dataset in hub.splits(str(source)).items()}


def _dataset_split(dataset: Any, source: str, config: DataConfig) -> Rows:
    from datasets import ClassLabel, Image

    features, image, label = dataset.features, str(config.image), str(config.label)
    for key, name in (("image", image), ("label", label)):
        if name not in features:
            raise DataError(f"{source}: no column {name!r} for data.{key}; {nearest(name, features)}")
    if not isinstance(features[image], Image):
        raise DataError(f"{source}: data.image: expected a column of images, got {image!r} of {features[image]}")
    columns = hub.columns(dataset)
    names = columns.pop(label, None)
    if names is None:
        raise DataError(f"{source}: data.label: expected a column of names or numbers, got {label!r} of {features[label]}")
    missing = next((i for i, name in enumerate(names) if name is None), None)
    if missing is not None:
        raise DataError(f"{source}, row {missing}: expected a label in column {label!r}, got none; remove the row")
    encoded = dataset.select_columns([image]).cast_column(image, Image(decode=False))
    pictures = _Pictures(len(dataset), lambda i: _bytes(encoded[i][image]), lambda i: f"{source}, row {i}")
    known = tuple(features[label].names) if isinstance(features[label], ClassLabel) else ()
    return Rows(pictures, [str(name) for name in names], {name: _spelt(each) for name, each in columns.items()}, known)


def _spelt(values: Sequence[Any]) -> np.ndarray:
    return np.array(["" if value is None else str(value) for value in values], dtype=object)


def _bytes(stored: Mapping[str, Any]) -> bytes:
    return stored["bytes"] if stored["bytes"] is not None else file_bytes(Path(stored["path"]))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"
