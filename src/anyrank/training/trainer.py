"""How a client trains: the one place that chooses the way, for this process and for a site's worker."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from anyrank.errors import RunFailed, in_a_line
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Code, Failure, Job
from anyrank.privacy.noise import Mechanism
from anyrank.training import local, private_examples, private_upload, stacked
from anyrank.training.lora import LoraModel

# How a client trains for the unit that its plan protects.
_PRIVATELY = {"example": private_examples.train, "client": private_upload.train}


class Shards(Protocol):
    """The training examples of clients: `shards[name]` are indices `[n]` of the task's training set, sorted."""

    def __getitem__(self, client: str) -> np.ndarray: ...


def train(
    model: LoraModel, job: Job, examples: np.ndarray, plan: Plan, mechanism: Mechanism | None = None
) -> ClientUpdate | Failure:
    """One client's reply to `job`, after training on `examples` (indices `[n]`). Nothing that goes wrong in it raises.

    A `KeyboardInterrupt` or a `SystemExit` in it is none of the client's, and goes through.

    A private client reports no figures, and of a failure only that it happened.
    """
    began, client = time.perf_counter(), job.client.name
    try:
        if mechanism:
            way = _PRIVATELY[mechanism.plan.level]
            return way(model, client, job.download, job.num_examples, examples, plan, mechanism)
        update = local.train(model, client, job.download, examples, plan)
    except Exception as error:  # a client costs itself alone, whatever its data and its module do
        return _private_failure(client) if mechanism else _failure(client, error)
    return replace(update, metrics={**update.metrics, "seconds": time.perf_counter() - began})


def train_cohort(
    model: LoraModel, jobs: Sequence[Job], shards: Shards, plan: Plan, mechanism: Mechanism | None, stacking: str
) -> Iterator[ClientUpdate | Failure]:
    """The replies to `jobs`, one after another or side by side.

    `stacking`: "auto" trains clients side by side where the model is small enough to gain from it, "always" wherever it is
    possible, "never". Where training side by side breaks, by one client's fault or for want of memory, those who have not
    replied yet train one by one, so that it costs the one who broke it.
    """
    replied: set[str] = set()
    if mechanism is None and _stacks(model, jobs, plan, stacking):
        try:
            for reply in stacked.train(model, jobs, [shards[job.client.name] for job in jobs], plan):
                replied.add(reply.client)
                yield reply
        except (RuntimeError, MemoryError, IndexError):
            model.leave_stack()
    for job in jobs:
        if job.client.name not in replied:
            yield train(model, job, shards[job.client.name], plan, mechanism)


def _stacks(model: LoraModel, jobs: Sequence[Job], plan: Plan, stacking: str) -> bool:
    wanted = stacking == "always" or (stacking == "auto" and stacked.worthwhile(model))
    whole = plan.config.accumulation_steps == 1  # who splits a batch has no memory for those of others beside it
    return wanted and whole and model.can_stack() and stacked.possible(model, jobs)


def _private_failure(client: str) -> Failure:
    return Failure(client, Code.PRIVATE, "private training failed; why stays with the client")


def _failure(client: str, error: Exception) -> Failure:
    if isinstance(error, RunFailed):
        return Failure(client, Code.DIVERGED, str(error))
    if _out_of_memory(error):
        return Failure(client, Code.OUT_OF_MEMORY, "its training ran out of memory; lower train.batch_size or its rank")
    return Failure(client, Code.CRASHED, f"its training raised {in_a_line(error)}")


def _out_of_memory(error: Exception) -> bool:
    """Whether memory was short: torch says so by a class of its own on a GPU, and by its text on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)
