"""What a worker does with each frame that it receives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from anyrank import methods
from anyrank.config.sections import Config
from anyrank.config.tables import from_table
from anyrank.data.partition import ByName, pooled
from anyrank.errors import AnyRankError, FrameError, RunFailed, in_a_line
from anyrank.messages import calls
from anyrank.messages.body import expect
from anyrank.messages.frame import Frame
from anyrank.messages.records import ClientUpdate, Code, Failure, Job, Reported
from anyrank.messages.roster import POOLED, Names
from anyrank.messages.scores import scores_frame
from anyrank.messages.wire import DOWNLOAD, counts_frame, failure_frame, job_of, plan_of, update_frame
from anyrank.privacy.noise import Mechanism
from anyrank.progress import Progress
from anyrank.tasks import digest
from anyrank.tasks.base import score
from anyrank.tasks.dealing import dealt, held_out, roster
from anyrank.tasks.load import load_task
from anyrank.training import stacked, trainer
from anyrank.training.lora import LoraModel
from anyrank.training.opening import open_model
from anyrank.training.scoring import Scorer
from anyrank.worker import memory
from anyrank.worker.serve import now_and_then

Receive = Callable[[], Frame]  # the next frame that comes


@dataclass(frozen=True, eq=False)
class Held:
    """What a worker has loaded: the model, and the training examples of its clients by name."""

    config: Config
    model: LoraModel
    stacking: str
    shards: trainer.ExamplesOf
    ready: calls.Ready
    scorer: Scorer


class Desk:
    """A worker of the user who runs the server, on the same machine: it has all examples and trains any client."""

    def __init__(self) -> None:
        self.held: Held | None = None

    def answer(self, frame: Frame, receive: Receive, progress: Callable[[Frame], None]) -> Iterator[Frame]:
        """The replies to a frame; `receive` gives the frames that belong to it, and `progress` takes frames that go ahead.

        What is wrong with a request is an error frame, and so is whatever a module of the user's raises while it is loaded or
        scored. A frame that is not what it should be raises `FrameError`: the sender is not one that can be trusted to go on. A
        lack of memory raises `MemoryError`: a new process may have enough.
        """
        kinds = {calls.SETUP: self._setup, calls.START: self._start, calls.COHORT: self._cohort, calls.EVALUATE: self._evaluate}
        expect(frame, *kinds)
        try:
            yield from kinds[frame.header.kind](frame, receive, progress)
        except FrameError:
            raise
        except AnyRankError as error:
            yield calls.error_frame(error, frame.header.run)
        except Exception as error:
            if trainer.out_of_memory(error):
                raise MemoryError(in_a_line(error)) from None
            yield calls.error_frame(RunFailed(f"worker, {frame.header.kind}: {in_a_line(error)}"), frame.header.run)

    def _setup(self, frame: Frame, receive: Receive, progress: Callable[[Frame], None]) -> Iterator[Frame]:
        table, largest_rank = calls.setup_of(frame)
        self.held = load(from_table(table), largest_rank, now_and_then(progress))
        yield calls.ready_frame(self.held.ready, frame.header.run)

    def _start(self, frame: Frame, receive: Receive, progress: Callable[[Frame], None]) -> Iterator[Frame]:
        rank, scaling, seed = calls.start_of(frame)
        yield calls.adapter_frame(self._loaded.model.start(rank, scaling, seed), run=frame.header.run)

    def _evaluate(self, frame: Frame, receive: Receive, progress: Callable[[Frame], None]) -> Iterator[Frame]:
        held, (adapter, merged) = self._loaded, calls.adapter_of(frame, calls.EVALUATE)
        held.model.apply(adapter, merged)
        yield scores_frame(score(held.model.task, held.config.eval.batch_size), frame.header.run)

    def _cohort(self, frame: Frame, receive: Receive, progress: Callable[[Frame], None]) -> Iterator[Frame]:
        held, run = self._loaded, frame.header.run
        wanted = calls.cohort_of(frame)
        frames = [receive() for _ in range(wanted.jobs)]
        for each in frames:
            expect(each, DOWNLOAD, run=run)
        jobs, plan = [job_of(each) for each in frames], plan_of(frames[0])
        known = {job.client.name: job for job in jobs}
        way = Mechanism.of(wanted.mechanism) if wanted.mechanism else None
        scorer = held.scorer if wanted.score else None
        if not (wanted.train or wanted.score):
            raise FrameError("cohort: expected score or train, got neither: this worker keeps nothing")
        if wanted.train:
            replies = trainer.train_cohort(held.model, jobs, held.shards, plan, way, held.stacking, wanted.deadline_s, scorer)
        else:
            replies = trainer.score_cohort(jobs, held.scorer, wanted.deadline_s)
        for reply in replies:
            yield _reply_frame(reply, known[reply.client], run, plan.round)

    @property
    def _loaded(self) -> Held:
        if self.held is None:
            raise FrameError("worker: expected a setup frame first")
        return self.held


def _reply_frame(reply: ClientUpdate | Reported | Failure, job: Job, run: str, round: int) -> Frame:
    """A reply as a frame. What no frame can hold, as a figure that is no number, is the client's failure."""
    if isinstance(reply, Reported):
        return counts_frame(reply, run, round)
    if not isinstance(reply, Failure):
        try:
            return update_frame(reply, job.download, run, round)
        except FrameError as error:
            reply = Failure(reply.client, Code.CRASHED, f"its upload cannot be sent: {error}")
    return failure_frame(reply, run, round, with_reason=True)


def load(config: Config, largest_rank: int, progress: Progress) -> Held:
    """Load the task of a configuration, with the examples of all its clients."""
    torch.set_num_threads(config.run.threads)
    if config.method.file:
        methods.load_file(config.method.file)
    method = methods.make(config.method.name, config.method.options)
    task = load_task(config, progress)
    shards, named = dealt(config, task)
    known = roster(config, task, shards, named, method.pools_data)
    model, stacking = open_model(task, config, largest_rank, method.train)
    place = Names(len(shards), known.names).index
    examples: Any = {POOLED: pooled(shards)[0]} if method.pools_data else ByName(shards, place)
    together = model.can_stack() and (stacking == "always" or (stacking == "auto" and stacked.worthwhile(model)))
    scorer = Scorer(model, held_out(known.names, known.owners), config.eval.batch_size, config.eval.by_label)
    held = json.dumps(digest.held(task, shards)) if config.privacy.level != "none" else ""
    return Held(config, model, stacking, examples, calls.Ready(known, together, memory.peak(), held), scorer)
