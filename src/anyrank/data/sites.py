"""The examples of named sites: each site's files are read on their own and concatenated, in the order of the sites' names.

The column `OWNER` of the training and of the held-out examples says whose each example is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np

from anyrank.config.sections import DataConfig, SiteConfig
from anyrank.data.partition import Shards
from anyrank.data.people import set_aside
from anyrank.data.split import ordered
from anyrank.errors import DataError, nearest

OWNER = "[[sites]]"  # a column's name: the site of each example; empty for examples of no site
Part = Any  # a `Table`, `Images` or `Instructions`: `labels` [n], `label_names`, `columns` and `take(index)`
Read = TypeVar("Read")


class Reader(Protocol):
    """A module that reads examples of one kind. `CLOSED`: whether labels are classes, so that held-out examples may have
    no others than the training examples, of which there are at least two."""

    CLOSED: bool

    def load_split(self, config: DataConfig) -> tuple[Part, Part]:
        """Training and held-out examples of one source."""
        ...

    def training(self, config: DataConfig) -> Part:
        """All examples of `data.source`."""
        ...

    def given_held_out(self, config: DataConfig) -> Part | None:
        """The held-out examples that have a source or split of their own; `None` if there are none."""
        ...

    def together(self, parts: Sequence[Part]) -> Mapping[str, Any]:
        """The fields of all parts' examples, one part after the other, without labels and columns."""
        ...


def load_split(reader: Reader, data: DataConfig, sites: Sequence[SiteConfig] = ()) -> tuple[Part, Part]:
    """Training and held-out examples of `data`, or of its `sites` `[s]`, read by `reader`.

    A site's held-out examples are those of its `test_source`, or else `data.test_fraction` of its source, stratified by label,
    drawn by a key of the site's name (none, if there is a `data.test_source`). Those of `data.test_source` follow; they belong
    to no site. Labels are numbered over all sites, or as in `data.label_names` if these are the labels themselves. A site's
    rows and columns, and with these names the numbers of its labels, are those that it has alone. Raises `DataError` that names
    the site.
    """
    if not sites:
        return reader.load_split(data)
    training: list[tuple[str, Part]] = []
    held: list[tuple[str, Part]] = []
    for site in sites:
        whole, own = _of_site(site, lambda site=site: _read(reader, data, site))
        if own is None and not data.test_source:
            whole, own = _divided(whole, data, site)
        training.append((site.name, whole))
        held += [(site.name, own)] if own is not None and len(own.labels) else []
    if data.test_source:
        held.append(("", reader.given_held_out(data)))
    if not held:
        raise DataError(
            f"sites: expected held-out examples, got none at data.test_fraction = {data.test_fraction}; raise it, or give "
            "a test_source"
        )
    names = _vocabulary([part for _, part in training])
    every = names if reader.CLOSED else _vocabulary([part for _, part in (*training, *held)])
    listed = _listed(data.label_names, every)
    if reader.CLOSED:
        _check_labels(listed or names, held, of_data=bool(listed))
    return tuple(_renamed(_joined(reader, parts, listed or every), data) for parts in (training, held))


def _read(reader: Reader, data: DataConfig, site: SiteConfig) -> tuple[Part, Part | None]:
    own = replace(data, source=site.source, test_source=site.test_source)
    return reader.training(own), reader.given_held_out(own)


def _of_site(site: SiteConfig, read: Callable[[], Read]) -> Read:
    try:
        return read()
    except DataError as error:
        raise DataError(f"site {site.name}: {str(error).removeprefix('data.')}") from None


def _divided(whole: Part, data: DataConfig, site: SiteConfig) -> tuple[Part, Part]:
    """Training and held-out examples of a site that has one source for both; a site of few examples may hold none out."""
    chosen = set_aside(whole, data, site.name)
    return whole.take(np.flatnonzero(~chosen)), whole.take(np.flatnonzero(chosen))


def _vocabulary(parts: Sequence[Part]) -> tuple[str, ...]:
    """The labels of all parts, in the order of the parts if that is the same in all of them."""
    first = parts[0].label_names
    same = all(part.label_names == first for part in parts)
    return first if same else ordered(name for part in parts for name in part.label_names)


def _listed(given: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """`data.label_names`, if they are the labels themselves, of which the sites may have some only; empty if they are other
    names. With them, a label has the same number whatever other sites there are."""
    known = set(own) & set(given)
    if not known:
        return ()
    lacking = sorted(set(own) - known)
    if lacking or len(set(given)) < len(given):
        what = f"and not {lacking[0]!r}; {nearest(lacking[0], given)}" if lacking else "and one of them twice"
        raise DataError(
            f"data.label_names: has {min(known)!r} of the sites' labels {what}; give all labels of the sites once each, in any "
            "order, or other names for all of them"
        )
    return given


def _check_labels(names: tuple[str, ...], held: Sequence[tuple[str, Part]], of_data: bool) -> None:
    """Raise `DataError` for fewer than two labels, or a held-out label that is not among `names`: those that the sites train
    on, or (`of_data`) those of `data.label_names`."""
    if len(names) < 2:
        raise DataError(f"sites: expected at least two different labels over all sites, got only {names[0]!r}")
    for site, part in held:
        used = {part.label_names[label] for label in np.unique(part.labels)}
        unknown = sorted(used - set(names))
        if unknown:
            where = f"site {site}" if site else "data.test_source"
            told = "of data.label_names" if of_data else "that the sites train on"
            raise DataError(
                f"{where}: label {unknown[0]!r} of held-out examples is not among the {len(names)} labels {told} "
                f"({len(unknown)} such); {nearest(unknown[0], names)}; remove those examples or add training examples"
            )


def _joined(reader: Reader, parts: Sequence[tuple[str, Part]], names: tuple[str, ...]) -> Part:
    """One part of all, with the labels `names` and the column of owners."""
    alone = [part for _, part in parts]
    named = dict.fromkeys(name for part in alone for name in part.columns)
    columns = {name: np.concatenate([_column(part, name) for part in alone]) for name in named}
    columns[OWNER] = np.concatenate([np.full(len(part.labels), name, dtype=object) for name, part in parts])
    labels = np.concatenate([_relabelled(part, names) for part in alone])
    return replace(alone[0], labels=labels, label_names=names, columns=columns, **reader.together(alone))


def _column(part: Part, name: str) -> np.ndarray:
    """A column `[n]` of a part; empty text where the part has no such column, so that no site takes a column from another."""
    return part.columns[name] if name in part.columns else np.full(len(part.labels), "", dtype=object)


def _relabelled(part: Part, names: tuple[str, ...]) -> np.ndarray:
    """The part's labels `[n]` as indices into `names`. A label that no example has need not be among them."""
    number = {name: place for place, name in enumerate(names)}
    return np.array([number.get(name, -1) for name in part.label_names], dtype=np.int64)[part.labels]


def _renamed(part: Part, data: DataConfig) -> Part:
    """The part with the names in `data.label_names`, if they are given."""
    given, own = data.label_names, part.label_names
    if not given or given == own:
        return part
    if len(given) != len(own) or len(set(given)) != len(given):
        raise DataError(
            f"data.label_names: expected {len(own)} different names, for the labels of all sites in order, got {len(given)}"
        )
    return replace(part, label_names=given)


def groups(columns: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The numbers of examples of each site, one after the other; empty if the examples are not those of sites.

    Frozen parts run on each group apart, so that a site's features do not depend on the batches of other sites.
    """
    if OWNER not in columns:
        return ()
    values = columns[OWNER]
    starts = np.flatnonzero(values[1:] != values[:-1]) + 1
    return tuple(np.diff([0, *starts, len(values)]).tolist())


def shards(columns: Mapping[str, np.ndarray], names: Sequence[str]) -> Shards:
    """Each site's training examples, in the order of `names`."""
    return Shards.of_owners(owners(columns[OWNER], names), len(names))


def owners(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The index in `names` of each value `[n]`, int64; -1 for a value that is not among them."""
    place = {name: number for number, name in enumerate(names)}
    return np.array([place.get(str(value), -1) for value in values], dtype=np.int64)
