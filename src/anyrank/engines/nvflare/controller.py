"""The server's side of a job: NVFlare's workflow, in which our round loop runs. No torch at import.

The job brings the run's name and no code. What runs the rounds is a component of the job, of a class that the server's own
allow-list has; where the state lies says the server's own file, `local/server.toml` in its kit. Errors end the job with a code;
their text stands in the server's own log, and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.fqcn import FQCN

from anyrank.engines.nvflare import fetching
from anyrank.errors import AnyRankError, RunFailed, in_a_line
from anyrank.messages.frame import Readable
from anyrank.remote import kits, parcels
from anyrank.remote.link import Asked, Came, RemoteWorker
from anyrank.worker import memory
from anyrank.worker.supervisor import Died

TASK, STOP, STATUS = (
    "anyrank",
    "anyrank.stop",
    "anyrank.status",
)  # name of our tasks; topics of messages to sites and from owners
RESULT = "anyrank.json"  # in the job's folder, which NVFlare keeps: how the job ended
_CHECK_S = 0.2  # between two looks at NVFlare's signal
_MORE_S = 5  # seconds after which NVFlare drops a task that nobody waits for any more

log = logging.getLogger(__name__)


@dataclass
class Standing:
    """How a job stands, for its owner. `state`: running, done, more (the next segment goes on), stopped or failed.

    `code`: the kind of error where it failed. `waiting`: sites that have been asked and have not replied.
    """

    run: str
    state: str = "running"
    code: str = ""
    round: int = 0
    rounds: int = 0
    waiting: tuple[str, ...] = ()


class Rounds(Protocol):
    """What runs the rounds of a job: a component of it."""

    def serve(self, job: Job) -> bool:
        """Run rounds until the run is done (true) or this job has had its share (false)."""


@dataclass(frozen=True)
class Job:
    """What `Rounds` has to work with. `folder`: the run's own folder on the server, which outlives the job. `sites`: names of
    the sites that take part in this job. `reply`: bytes of a reply at most. `worker`: makes the worker of a site; it takes the
    other arguments of `RemoteWorker`. `told`: takes (round, rounds) after each round."""

    run: str
    folder: Path
    sites: tuple[str, ...]
    reply: int
    worker: Callable[..., RemoteWorker]
    told: Callable[[int, int], None]


class AnyRankController(Controller):
    """`run`: name of the run, as a folder can have it. `rounds`: id of the component that runs the rounds."""

    def __init__(self, run: str, rounds: str = "rounds") -> None:
        super().__init__()
        kits.check_run(run)
        self._standing, self._rounds = Standing(run), rounds
        self._open: dict[str, tuple[Asked, Task | None]] = {}  # by site; without a task once its reply has come
        self._offers: dict[str, fetching.Offer] = {}  # what each site may ask for
        self._job = ""
        self._lock, self._stopped = threading.Lock(), threading.Event()

    # --- NVFlare's side ---

    def start_controller(self, fl_ctx: FLContext) -> None:
        self._engine.register_app_command(STATUS, self._status)
        fetching.leave_references(self._engine.get_cell())

    def stop_controller(self, fl_ctx: FLContext) -> None:
        self._stop()

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        log.info("site %s: a late reply was dropped", client.name)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        threading.Thread(target=self._follow, args=(abort_signal,), daemon=True).start()
        workspace, self._job = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT), fl_ctx.get_job_id()
        try:
            done = self._serve(Path(workspace.get_site_config_dir()))
            self._standing.state = "done" if done else "more"
        except BaseException as error:
            self._failed(error, abort_signal)
        self._stop()
        Path(workspace.get_run_dir(self._job), RESULT).write_text(json.dumps(asdict(self._standing)), encoding="utf-8")
        if self._standing.state == "failed":
            self.system_panic(f"anyrank: {self._standing.code}", fl_ctx)

    def _serve(self, local: Path) -> bool:
        rounds = self._engine.get_component(self._rounds)
        if rounds is None or not hasattr(rounds, "serve"):
            raise RunFailed(f"job: expected a component {self._rounds!r} that runs the rounds, got none")
        own = kits.server(local)
        if own.memory and not memory.limit(0, own.memory):
            log.error("memory_gb: this system cannot limit the memory of a process; it is not limited")
        folder = own.state / self._standing.run
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sites = tuple(sorted(client.name for client in self._engine.get_clients()))
        return rounds.serve(Job(self._standing.run, folder, sites, own.reply, self._worker, self._told))

    def _failed(self, error: BaseException, abort_signal: Signal) -> None:
        stopped = abort_signal.triggered
        self._standing.state = "stopped" if stopped else "failed"
        self._standing.code = "" if stopped else type(error).__name__
        if isinstance(error, AnyRankError):
            log.error("run %s: %s", self._standing.run, in_a_line(error))
        else:
            log.exception("run %s: %s", self._standing.run, type(error).__name__)

    def _follow(self, abort_signal: Signal) -> None:
        while not self._stopped.wait(_CHECK_S):
            if abort_signal.triggered:
                self._stop()

    def _stop(self) -> None:
        """From now on every question raises `RunFailed`, also those that are open: that a job ends is no fault of a site."""
        self._stopped.set()
        with self._lock:
            waiting = list(self._open.values())
        for asked, _ in waiting:
            asked.give_up(RunFailed("the job was stopped"))

    # --- for the rounds ---

    def _worker(self, site: str, *values: Any, **named: Any) -> RemoteWorker:
        return RemoteWorker(self, site, *values, **named)

    def _told(self, number: int, of: int) -> None:
        self._standing.round, self._standing.rounds = number, of

    def _status(self, topic: str, data: Any, fl_ctx: FLContext) -> dict[str, Any]:
        with self._lock:
            self._standing.waiting = tuple(sorted(self._open))
        return asdict(self._standing)

    # --- the port of `link` ---

    def send(self, asked: Asked) -> None:
        """One task for one site. Its frames are cut when the site fetches it; the callbacks run under NVFlare's one lock."""
        if asked.site not in {client.name for client in self._engine.get_clients()}:
            raise Died("the site does not take part in this job")
        seconds = 0 if asked.seconds is None else math.ceil(asked.seconds * asked.replies) + _MORE_S
        task = Task(
            **{"name": TASK, "data": Shareable(), "timeout": seconds, "props": {TASK: asked}},
            **{"before_task_sent_cb": self._fill, "result_received_cb": self._take, "task_done_cb": self._done},
        )
        with self._lock:
            if self._stopped.is_set():
                raise RunFailed("the job was stopped")
            self._open[asked.site] = (asked, task)
        with self._engine.new_context() as fl_ctx:
            self.communicator.send(task, fl_ctx, targets=[asked.site])

    def cancel(self, asked: Asked) -> None:
        task = self._close(asked)
        if task is None:
            return
        self.cancel_task(task)
        note = Shareable()
        note["number"] = asked.number
        with self._engine.new_context() as fl_ctx:
            self._engine.send_aux_request([asked.site], STOP, note, 0.0, fl_ctx, optional=True)

    @contextlib.contextmanager
    def fetch(self, asked: Asked, known: parcels.Reply, parts: Any, until: float | None) -> Iterator[Readable]:
        with self._lock:
            self._open[asked.site] = (asked, None)  # so that the end of the job ends this, too
        try:
            cell, source = self._engine.get_cell(), self._process_of(asked.site)
            with fetching.incoming(cell, source, parts, sum(known.sizes), until, asked.given_up) as stream:
                yield stream
        finally:
            self._close(asked)

    def _process_of(self, site: str) -> str:
        """NVFlare's name of a site's process in this job."""
        return FQCN.join([site, self._job])

    def _close(self, asked: Asked) -> Task | None:
        """The task of a question that was open until now; its frames are let go."""
        with self._lock:
            found = self._open.get(asked.site)
            if found is None or found[0] is not asked:
                return None
            del self._open[asked.site]
        self._let_go(asked.site)
        return found[1]

    def _take(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """A site's reply is there: put it into the queue, and let NVFlare hold nothing of it."""
        asked, result = client_task.task.props[TASK], client_task.result
        came = Came(result.pop(parcels.ABOUT, None), result.pop(parcels.FRAMES, None))
        client_task.result = None
        self._close(asked)
        asked.came.put(came)

    def _done(self, task: Task, fl_ctx: FLContext) -> None:
        """NVFlare has closed the task. Without a reply something went wrong: no task may look done that nobody did."""
        task.data = Shareable()
        asked = task.props[TASK]
        with self._lock:
            is_open = self._open.get(asked.site) == (asked, task)
            if is_open:
                del self._open[asked.site]
        if is_open:
            self._let_go(asked.site)
            asked.came.put(Died(f"its task ended as {task.completion_status.value}"))

    def _fill(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """A site fetches its task: put in what it is asked. A site whose connection broke fetches it twice."""
        asked = client_task.task.props[TASK]
        self._let_go(asked.site)
        offer = fetching.Offer(self._engine.get_cell(), self._process_of(asked.site), asked.frames, asked.give_up)
        self._offers[asked.site] = offer
        client_task.task.data.update({parcels.ABOUT: parcels.table(asked.known()), parcels.FRAMES: offer.reference})

    def _let_go(self, site: str) -> None:
        """Nobody may ask for the frames any more that were offered to a site."""
        if (offer := self._offers.pop(site, None)) is not None:
            offer.release()
