"""What parties of a test do that no honest one would: a site that lies, a server that is killed or whose disk is full.

A party's processes get this by their environment (`flare_start/sitecustomize.py`); everything else about them is real. The file
that ANYRANK_TEST_DEEDS names says what, in JSON: at a site `{round: deed}`, at the server `{"phase", "round", "deed"}`.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def environment(deeds: Path) -> dict[str, str]:
    """The environment of a party whose deeds are in that file, which may be written later."""
    paths = (HERE.parent / "src", HERE / "flare_start", HERE)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "ANYRANK_TEST_DEEDS": str(deeds)}


def install() -> None:
    words = " ".join(sys.orig_argv)
    kinds = {"-m anyrank.worker": _lying_worker, "worker_process": _lying_executor, "runner_process": _struck_server}
    for mark, make in kinds.items():
        if mark in words:
            make(_deeds())
            return


def _deeds() -> dict[str, Any]:
    path = Path(os.environ["ANYRANK_TEST_DEEDS"])
    return json.loads(path.read_text()) if path.exists() else {}


# --- a site that lies -------------------------------------------------------------------------------------------------


def _lying_worker(deeds: dict[str, str]) -> None:
    from anyrank.messages import wire
    from anyrank.worker.site import SiteDesk

    honest = SiteDesk._cohort
    before: list[Any] = []

    def cohort(self: SiteDesk, *values: Any) -> Iterator[Any]:
        for reply in honest(self, *values):
            if reply.header.kind != wire.UPDATE:
                yield reply
                continue
            yield from LIES.get(deeds.get(str(reply.header.round), ""), lambda frame, before: [frame])(reply, before)
            before.append(reply)

    SiteDesk._cohort = cohort


def _with_array(frame: Any, change: Callable[[Any], Any]) -> Any:
    name = next(iter(frame.arrays))
    return replace(frame, arrays={**frame.arrays, name: change(frame.arrays[name])})


def _with_body(frame: Any, **changed: Any) -> Any:
    return replace(frame, header=replace(frame.header, body={**frame.header.body, **changed}))


def _as(frame: Any, **changed: Any) -> Any:
    return replace(frame, header=replace(frame.header, **changed))


def _late(frame: Any, before: list[Any]) -> list[Any]:
    time.sleep(600)  # it is ended before
    return [frame]


def _dies(frame: Any, before: list[Any]) -> list[Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def _larger(frame: Any) -> Any:
    import numpy as np

    return replace(frame, arrays={**frame.arrays, "A/more": np.zeros(4_000_000, np.float32)})


# The reply to one question, by the honest reply and the honest replies before it.
LIES: dict[str, Callable[[Any, list[Any]], list[Any]]] = {
    "wrong shape": lambda frame, before: [_with_array(frame, lambda array: array[:1].copy())],
    "NaN": lambda frame, before: [_with_array(frame, lambda array: array * float("nan"))],
    "boasted count": lambda frame, before: [_with_body(frame, num_examples=10**6)],
    "another site's name": lambda frame, before: [_as(frame, client="a")],
    "replay": lambda frame, before: [before[-1]],
    "second reply": lambda frame, before: [frame, frame],
    "oversized, declared": lambda frame, before: [_larger(frame)],
    "late": _late,
    "dies": _dies,
}
FALSE_SIZES = {"oversized, real": [200], "declared and not sent": [10**15]}
STOPS = "stops in the middle"
STOPPED_S = 30


def _lying_executor(deeds: dict[str, str]) -> None:
    from anyrank.engines.nvflare.executor import AnyRankExecutor
    from anyrank.remote import parcels

    honest = AnyRankExecutor._sent

    def sent(self: AnyRankExecutor, asked: Any, frames: Any) -> Any:
        made, deed = honest(self, asked, frames), deeds.get(str(asked.round), "")
        if asked.kind == parcels.ASK and deed in FALSE_SIZES:
            made[parcels.ABOUT]["sizes"] = FALSE_SIZES[deed]
        if asked.kind == parcels.ASK and deed == STOPS:
            _stop_soon()
        return made

    AnyRankExecutor._sent = sent


def _stop_soon() -> None:
    """Stop this process once the reply is announced, before its arrays have been fetched; it goes on later."""
    import anyrank.engines.nvflare.executor as ours

    me = os.getpid()
    ours.log.error("stops for %s s", STOPPED_S)
    subprocess.Popen(
        ["/bin/sh", "-c", f"sleep 0.02; kill -STOP {me}; sleep {STOPPED_S}; kill -CONT {me}"], start_new_session=True
    )


# --- a server that is struck ------------------------------------------------------------------------------------------

# The phases of a round, in their order, and of the run's end. "write event N": just before the Nth write event of that round.
PHASES = ("sites are there", "cohort drawn", "downloads sent", "one reply", "all replies", "merged", "logs", "checkpoint")
ENDS = ("round over", "adapters half-written", "run over")  # of the last round alone


def _struck_server(deeds: dict[str, Any]) -> None:
    if deeds:
        arm(deeds["phase"], deeds["round"], _STRIKES[deeds["deed"]])


def _kill() -> None:
    """SIGKILL for this process, and for the server's own process where this is that of a job."""
    Path(os.environ["ANYRANK_TEST_DEEDS"]).unlink(missing_ok=True)
    if "runner_process" in " ".join(sys.orig_argv):
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _full() -> None:
    if Path(os.environ["ANYRANK_TEST_DEEDS"]).exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_STRIKES = {"kill": _kill, "full": _full}


def arm(phase: str, round: int, strike: Callable[[], object]) -> list[str]:
    """Let `strike` be called when the round loop of this process is in that phase of that round. The list gets the write events
    of that round."""
    from anyrank import files
    from anyrank.engines import posts, sites
    from anyrank.federation import intake, loop
    from anyrank.runs.folder import RunDir

    now, counts, events = [0], Counter(), []

    def before(owner: Any, name: str, here: str, number: int = 1) -> None:
        """Strike before the `number`th call of a function in the round."""
        honest = getattr(owner, name)

        def called(*values: Any, **named: Any) -> Any:
            counts[here] += now[0] == round or here == PHASES[0]
            if phase == here and counts[here] == number:
                strike()
            return honest(*values, **named)

        setattr(owner, name, called)

    def ask(federation: Any, ledger: Any, quarantine: Any, state: Any, honest: Any = loop.ask) -> Any:
        now[0] = state.round + 1
        return honest(federation, ledger, quarantine, state)

    def reached(what: str, path: Path) -> None:
        if now[0] != round or "/store" in str(path):  # the latter: a site's, where sites are in this process
            return
        events.append(f"{what} {path.name}")
        counts["before the end"] = counts["before the end"] if counts["round over"] else len(events)
        here = {
            **{"logs": what == "flush" and path.name == "metrics.jsonl"},
            **{"checkpoint": what == "flush" and "state.safetensors" in path.name},
            **{"adapters half-written": counts["round over"] > 0 and len(events) == counts["before the end"] + 3},
        }
        if phase == f"write event {len(events)}" or here.get(phase, False):
            strike()

    loop.ask = ask
    before(sites, "roster_of", "sites are there")
    before(loop, "collect", "cohort drawn")
    before(posts.Post, "give", "downloads sent", 3)
    before(intake.Collected, "judge", "one reply", 2)
    before(loop, "advance", "all replies")
    before(loop, "measure", "merged")
    before(loop, "summarize", "round over")
    files.reached, over = reached, RunDir.finish

    def finish(self: RunDir, *values: Any) -> None:
        over(self, *values)
        if phase == "run over":
            strike()

    RunDir.finish = finish
    return events
