"""The outputs of a model's frozen part for many examples: computed once, kept on disk, part by part and site by site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anyrank.data import cache
from anyrank.progress import Progress

Tensors = Mapping[str, Tensor]
Step = Callable[[int], None]  # gets the number of examples that were just done


@dataclass(frozen=True)
class Wanted:
    """The outputs for `size` examples: the `key` of their file, and `compute(step)`, which makes them.

    `groups`: the same for each site's examples, one site after the other (empty: computed together). Each group has a file of
    its own and is computed apart, so that it is the same whatever other groups there are.
    """

    key: Mapping[str, str]
    size: int
    compute: Callable[[Step], Tensors]
    groups: tuple[Wanted, ...] = ()


@dataclass(frozen=True)
class Frozen:
    """Outputs of one `kind` in the folder of the cache; `progress(done, total)` counts examples that are computed.

    `on_disk`: outputs stay in their file (a memory map), whatever their size. For a part with groups, there is a file of the
    whole part beside those of the groups.
    """

    folder: Path
    kind: str
    progress: Progress | None = None
    on_disk: bool = False

    def __call__(self, wanted: Mapping[str, Wanted]) -> dict[str, Tensors]:
        """`{part: tensors}`, from the cache where they are there."""
        whole = {part: self._load(each) if each.groups and self.on_disk else None for part, each in wanted.items()}
        pieces = {part: each.groups or (each,) for part, each in wanted.items() if whole[part] is None}
        found = {part: [self._load(piece) for piece in each] for part, each in pieces.items()}
        lacking = [
            piece.size for part, each in pieces.items() for piece, there in zip(each, found[part], strict=True) if not there
        ]
        step = self._counter(sum(lacking))
        for part, each in pieces.items():
            made = [there or self._make(piece, step) for piece, there in zip(each, found.pop(part), strict=True)]
            whole[part] = self._join(wanted[part], made) if wanted[part].groups else made[0]
        return whole

    def _load(self, wanted: Wanted) -> Tensors | None:
        return cache.load(self.folder, self.kind, wanted.key, mapped=self.on_disk)

    def _make(self, wanted: Wanted, step: Step) -> Tensors:
        return self._keep(wanted, wanted.compute(step))

    def _join(self, wanted: Wanted, groups: Sequence[Tensors]) -> Tensors:
        tensors = {name: torch.cat([group[name] for group in groups]) for name in groups[0]}
        return self._keep(wanted, tensors) if self.on_disk else tensors

    def _keep(self, wanted: Wanted, tensors: Tensors) -> Tensors:
        cache.store(self.folder, self.kind, wanted.key, tensors)
        return self._load(wanted) if self.on_disk else tensors

    def _counter(self, total: int) -> Step:
        done = 0

        def step(number: int) -> None:
            nonlocal done
            done += number
            if self.progress is not None:
                self.progress(done, total)

        return step
