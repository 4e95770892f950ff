"""The data sets that private runs trained on: how one is known again, and where its ledger is.

Each has a folder below `spent` in the user's state folder, beside the noise keys, readable only by the user. Its file
`data-set.json` says what the data set is known by. A data set is the same if its files have the same contents, whatever their
names, or if it has the same rows, whatever their order and the form of the file. A data set with the rows of another one and
more is not the same; it is noticed by a sample of the rows' digests. The digests say something about the data, so they stay in
this folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyrank import files
from anyrank.errors import RunError, RunFailed
from anyrank.privacy import noise
from anyrank.privacy.chain import write_text

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns where the system has no locks
    from filelock import FileLock, Timeout

SHARED = "shared:"  # how the group of a run begins in which several clients may have an example
ABOUT, LOCK = "data-set.json", ".lock"
_SAMPLE = 128  # digests of rows that are kept of a data set: the smallest ones
_LETTERS = 16  # of a row's digest in the sample
_MOST_FORMS, _MOST_SETS, _MOST_BYTES = 1000, 10_000, 1 << 24
_PATIENCE_S = 120.0  # how long another process may hold a lock, which it does for one charge
_MOST_ROWS_ALIKE = 0.5  # share of the smaller of two data sets, from which on it is said that they have rows in common


@dataclass(frozen=True)
class DataSet:
    """What a data set is known by: its `name`; the `path` that it was read from, empty if there is none; digests of its `files`
    and of its `rows` (each empty if there is none); its number of `examples`, and a `sample` of digests of rows."""

    name: str
    path: str = ""
    files: str = ""
    rows: str = ""
    examples: int = 0
    sample: tuple[str, ...] = ()

    @classmethod
    def of_rows(cls, name: str, path: str, files: str, rows: Iterable[bytes]) -> DataSet:
        """A data set of these rows, each as bytes. The order of rows does not matter; how often a row is there does."""
        digests = sorted(hashlib.sha256(row).hexdigest() for row in rows)
        sample = tuple(dict.fromkeys(digest[:_LETTERS] for digest in digests))[:_SAMPLE]
        return cls(name, path, files, hashlib.sha256("\n".join(digests).encode()).hexdigest(), len(digests), sample)

    def is_same(self, other: DataSet) -> bool:
        """Whether two records are of the same data set."""
        return bool(self.files and self.files == other.files) or bool(self.rows and self.rows == other.rows)

    def in_common(self, other: DataSet) -> float:
        """An estimate of the share of the smaller data set's rows that the other one has, too; 0 where it is not known."""
        if not (self.sample and other.sample):
            return 0.0
        smallest = sorted({*self.sample, *other.sample})[:_SAMPLE]
        both = len({*self.sample} & {*other.sample} & {*smallest}) / len(smallest)  # of the rows of either, those of both
        return min(1.0, both / (1 + both) * (self.examples + other.examples) / min(self.examples, other.examples))


@dataclass(frozen=True)
class Source:
    """A data set of a run. `group`: runs of one group give each example to the same client, of the same declared count; it
    begins with `SHARED` if clients may have examples in common. `clients` that have examples of it, `None` for all."""

    data: DataSet
    group: str
    clients: frozenset[str] | None = None


@dataclass(frozen=True)
class Kept:
    """A data set with a ledger: its folder, what it is known by, and its ceiling, `epsilon` at `delta` (0: none)."""

    folder: Path
    forms: tuple[DataSet, ...]
    epsilon: float = 0.0
    delta: float = 0.0

    @property
    def name(self) -> str:
        return self.forms[0].name

    def has(self, data: DataSet) -> bool:
        """Whether it is this data set."""
        return any(form.is_same(data) for form in self.forms)

    def table(self) -> dict[str, Any]:
        """The object of `data-set.json`."""
        forms = [dataclasses.asdict(form) | {"sample": list(form.sample)} for form in self.forms]
        return {"forms": forms, "ceiling": self.epsilon, "delta": self.delta}


def folder() -> Path:
    """Where the ledgers of data sets are: `$XDG_STATE_HOME/anyrank/spent`, or `~/.local/state/anyrank/spent`."""
    return noise.key_folder().parent / "spent"


def kept() -> list[Kept]:
    """All data sets with a ledger. Raises `RunError` where one cannot be read: it might be the one that is looked for."""
    found = []
    for path in files.contents(folder()):
        if path.is_dir() and not path.is_symlink() and _begun(path):
            found.append(_read(path))
        if len(found) > _MOST_SETS:
            raise RunError(f"{folder()}: expected at most {_MOST_SETS:,} data sets; move those away that are no longer there")
    return found


def find(data: DataSet) -> list[Kept]:
    """The ledgers of a data set: usually none or one. It has several if its forms were not known to be the same before."""
    return [each for each in kept() if each.has(data)]


def opened(data: DataSet) -> list[Kept]:
    """The ledgers of a data set, with this form of it noted; a new one where there is none."""
    with locked(folder()):
        found = find(data) or [Kept(folder() / (data.rows or data.files)[:32], (data,))]
        return [_noted(each, data) for each in found]


def current(known: Kept) -> Kept:
    """A data set as it is kept now: another process may have set a ceiling since."""
    return _read(known.folder)


def set_ceiling(data: DataSet, epsilon: float, delta: float) -> None:
    """Keep the most epsilon, at `delta`, that all runs on a data set together may spend; 0: no such limit."""
    for each in opened(data):
        with locked(folder()):
            _write(dataclasses.replace(_read(each.folder), epsilon=epsilon, delta=delta if epsilon else 0.0))


def alike(data: DataSet) -> list[str]:
    """What a person should know of other data sets with a ledger: lines about those that were read from the same path, and
    those that have most rows in common with this one."""
    lines = []
    for each in kept():
        if each.has(data):
            continue
        if data.path and any(form.path == data.path for form in each.forms):
            lines.append(
                f"privacy: {data.name} has changed since earlier private runs trained on it; their ledger does not count for "
                f"it as it is now, although rows that are in both were used by both ({each.folder})"
            )
            continue
        share = max(form.in_common(data) for form in each.forms)
        if share >= _MOST_ROWS_ALIKE:
            lines.append(
                f"privacy: {data.name} and {each.name} have about {100 * share:.0f} % of the smaller one's rows in common, and "
                f"a ledger each; the two are not added, although rows that are in both were used by both ({each.folder})"
            )
    return lines


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if need be. Raises `RunFailed` where that takes too long."""
    files.make_folder(path, mode=0o700)
    lock = FileLock(path / LOCK, mode=0o600, thread_local=False)
    with files.naming(path / LOCK):
        files.reached("lock", path / LOCK)
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            held = f"{path}: another process has held its lock for {_PATIENCE_S:.0f} s; see to that process, then go on"
            raise RunFailed(held) from None
    try:
        yield
    finally:
        lock.release()


def _begun(path: Path) -> bool:
    """Whether there is more in a folder than what a process leaves that was killed when it made it."""
    return any(not entry.name.startswith(".") for entry in files.contents(path))


def _noted(found: Kept, data: DataSet) -> Kept:
    """`found` with one more form, if it is a new one."""
    if (found.folder / ABOUT).exists() and data in found.forms:
        return found
    forms = found.forms if data in found.forms else (*found.forms, data)
    if len(forms) > _MOST_FORMS:
        raise RunError(f"{found.folder / ABOUT}: expected at most {_MOST_FORMS} forms of one data set; read it in fewer ways")
    changed = dataclasses.replace(found, forms=forms)
    _write(changed)
    return changed


def _write(changed: Kept) -> None:
    files.make_folder(changed.folder, mode=0o700)
    text = json.dumps(changed.table(), indent=1) + "\n"
    files.write_whole(changed.folder / ABOUT, lambda path: write_text(path, text, private=True))


def _read(path: Path) -> Kept:
    try:
        table = files.parse_json(files.read_bounded(path / ABOUT, _MOST_BYTES))
        forms = tuple(_form(each) for each in table["forms"])
        epsilon, delta = float(table["ceiling"]), float(table["delta"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise _damaged(path, getattr(error, "strerror", None) or "it is not as it was written") from None
    if not forms or not 0 <= epsilon < float("inf") or not 0 <= delta < 1:
        raise _damaged(path, "it is not as it was written")
    return Kept(path, forms, epsilon, delta)


def _form(table: Mapping[str, Any]) -> DataSet:
    sample: Sequence[str] = table["sample"]
    form = DataSet(**{**table, "sample": tuple(sample)})
    texts = (form.name, form.path, form.files, form.rows, *form.sample)
    if not all(isinstance(text, str) for text in texts) or type(form.examples) is not int or not (form.files or form.rows):
        raise ValueError("no data set")
    return form


def _damaged(path: Path, reason: str) -> RunError:
    return RunError(
        f"{path / ABOUT}: cannot be read ({reason}), so that it is not known on which data its ledger was spent; restore the "
        "file, or move its folder away if nobody trains on that data any more"
    )
