"""Divide training examples among clients. Every example goes to exactly one client, as a pure function of config and seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from anyrank import keys, own
from anyrank.config.sections import PartitionConfig
from anyrank.data.split import ordered
from anyrank.errors import DataError, in_a_line, nearest

_ATTEMPTS = 20  # draws of random sizes, from one stream, until every client has enough; flwr-datasets makes 10
_EMPTY: Mapping[str, np.ndarray] = MappingProxyType({})
_BY_LABEL = ("dirichlet", "pathological", "staircase", "sampled")


@dataclass(frozen=True, eq=False)
class Shards:
    """The examples of every client in two arrays, whatever the number of clients.

    Client `c` holds `order[offsets[c]:offsets[c + 1]]`: `order` `[examples]`, `offsets` `[clients + 1]`, both int64.

    >>> shards = Shards.of_owners(np.array([1, 0, 1]), num_clients=2)
    >>> len(shards), shards[1].tolist(), shards.sizes.tolist()
    (2, [0, 2], [1, 2])
    """

    order: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of_owners(cls, owners: np.ndarray, num_clients: int) -> Shards:
        """From the client of each example, `owners` `[examples]`."""
        order = np.argsort(owners, kind="stable").astype(np.int64)  # stable: each client's examples stay sorted
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=num_clients))]).astype(np.int64)
        order.setflags(write=False)
        offsets.setflags(write=False)
        return cls(order, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> np.ndarray:
        """The client's examples, sorted, int64; a read-only view."""
        if not 0 <= client < len(self):
            raise IndexError(f"client {client}: expected 0 to {len(self) - 1}")
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[client] for client in range(len(self)))

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, `[clients]`."""
        return np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class SampledShards:
    """Clients that draw from all examples, each by its own key and only when needed: a million clients cost as much as one.

    Client `c` holds `size` different examples; its label proportions are drawn from Dirichlet(`alpha`). Clients may share
    examples. `by_label`: the indices of each label's examples.
    """

    by_label: tuple[np.ndarray, ...]
    clients: int
    size: int
    alpha: float
    seed: int

    def __len__(self) -> int:
        return self.clients

    def __getitem__(self, client: int) -> np.ndarray:
        """The client's examples, sorted, int64."""
        if not 0 <= client < len(self):
            raise IndexError(f"client {client}: expected 0 to {len(self) - 1}")
        rng = keys.rng(self.seed, "partition", client)
        wanted = rng.multinomial(self.size, rng.dirichlet(np.full(len(self.by_label), self.alpha)))
        drawn = [rng.permutation(group)[:count] for group, count in zip(self.by_label, wanted, strict=True)]
        chosen = np.concatenate(drawn)
        if len(chosen) < self.size:  # if a label has fewer examples than were drawn of it, the rest have any label
            others = np.setdiff1d(np.concatenate(self.by_label), chosen)
            chosen = np.concatenate([chosen, rng.choice(others, self.size - len(chosen), replace=False)])
        return np.sort(chosen).astype(np.int64)

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, `[clients]`."""
        return np.full(self.clients, self.size)


@dataclass(frozen=True, eq=False)
class Whole:
    """The shards of a single client that holds `examples`."""

    examples: np.ndarray

    def __len__(self) -> int:
        return 1

    def __getitem__(self, client: int) -> np.ndarray:
        return self.examples

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, `[clients]`."""
        return np.array([len(self.examples)])


def pooled(shards: Shards | SampledShards | Whole) -> Whole:
    """One client that holds every client's examples."""
    return Whole(np.unique(np.concatenate([shards[client] for client in range(len(shards))])))


@dataclass(frozen=True, eq=False)
class ByName:
    """Shards by the name of their client; `place` gives the position of a name's shard."""

    shards: Any
    place: Callable[[str], int]

    def __getitem__(self, client: str) -> np.ndarray:
        return self.shards[self.place(client)]


def partition(
    config: PartitionConfig, labels: Any, num_clients: int, seed: int, columns: Mapping[str, np.ndarray] = _EMPTY
) -> Shards | SampledShards:
    """Split examples over clients as `config.kind` says; `labels` `[n]` (array or tensor) are whole numbers from 0.

    * `iid`: shuffled and divided evenly.
    * `dirichlet`: each label's examples in proportions over the clients drawn from Dirichlet(`alpha`), as in flwr-datasets and
      Yurochkin et al. 2019 (without flwr-datasets' self-balancing). The remainders of rounding are assigned at random. *
      `pathological`: each client is given `labels_per_client` labels, those with the fewest clients first; the clients of a
      label share it equally.
    * `staircase`: client i of K holds the labels 0 … ceil((i+1)·L/K)-1, as RBLA's clients do; the clients of a label share it
    equally.
    * `quantity`: sizes in proportions from Dirichlet(`alpha`), labels at random.
    * `sampled`: no split, see `SampledShards`: for federations of more clients than there are examples.
    * `column`: one client per distinct value of `config.column`; with more values than clients, the values are assigned to the
      clients in turn.

    If sizes are random (`dirichlet`, `quantity`), a split that gives a client fewer than `config.min_examples` is drawn again,
    up to 20 draws in all; if that does not help, a `DataError` names the client. `min_examples = 0` permits empty clients, but
    never more clients than examples.
    """
    if config.file:
        return _of_file(config, labels, num_clients, seed, columns)
    labels = np.asarray(labels)
    if config.kind in _BY_LABEL and not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"data.partition.kind = '{config.kind}' splits by label, and these labels are {labels.dtype} numbers, no kinds; "
            "use iid, quantity or column"
        )
    labels = labels.astype(np.int64)
    if config.kind == "sampled":
        return _sampled(config, labels, num_clients, seed)
    if num_clients > len(labels):
        raise DataError(
            f"clients.count = {num_clients}: more clients than the {len(labels)} training examples; lower it, or let clients "
            "share examples: data.partition.kind = 'sampled'"
        )
    rng = keys.rng(seed, "partition")
    draw = _KINDS[config.kind]
    for _ in range(_ATTEMPTS if config.kind in ("dirichlet", "quantity") else 1):
        shards = Shards.of_owners(draw(config, labels, num_clients, rng, columns), num_clients)
        if shards.sizes.min() >= config.min_examples:
            return shards
    client = int(shards.sizes.argmin())
    raise DataError(
        f"data.partition: kind = '{config.kind}' leaves client {client} with {shards.sizes[client]} examples, expected at "
        f"least {config.min_examples}; {_MENDS[config.kind]}lower clients.count or data.partition.min_examples "
        "(0 permits empty clients)"
    )


def by_hand(shards: Mapping[str, np.ndarray], num_examples: int) -> Shards:
    """Shards from a mapping `{client: indices [n]}`, in this order of clients. Not every example has to be in a shard.

    Raises `DataError` for a client without examples, for an index out of range, and for an example that is given twice.
    """
    owner = np.full(num_examples, -1, dtype=np.int64)
    names = list(shards)
    for client, rows in enumerate(shards.values()):
        if not len(rows):
            raise DataError(f"shards: client {names[client]} has no examples; give it some, or leave it out")
        if rows[0] < 0 or rows[-1] >= num_examples:
            wrong = rows[0] if rows[0] < 0 else rows[-1]
            raise DataError(
                f"shards: client {names[client]}: expected examples 0 to {num_examples - 1}, the training set's, got {wrong}"
            )
        twice = rows[1:][rows[1:] == rows[:-1]]
        if len(twice):
            raise DataError(f"shards: client {names[client]} is given example {twice[0]} twice; give each example once")
        taken = rows[owner[rows] >= 0]
        if len(taken):
            raise DataError(
                f"shards: example {taken[0]} is given to {names[owner[taken[0]]]} and to {names[client]}; every example "
                "belongs to one client"
            )
        owner[rows] = client
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in shards.values()])]).astype(np.int64)
    return Shards(np.concatenate(list(shards.values())).astype(np.int64), offsets)


# --- users' partitions ------------------------------------------------------------------------------------------------

OWN: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register `function(labels, clients, rng, columns)` as `data.partition.kind = name`.

    The function returns the client of each example, whole numbers `[n]` from 0 to `clients - 1`; `labels` `[n]`, `columns`
    `{name: values [n]}` of the training data, and a NumPy generator that is keyed by the run's seed.
    """
    if name in _KINDS or name == "sampled":
        raise DataError(f"partition.register: '{name}' is a built-in partition; choose another name")

    def keep(split: Callable[..., Any]) -> Callable[..., Any]:
        OWN[name] = split
        return split

    return keep


def _of_file(config: PartitionConfig, labels: Any, num_clients: int, seed: int, columns: Mapping[str, np.ndarray]) -> Shards:
    wanted = "partition; expected a function under @anyrank.partitions.register('mine')"
    made = own.registered(config.file, "data.partition.file", DataError, OWN, wanted)
    named = config.kind if config.kind in made or config.kind != PartitionConfig().kind else next(iter(made))
    if named not in made:
        raise DataError(f"data.partition.kind: {config.file} registers no '{named}'; {nearest(named, made)}")
    return split_by(made[named], named, labels, num_clients, seed, columns, config.min_examples)


def split_by(
    split: Callable[..., Any],
    name: str,
    labels: Any,
    num_clients: int,
    seed: int,
    columns: Mapping[str, np.ndarray] = _EMPTY,
    min_examples: int = 1,
) -> Shards:
    """The shards of a user's partition, see `register`. Raises `DataError` for invalid owners and for empty clients."""
    labels = np.asarray(labels)
    try:
        owners = np.asarray(split(labels, num_clients, keys.rng(seed, "partition"), columns))
    except Exception as error:
        raise DataError(f"partition '{name}' raised {in_a_line(error)}") from error
    if owners.shape != labels.shape[:1] or not np.issubdtype(owners.dtype, np.integer):
        raise DataError(
            f"partition '{name}': expected the client of each of {len(labels)} examples, whole numbers [{len(labels)}], got "
            f"{owners.dtype} of shape {owners.shape}"
        )
    if owners.min() < 0 or owners.max() >= num_clients:
        raise DataError(f"partition '{name}': expected clients 0 to {num_clients - 1}, got {owners.min()} to {owners.max()}")
    shards = Shards.of_owners(owners.astype(np.int64), num_clients)
    if shards.sizes.min() < min_examples:
        client = int(shards.sizes.argmin())
        raise DataError(
            f"partition '{name}': leaves client {client} with {shards.sizes[client]} examples, expected at least "
            f"{min_examples}; data.partition.min_examples = 0 permits empty clients"
        )
    return shards


def names_of(config: PartitionConfig, num_clients: int, columns: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The values of `config.column` in the order of their clients, if each client has one value; else empty."""
    if config.kind != "column" or config.file:
        return ()
    values = ordered(str(value) for value in columns.get(config.column, ()))
    return values if len(values) == num_clients else ()


def _sampled(config: PartitionConfig, labels: np.ndarray, clients: int, seed: int) -> SampledShards:
    if config.examples_per_client > len(labels):
        raise DataError(
            f"data.partition.examples_per_client = {config.examples_per_client}: the data has {len(labels)} training examples; "
            "lower it"
        )
    return SampledShards(tuple(_by_label(labels)), clients, config.examples_per_client, config.alpha, seed)


def _iid(config: PartitionConfig, labels: np.ndarray, clients: int, rng: np.random.Generator, columns: Mapping) -> np.ndarray:
    return _deal(np.arange(clients), len(labels), rng)


def _dirichlet(
    config: PartitionConfig, labels: np.ndarray, clients: int, rng: np.random.Generator, columns: Mapping
) -> np.ndarray:
    owners = np.empty(len(labels), dtype=np.int64)
    for examples in _by_label(labels):
        owners[rng.permutation(examples)] = _proportional(config.alpha, clients, len(examples), rng)
    return owners


def _pathological(
    config: PartitionConfig, labels: np.ndarray, clients: int, rng: np.random.Generator, columns: Mapping
) -> np.ndarray:
    groups, k = _by_label(labels), config.labels_per_client
    if k > len(groups):
        raise DataError(f"data.partition.labels_per_client = {k}: the data has only {len(groups)} labels; lower it")
    if clients * k < len(groups):
        raise DataError(
            f"data.partition: {clients} clients of {k} labels cannot hold all {len(groups)} labels; "
            f"raise clients.count or data.partition.labels_per_client to {-(-len(groups) // clients)}"
        )
    holders: list[list[int]] = [[] for _ in groups]
    given = np.zeros(len(groups), dtype=np.int64)
    for client in rng.permutation(clients):
        chosen = np.lexsort((rng.random(len(groups)), given))[:k]  # the labels with the fewest clients so far, ties at random
        given[chosen] += 1
        for label in chosen:
            holders[label].append(client)
    return _share(groups, [np.array(each) for each in holders], len(labels), rng)


def _staircase(
    config: PartitionConfig, labels: np.ndarray, clients: int, rng: np.random.Generator, columns: Mapping
) -> np.ndarray:
    groups = _by_label(labels)
    # Client i holds label l where l <= ceil((i+1)·L/K) - 1, that is where i >= floor(l·K/L).
    holders = [np.arange(label * clients // len(groups), clients) for label in range(len(groups))]
    return _share(groups, holders, len(labels), rng)


def _quantity(
    config: PartitionConfig, labels: np.ndarray, clients: int, rng: np.random.Generator, columns: Mapping
) -> np.ndarray:
    owners = np.empty(len(labels), dtype=np.int64)
    owners[rng.permutation(len(labels))] = _proportional(config.alpha, clients, len(labels), rng)
    return owners


def _column(
    config: PartitionConfig, labels: np.ndarray, clients: int, rng: np.random.Generator, columns: Mapping
) -> np.ndarray:
    if config.column not in columns:
        hint = nearest(config.column, columns) if columns else "the data has no columns beside text and label"
        raise DataError(f"data.partition.column: no column {config.column!r} in the training data; {hint}")
    values = [str(value) for value in columns[config.column]]
    missing = sum(not value.strip() for value in values)
    if missing:
        raise DataError(
            f"data.partition.column: {missing} examples have no value in column {config.column!r}; fill or remove them"
        )
    distinct = ordered(values)
    if len(distinct) < clients:
        raise DataError(
            f"clients.count = {clients}: column {config.column!r} has only {len(distinct)} distinct values; "
            f"set clients.count to {len(distinct)} or less"
        )
    client = {value: number % clients for number, value in enumerate(distinct)}
    return np.array([client[value] for value in values], dtype=np.int64)


_KINDS: Mapping[str, Callable[..., np.ndarray]] = MappingProxyType(
    {
        "iid": _iid,
        "dirichlet": _dirichlet,
        "pathological": _pathological,
        "staircase": _staircase,
        "quantity": _quantity,
        "column": _column,
    }
)
_BY_LABEL = ("dirichlet", "pathological", "staircase", "sampled")
_MENDS = {
    "iid": "",
    "dirichlet": "raise data.partition.alpha, ",
    "pathological": "raise data.partition.labels_per_client, ",
    "staircase": "",
    "quantity": "raise data.partition.alpha, ",
    "column": "",
}


def _by_label(labels: np.ndarray) -> list[np.ndarray]:
    """The examples of each label that has any, in label order."""
    order = np.argsort(labels, kind="stable")
    return [group for group in np.split(order, np.cumsum(np.bincount(labels))[:-1]) if len(group)]


def _deal(holders: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """`number` examples divided evenly among `holders`, at random: the holder of each; counts differ by at most one."""
    return rng.permutation(rng.permutation(holders)[np.arange(number) % len(holders)])


def _share(groups: list[np.ndarray], holders: list[np.ndarray], number: int, rng: np.random.Generator) -> np.ndarray:
    """Owners `[number]`, with each label's examples shared equally by its holders."""
    owners = np.empty(number, dtype=np.int64)
    for examples, each in zip(groups, holders, strict=True):
        owners[examples] = _deal(each, len(examples), rng)
    return owners


def _proportional(alpha: float, clients: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """Owners `[number]`, grouped, in proportions p ~ Dirichlet(alpha) over the clients; each count is p·number rounded.

    Clients are laid end to end on [0, 1) in random order, each as long as its proportion, and a comb of `number` teeth with a
    random start picks them, so that every client's expected count is exactly p·number and no client is favoured by rounding.
    """
    ends = np.cumsum(rng.dirichlet(np.full(clients, alpha)))
    teeth = (np.arange(number) + rng.random()) / number
    return rng.permutation(clients)[np.minimum(np.searchsorted(ends, teeth, side="right"), clients - 1)]
