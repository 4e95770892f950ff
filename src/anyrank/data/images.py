"""Sources of labelled images: IDX files, `.npz` arrays, folders of pictures and Hugging Face datasets, as one frozen record.

Pictures stay as they are stored until they are asked for, so that a folder of photographs costs its list of names. Pixels are
bytes; what they mean to a model is the task's business. Pillow and datasets are imported where a source needs them.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from anyrank import keys
from anyrank.config.sections import DataConfig
from anyrank.data import hub
from anyrank.data.split import held_out, ordered
from anyrank.errors import DataError, nearest

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_HELD_OUT = ("test", "validation", "valid", "val")  # usual names of held-out splits, the first that is there
_SEED = 0  # which examples a limit keeps is the same for every run seed


class Pixels(Protocol):
    """Pictures by number, decoded when one is read."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> np.ndarray:
        """Picture `i` as uint8 `[h, w]` (grey) or `[h, w, 3]` (colour)."""
        ...

    def raw(self, i: int) -> bytes:
        """What picture `i` is made from: its digest is the picture's."""
        ...

    def where(self, i: int) -> str:
        """Picture `i` in the words of an error."""
        ...


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled pictures. `rows` `[n]` are their numbers in `pixels`; `labels` `[n]` int64 index `label_names`; `columns`: what
    else the source says of each, `[n]` of str.
    """

    pixels: Pixels
    rows: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.pixels.read(i) for i in self.rows.tolist())

    def where(self, i: int) -> str:
        return self.pixels.where(int(self.rows[i]))

    def take(self, index: np.ndarray) -> Images:
        """The examples `index` `[m]`, in that order, with all the label names."""
        columns = {name: values[index] for name, values in self.columns.items()}
        return Images(self.pixels, self.rows[index], self.labels[index], self.label_names, columns)

    def sample(self, number: int, purpose: str) -> np.ndarray:
        """Which examples `[n]` bool are among `number` drawn at random, the same ones for every run seed."""
        chosen = np.zeros(len(self), dtype=bool)
        chosen[keys.rng(_SEED, "images", purpose).permutation(len(self))[:number]] = True
        return chosen

    def relabelled(self, label_names: tuple[str, ...]) -> Images:
        """The same examples with the same labels, counted in the order of `label_names`."""
        place = np.array([label_names.index(name) for name in self.label_names])
        return replace(self, labels=place[self.labels], label_names=label_names)

    def digest(self) -> str:
        """The sha256 of all pictures in order; they are read, not decoded."""
        total = hashlib.sha256()
        for i in self.rows.tolist():
            data = self.pixels.raw(i)
            total.update(len(data).to_bytes(8, "big") + data)
        return total.hexdigest()

    def stacked(self) -> np.ndarray:
        """All pictures as one array, uint8 `[n, channels, h, w]`; `DataError` where they differ in size or colour."""
        values: np.ndarray | None = None
        for i, picture in enumerate(self):
            if values is None:
                values = np.empty((len(self), *picture.shape), dtype=np.uint8)
            if picture.shape != values.shape[1:]:
                raise DataError(
                    f"{self.where(i)}: expected {spoken(values.shape[1:])}, as {self.where(0)} is, got {spoken(picture.shape)};"
                    " make all images of one size and colour, or use a transformers model, which resizes them"
                )
            values[i] = picture
        return values[:, None] if values.ndim == 3 else np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def spoken(shape: Sequence[int]) -> str:
    """A picture's shape in words.

    >>> spoken((28, 28)), spoken((64, 48, 3))
    ('28x28 grey', '64x48 colour')
    """
    return f"{shape[0]}x{shape[1]} {'grey' if len(shape) == 2 else 'colour'}"


def load_split(config: DataConfig) -> tuple[Images, Images]:
    """Training and held-out images of `data.source`: the path of

    * a folder of IDX files, `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same with `t10k` or `test`, each with
      or without `.gz`, as MNIST and its kin are published;
    * an `.npz` file, its arrays named by `data.image` (uint8 `[n, h, w]` or `[n, h, w, 3]`) and `data.label`; where both names
      have `train` in them, the arrays with `test` instead are held out; other arrays `[n]` are columns;
    * a folder of pictures, `class/picture.png` or, with held-out ones of its own, `train/class/…` and `test/class/…`; a
      `metadata.csv` beside the classes, with a column `file_name` (`class/picture.png`), adds columns;
    * a dataset that `datasets` has saved to disk, a `.parquet` file or a folder of them, or a hub id (`owner/name`), with the
      columns `data.image` and `data.label`.

    Trained on is `data.split` of the source (`train`). Held out are the examples of `data.test_source`, else the source's own:
    its `data.test_split` (`test`, or `validation` where there is no such). Where there is none, `data.test_fraction` of the
    examples is, drawn label by label and the same for every run seed. `data.test_examples` then keeps so many at random; see
    `limited` for the others. Raises `DataError`.
    """
    splits = _read(config.source, config, "data.source")
    chosen = _split(splits, config.split, ("train", ""), config.source, "data.split")
    train = _labelled(splits[chosen](), config.source)
    if len(train.label_names) < 2:
        raise DataError(f"{config.source}: expected at least two different labels, got only {train.label_names[0]!r}")
    rows = _held_out_rows(config, {name: read for name, read in splits.items() if name != chosen})
    if rows is not None:
        test = _labelled(rows, config.test_source or config.source, train.label_names, config.source)
    else:
        train, test = _divided(train, config)
    return train, _limited(test, config.test_examples, "data.test_examples")


def _held_out_rows(config: DataConfig, others: _Splits) -> _Rows | None:
    """The held-out examples that a source gives; `others`: the splits of `data.source` that are not trained on."""
    if config.test_source:
        splits = _read(config.test_source, config, "data.test_source")
        usual = (*_HELD_OUT, "train", "")
        return splits[_split(splits, config.test_split, usual, config.test_source, "data.test_split")]()
    if config.test_split or set(_HELD_OUT) & set(others):
        return others[_split(others, config.test_split, _HELD_OUT, config.source, "data.test_split")]()
    return None


def _split(splits: _Splits, name: str, usual: Sequence[str], source: str, key: str) -> str:
    """The split `name`; where none is named, the first of the `usual` ones that there is."""
    found = [each for each in ((name,) if name else usual) if each in splits]
    if not found:
        raise DataError(f"{source}: no split {name or usual[0]!r} for {key}; {nearest(name, splits)}")
    return found[0]


def _divided(images: Images, config: DataConfig) -> tuple[Images, Images]:
    chosen = held_out(images.labels, config.test_fraction)
    if not chosen.any():
        raise DataError(
            f"{config.source}: {len(images)} images of {len(images.label_names)} labels leave none to hold out at "
            f"data.test_fraction = {config.test_fraction}; raise it, or give data.test_source"
        )
    return images.take(np.flatnonzero(~chosen)), images.take(np.flatnonzero(chosen))


def limited(train: Images, config: DataConfig) -> Images:
    """The training images that `data.train_examples` keeps: all of them where it is 0."""
    return _limited(train, config.train_examples, "data.train_examples")


def _limited(images: Images, number: int, key: str) -> Images:
    if number > len(images):
        raise DataError(f"{key} = {number}: the source has only {len(images)} such examples; lower it, or leave it out")
    return images.take(np.flatnonzero(images.sample(number, key))) if number else images


# --- labels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """What one part of a source holds: `names` `[n]` are label names, in the order `known` where the source has one."""

    pixels: Pixels
    names: list[str]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    known: tuple[str, ...] = ()


def _labelled(rows: _Rows, source: str, label_names: tuple[str, ...] = (), of: str = "") -> Images:
    """Rows with their labels counted in the order of `label_names`, the training images' where `of` is their source."""
    if not rows.names:
        raise DataError(f"{source}: expected images, got none")
    unknown = sorted(set(rows.names) - set(label_names)) if of else []
    if unknown:
        raise DataError(
            f"{source}: label {unknown[0]!r} of held-out images is not among the {len(label_names)} labels of {of}; "
            f"{nearest(unknown[0], label_names)}; remove those images or add training images"
        )
    label_names = label_names or rows.known or ordered(rows.names)
    place = {name: i for i, name in enumerate(label_names)}
    labels = np.array([place[name] for name in rows.names], dtype=np.int64)
    return Images(rows.pixels, np.arange(len(labels)), labels, label_names, rows.columns)


# --- kinds of sources ------------------------------------------------------------------------------------------------


_Splits = Mapping[str, Callable[[], _Rows]]


def _read(source: str, config: DataConfig, key: str) -> _Splits:
    """The splits of a source, each read when it is called."""
    path = Path(source)
    try:
        if path.is_dir():
            return _folder_kind(path)(path, config)
        if path.is_file():
            return _file_kind(path, key)(path, config)
    except OSError as error:
        raise DataError(f"{key}: cannot read {path}: {error}") from None
    if hub.is_id(source) and path.suffix not in _FILE_KINDS:
        return _dataset(source, config)
    raise DataError(f"{key}: no such file or folder: {path}; give its path, from the configuration's folder or absolute")


def _folder_kind(path: Path) -> Callable[[Path, DataConfig], _Splits]:
    names = [child.name for child in path.iterdir()]
    if any(_IDX.fullmatch(name) for name in names):
        return _idx_folder
    if {"state.json", "dataset_dict.json"} & set(names) or next(path.glob("**/*.parquet"), None):
        return _dataset
    return _picture_folder


def _file_kind(path: Path, key: str) -> Callable[[Path, DataConfig], _Splits]:
    if path.suffix.lower() not in _FILE_KINDS:
        raise DataError(
            f"{key}: expected images as a folder (of IDX files, of pictures, or of a saved dataset), an .npz or a .parquet "
            f"file, got {str(path)!r}"
        )
    return _FILE_KINDS[path.suffix.lower()]


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


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

_IDX = re.compile(r"(?P<set>.*?)(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx\d-ubyte(\.gz)?")


def _idx_folder(path: Path, config: DataConfig) -> _Splits:
    found: dict[tuple[str, str], Path] = {}
    for file in sorted(path.iterdir(), reverse=True):  # so that a file without .gz comes after, and instead of, one with it
        if match := _IDX.fullmatch(file.name):
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


def _idx_split(images: Path, labels: Path) -> _Rows:
    values, names = _idx(images, 3), _idx(labels, 1)
    _same_number(len(values), images, len(names), labels)
    return _Rows(_Array(values, images), [str(name) for name in names.tolist()])


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file: `00 00 08 d`, then d sizes as big-endian 32-bit numbers, then bytes."""
    data = _file_bytes(path)
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not readable as gzip ({error}); the file is damaged or truncated") from None
    magic, expected = data[:4], bytes((0, 0, 8, dimensions))
    if magic != expected:
        raise DataError(f"{path}: expected an IDX file that begins {expected.hex(' ')}, got {magic.hex(' ') or 'nothing'}")
    start = 4 + 4 * dimensions
    shape = np.frombuffer(data[4:start].ljust(start - 4, b"\0"), dtype=">u4").tolist()
    if len(data) < start or len(data) - start != np.prod(shape):
        says, has = "x".join(map(str, shape)), max(len(data) - start, 0)
        raise DataError(f"{path}: its header declares {says} bytes, but {has} follow; the file is damaged or truncated")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _same_number(images: int, images_in: object, labels: int, labels_in: object) -> None:
    if images != labels:
        raise DataError(f"{labels_in}: expected {images} labels, one per image of {images_in}, got {labels}")


# --- npz -------------------------------------------------------------------------------------------------------------


def _npz(path: Path, config: DataConfig) -> _Splits:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not readable as an .npz of plain arrays: {error}") from None
    image, label = str(config.image), str(config.label)
    splits = {"train": partial(_npz_split, path, arrays, image, label)}
    if "train" in image and "train" in label and image.replace("train", "test") in arrays:
        named = (name.replace("train", "test") for name in (image, label))
        splits["test"] = partial(_npz_split, path, arrays, *named)
    return splits


def _npz_split(path: Path, arrays: Mapping[str, np.ndarray], image: str, label: str) -> _Rows:
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
    others = {name for name, array in arrays.items() if array.ndim == 1 and len(array) == len(labels)} - {label}
    columns = {name: arrays[name].astype(str).astype(object) for name in sorted(others)}
    return _Rows(_Array(values, path), [str(each) for each in labels.tolist()], columns)


def _as_pictures(values: np.ndarray, where: str) -> np.ndarray:
    """uint8 `[n, h, w]` or `[n, h, w, 3]`; one channel is the same as none."""
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.dtype != np.uint8 or not (values.ndim == 3 or (values.ndim == 4 and values.shape[3] == 3)):
        raise DataError(
            f"{where}: expected uint8 pixels [n, h, w] or, in colour, [n, h, w, 3], got {values.dtype} {list(values.shape)}"
        )
    return values


# --- pictures --------------------------------------------------------------------------------------------------------


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
        raise DataError(f"{where}: not readable as an image: {_first_line(error)}; repair or remove it") from None
    if deep:
        raise DataError(f"{where}: expected 8 bits per channel, got mode {picture.mode}; save it with 8 bits")
    return pixels


def _picture_folder(path: Path, config: DataConfig) -> _Splits:
    folders = {folder.name: folder for folder in _folders(path)}
    if "train" in folders and set(_HELD_OUT) & set(folders):
        return {name: partial(_classes, folder) for name, folder in folders.items()}
    return {"": partial(_classes, path)}


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _classes(root: Path) -> _Rows:
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
    pictures = _Pictures(len(files), lambda i: _file_bytes(files[i]), lambda i: str(files[i]))
    return _Rows(pictures, names, _metadata(root, [file.relative_to(root).as_posix() for file in files]))


def _metadata(root: Path, names: Sequence[str]) -> Mapping[str, np.ndarray]:
    """The columns of `metadata.csv` for the pictures `names`, where there is such a file."""
    path = root / "metadata.csv"
    if not path.is_file():
        return {}
    try:
        reader = csv.DictReader(io.StringIO(_file_bytes(path).decode("utf-8-sig"), newline=""), restval="")
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


def _dataset(source: Path | str, config: DataConfig) -> _Splits:
    """The splits of a dataset on disk, in Parquet or on the hub."""
    return {name: partial(_dataset_split, dataset, str(source), config) for name, dataset in hub.splits(str(source)).items()}


def _dataset_split(dataset: Any, source: str, config: DataConfig) -> _Rows:
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
    return _Rows(pictures, [str(name) for name in names], {name: _spelt(each) for name, each in columns.items()}, known)


def _spelt(values: Sequence[Any]) -> np.ndarray:
    return np.array(["" if value is None else str(value) for value in values], dtype=object)


def _bytes(stored: Mapping[str, Any]) -> bytes:
    return stored["bytes"] if stored["bytes"] is not None else _file_bytes(Path(stored["path"]))


_FILE_KINDS: Mapping[str, Callable[[Path, DataConfig], _Splits]] = {".npz": _npz, ".parquet": _dataset}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"
