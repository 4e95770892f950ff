"""All clients in this process, on one shared frozen model: one after another, or side by side where that is faster."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from anyrank.adapter.adapter import Adapter
from anyrank.errors import AnyRankError
from anyrank.federation.cohort import Shards
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Failure, Job, Scaling, Scores
from anyrank.tasks.base import score
from anyrank.training import local, private_examples, private_upload, stacked
from anyrank.training.lora import LoraModel

# How a client trains for the unit that its plan protects.
_PRIVATELY = {"example": private_examples.train, "client": private_upload.train}


@dataclass(frozen=True, eq=False)
class InProcess:
    """The default engine: `shards[i]` are the training examples of client i; scores in batches of `eval_batch_size`.

    `stacking`: "auto" trains clients side by side where the model is small enough to gain from it, "always" wherever it is
    possible, "never".
    """

    model: LoraModel
    shards: Shards
    eval_batch_size: int = 1024
    stacking: str = "auto"

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        return self.model.start(rank, scaling, seed)

    def train(self, jobs: Sequence[Job], plan: Plan) -> Iterator[ClientUpdate | Failure]:
        if plan.privacy:
            yield from (self._private(job, plan) for job in jobs)
            return
        if self._stacks(jobs, plan):
            yield from stacked.train(self.model, jobs, [self.shards[job.index] for job in jobs], plan)
            return
        for job in jobs:
            began = time.perf_counter()
            try:
                update = local.train(self.model, job.client.name, job.download, self.shards[job.index], plan)
            except AnyRankError as error:
                yield Failure(job.client.name, str(error))
                continue
            yield replace(update, metrics={**update.metrics, "seconds": time.perf_counter() - began})

    def _private(self, job: Job, plan: Plan) -> ClientUpdate | Failure:
        """A private client's reply: it tells no figures, and of a failure only that it happened."""
        try:
            own = self.shards[job.index]
            train = _PRIVATELY[plan.privacy.plan.level]
            return train(self.model, job.client.name, job.download, job.num_examples, own, plan)
        except AnyRankError:
            return Failure(job.client.name, "private training failed; why stays with the client")

    def _stacks(self, jobs: Sequence[Job], plan: Plan) -> bool:
        wanted = self.stacking == "always" or (self.stacking == "auto" and stacked.worthwhile(self.model))
        whole = plan.config.accumulation_steps == 1  # who splits a batch has no memory for those of others beside it
        return wanted and whole and stacked.possible(self.model, jobs)

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        self.model.apply(adapter, merged)
        return score(self.model.task, self.eval_batch_size)
