"""A federation from Python, with your own torch module, data, shards and method, in an ordinary run folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import HANDED_IN, Config
from anyrank.config.tables import from_table, to_table
from anyrank.config.tables import load as load_config
from anyrank.data import partition
from anyrank.errors import AnyRankError, ConfigError, DataError, MethodError
from anyrank.messages.records import Client, ServerState
from anyrank.methods import REGISTRY, Method, make
from anyrank.progress import Progress
from anyrank.runs.checkpoint import load_state
from anyrank.runs.folder import RunDir
from anyrank.simulation import building
from anyrank.tasks import digest
from anyrank.tasks.base import Task
from anyrank.tasks.inputs import rows_of

Rows = Sequence[int] | np.ndarray | torch.Tensor
Split = Callable[[np.ndarray, int, np.random.Generator, Mapping[str, np.ndarray]], np.ndarray]
_PRIVATE = "private"  # stands in a private run's configuration for a digest of data
_SECTIONS = ("run", "model", "data", "clients", "lora", "train", "privacy", "rounds", "guard", "robust", "eval")


class Federation:
    """One federation: a task or a configuration, its clients, and the method that merges what they train.

    >>> import torch
    >>> x, y = torch.randn(40, 4), torch.arange(40) % 2
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> task = Task(module=net, targets=("0",), train=(x, y), test=(x, y))
    >>> Federation(task, ranks={"north": 4, "south": 2}, rounds=1).names
    ('north', 'south')
    """

    def __init__(
        self,
        task: Task | None = None,
        *,
        ranks: Mapping[str, int] | Sequence[int] | int | None = None,
        shards: Mapping[str, Rows] | Sequence[Rows] | Split | None = None,
        method: str | Mapping[str, Any] | Method | type[Method] | None = None,
        rounds: int | Mapping[str, Any] | None = None,
        seed: int | None = None,
        config: Config | None = None,
        **sections: Mapping[str, Any],
    ) -> None:
        """A federation of `task`, or else of the task that `config` describes.

        `ranks`: of each client, by name, in a list, or one for all. `shards`: the training examples of each client, by the
        same names or in the same order, as indices `[n]` or a mask; or a function `(labels, clients, rng, columns)` that
        gives the client of each example `[n]`. Without `shards` the configuration's partition splits them. `method`: by name,
        or a method object. `config`, or keywords `run`, `model`, `data`, `clients`, `lora`, `train`, `privacy`, `rounds`,
        `guard`, `robust` and `eval` with keys of that section, such as `train={"learning_rate": 1e-2}`, set everything else.
        `rounds` as a number is how many there are, with keys it is the section: `run={"rounds": 30}, rounds={"least": 3}`.
        If clients are named, all take part in every round, unless `clients={"participation": ...}` is given.

        Raises `AnyRankError`, in one line, if the arguments do not fit together.
        """
        if task is not None and not isinstance(task, Task):
            raise ConfigError(f"task: expected an anyrank.Task, got {type(task).__name__}")
        if task is None and config is None:
            raise ConfigError("Federation: expected a task, or config=...; anyrank.load('config.toml') reads a file")
        self.task = task
        self._shards: Any = None
        if isinstance(rounds, Mapping):
            sections, rounds = {**sections, "rounds": rounds}, None
        shards = list(shards) if isinstance(shards, (ValuesView, Iterator)) else shards
        _check_given(task, config, ranks, shards, rounds, seed, sections)
        chosen = _configured(config, sections)
        participation = chosen.clients.participation
        stated = "participation" in sections.get("clients", {}) or participation != Config().clients.participation
        chosen, names = _with_clients(chosen, ranks, shards, stated)
        self._method, chosen = _with_method(chosen, method)
        run = {key: _whole(value) for key, value in (("rounds", rounds), ("seed", seed)) if value is not None}
        chosen = _replaced(chosen, {"run": run})
        if task is not None:
            chosen = _handed_in(chosen, task)
        if shards is not None:
            if task is None:
                raise ConfigError("shards: are indices of a task's training examples; pass the task too")
            self._shards = _shards(shards, names, task, chosen)
            found = digest.of_shards((name, self._shards[i]) for i, name in enumerate(names))
            found = _PRIVATE if chosen.privacy.level != "none" else found
            chosen = _replaced(chosen, {"data": {"partition": dataclasses.replace(
                chosen.data.partition, kind=HANDED_IN, handed_in=found, column="", examples_per_client=0)}})  # fmt: skip
        elif task is not None and not task.has_classes and chosen.data.partition == type(chosen.data.partition)():
            iid = dataclasses.replace(chosen.data.partition, kind="iid")
            chosen = _replaced(chosen, {"data": {"partition": iid}})
        self.config = chosen

    @property
    def names(self) -> tuple[str, ...]:
        """The clients' names."""
        clients = self.config.clients
        return clients.names or tuple(f"client-{i:0{len(str(clients.count - 1))}d}" for i in range(clients.count))

    def run(
        self,
        out: str | os.PathLike[str] | None = None,
        resume: bool = False,
        on_round: Callable[[Mapping[str, Any]], None] | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Run the federation in the folder `out` (default: `runs/NAME`), and return its result.

        `resume`: continue the run in the folder, or start it if there is none; a run of another task, other shards or another
        configuration is refused. `on_round` gets each round's metrics; `progress(done, total)` reports the preparation. The
        folder is an ordinary run folder: `anyrank report OUT` makes its page. Afterwards, the module is as it was before.
        """
        if on_round is not None and not callable(on_round):
            raise ConfigError(f"on_round: expected a function of a round's metrics, got {on_round!r}")
        folder = _folder(Path("runs") / self.config.run.name if out is None else out)
        config = self.config if self.task is None else _handed_in(self.config, self.task)  # as the task is by now
        instead = {"task": self.task, "shards": self._shards, "method": self._method}
        summary = building.execute(config, folder, resume, on_round, progress, **instead)
        return Result.of(folder, summary, self._method or make(self.config.method.name, self.config.method.options))


@dataclass(frozen=True)
class Result:
    """The result of a run: its folder `out`, the final figures `summary`, and the `metrics` of each round.

    `adapter`: the global update; `base_update`: the update of the frozen base model (FLoRA, FedEx), or `None`.
    """

    out: Path
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    state: ServerState = dataclasses.field(repr=False)
    method: Method = dataclasses.field(repr=False)

    @classmethod
    def of(cls, out: Path, summary: Mapping[str, Any], method: Method) -> Result:
        """From the folder of a finished run."""
        metrics = RunDir.read_metrics(out)
        return cls(out, summary, metrics, load_state(out / "checkpoint" / "state.safetensors"), method)

    @property
    def adapter(self) -> Adapter:
        return self.state.adapter

    @property
    def base_update(self) -> Adapter | None:
        return self.state.merged

    def share(self, rank: int) -> Adapter:
        """What a client of `rank` would get: the part of the global update that fits it."""
        rank = _whole(rank)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise MethodError(f"share: expected a rank of at least 1, got {rank!r}")
        return self.method.share(self.state, Client(f"rank-{rank}", rank))


def _folder(out: Any) -> Path:
    try:
        path = Path(os.fspath(out))
    except TypeError:
        raise ConfigError(f"out: expected a folder, got {out!r}") from None
    if "\0" in str(path):
        raise ConfigError(f"out: expected a folder, got {str(path)!r}")
    return path


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Federation:
    """The federation of a TOML configuration, with `section.key=value` overrides, as `anyrank run` builds it."""
    return Federation(config=load_config(path, overrides))


# --- from keywords to a configuration ---------------------------------------------------------------------------------


def _configured(config: Config | None, sections: Mapping[str, Mapping[str, Any]]) -> Config:
    for name in sections:
        if name not in _SECTIONS:
            raise ConfigError(
                f"Federation: unknown keyword {name!r}; expected task, ranks, shards, method, rounds, seed, config, or one of "
                f"the sections {', '.join(_SECTIONS)}, as in train={{'learning_rate': 1e-2}}"
            )
    return _replaced(config or Config(), sections)


def _replaced(config: Config, sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """`config` with keys changed; a key that no section has is an error as in a file."""
    plain = {
        name: keys for name, keys in sections.items() if not any(dataclasses.is_dataclass(value) for value in keys.values())
    }
    table = to_table(config)
    for name, keys in plain.items():
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{name}: expected keys of the section [{name}], got {keys!r}")
        table[name] = table[name] | {key: _plain(value) for key, value in keys.items()}
    changed = from_table(table) if plain else config
    return changed.replace(**{name: keys for name, keys in sections.items() if name not in plain})


def _with_clients(config: Config, ranks: Any, shards: Any, stated: bool) -> tuple[Config, tuple[str, ...]]:
    """The configuration with the clients that `ranks` and `shards` name, and their names."""
    by_name = next((given for given in (ranks, shards) if isinstance(given, Mapping)), None)
    listed = next((given for given in (ranks, shards) if _is_list(given)), None)
    if by_name is None and listed is None:
        keys = {} if ranks is None else {"ranks": [_rank(ranks, "every client")]}
        config = _replaced(config, {"clients": keys}) if keys else config
        return config, config.clients.names
    if by_name is not None:
        names = tuple(sorted(by_name, key=str))  # by name, in whatever order they were given
        for name in names:
            if not isinstance(name, str) or not name:
                raise ConfigError(f"ranks: expected names of clients, got {name!r}")
        _same_names(ranks, shards)
    else:
        names = ()
    count = len(by_name if by_name is not None else listed)
    if not count:
        raise ConfigError("ranks: expected at least one client, got none")
    keys: dict[str, Any] = {"count": count, "names": list(names)}
    if isinstance(ranks, Mapping):
        keys |= {"ranks": [_rank(rank, name) for name, rank in sorted(ranks.items())], "rank_order": "cycled"}
    elif _is_list(ranks):
        if len(ranks) != count:
            raise ConfigError(f"ranks: expected one per client, {count}, got {len(ranks)}")
        keys |= {"ranks": [_rank(rank, f"client {i}") for i, rank in enumerate(ranks)], "rank_order": "cycled"}
    elif ranks is not None:
        keys |= {"ranks": [_rank(ranks, "every client")]}
    if not stated:  # how many take part: who names clients means all of them
        keys |= {"participation": 1.0}
    return _replaced(config, {"clients": keys}), names


def _check_given(
    task: Task | None, config: Any, ranks: Any, shards: Any, rounds: Any, seed: Any, sections: Mapping[str, Any]
) -> None:
    """Raise `ConfigError` for what is no configuration, and for keys that something else that is given would overrule."""
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"config: expected an anyrank.Config, got {type(config).__name__}; anyrank.load reads a file")
    for name, keys in sections.items():
        if name in _SECTIONS and not (isinstance(keys, Mapping) and all(isinstance(key, str) for key in keys)):
            raise ConfigError(f"{name}: expected keys of the section [{name}], as in {name}={{'key': value}}, got {keys!r}")
    given = lambda section, *names: sorted(set(sections.get(section, {})) & set(names))  # noqa: E731
    twice = {
        "rounds": given("run", "rounds") if rounds is not None else [],
        "seed": given("run", "seed") if seed is not None else [],
        "ranks": given("clients", "count", "ranks", "rank_order", "names") if ranks is not None else [],
        "shards": given("data", "partition") if shards is not None else [],
    }
    for keyword, keys in twice.items():
        if keys:
            raise ConfigError(f"{keyword}: is given, and {keys[0]!r} of a section, too; leave one of them out")
    if task is not None:
        unread = [
            *given("lora", "target_modules"),
            *sections.get("model", {}),
            *(set(sections.get("data", {})) - {"partition"}),
        ]
        if unread:
            raise ConfigError(f"{unread[0]}: says what a task is, and a task is handed in; leave it out, or say it in the Task")


def _is_list(given: Any) -> bool:
    return isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, (str, bytes))


def _same_names(ranks: Any, shards: Any) -> None:
    if isinstance(ranks, Mapping) and isinstance(shards, Mapping):
        lacking = sorted(map(str, ranks.keys() ^ shards.keys()))
        if lacking:
            has, other = ("ranks", "shards") if lacking[0] in ranks else ("shards", "ranks")
            raise ConfigError(f"{other}: client {lacking[0]!r} is in {has} and not in {other}; name the same clients in both")
    elif ranks is not None and shards is not None and (_is_list(ranks) or _is_list(shards)):
        raise ConfigError("ranks and shards: expected both by name, or both in a list")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, np.integer) else value


def _rank(rank: Any, client: str) -> int:
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or not 1 <= rank < 1 << 31:
        raise ConfigError(f"ranks: {client}: expected a whole number of at least 1, got {rank!r}")
    return int(rank)


def _with_method(config: Config, method: Any) -> tuple[Method | None, Config]:
    """A method that was passed from Python (`None` if the configuration can make it), and the configuration that names it."""
    if method is None:
        return None, config
    if isinstance(method, Mapping):
        options = {key: value for key, value in method.items() if key != "name"}
        return None, config.replace(method={"name": method.get("name", config.method.name), "options": options})
    if isinstance(method, str):
        options = config.method.options if method == config.method.name else {}
        return None, config.replace(method={"name": method, "options": options})
    try:
        made = method() if isinstance(method, type) and issubclass(method, Method) else method
    except TypeError as error:
        raise MethodError(f"method: {error}") from None
    if not isinstance(made, Method):
        raise MethodError(f"method: expected a name or an anyrank.methods.Method, got {type(method).__name__}")
    options = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    try:
        tomli_w.dumps(options)
    except (TypeError, ValueError) as error:
        raise MethodError(f"method: {made.name}: config.toml cannot hold one of its options ({error})") from None
    known = REGISTRY.get(made.name) is type(made) and type(made).__module__.startswith("anyrank.methods.")
    found = "" if known else digest.of_text(digest.source(made))
    return made, config.replace(method={"name": made.name, "options": options, "file": "", "handed_in": found})


def _handed_in(config: Config, task: Task) -> Config:
    """The configuration of a task that was passed from Python: it records this, with the task's digest. Of a private run, the
    run folder has tags in place of digests (`anyrank.runs.identity`)."""
    if config.model.device not in ("cpu", "auto") or config.model.train_dtype != "float32":
        raise ConfigError(
            "model: device and train_dtype are the module's own, which is used where and as it is; leave them out"
        )
    found = (_PRIVATE,) if config.privacy.level != "none" else digest.digest(task)
    model = dataclasses.replace(type(config.model)(), task=HANDED_IN, handed_in=found)
    data = dataclasses.replace(
        type(config.data)(), source=HANDED_IN, partition=config.data.partition, person=config.data.person
    )
    return dataclasses.replace(config, model=model, data=data)


def _shards(shards: Any, names: tuple[str, ...], task: Task, config: Config) -> partition.Shards:
    size, labels = len(task.train), task.train.labels.cpu().numpy()
    if callable(shards) and not _is_list(shards) and not isinstance(shards, Mapping):
        least = config.data.partition.min_examples
        name = getattr(shards, "__name__", "shards")
        return partition.split_by(shards, name, labels, config.clients.count, config.run.seed, task.columns, least)
    if not isinstance(shards, Mapping) and (not _is_list(shards) or isinstance(shards, torch.Tensor)):
        raise DataError(f"shards: expected rows by client, a list of rows, or a function, got {type(shards).__name__}")
    given = shards if isinstance(shards, Mapping) else dict(enumerate(shards))
    if isinstance(shards, Mapping) and names:
        given = {name: shards[name] for name in names}
    rows = {}
    for name, own in given.items():
        try:
            rows[str(name)] = rows_of(own, size)
        except DataError as error:
            raise DataError(f"shards: client {name}: {error}") from None
    return partition.by_hand(rows, size)


__all__ = ["AnyRankError", "Federation", "Result", "load"]
