"""From a configuration to a federation in this process: task, partition, population, method, engine."""

from __future__ import annotations

from pathlib import Path

import torch

from anyrank import methods
from anyrank.config.sections import Config
from anyrank.data import partition
from anyrank.engines.inprocess import InProcess
from anyrank.federation import cohort, loop
from anyrank.federation.checks import check_private, check_ranks
from anyrank.federation.federation import Federation
from anyrank.federation.standing import MOST_CLIENTS, Labels
from anyrank.privacy.plan import plan_privacy
from anyrank.progress import Progress
from anyrank.robust import central_noise
from anyrank.runs.folder import RunDir
from anyrank.tasks.base import Task
from anyrank.tasks.load import load_task
from anyrank.training import private_examples
from anyrank.training.lora import LoraModel


def build(config: Config, progress: Progress | None = None) -> Federation:
    """The federation of a configuration, ready to run in this process; checks all that can be checked before round 1."""
    torch.set_num_threads(config.run.threads)
    if config.method.file:
        methods.load_file(config.method.file)
    method = methods.make(config.method.name, config.method.options)
    check_ranks(config, method)
    task = load_task(config, progress)
    torch.set_num_threads(config.run.threads)
    examples, clients = task.train.labels.cpu(), config.clients.count
    shards = partition.partition(config.data.partition, examples, clients, config.run.seed, task.columns)
    population = cohort.populate(config.clients, shards, config.run.seed)
    labels, step_factor = _labels(population, task), 1  # of the clients there are, also where one stands in for all
    if method.pools_data:
        population, step_factor = population.pooled(), population.cohort_size
    model = LoraModel(task, config.train.gradient_checkpointing)
    model.check_rank(population.levels()[-1])
    private = plan_privacy(config, population.shards.sizes)
    if private:
        check_private(private, method)
        if private.central:
            central_noise.check(method, population.levels())
        if private.level == "example":
            private_examples.check(model)
        labels = None  # what kinds of examples clients have is theirs to know
    engine = InProcess(model, population.shards, config.eval.batch_size, config.run.stacking)
    facts = {
        "task": task.name,
        "head": task.head,
        "base_model": task.base_model,
        "train_examples": sum(private.declared(int(n)) for n in population.shards.sizes) if private else len(task.train),
        "test_examples": len(task.test),
        "inputs_bytes": task.train.inputs.nbytes + task.test.inputs.nbytes,
        "inputs_in": config.model.features if config.model.task == "text-classification" else "memory",
    }
    return Federation(config, method, population, engine, facts, step_factor, labels, private)


def _labels(population: cohort.Population, task: Task) -> Labels | None:
    """What kinds of examples the clients have; `None` where there are too many clients to tell them apart, or no kinds."""
    if len(population) > MOST_CLIENTS or task.train.labels.is_floating_point():
        return None
    members = range(len(population))
    names, shards = [population.name(i) for i in members], [population.shards[i] for i in members]
    return Labels.of(names, shards, task.train.labels.cpu().numpy())


def execute(config: Config, out: Path, resume: bool = False, on_round=None, progress: Progress | None = None) -> dict:
    """Build and run a configuration in the folder `out`; returns the summary. Nothing is written before all is checked."""
    RunDir.check(out, config, resume)
    built = build(config, progress)
    try:
        with RunDir.open(out, config, resume) as store:
            return loop.run(built, store, on_round)
    finally:
        built.engine.model.close()
