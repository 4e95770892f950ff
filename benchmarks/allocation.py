"""What a round holds in memory by torch's own count, and the parts that it has to hold.

torch's count is of every byte that its CPU allocator hands out and takes back, as its profiler is told of them. What libraries
below torch allocate for themselves, Python's objects, the code of libraries, and memory that is free but not given back to the
system are not in it: they are what resident memory has on top.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Allocated:
    """Bytes that torch allocated inside and has not freed: the most at any time, and what was left at the end."""

    most: int = 0
    left: int = 0


@contextlib.contextmanager
def allocations() -> Iterator[Allocated]:
    """Counts what torch allocates inside; the figures are there at the end."""
    found = Allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            found.left += event.nbytes()
            found.most = max(found.most, found.left)


def alive() -> int:
    """Bytes of all tensors that there are in this process, whoever holds them."""
    gc.collect()
    return storage_bytes(each for each in gc.get_objects() if issubclass(type(each), Tensor))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory; what several share counts once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def parts(built: Any) -> dict[str, float]:
    """The megabytes that a round of a federation has to hold, each by itself.

    `model` and `cache`: the base model, and all examples; `adapters`: the server's, and what each client of the cohort gets and
    sends; `step`: the most that torch allocates at once while the cohort trains and nobody keeps what it sends, that is the
    factors in training with gradients and AdamW's moments, and a step's activations; `saved`: what of these a forward pass
    keeps for its backward pass.
    """
    from anyrank.federation import asking, loop
    from anyrank.messages.plan import plan_round
    from anyrank.messages.records import BOTH, factor_bytes

    model, state = built.engine.model, loop.start(built)
    jobs, _ = asking.dispatch(built, state, 1)
    plan = plan_round(built.config.train, 1, built.config.run.rounds, built.config.run.seed)
    saved = _Saved({parameter.untyped_storage().data_ptr() for parameter in model.module.parameters()})
    with allocations() as found, torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda kept: kept.tensor):
        for _ in built.engine.train(jobs, plan):
            pass
    examples = [each for part in (model.task.train, model.task.test) for each in (*vars(part.inputs).values(), part.labels)]
    needed = {
        "model": storage_bytes([*model.module.parameters(), *model.module.buffers()]),
        "cache": storage_bytes(each for each in examples if isinstance(each, Tensor)),
        "adapters": factor_bytes(state.adapter, BOTH) + 2 * sum(job.download.upload_bytes() for job in jobs),
        "step": found.most,
        "saved": saved.most,
    }
    return {name: number / 1e6 for name, number in needed.items()}


@dataclass
class _Saved:
    """Bytes that forward passes keep at a time for their backward passes, memory that is `owned` by others left out."""

    owned: set[int]
    now: int = 0
    most: int = 0
    holders: Counter[int] = field(default_factory=Counter)

    def keep(self, tensor: Tensor) -> _Kept:
        return _Kept(tensor, self)

    def count(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self.owned:
            return
        before = self.holders[place]
        self.holders[place] += change
        self.now += storage.nbytes() * (bool(self.holders[place]) - bool(before))
        self.most = max(self.most, self.now)


class _Kept:
    """A tensor that is saved for a backward pass, for as long as it is."""

    def __init__(self, tensor: Tensor, saved: _Saved) -> None:
        self.tensor, self._saved = tensor.detach(), saved
        saved.count(tensor, 1)

    def __del__(self) -> None:
        self._saved.count(self.tensor, -1)
