"""Two hundred sites, played here: how many are asked at the same time, and what the server holds of them meanwhile."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config
from anyrank.engines import sites as engine
from anyrank.engines.sites import Sites
from anyrank.messages import calls, wire
from anyrank.messages.frame import Frame
from anyrank.messages.plan import plan_round
from anyrank.messages.records import Client, ClientUpdate, Download, Facts, Failure, Job, Scaling
from anyrank.messages.roster import Roster
from anyrank.worker.supervisor import Died

MANY = 200
NAMES = tuple(f"site-{number:03}" for number in range(MANY))
RANK, WIDTH, LAYERS = 4, 256, 4
SCALING = Scaling(8.0, "standard")
EACH = LAYERS * 2 * RANK * WIDTH * 4  # bytes of a download, and of its reply: 4 layers of A and B, float32


def adapter(fill: float) -> Adapter:
    layer = LoraLayer(A=torch.full((RANK, WIDTH), fill), B=torch.full((WIDTH, RANK), fill), scaling=2.0)
    return Adapter({f"layer-{number}": layer for number in range(LAYERS)})


@dataclass
class Watch:
    """Counts what is under way at the same time. `hurry`: seconds that a site takes."""

    hurry: float = 0.002
    lock: threading.Lock = field(default_factory=threading.Lock)
    now: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    def enter(self, what: str) -> None:
        with self.lock:
            self.now[what] = self.now.get(what, 0) + 1
            self.most[what] = max(self.most.get(what, 0), self.now[what])

    def leave(self, what: str) -> None:
        with self.lock:
            self.now[what] -= 1


class Site:
    """A site's worker. In a round it replies with its download; `dies`: it does not."""

    def __init__(
        self, name: str, watch: Watch, dies: bool, opening: Any, opened: Callable[[Frame], None], receive: Any
    ) -> None:
        self.name, self.watch, self.dies, self.opened = name, watch, dies, opened
        self.there = False

    def start(self, timeout_s: float | None = None) -> None:
        if self.there:
            return
        self.watch.enter("loading")
        time.sleep(0.05)
        roster = Roster((self.name,), np.array([10], np.int64), 0, Facts("t"), held_out=np.array([0], np.int64))
        self.opened(calls.ready_frame(calls.Ready(roster, base_digest="d"), "r"))
        self.there = True
        self.watch.leave("loading")

    def ask(self, frames: list[Frame], replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
        what = frames[0].header.kind
        self.watch.enter(what)
        try:
            time.sleep(self.watch.hurry)
            if what == calls.START:
                yield calls.adapter_frame(adapter(0.0), run="r")
                return
            if self.dies:
                raise Died("it was killed")
            job = wire.job_of(frames[-1])
            yield wire.update_frame(ClientUpdate(job.download.adapter, 10, self.name), job.download, "r", 1)
        finally:
            self.watch.leave(what)

    def kill(self) -> None: ...

    revive = end = close = kill


@dataclass
class Held:
    """How many downloads exist at the same time."""

    now: int = 0
    most: int = 0

    def make(self) -> Download:
        made = adapter(1.0)
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(made.layers["layer-0"].A, self.gone)
        return Download(made, slices={name: tuple(range(RANK)) for name in made.layers})

    def gone(self) -> None:
        self.now -= 1


def opened(watch: Watch, dying: tuple[str, ...] = (), **limits: int) -> Sites:
    def maker(name: str) -> Any:
        return lambda opening, opened, receive: Site(name, watch, name in dying, opening, opened, receive)

    sites = Sites({}, (RANK, SCALING, 0), {name: maker(name) for name in NAMES}, "r", **limits)
    assert sites.open().names == NAMES
    return sites


def a_round(sites: Sites, held: Held, folder: Path) -> dict[str, Any]:
    """A round over all sites: the reply of each."""
    sites.keep_in(folder)
    jobs = [Job(Client(name, RANK), 10, held.make) for name in NAMES]
    replies = {}
    for reply in sites.train(jobs, plan_round(Config().train, 1, 1, 0)):
        name = reply.client
        assert name not in replies
        replies[name] = type(reply)
        next(job for job in jobs if job.client.name == name).settle()
    return replies


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"most": 8}, 8),
        ({"most_bytes": 20 * EACH}, 11),  # ten downloads with their replies are 20 x EACH at least: one more is asked below it
        ({"most_bytes": 1}, 1),  # whoever is asked alone may be asked for anything
        ({"most": 3, "most_bytes": 20 * EACH}, 3),
    ],
)
def test_two_hundred_sites_are_asked_in_waves_and_each_replies_once(tmp_path: Path, limits: dict[str, int], most: int) -> None:
    watch, held = Watch(), Held()
    sites = opened(watch, **limits)
    try:
        assert a_round(sites, held, tmp_path) == dict.fromkeys(NAMES, ClientUpdate)
    finally:
        sites.close()
    gc.collect()
    assert watch.most[calls.COHORT] <= most
    assert held.most <= most + 2  # those under way, the one whose reply is being checked, and the next one
    assert watch.now[calls.COHORT] == 0


def test_small_adapters_go_to_all_sites_at_once_by_default(tmp_path: Path) -> None:
    watch = Watch(hurry=1.0)
    sites = opened(Watch(hurry=0.0))
    for seat in sites._seats.values():
        seat._worker.watch = watch
    try:
        a_round(sites, Held(), tmp_path)
    finally:
        sites.close()
    assert watch.most[calls.COHORT] > MANY // 2  # by the limit in bytes, 30,000 of them
    assert engine.IN_FLIGHT // (2 * EACH) > MANY


def test_all_sites_load_at_the_same_time_and_send_their_starts_in_turn() -> None:
    watch = Watch(hurry=0.01)
    opened(watch, most=2).close()
    assert watch.most["loading"] > 20
    assert watch.most[calls.START] <= engine._STARTS


def test_sites_that_die_free_their_place_in_the_wave(tmp_path: Path) -> None:
    watch, held, dying = Watch(), Held(), NAMES[::3]
    sites = opened(watch, dying, most=4)
    try:
        found = a_round(sites, held, tmp_path)
    finally:
        sites.close()
    assert found == {name: Failure if name in dying else ClientUpdate for name in NAMES}
    assert watch.most[calls.COHORT] <= 4
