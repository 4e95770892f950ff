"""`[run]`: the run itself."""

from __future__ import annotations

from dataclasses import dataclass

from anyrank.config.describe import COUNT, LATER, NATURAL, NOT_NEGATIVE, key
from anyrank.config.sections.values import expect, one_of

STACKINGS = ("auto", "always", "never")
ENGINES = ("process", "workers")
MOST_WORKERS = 1024
_LEAST_GB, _MOST_GB = 0.1, 1_000_000
# Keys that say where clients train, and not what the run is: they are no part of its identity, and may change when it resumes.
WHERE = ("engine", "workers", "worker_memory_gb")


@dataclass(frozen=True)
class RunConfig:
    """`[run]`: the run itself, its name, its seed and its length."""

    name: str = key(
        "run", "Name of the run, and of its folder below runs/.", "a name without '/'", {"transformers": "run_name"}
    )
    label: str = key("", "Name of the run in tables and charts. Empty: the name of its method.")
    seed: int = key(0, "Seed of all random draws of the run; each draw is keyed by the seed and by what is drawn.", NATURAL)
    rounds: int = key(
        40,
        "Number of rounds; in each round, clients train and the server merges.",
        COUNT,
        {"Flower": "num_rounds, num-server-rounds"},
    )
    threads: int = key(1, "CPU threads for local training.", COUNT, {"torch": "set_num_threads"})
    stacking: str = key(
        "auto",
        "Whether the clients of a round train together in one stacked model. auto: if the model is small enough to be faster, "
        "and never with [[sites]], which train as each would on its own machine.",
        STACKINGS,
    )

    engine: str = key(
        "process",
        "Where clients train: in this process, or in worker processes on this machine, so that this one needs neither data nor "
        "base model, and a client that ends its process costs its own reply. The results are the same; a run may go on with "
        "another engine.",
        ENGINES,
        metadata=LATER,
    )
    workers: int = key(
        0,
        "Largest number of worker processes, for engine = 'workers'; each is started when it is first needed. 0: as many as "
        "there are clients in a round, cores for run.threads each, and memory for another base model; with GPUs, one for each; "
        "one, if clients train together in a stack. Over sites: the most sites that are asked at once; 0: no such limit.",
        NATURAL,
        metadata=LATER,
    )
    worker_memory_gb: float = key(
        0.0,
        "Memory that one worker may take, in GB (10^9 bytes), on Linux: a client that needs more fails, and a worker that has "
        "taken more is ended and started anew. 0: no limit.",
        NOT_NEGATIVE,
        metadata=LATER,
    )

    def __post_init__(self) -> None:
        expect(self.rounds >= 1, "run.rounds", COUNT, self.rounds)
        expect(1 <= self.threads <= 1024, "run.threads", "a whole number from 1 to 1024", self.threads)
        one_of(self.stacking, STACKINGS, "run.stacking")
        one_of(self.engine, ENGINES, "run.engine")
        expect(0 <= self.workers <= MOST_WORKERS, "run.workers", f"a whole number from 0 to {MOST_WORKERS}", self.workers)
        limit = self.worker_memory_gb == 0 or _LEAST_GB <= self.worker_memory_gb <= _MOST_GB
        expect(limit, "run.worker_memory_gb", f"{_LEAST_GB:g} to {_MOST_GB:,} GB, or 0 for no limit", self.worker_memory_gb)
        expect(self.seed >= 0, "run.seed", NATURAL, self.seed)
        is_name = bool(self.name) and self.name not in (".", "..") and not set(self.name) & set("/\\\0")
        is_name = is_name and len(self.name.encode(errors="replace")) <= 200
        expect(is_name, "run.name", "a name without '/' that a folder can have", self.name)
