"""Runs in which some clients are hostile: an engine that replaces their replies and their data, and what becomes of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyrank import keys, simulation
from anyrank.config.sections import Config
from anyrank.errors import RunFailed
from anyrank.federation import loop
from anyrank.federation.federation import Federation
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Failure, Job, ServerState
from anyrank.privacy.noise import Mechanism
from anyrank.runs.folder import RunDir
from anyrank.tasks.base import Examples, TensorInputs
from attacks import Attack, Scene
from attacks_data import CLASSES, TARGET, Data, triggered

CHANCE = 1 / CLASSES


class Hostile:
    """An engine, of whose clients some are hostile: `attack.reply` replaces what these send."""

    def __init__(self, engine: Any, hostile: Sequence[str], attack: Attack) -> None:
        self._engine, self._hostile, self._attack = engine, frozenset(hostile), attack
        self.start, self.evaluate, self.close = engine.start, engine.evaluate, engine.close
        self.profile, self.model = engine.profile, engine.model

    def train(
        self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None, deadline_s: float | None = None
    ) -> Iterator[ClientUpdate | Failure]:
        replies = {reply.client: reply for reply in self._engine.train(jobs, plan, mechanism, deadline_s)}
        usable = {name: reply for name, reply in replies.items() if isinstance(reply, ClientUpdate)}
        scene = Scene(plan.round, plan.seed, {job.client.name: job for job in jobs}, usable, self._hostile)
        for name, reply in replies.items():
            yield self._attack.reply(scene, name) if name in self._hostile and name in usable else reply


@dataclass(frozen=True, eq=False)
class OtherShards:
    """The shards of all clients, `own` in the place of some."""

    shards: Any
    own: Mapping[str, np.ndarray]

    def __getitem__(self, client: str) -> np.ndarray:
        return self.own[client] if client in self.own else self.shards[client]


def poisoned(setting: simulation.Setting, hostile: Sequence[str], data: Data | None) -> simulation.Setting:
    """`setting`, in which the hostile clients train on what `data` makes of their examples."""
    if data is None or not hostile:
        return setting
    train, own = setting.task.train, {}
    inputs, labels = [train.inputs.values], [train.labels]
    count = len(train)
    for name in hostile:
        rows = torch.from_numpy(np.array(setting.shards[name]))
        spoiled = data(train.inputs.values[rows], train.labels[rows], keys.generator(setting.config.run.seed, "spoiled", name))
        own[name] = np.arange(count, count + len(rows))
        inputs.append(spoiled[0])
        labels.append(spoiled[1])
        count += len(rows)
    examples = Examples(TensorInputs(torch.cat(inputs), train.inputs.name), torch.cat(labels))
    return replace(setting, task=replace(setting.task, train=examples), shards=OtherShards(setting.shards, own))


def choose(federation_ranks: np.ndarray, names: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` hostile clients by key: the first has the largest rank, and more of them include the fewer."""
    order = keys.rng(seed, "hostile").permutation(len(names)).tolist()
    first = next(index for index in order if federation_ranks[index] == federation_ranks.max())
    return [names[index] for index in [first, *(index for index in order if index != first)][:count]]


@dataclass(frozen=True)
class Outcome:
    """What became of a run: accuracy as the mean of the last five rounds, and after the last; the share of triggered held-out
    examples of other labels that are taken for the target; rows of `clients.jsonl` by status, of honest and hostile clients."""

    last: float
    final: float
    success: float
    failed: str
    rows: Mapping[str, Mapping[str, int]]


def run(config: Config, attack: Attack, hostile: int, out: Path) -> Outcome:
    """Run `config` in the folder `out` with so many hostile clients. A run that ends early counts as at chance."""
    population = _population(config)
    names = choose(population.ranks, [population.name(i) for i in range(len(population))], hostile, config.run.seed)
    spoiled: list[Examples] = []

    def engine(setting: simulation.Setting) -> Hostile:
        spoiled.append(setting.task.test)
        return Hostile(simulation.in_process(poisoned(setting, names, attack.data)), names, attack)

    federation = simulation.build(config, engine=engine)
    if attack.inflates:
        federation = inflated(federation, names)
    try:
        with RunDir.open(out, config) as store:
            try:
                summary = loop.run(federation, store)
            except RunFailed as error:
                return Outcome(CHANCE, CHANCE, 0.0, str(error), _rows(store, names))
            state = store.restore()
            success = success_of(federation, state, spoiled[0])
            return Outcome(summary["last_accuracy"], summary["accuracy"], success, "", _rows(store, names))
    finally:
        federation.close()


def inflated(federation: Federation, names: Sequence[str]) -> Federation:
    """The federation in which these clients registered the largest rank."""
    population = federation.population
    ranks = population.ranks.copy()
    ranks[[population.index(name) for name in names]] = ranks.max()
    return replace(federation, population=replace(population, ranks=ranks))


def success_of(federation: Federation, state: ServerState, test: Examples) -> float:
    """How many of the held-out examples of other labels, with the trigger, are taken for the target's label."""
    others = test.labels != TARGET
    inputs = triggered(test.inputs.values[others])
    model = federation.engine.model
    model.apply(state.adapter, state.merged)
    examples = Examples(TensorInputs(inputs, test.inputs.name), torch.full((len(inputs),), TARGET))
    return float(model.task.objective.score(model.module, examples, len(inputs)).accuracy)


def _population(config: Config) -> Any:
    """The registered clients of a configuration, whose sizes do not matter here."""
    from anyrank.federation import cohort

    return cohort.populate(config.clients, np.ones(config.clients.count, dtype=np.int64), config.run.seed)


def _rows(store: RunDir, names: Sequence[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {"honest": {}, "hostile": {}}
    for row in store.clients():
        counts = found["hostile" if row["client"] in names else "honest"]
        what = "shortened" if row.get("shortened") is not None else row["status"]
        counts[what] = counts.get(what, 0) + 1
    return found
