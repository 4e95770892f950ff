"""Labelled images of a source (IDX files, `.npz` arrays, folders of pictures, Hugging Face datasets) as one frozen record.

A picture is read and decoded only when it is used, so that a folder of photographs costs memory for its file names only.
Pixels are bytes; each task decides how to scale them. Pillow and datasets are imported only if a source needs them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from anyrank import keys
from anyrank.config.sections import DataConfig
from anyrank.data import hub
from anyrank.data.arrays import IDX, idx_folder, npz
from anyrank.data.people import set_aside
from anyrank.data.pictures import dataset_source, picture_folder
from anyrank.data.pixels import HELD_OUT, Concatenated, Pixels, Rows, Splits
from anyrank.data.split import ordered
from anyrank.errors import DataError, nearest
from anyrank.files import check_regular, walk

CLOSED = True  # labels are classes
_SEED = 0  # which examples a limit keeps is the same for every run seed


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled pictures. `rows` `[n]`: their indices in `pixels`. `labels` `[n]` int64: indices into `label_names`. `columns`:
    the other columns of the source, `[n]` of str each.
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
        """A mask `[n]` bool of `number` examples drawn at random, the same for every run seed."""
        chosen = np.zeros(len(self), dtype=bool)
        chosen[keys.rng(_SEED, "images", purpose).permutation(len(self))[:number]] = True
        return chosen

    def relabelled(self, label_names: tuple[str, ...]) -> Images:
        """The same examples, with labels as indices into `label_names`."""
        number = {name: i for i, name in enumerate(label_names)}
        place = np.array([number[name] for name in self.label_names])
        return replace(self, labels=place[self.labels], label_names=label_names)

    def digest(self) -> str:
        """The sha256 of all pictures in their order, as they are stored; nothing is decoded."""
        total = hashlib.sha256()
        for i in self.rows.tolist():
            data = self.pixels.raw(i)
            total.update(len(data).to_bytes(8, "big") + data)
        return total.hexdigest()

    def stacked(self) -> np.ndarray:
        """All pictures as one array, uint8 `[n, channels, h, w]`; `DataError` if they differ in size or colour."""
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
    """The shape of a picture in words.

    >>> spoken((28, 28)), spoken((64, 48, 3))
    ('28x28 grey', '64x48 colour')
    """
    return f"{shape[0]}x{shape[1]} {'grey' if len(shape) == 2 else 'colour'}"


def load_split(config: DataConfig) -> tuple[Images, Images]:
    """Training and held-out images of `data.source`: the path of

    * a folder of IDX files, `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same with `t10k` or `test`, each with
      or without `.gz`: the format of MNIST;
    * an `.npz` file, its arrays named by `data.image` (uint8 `[n, h, w]` or `[n, h, w, 3]`) and `data.label`; if both names
      contain `train`, the arrays with `test` in its place are held out; other arrays `[n]` are columns;
    * a folder of pictures, `class/picture.png` or, with held-out ones of its own, `train/class/…` and `test/class/…`; a
      `metadata.csv` beside the classes, with a column `file_name` (`class/picture.png`), adds columns;
    * a dataset that `datasets` has saved to disk, a `.parquet` file or a folder of them, or a hub id (`owner/name`), with the
      columns `data.image` and `data.label`.

    The training images are the split `data.split` (default: train). Held out are, in this order: `data.test_source`; the split
    `data.test_split` of the source (default: test, or else validation); or `data.test_fraction` of the images, stratified by
    label and the same for every run seed. If `data.test_examples` is set, only so many of them are kept, drawn at random; for
    training images, see `limited`. Raises `DataError`.
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


def training(config: DataConfig) -> Images:
    """All training images of `data.source`."""
    splits = _read(config.source, config, "data.source")
    return _labelled(splits[_split(splits, config.split, ("train", ""), config.source, "data.split")](), config.source)


def given_held_out(config: DataConfig) -> Images | None:
    """The images of the test source, or of a split of the source that is not for training; `None` if there are none."""
    others: Splits = {}
    if not config.test_source:
        splits = _read(config.source, config, "data.source")
        chosen = _split(splits, config.split, ("train", ""), config.source, "data.split")
        others = {name: read for name, read in splits.items() if name != chosen}
    rows = _held_out_rows(config, others)
    return None if rows is None else _labelled(rows, config.test_source or config.source)


def together(parts: Sequence[Images]) -> dict[str, Any]:
    """The pictures of all parts, one after the other."""
    pixels = Concatenated(tuple(part.pixels for part in parts))
    rows = [part.rows + start for part, start in zip(parts, pixels.starts, strict=False)]
    return {"pixels": pixels, "rows": np.concatenate(rows)}


def _held_out_rows(config: DataConfig, others: Splits) -> Rows | None:
    """The held-out examples of a source that has some. `others`: the splits of `data.source` that are not for training."""
    if config.test_source:
        splits = _read(config.test_source, config, "data.test_source")
        usual = (*HELD_OUT, "train", "")
        return splits[_split(splits, config.test_split, usual, config.test_source, "data.test_split")]()
    if config.test_split or set(HELD_OUT) & set(others):
        return others[_split(others, config.test_split, HELD_OUT, config.source, "data.test_split")]()
    return None


def _split(splits: Splits, name: str, usual: Sequence[str], source: str, key: str) -> str:
    """The split `name`; if `name` is empty, the first of `usual` that exists."""
    found = [each for each in ((name,) if name else usual) if each in splits]
    if not found:
        raise DataError(f"{source}: no split {name or usual[0]!r} for {key}; {nearest(name, splits)}")
    return found[0]


def _divided(images: Images, config: DataConfig) -> tuple[Images, Images]:
    chosen = set_aside(images, config)
    if not chosen.any():
        raise DataError(
            f"{config.source}: {len(images)} images of {len(images.label_names)} labels leave none to hold out at "
            f"data.test_fraction = {config.test_fraction}; raise it, or give data.test_source"
        )
    return images.take(np.flatnonzero(~chosen)), images.take(np.flatnonzero(chosen))


def limited(train: Images, config: DataConfig) -> Images:
    """`data.train_examples` of the training images, drawn at random; all of them if it is 0."""
    return _limited(train, config.train_examples, "data.train_examples")


def _limited(images: Images, number: int, key: str) -> Images:
    if number > len(images):
        raise DataError(f"{key} = {number}: the source has only {len(images)} such examples; lower it, or leave it out")
    return images.take(np.flatnonzero(images.sample(number, key))) if number else images


# --- labels ----------------------------------------------------------------------------------------------------------


def _labelled(rows: Rows, source: str, label_names: tuple[str, ...] = (), of: str = "") -> Images:
    """Rows as `Images`. `label_names`: those of the training images, from the source `of`; if empty, those of the rows."""
    if not rows.names:
        raise DataError(f"{source}: expected images, got none")
    unknown = sorted(set(rows.names) - set(label_names)) if of else []
    if unknown:
        raise DataError(
            f"{source}: label {unknown[0]!r} of held-out images is not among the {len(label_names)} labels of {of}; "
            f"{nearest(unknown[0], label_names)}; remove those images or add training images"
        )
    odd = next((name for name in label_names or set(rows.names) if not _is_unicode(name)), None)
    if odd is not None:
        raise DataError(f"{source}: expected labels of Unicode text, got {odd!a}; rename it")
    label_names = label_names or rows.known or ordered(rows.names)
    place = {name: i for i, name in enumerate(label_names)}
    labels = np.array([place[name] for name in rows.names], dtype=np.int64)
    return Images(rows.pixels, np.arange(len(labels)), labels, label_names, rows.columns)


def _is_unicode(name: str) -> bool:
    """Whether a file can hold the name: those of folders may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- kinds of sources ------------------------------------------------------------------------------------------------


def _read(source: str, config: DataConfig, key: str) -> Splits:
    """The splits of a source; each is read when its function is called."""
    path = Path(source)
    try:
        if path.is_dir():
            return _folder_kind(path)(path, config)
        if path.exists():
            check_regular(path)
            return _file_kind(path, key)(path, config)
    except OSError as error:
        raise DataError(f"{key}: cannot read {path}: {error.strerror or error}") from None
    if hub.is_id(source) and path.suffix not in _FILE_KINDS:
        return dataset_source(source, config)
    raise DataError(f"{key}: no such file or folder: {path}; give its path, from the configuration's folder or absolute")


def _folder_kind(path: Path) -> Callable[[Path, DataConfig], Splits]:
    names = [child.name for child in path.iterdir()]
    if any(IDX.fullmatch(name) for name in names):
        return idx_folder
    if {"state.json", "dataset_dict.json"} & set(names) or any(file.suffix == ".parquet" for file in walk(path)):
        return dataset_source
    return picture_folder


def _file_kind(path: Path, key: str) -> Callable[[Path, DataConfig], Splits]:
    if path.suffix.lower() not in _FILE_KINDS:
        raise DataError(
            f"{key}: expected images as a folder (of IDX files, of pictures, or of a saved dataset), an .npz or a .parquet "
            f"file, got {str(path)!r}"
        )
    return _FILE_KINDS[path.suffix.lower()]


_FILE_KINDS: Mapping[str, Callable[[Path, DataConfig], Splits]] = {".npz": npz, ".parquet": dataset_source}
