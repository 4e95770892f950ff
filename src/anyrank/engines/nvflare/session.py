"""Commands to a federation's server, with an owner's or a viewer's kit: submit, list, abort. By NVFlare's session API.

NVFlare's list of jobs is not evidence: a job that a killed server was running stays listed as RUNNING for ever. What the server
says of itself is compared with it: see `Job.lost`.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import io
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyrank.errors import DeployError, in_a_line, printable, shortened
from anyrank.files import parse_json, read_bounded

if TYPE_CHECKING:
    from nvflare.fuel.flare_api.flare_api import Session

STATUS, RESULT = "anyrank.status", "anyrank.json"  # what the controller is asked; the file in which it says how it ended
_MOST_BYTES, _MOST_LOG = 1 << 20, 64 << 20
_ERROR = re.compile(r" - controller - ERROR - (?:\[[^\]]*\] - )?(?:run [^:\s]*: )?(.*)")
_RUNNING = ("RUNNING", "DISPATCHED")
_WAITING = ("SUBMITTED", "APPROVED")
_TIMEOUT_S = 10.0
_SECOND_LOOK_S = 2.0  # a job that has just been started may be listed before the server counts it as running


class Unreached(DeployError):
    """The server does not reply."""


@dataclass(frozen=True)
class Job:
    """A job of a run, whose name it has. `attempt`: the run's jobs are numbered from 1. `status`: NVFlare's word. `lost`: it is
    listed as running, and no server runs it: the server was killed, and the job has to be submitted again."""

    id: str
    run: str
    attempt: int
    status: str
    submitted: str
    lost: bool = False

    def waited(self, now: float) -> float | None:
        """Seconds since its submission at the time `now`; `None` where the server does not say when that was."""
        with contextlib.suppress(ValueError, OverflowError):
            return max(0.0, now - datetime.datetime.fromisoformat(self.submitted).timestamp())
        return None

    @property
    def state(self) -> str:
        """One word for people: waiting, running, lost, done, stopped or failed."""
        if self.lost:
            return "lost"
        if self.status in _WAITING:
            return "waiting"
        if self.status in _RUNNING:
            return "running"
        return {"FINISHED:COMPLETED": "done", "FINISHED:ABORTED": "stopped"}.get(self.status, "failed")

    @property
    def over(self) -> bool:
        return self.state not in ("waiting", "running")


@dataclass(frozen=True)
class Standing:
    """What a server says of itself. `seen`: `{site: when it was last heard}`; `started`: when the server was started."""

    started: float
    seen: dict[str, float]
    running: frozenset[str]


class Commands:
    """An open session. It is for one thread."""

    def __init__(self, session: Session, where: str) -> None:
        self._session, self._where = session, where

    def standing(self) -> Standing:
        info = self._ask(self._session.get_system_info)
        seen = {each.name: float(each.last_connect_time or 0) for each in info.client_info}
        return Standing(float(info.server_info.start_time or 0), seen, frozenset(each.job_id for each in info.job_info))

    def jobs(self) -> list[Job]:
        """All jobs, in the order of their submission; those that are lost are known as such."""
        jobs = self._listed()
        if any(job.lost for job in jobs):
            time.sleep(_SECOND_LOOK_S)
            again = {job.id: job for job in self._listed()}
            jobs = [again.get(job.id, job) for job in jobs]
        return jobs

    def _listed(self) -> list[Job]:
        listed = self._ask(self._session.list_jobs)
        running = self.standing().running
        listed = sorted(listed, key=lambda meta: str(meta.get("submit_time", "")))
        attempts: collections.Counter[str] = collections.Counter()
        jobs = []
        for meta in listed:
            run = str(meta.get("job_name") or meta.get("name") or "")
            attempts[run] += 1
            jobs.append(_job(meta, run, attempts[run], running))
        return jobs

    def submit(self, folder: Path) -> str:
        """Submit a job's folder: the job's id. Raises `DeployError`, also for who may not submit."""
        return self._ask(lambda: self._session.submit_job(str(folder.absolute())))

    def abort(self, job: str) -> None:
        self._ask(lambda: self._session.abort_job(job))

    def progress(self, job: str) -> dict[str, Any]:
        """What a running job says of its run: see `anyrank.engines.nvflare.controller.Standing`."""
        return dict(self._ask(lambda: self._session.do_app_command(job, STATUS, {})) or {})

    def queued(self, job: str) -> tuple[dict[str, str], frozenset[str]]:
        """Of a waiting job: those of its sites that another run is using, each with that run, and all of its sites."""
        from anyrank.engines.nvflare.turns import sites_of, waits_for

        meta = self._ask(lambda: self._session.get_job_meta(job))
        return waits_for(meta.get("schedule_history") or []), sites_of(meta)

    def ended(self, job: str, folder: Path) -> dict[str, Any]:
        """What a job that is over has said of its run at its end; empty if it could not. `folder`: for what is downloaded.

        `state`, `code` and more as in `anyrank.engines.nvflare.controller.Standing`; `reason`: its last error in words, if any.
        """
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found = Path(self._ask(lambda: self._session.download_job_result(job, place)))
            table = _table(next(found.rglob(RESULT), None))
            return table | {"reason": _reason(next(found.rglob("error_log.txt"), None))} if table else {}

    def keep_out(self, site: str) -> None:
        """Let no process of this site connect any more, until `let_in`: its certificate stays valid until it ends."""
        self._ask(lambda: self._session.disable_client(site))

    def let_in(self, site: str) -> None:
        self._ask(lambda: self._session.enable_client(site))

    def _ask(self, question: Callable[[], Any]) -> Any:
        from nvflare.fuel.flare_api.api_spec import (
            AuthenticationError,
            AuthorizationError,
            InvalidJobDefinition,
            NoConnection,
            SessionClosed,
        )

        silent = io.StringIO()
        try:
            with contextlib.redirect_stdout(silent):
                return question()
        except AuthorizationError:
            raise DeployError(f"{self._where}: this kit's role may not do that; it needs an owner's kit") from None
        except AuthenticationError as error:
            raise DeployError(f"{self._where}: the server does not accept this kit ({in_a_line(error)})") from None
        except (NoConnection, SessionClosed) as error:
            raise Unreached(f"{self._where}: {_UNREACHED} ({in_a_line(error)})") from None
        except InvalidJobDefinition as error:
            raise DeployError(f"{self._where}: the server does not accept the job ({in_a_line(error)})") from None
        except Exception as error:  # NVFlare raises many kinds; each ends the command in one line
            raise DeployError(f"{self._where}: the command failed ({in_a_line(error)})") from None


_UNREACHED = "the server cannot be reached; is it started, and its port open? anyrank deploy doctor KIT says more"


def _table(path: Path | None) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        table = parse_json(read_bounded(path, _MOST_BYTES)) if path else {}
        return table if isinstance(table, dict) else {}
    return {}


def _reason(path: Path | None) -> str:
    """The last error of our own in a job's log."""
    with contextlib.suppress(OSError):
        text = read_bounded(path, _MOST_LOG).decode(errors="replace") if path else ""
        found = _ERROR.findall(text)
        return shortened(printable(found[-1].strip()), 500) if found else ""
    return ""


def _job(meta: dict[str, Any], run: str, attempt: int, running: frozenset[str]) -> Job:
    number, status = str(meta.get("job_id", "")), str(meta.get("status", ""))
    return Job(number, run, attempt, status, str(meta.get("submit_time", "")), status in _RUNNING and number not in running)


@contextlib.contextmanager
def opened(kit: Path, user: str, where: str, timeout_s: float = _TIMEOUT_S) -> Iterator[Commands]:
    """A session of the person `user` with the kit at `kit`. `where`: the server, HOST:PORT. Raises `DeployError`."""
    try:
        from nvflare.fuel.flare_api.flare_api import new_secure_session
    except ImportError:
        raise DeployError("no NVFlare is installed here; install it with: pip install 'anyrank[nvflare,minilm]'") from None
    logger = logging.getLogger("nvflare")
    if not logger.handlers:  # else Python prints its warnings of lost connections among the lines of the command
        logger.addHandler(logging.NullHandler())
    before = Path.cwd()
    commands = Commands(None, where)
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout_s).close()  # NVFlare itself goes on trying for a long time
    except OSError as error:
        raise Unreached(f"{where}: {_UNREACHED} ({error.strerror or in_a_line(error)})") from None
    session = commands._ask(lambda: new_secure_session(user, str(kit.absolute()), timeout=timeout_s, auto_login_max_tries=1))
    os.chdir(before)
    try:
        yield Commands(session, where)
    finally:
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            session.close()
