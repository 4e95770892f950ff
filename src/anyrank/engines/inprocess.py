"""Run all clients in this process on one shared frozen model: one after another, or stacked if that is faster."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anyrank.adapter.adapter import Adapter
from anyrank.errors import RunFailed
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Failure, Job, Profile, Reported, Scaling, Scores
from anyrank.privacy.noise import Mechanism
from anyrank.tasks import digest
from anyrank.tasks.base import score
from anyrank.training import memory, trainer
from anyrank.training.lora import LoraModel
from anyrank.training.scoring import Score
from anyrank.training.trainer import ExamplesOf


@dataclass(frozen=True, eq=False)
class InProcess:
    """The default engine: `shards[name]` are the training examples of a client; scores in batches of `eval_batch_size`.

    `stacking`: as `trainer.train_cohort` has it; `scorer`: what scores a client's download on its own held-out examples, if
    clients score (`eval.where = "sites"`).

    Whatever a client's training raises is its `Failure`, apart from a `KeyboardInterrupt`, which stops the run. A client that
    does not return within the deadline is interrupted (see `training.deadline`). A fault that ends the process itself, in a C
    library or because the system is out of memory, ends the run; it continues from its last checkpoint with `--resume`.
    """

    model: LoraModel
    shards: ExamplesOf
    eval_batch_size: int = 1024
    stacking: str = "auto"
    scorer: Score | None = None

    @property
    def held(self) -> dict[str, str]:
        """Digests of what a private run holds in memory: it continues with the same."""
        return digest.held(self.model.task, getattr(self.shards, "shards", self.shards))

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        return self.model.start(rank, scaling, seed)

    def train(
        self,
        jobs: Sequence[Job],
        plan: Plan,
        mechanism: Mechanism | None = None,
        deadline_s: float | None = None,
        score: bool = False,
    ) -> Iterator[ClientUpdate | Failure]:
        scorer = self.scorer if score else None
        return trainer.train_cohort(self.model, jobs, self.shards, plan, mechanism, self.stacking, deadline_s, scorer)

    def score(self, jobs: Sequence[Job], plan: Plan, deadline_s: float | None = None) -> Iterator[Reported | Failure]:
        return trainer.score_cohort(jobs, self.scorer, deadline_s)

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        self.model.apply(adapter, merged)
        return score(self.model.task, self.eval_batch_size)

    def profile(self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None) -> Profile:
        """Take one warm-up step, in which memory is measured, and one step that is timed."""
        kept = memory.Kept(self.model.module)
        with kept.watch():
            list(self.train(jobs, plan, mechanism))
        step_s, began = {}, time.perf_counter()
        for reply in self.train(jobs, plan, mechanism):
            if isinstance(reply, Failure):
                raise RunFailed(f"one local step of {reply.client}: {reply}")
            # Private clients report no time, so this is the time until their reply.
            step_s[reply.client] = reply.metrics.get("seconds", time.perf_counter() - began)
            began = time.perf_counter()
        return Profile(step_s, kept.peak)

    def close(self) -> None:
        self.model.close()
