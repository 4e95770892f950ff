"""All clients in this process, on one shared frozen model: one after another, or side by side where that is faster."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from anyrank import local
from anyrank.adapter import Adapter
from anyrank.cohort import Shards
from anyrank.engines import stacked
from anyrank.engines.base import Job
from anyrank.errors import AnyRankError
from anyrank.models import LoraModel
from anyrank.records import ClientUpdate, Failure, Scaling
from anyrank.tasks.base import Scores


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

    def train(self, jobs: Sequence[Job], plan: local.Plan) -> Iterator[ClientUpdate | Failure]:
        if self._stacks(jobs):
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

    def _stacks(self, jobs: Sequence[Job]) -> bool:
        wanted = self.stacking == "always" or (self.stacking == "auto" and stacked.worthwhile(self.model))
        return wanted and stacked.possible(self.model, jobs)

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        self.model.apply(adapter, merged)
        task = self.model.task
        return task.objective.score(task.module, task.test, self.eval_batch_size)
