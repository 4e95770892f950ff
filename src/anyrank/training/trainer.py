"""Choose how a client trains: one function for this process and for a site's worker."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from anyrank import keys
from anyrank.errors import RunFailed, in_a_line
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Code, Failure, Job, Reported
from anyrank.privacy.noise import Mechanism
from anyrank.training import local, private_examples, private_people, private_upload, stacked
from anyrank.training.deadline import Overdue, each, limited
from anyrank.training.lora import LoraModel
from anyrank.training.scoring import Score, score_each

# The training function for each unit of privacy.
_PRIVATELY = {"example": private_examples.train, "person": private_people.train, "client": private_upload.train}


class ExamplesOf(Protocol):
    """The training examples of clients: `shards[name]` are indices `[n]` of the task's training set, sorted."""

    def __getitem__(self, client: str) -> np.ndarray: ...


def train(
    model: LoraModel,
    job: Job,
    examples: np.ndarray,
    plan: Plan,
    mechanism: Mechanism | None = None,
    deadline_s: float | None = None,
    score: Score | None = None,
) -> ClientUpdate | Failure:
    """One client's reply to `job`, after training on `examples` (indices `[n]`). Problems never raise an exception, apart from
    a `KeyboardInterrupt`, which does not come from the client.

    A private client reports no figures, and of a failure only the fact that it happened. `deadline_s`: seconds after which the
    training is interrupted. `score`: what scores the download before the training, which is the same with or without it.
    """
    client = job.client.name
    try:
        with limited(deadline_s):
            counts, began = score(job) if score else None, time.perf_counter()
            torch.manual_seed(keys.key(plan.seed, "forward", plan.round, client))  # for a module that draws in its forward pass
            if mechanism:
                way = _PRIVATELY[mechanism.plan.level]
                return way(model, client, job.download, job.num_examples, examples, plan, mechanism)
            update = local.train(model, client, job.download, examples, plan)
    except Overdue:
        return _late(client, deadline_s)
    except (Exception, SystemExit) as error:  # one client's failure does not stop the others, whatever its data and module do
        return _private_failure(client) if mechanism else _failure(client, error)
    return replace(update, metrics={**update.metrics, "seconds": time.perf_counter() - began}, counts=counts)


def train_cohort(
    model: LoraModel,
    jobs: Sequence[Job],
    shards: ExamplesOf,
    plan: Plan,
    mechanism: Mechanism | None,
    stacking: str,
    deadline_s: float | None = None,
    score: Score | None = None,
) -> Iterator[ClientUpdate | Failure]:
    """The replies to `jobs`, with clients trained one after another or stacked.

    `stacking`: "auto" stacks clients if the model is small enough to be faster, "always" whenever it is possible, "never" does
    not. If stacked training fails, because of one client or because memory ran out, the clients without a reply train one by
    one, so that only the client with the problem fails. `deadline_s`: the time limit of each client's training; clients in a
    stack share one, from reply to reply, so that one that hangs costs the round twice that time. `score`: what scores each
    client's download before it trains.
    """
    replied: set[str] = set()
    if mechanism is None and _stacks(model, jobs, plan, stacking):
        counts = {}
        for reply in score_cohort(jobs, score, deadline_s) if score else ():
            if isinstance(reply, Failure):
                replied.add(reply.client)
                yield reply
            else:
                counts[reply.client] = reply.counts
        jobs = [job for job in jobs if job.client.name not in replied]
        try:
            together = stacked.train(model, jobs, [shards[job.client.name] for job in jobs], plan)
            for reply in each(together, deadline_s):
                replied.add(reply.client)
                yield replace(reply, counts=counts.get(reply.client)) if isinstance(reply, ClientUpdate) else reply
        except (Exception, SystemExit, Overdue):  # a client may break it in any way: alone, it costs itself
            model.leave_stack()
    for job in jobs:
        if job.client.name not in replied:
            yield train(model, job, shards[job.client.name], plan, mechanism, deadline_s, score)


def score_cohort(jobs: Sequence[Job], score: Score, deadline_s: float | None = None) -> Iterator[Reported | Failure]:
    """The scores of clients that do not train. Problems never raise an exception, apart from a `KeyboardInterrupt`."""

    def failed(client: str, error: BaseException) -> Failure:
        return _late(client, deadline_s) if isinstance(error, Overdue) else _failure(client, error)

    return score_each(jobs, score, failed, deadline_s)


def _stacks(model: LoraModel, jobs: Sequence[Job], plan: Plan, stacking: str) -> bool:
    wanted = stacking == "always" or (stacking == "auto" and stacked.worthwhile(model))
    whole = plan.config.accumulation_steps == 1  # a batch that is split needs memory, which leaves none for stacked clients
    return wanted and whole and model.can_stack() and stacked.possible(model, jobs)


def _late(client: str, deadline_s: float | None) -> Failure:
    return Failure(client, Code.LATE, f"its training took longer than {deadline_s:g} s (rounds.deadline_s)")


def _private_failure(client: str) -> Failure:
    return Failure(client, Code.PRIVATE, "private training failed; the reason stays with the client")


def _failure(client: str, error: BaseException) -> Failure:
    if isinstance(error, RunFailed):
        return Failure(client, Code.DIVERGED, str(error))
    if out_of_memory(error):
        return Failure(client, Code.OUT_OF_MEMORY, "its training ran out of memory; lower train.batch_size or its rank")
    return Failure(client, Code.CRASHED, f"its training raised {in_a_line(error)}")


# torch on the CPU, on Windows and elsewhere; and Python, where there is no memory for a thread's stack
_SAYS = ("not enough memory", "can't allocate memory", "can't start new thread")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch raises a special class on a GPU, and an ordinary error with a certain text on the CPU."""
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return refused or isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in _SAYS)
