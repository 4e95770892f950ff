"""One of twenty clients is hostile: it sends ten times the opposite of what it learned. With the guard, and without it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from anyrank import simulation
from anyrank.config import Config
from anyrank.federation import run
from anyrank.messages.records import ClientUpdate, Job
from anyrank.runs.folder import RunDir


class OneHostile:
    """The engine that trains all clients in this process, and changes the reply of one of them."""

    def __init__(self, setting: simulation.Setting, hostile: str) -> None:
        self.engine, self.hostile = simulation.in_process(setting), hostile
        self.start, self.evaluate, self.close = self.engine.start, self.engine.evaluate, self.engine.close

    def train(self, jobs, plan, mechanism=None, deadline_s=None) -> Iterator:
        by_name = {job.client.name: job for job in jobs}
        for reply in self.engine.train(jobs, plan, mechanism, deadline_s):
            honest = reply.client != self.hostile or not isinstance(reply, ClientUpdate)
            yield reply if honest else opposite(by_name[reply.client], reply, times=10.0)


def opposite(job: Job, update: ClientUpdate, times: float) -> ClientUpdate:
    """The download minus `times` the change of the client's factors."""
    layers = {}
    for name, after in update.adapter.layers.items():
        before = job.download.adapter.layers[name]
        layers[name] = after.with_factors(before.A - times * (after.A - before.A), before.B - times * (after.B - before.B))
    return replace(update, adapter=replace(update.adapter, layers=layers))


def accuracy(guarded: bool, rounds: int = 20) -> float:
    off = {"norm": 0.0, "far": 0.0, "owner": 1.0}
    config = Config().replace(
        run={"rounds": rounds}, model={"name": "digits-mlp"}, method={"name": "rbla"}, guard={} if guarded else off
    )
    federation = simulation.build(config, engine=lambda setting: OneHostile(setting, "client-07"))
    try:
        with tempfile.TemporaryDirectory() as folder, RunDir.open(Path(folder) / "run", config) as store:
            return run(federation, store)["accuracy"]
    finally:
        federation.close()


if __name__ == "__main__":
    print(f"without the guard {accuracy(False):.3f}, with the guard {accuracy(True):.3f}")
