"""What a client downloads, scored on the client's own held-out examples before it trains: sums that are added over clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anyrank.messages.records import Counts, Failure, Job, Reported, Scores
from anyrank.tasks.part import part_of
from anyrank.training.deadline import limited
from anyrank.training.lora import LoraModel

Score = Callable[[Job], Counts | None]


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores the download of a job. `held_out[name]`: the client's own ones of the task's held-out examples, as indices `[n]`,
    sorted; clients without any are missing. `by_label`: whether counts are by label, too.
    """

    model: LoraModel
    held_out: Mapping[str, np.ndarray]
    batch_size: int
    by_label: bool = False

    def __call__(self, job: Job) -> Counts | None:
        """The counts, or `None` for a client without held-out examples. Whatever the module raises is raised."""
        index = self.held_out.get(job.client.name)
        if index is None or not len(index):
            return None
        objective, examples = part_of(self.model.task, index)
        self.model.apply(job.download.adapter, job.download.merged)
        scores = objective.score(self.model.module, examples, self.batch_size, frozenset())
        return counted(scores, self.model.task.label_names if self.by_label else ())


def counted(scores: Scores, label_names: Sequence[str] = ()) -> Counts:
    """The sums of results on examples; by label, if `label_names` `[labels]` has a name for each label that occurs."""
    losses = float(scores.losses.sum(dtype=np.float64))
    correct = None if scores.correct is None else int(scores.correct.sum())
    by_label = _by_label(scores, label_names) if label_names and correct is not None else {}
    return Counts(len(scores.losses), losses if math.isfinite(losses) else None, correct, by_label)


def _by_label(scores: Scores, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    labels = np.asarray(scores.labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(names):
        return {}
    found = {int(label): labels == label for label in np.unique(labels)}
    return {names[label]: (int(own.sum()), int(scores.correct[own].sum())) for label, own in found.items()}


def score_each(
    jobs: Sequence[Job], score: Score, failed: Callable[[str, BaseException], Failure], deadline_s: float | None = None
) -> Iterator[Reported | Failure]:
    """The scores of clients that do not train; of one whose scoring fails, what `failed` makes of it."""
    for job in jobs:
        try:
            with limited(deadline_s):
                reply = Reported(job.client.name, score(job))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            reply = failed(job.client.name, error)
        yield reply
