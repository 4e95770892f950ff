"""A part of a task's held-out examples, such as those of one client."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anyrank.tasks.base import Examples, Objective, Task
from anyrank.tasks.inputs import Inputs


@dataclass(frozen=True, eq=False)
class Chosen:
    """The inputs of the examples `index` `[n]` of `inputs`."""

    inputs: Inputs
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def nbytes(self) -> int:
        return 0  # they are those of the inputs

    @property
    def on_disk(self) -> bool:
        return self.inputs.on_disk

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor | bool]:
        return self.inputs.batch(self.index[index], equal_lengths)


def part_of(task: Task, index: np.ndarray) -> tuple[Objective, Examples]:
    """The held-out examples `index` `[n]` of a task, and the objective that scores them.

    An objective that knows the held-out examples itself has a method `part(index)`, which gives the one of these examples.
    """
    if np.array_equal(index, np.arange(len(task.test))):
        return task.objective, task.test
    part = getattr(task.objective, "part", None)
    chosen = torch.from_numpy(np.asarray(index, np.int64).copy())
    examples = Examples(Chosen(task.test.inputs, chosen), task.test.labels[chosen.to(task.test.labels.device)])
    return (part(index) if part else task.objective), examples
