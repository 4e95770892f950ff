"""Stand-ins for tests of the NVFlare engine: a worker that trains nothing, an executor that starts it, and rounds for it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from anyrank.engines.nvflare.executor import AnyRankExecutor
from anyrank.messages.frame import Frame, Header, to_bytes
from anyrank.worker.supervisor import Died, Late


class StandIn(AnyRankExecutor):
    """Starts the worker below instead of one that loads a model."""

    command = (sys.executable, str(Path(__file__).with_name("flare_worker.py")))


def opening(run: str = "r") -> Frame:
    return Frame(Header("setup", run), {})


def question(site: str, number: int, size: int = 8, **body: object) -> Frame:
    """A download of `size` bytes with numbers that follow from the round."""
    array = np.random.default_rng(number).integers(0, 255, size, np.uint8)
    return Frame(Header("download", "r", number, site, body), {"a": array})


class Rounds:
    """Asks every site in each of `rounds` rounds, one thread a site, and writes a line for each reply into the run's folder.

    `plan`: what a site is asked to do besides, `{site: {round: {...}}}` in JSON. `segment`: rounds of one job.
    """

    def __init__(
        self, rounds: int, size: int = 8, plan: str = "", timeout_s: float = 30.0, segment: int = 1000, limit: int = 10**9
    ) -> None:
        self.rounds, self.size, self.timeout_s, self.segment, self.limit = rounds, size, timeout_s, segment, limit
        self.plan = json.loads(bytes.fromhex(plan)) if plan else {}

    def serve(self, job) -> bool:
        from concurrent.futures import ThreadPoolExecutor

        state = job.folder / "state.json"
        first = json.loads(state.read_text()) if state.exists() else 1
        workers = {site: job.worker(site, opening, self._opened(job, site), self.limit, opening_s=60.0) for site in job.sites}
        with (job.folder / "log.jsonl").open("a") as out, ThreadPoolExecutor(len(workers)) as pool:
            for number in range(first, self.rounds + 1):
                began = time.monotonic()
                rows = list(pool.map(lambda site, n=number: self._ask(workers[site], site, n), job.sites))
                for row in rows:
                    out.write(
                        json.dumps(row | {"seconds": time.monotonic() - began, "at": time.time(), "pid": os.getpid()}) + "\n"
                    )
                out.flush()
                state.write_text(json.dumps(number + 1))
                job.told(number, self.rounds)
                if number - first + 1 >= self.segment and number < self.rounds:
                    return False
        return True

    def _opened(self, job, site: str) -> Callable[[Frame], None]:
        def opened(frame: Frame) -> None:
            Path(job.folder / f"opened-{site}").write_text(json.dumps(dict(frame.header.body)))

        return opened

    def _ask(self, worker, site: str, number: int) -> dict:
        body = self.plan.get(site, {}).get(str(number), {})
        frame = question(site, number, self.size, **body)
        row = {"round": number, "site": site, "sent": to_bytes(frame)[-32:].hex()}
        try:
            (reply,) = worker.ask([frame], 1, self.timeout_s)
        except (Died, Late) as error:
            return row | {"status": type(error).__name__, "text": str(error)}
        return row | {"status": reply.header.kind, **reply.header.body, "digest": to_bytes(reply)[-32:].hex()}


def replies(frame: Frame) -> Iterator[Frame]:
    """What the stand-in worker answers: the array plus one, and the digest of what it got."""
    body = dict(frame.header.body)
    if body.get("die"):
        os._exit(7)
    time.sleep(body.get("sleep", 0))
    array = np.zeros(body["bytes"], np.uint8) if "bytes" in body else next(iter(frame.arrays.values())) + np.uint8(1)
    header = Header(
        "update", "r", frame.header.round, frame.header.client, {"got": to_bytes(frame)[-32:].hex(), "worker": os.getpid()}
    )
    yield Frame(header, {"a": array})
    if body.get("twice"):
        yield Frame(header, {"a": array})
    if body.get("leave"):
        os._exit(0)
