"""Images as pictures (PNG, JPEG, …): in folders, one for each class, and in Hugging Face datasets."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anyrank.config.sections import DataConfig
from anyrank.data import hub
from anyrank.data.pixels import HELD_OUT, PICTURE_BYTES, Rows, Splits, file_bytes
from anyrank.data.rows import delimited, read_text
from anyrank.errors import DataError, in_a_line, nearest
from anyrank.files import walk

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF")  # others run programs, or read other files
_MOST_PIXELS = 64 << 20


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
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError("reading pictures needs the package Pillow; pip install pillow") from None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are more than {_MOST_PIXELS:,}")
            deep = picture.mode.startswith(("I", "F"))
            pixels = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    except UnidentifiedImageError:
        raise DataError(f"{where}: not readable as an image ({', '.join(_FORMATS)}); repair or remove it") from None
    except Exception as error:  # decoders of damaged bytes fail in any way
        raise DataError(f"{where}: not readable as an image: {in_a_line(error)}; repair or remove it") from None
    if deep:
        raise DataError(f"{where}: expected 8 bits per channel, got mode {picture.mode}; save it with 8 bits")
    return pixels


def picture_folder(path: Path, config: DataConfig) -> Splits:
    folders = {folder.name: folder for folder in _folders(path)}
    if "train" in folders and set(HELD_OUT) & set(folders):
        return {name: partial(_classes, folder, config) for name, folder in folders.items()}
    return {"": partial(_classes, path, config)}


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _classes(root: Path, config: DataConfig) -> Rows:
    """Every picture below each folder of `root`, in the order of names."""
    files: list[Path] = []
    names: list[str] = []
    for folder in _folders(root):
        own = sorted(file for file in walk(folder) if file.suffix.lower() in _SUFFIXES)
        if not own:
            raise DataError(f"{folder}: expected pictures ({', '.join(_SUFFIXES)}) of class {folder.name!r}, got none")
        files += own
        names += [folder.name] * len(own)
    if not files:
        raise DataError(
            f"{root}: expected a folder for each class with its pictures in it, IDX files, or a saved dataset; got none of them"
        )
    pictures = _Pictures(len(files), lambda i: file_bytes(files[i]), lambda i: str(files[i]))
    return Rows(pictures, names, _metadata(root, [file.relative_to(root).as_posix() for file in files], config))


def _metadata(root: Path, names: Sequence[str], config: DataConfig) -> Mapping[str, np.ndarray]:
    """The columns of `metadata.csv` for the pictures `names`, where there is such a file."""
    path = root / "metadata.csv"
    if not os.path.lexists(path):
        return {}
    try:
        found = [row for _, row in delimited(path, read_text(path, config), True, config.delimiter)]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    columns = list(found[0]) if found else []
    if "file_name" not in columns:
        raise DataError(f"{path}: expected a column 'file_name', got {', '.join(columns[:50]) or 'no rows'}")
    rows = {row["file_name"]: row for row in found}
    missing = [name for name in names if name not in rows]
    if missing:
        raise DataError(f"{path}: no row for {missing[0]} ({len(missing)} pictures without one); add it or remove the file")
    others = [name for name in columns if name != "file_name"]
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
    columns = hub.columns(dataset, source)
    names = columns.pop(label, None)
    if names is None:
        raise DataError(f"{source}: data.label: expected a column of names or numbers, got {label!r} of {features[label]}")
    missing = next((i for i, name in enumerate(names) if name is None), None)
    if missing is not None:
        raise DataError(f"{source}, row {missing}: expected a label in column {label!r}, got none; remove the row")
    encoded = dataset.select_columns([image]).cast_column(image, Image(decode=False))
    pictures = _Pictures(len(dataset), lambda i: _bytes(encoded, i, image, source), lambda i: f"{source}, row {i}")
    known = tuple(features[label].names) if isinstance(features[label], ClassLabel) else ()
    return Rows(pictures, [str(name) for name in names], {name: _spelt(each) for name, each in columns.items()}, known)


def _spelt(values: Sequence[Any]) -> np.ndarray:
    return np.array(["" if value is None else str(value) for value in values], dtype=object)


def _bytes(encoded: Any, i: int, image: str, source: str) -> bytes:
    """The encoded picture in row `i`, or in the file that the row names."""
    try:
        stored = encoded[i][image] or {}
    except Exception as error:  # as hub.columns has it
        raise DataError(f"{source}, row {i}: datasets cannot read it ({in_a_line(error)}); check what is in it") from None
    if not stored.get("bytes") and not stored.get("path"):
        raise DataError(f"{source}, row {i}: expected a picture in column {image!r}, got none; remove the row")
    if stored.get("bytes") is None:
        return file_bytes(Path(stored["path"]))
    if len(stored["bytes"]) > PICTURE_BYTES:
        raise DataError(f"{source}, row {i}: expected a picture of at most {PICTURE_BYTES:,} bytes, got more; remove the row")
    return stored["bytes"]
