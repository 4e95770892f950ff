"""Images in arrays: IDX files, as MNIST is published, and `.npz` files."""

from __future__ import annotations

import gzip
import io
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anyrank.config.sections import DataConfig
from anyrank.data.pixels import Rows, Splits, file_bytes
from anyrank.errors import DataError, in_a_line, nearest, shortened
from anyrank.files import check_regular

_MOST_BYTES = 4 << 30  # of all arrays of a file
_PIECE = 1 << 20


@dataclass(frozen=True, eq=False)
class _Array:
    """Pictures in an array: `values` uint8 `[n, h, w]` or `[n, h, w, 3]`, from the file `path`."""

    values: np.ndarray
    path: Path

    def __len__(self) -> int:
        return len(self.values)

    def read(self, i: int) -> np.ndarray:
        return self.values[i]

    def raw(self, i: int) -> bytes:
        return f"{self.values.shape[1:]}".encode() + self.values[i].tobytes()

    def where(self, i: int) -> str:
        return f"{self.path}, image {i}"


# --- IDX -------------------------------------------------------------------------------------------------------------

IDX = re.compile(r"(?P<set>.*?)(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx\d-ubyte(\.gz)?")


def idx_folder(path: Path, config: DataConfig) -> Splits:
    found: dict[tuple[str, str], Path] = {}
    for file in sorted(path.iterdir(), reverse=True):  # so that a file without .gz comes after, and instead of, one with it
        if match := IDX.fullmatch(file.name):
            place = ("train" if match["part"] == "train" else "test", match["what"])
            if place in found and found[place].name.removesuffix(".gz") != file.name.removesuffix(".gz"):
                raise DataError(
                    f"{path}: {found[place].name} and {file.name} belong to two datasets; put each dataset in its own folder"
                )
            found[place] = file
    for part, what in found:
        lacking = (part, "labels" if what == "images" else "images")
        if lacking not in found:
            raise DataError(
                f"{found[part, what]}: there is no file of its {lacking[1]} in the same folder, with or without .gz"
            )
    return {part: partial(_idx_split, found[part, "images"], found[part, "labels"]) for part, what in found if what == "images"}


def _idx_split(images: Path, labels: Path) -> Rows:
    values, names = _idx(images, 3), _idx(labels, 1)
    if not values.size:
        raise DataError(f"{images}: expected images, got {'x'.join(map(str, values.shape))} pixels")
    _same_number(len(values), images, len(names), labels)
    return Rows(_Array(values, images), [str(name) for name in names.tolist()])


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file: `00 00 08 d`, then d sizes as big-endian 32-bit numbers, then bytes.

    No more is read, or decompressed, than the sizes declare.
    """
    stored = io.BytesIO(file_bytes(path, _MOST_BYTES))
    file = gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored
    start = 4 + 4 * dimensions
    try:
        head = file.read(start)
        magic, expected = head[:4], bytes((0, 0, 8, dimensions))
        if magic != expected:
            raise DataError(f"{path}: expected an IDX file that begins {expected.hex(' ')}, got {magic.hex(' ') or 'nothing'}")
        shape = np.frombuffer(head[4:].ljust(start - 4, b"\0"), dtype=">u4").tolist()
        declared = math.prod(shape)
        data = _at_most(file, declared + 1) if len(head) == start and declared <= _MOST_BYTES else b""
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not readable as gzip ({error}); the file is damaged or truncated") from None
    if len(head) < start or len(data) != declared:
        says, has = "x".join(map(str, shape)), "more" if len(data) > declared else len(data)
        raise DataError(f"{path}: its header declares {says} bytes, but {has} follow; the file is damaged or truncated")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _at_most(file: Any, size: int) -> bytes:
    """The next `size` bytes of a file, or all that there are, in pieces: a read makes room for all that it is asked for."""
    pieces = []
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _same_number(images: int, images_in: object, labels: int, labels_in: object) -> None:
    if images != labels:
        raise DataError(f"{labels_in}: expected {images} labels, one per image of {images_in}, got {labels}")


# --- npz -------------------------------------------------------------------------------------------------------------


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def npz(path: Path, config: DataConfig) -> Splits:
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as file:
            _check_sizes(path, file)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except DataError:
        raise
    except Exception as error:  # a damaged archive breaks in any way: zipfile, zlib and NumPy have no common error
        raise DataError(f"{path}: not readable as an .npz of plain arrays: {in_a_line(error)}") from None
    odd = next((name for name, array in arrays.items() if not _is_plain(array)), None)
    if odd is not None:
        raise DataError(f"{path}: {shortened(odd, 100)!r} is no array of numbers or Unicode text; save it with numpy.savez")
    image, label = str(config.image), str(config.label)
    splits = {"train": partial(_npz_split, path, arrays, image, label)}
    if "train" in image and "train" in label and image.replace("train", "test") in arrays:
        named = (name.replace("train", "test") for name in (image, label))
        splits["test"] = partial(_npz_split, path, arrays, *named)
    return splits


def _check_sizes(path: Path, file: zipfile.ZipFile) -> None:
    """Raise `DataError` for an archive that takes too much memory, by its directory or by what an array says of itself."""
    whole = sum(entry.file_size for entry in file.infolist())
    if whole > _MOST_BYTES:
        raise DataError(f"{path}: expected arrays of at most {_MOST_BYTES:,} bytes, got {whole:,}; take fewer of them")
    for entry in file.infolist():
        with file.open(entry) as member:
            version = np.lib.format.read_magic(member)
            shape, _, dtype = _HEADERS[version](member)
        if dtype.hasobject:
            raise ValueError(f"array {shortened(entry.filename, 100)!r} holds Python objects, which are never read")
        if math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(f"array {shortened(entry.filename, 100)!r} declares more numbers than follow")


def _is_plain(array: Any) -> bool:
    """Whether this is an array whose text, if any, is Unicode: for NumPy, characters are 32-bit numbers of any value."""
    if not isinstance(array, np.ndarray) or array.dtype.kind != "U" or not array.size:
        return isinstance(array, np.ndarray)
    letters = np.ascontiguousarray(array).reshape(-1).view(f"{array.dtype.byteorder}u4".replace("=", ""))
    return bool(((letters < 0xD800) | ((letters > 0xDFFF) & (letters <= 0x10FFFF))).all())


def _npz_split(path: Path, arrays: Mapping[str, np.ndarray], image: str, label: str) -> Rows:
    for key, name in (("image", image), ("label", label)):
        if name not in arrays:
            raise DataError(f"{path}: no array {name!r} for data.{key}; {nearest(name, arrays)}")
    values, labels = _as_pictures(arrays[image], f"{path}, array {image!r}"), arrays[label]
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise DataError(
            f"{path}, array {label!r}: expected whole numbers or names [n], got {labels.dtype} {list(labels.shape)}"
        )
    _same_number(len(values), f"array {image!r}", len(labels), f"{path}, array {label!r}")
    fitting = {name for name, array in arrays.items() if array.shape == labels.shape and array.dtype.kind in "biufU"}
    columns = {name: arrays[name].astype(str).astype(object) for name in sorted(fitting - {label})}
    return Rows(_Array(values, path), [str(each) for each in labels.tolist()], columns)


def _as_pictures(values: np.ndarray, where: str) -> np.ndarray:
    """uint8 `[n, h, w]` or `[n, h, w, 3]`; one channel is the same as none."""
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.dtype != np.uint8 or not (values.ndim == 3 or (values.ndim == 4 and values.shape[3] == 3)) or not values[:1].size:
        raise DataError(
            f"{where}: expected uint8 pixels [n, h, w] or, in colour, [n, h, w, 3], got {values.dtype} {list(values.shape)}"
        )
    return values
