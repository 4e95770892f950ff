"""The ranks that the memory of named sites affords, by a real local step at each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from anyrank.config.sections import Config, SiteConfig
from anyrank.config.sections.sites import AUTO, AUTO_RANKS
from anyrank.devices import free_memory
from anyrank.errors import ConfigError
from anyrank.federation.federation import Federation
from anyrank.messages.plan import plan_round
from anyrank.messages.records import BOTH, Job, Scaling, ServerState, factor_bytes, tensor_bytes
from anyrank.privacy.noise import Mechanism
from anyrank.training.lora import LoraModel

SHARE = 0.8  # of the free memory, for what is not counted: the allocator, the interpreter, other programs
_COPIES = 4  # of an adapter beside the optimizer's: download, parameters, gradients, upload


def asked(config: Config) -> list[SiteConfig]:
    """The sites for which something is measured: those whose rank is `auto`, or whose memory is given."""
    return [site for site in config.sites if site.rank == AUTO or site.memory_gb]


def lowest(config: Config) -> Config:
    """The configuration with one rank for all sites, the lowest that is asked for: for the federation that is measured."""
    ranks = [site.rank for site in config.sites if site.rank != AUTO]
    return config.at_rank(min([*ranks, *(config.clients.ranks if config.undecided else ())]))


def settle(built: Federation, model: LoraModel, config: Config, tell: Callable[[str], None] | None = None) -> Config:
    """`config` with a number for every rank; `built` and its `model` are those of `lowest(config)`.

    `tell` gets a line for each rank that was chosen. Raises `ConfigError` for a given rank that does not fit in
    `sites.memory_gb`, and where no rank fits.
    """
    most = min(min(target.out, target.width) for target in model.targets.values())
    found = {}
    for site in asked(config):
        chosen = site.rank == AUTO
        wanted = sorted(set(config.clients.ranks)) if chosen else [*(r for r in AUTO_RANKS if r < site.rank), site.rank]
        ranks = [rank for rank in wanted if rank <= most] or [most]
        memory = _Memory.of(built, model, site)
        fitting, needed = _fitting(built, memory, site, ranks)
        if not fitting or (not chosen and fitting != site.rank and site.rank <= most):
            raise _too_small(site, memory, fitting, needed)
        if chosen:
            found[site.name] = fitting
            if tell:
                listed = ", ".join(map(str, ranks))
                tell(f"site {site.name}: rank {fitting}, the largest of {listed} that fits in {_gb(memory.total)} GB")
    return config.with_ranks(found)


@dataclass(frozen=True)
class _Memory:
    """Bytes: what base model and examples of a site take (`resident`), and what is left for training (`spare`)."""

    resident: int
    spare: int

    @classmethod
    def of(cls, built: Federation, model: LoraModel, site: SiteConfig) -> _Memory:
        facts = built.facts
        own = int(built.population.sizes[built.population.index(site.name)])
        inputs = 0 if facts.inputs_on_disk else facts.inputs_bytes * own // max(1, facts.train_examples + facts.test_examples)
        resident = facts.model_bytes + inputs
        if site.memory_gb:
            return cls(resident, int(site.memory_gb * 1e9) - resident)
        free = free_memory(model.device)
        if free is None:
            raise ConfigError(
                f"sites.{site.name}.rank: 'auto': this system does not say how much memory is free; give memory_gb"
            )
        return cls(resident, int(free * SHARE))  # model and examples are in memory already

    @property
    def total(self) -> int:
        return self.resident + self.spare


def _fitting(built: Federation, memory: _Memory, site: SiteConfig, ranks: Sequence[int]) -> tuple[int | None, int]:
    """The largest of the rising `ranks` that fits, and the bytes of the first one that does not, or else of the largest.

    A step is only taken at a rank whose adapter fits beside what the rank before kept for its gradients.
    """
    fitting, needed, kept = None, 0, 0
    for job, rank in _jobs(built, site, ranks):
        adapter = _adapter_bytes(built, job)
        needed = memory.resident + adapter + kept
        if adapter + kept <= memory.spare:
            kept = _activations(built, job)
            needed = memory.resident + adapter + kept
        job.settle()
        if needed > memory.total:
            return fitting, needed
        fitting = rank
    return fitting, needed


def _jobs(built: Federation, site: SiteConfig, ranks: Sequence[int]) -> Iterator[tuple[Job, int]]:
    """A job of the site at each rank, from the start of a federation of this rank."""
    config, index = built.config, built.population.index(site.name)
    scaling = Scaling(config.lora.alpha, config.lora.scaling)
    for rank in ranks:
        state: ServerState = built.method.init(built.engine.start(rank, scaling, config.run.seed), scaling, config.run.seed)
        client = replace(built.population.client(index), rank=rank)
        count = max(1, built.counted(int(built.population.sizes[index])))
        yield Job(client, count, partial(built.method.dispatch, state, client)), rank


def _adapter_bytes(built: Federation, job: Job) -> int:
    """Bytes of all copies of the adapter and of its moments in the optimizer."""
    train, adapter = built.config.train, job.download.adapter
    moments = 2 if train.optimizer == "adamw" else int(train.momentum > 0)
    return (_COPIES + moments) * (factor_bytes(adapter, BOTH) + tensor_bytes(adapter))


def _activations(built: Federation, job: Job) -> int:
    """Bytes that one real local step keeps for its gradients."""
    train = replace(built.config.train, local_steps=1, local_epochs=0)
    mechanism = Mechanism(replace(built.privacy, local_steps=1, bands={})) if built.privacy else None
    return built.engine.profile([job], plan_round(train, 1, 2, built.config.run.seed), mechanism).activations


def _too_small(site: SiteConfig, memory: _Memory, fitting: int | None, needed: int) -> ConfigError:
    told = f"needs {_gb(needed)} GB with the base model and the examples, and the site has {_gb(memory.total)} GB"
    if fitting:
        return ConfigError(
            f"sites.{site.name}.rank = {site.rank}: {told} (memory_gb); at most rank {fitting} fits; lower it, or use 'auto'"
        )
    return ConfigError(
        f"sites.{site.name}.rank = {site.rank!r}: no rank fits: the smallest {told}; lower train.batch_size, or set "
        "train.gradient_checkpointing"
    )


def _gb(size: int) -> str:
    """Bytes as GB with two digits that count.

    >>> _gb(1_234_000_000), _gb(56_780_000), _gb(12_345_000_000)
    ('1.2', '0.057', '12')
    """
    digits = 1 - math.floor(math.log10(max(size, 1) / 1e9))
    return f"{round(size / 1e9, digits):.{max(0, digits)}f}"
