"""When a job starts: when all of its sites are connected, and no other job is using one of them.

A component of the server's own process, which its `local/resources.json` names. NVFlare's own means cannot do this. A site
without a free slot counts there as a site that is away, without which the job may start. And `min_clients` and
`mandatory_clients` of a job count during its rounds, too: one site that is away for a minute would end the job of all.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.utils.job_utils import get_event_job_id

_SERVER = "server"
_REASON = "busy: "
_BUSY = re.compile(r"([^\s,()]+) \(([^\s,()]+)\)")
_AWAY = "away: "
_ENDS = (EventType.JOB_COMPLETED, EventType.JOB_ABORTED)


class Turns(FLComponent):
    """Has no arguments. A job holds its sites until all their processes have ended."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._looked: tuple[str, str, frozenset[str]] = ("", "", frozenset())  # the newest job that was looked at
        self._held: dict[str, tuple[str, frozenset[str]]] = {}  # by job: its run, and its sites

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """NVFlare looks at one job after the other, and starts the one it has looked at last, if any."""
        if event_type == EventType.BEFORE_CHECK_CLIENT_RESOURCES:
            self._look(fl_ctx)
        elif event_type == EventType.AFTER_CHECK_CLIENT_RESOURCES:
            _check_replies(fl_ctx)
        elif event_type == EventType.JOB_STARTED:
            self._start(get_event_job_id(fl_ctx))
        elif event_type in _ENDS:
            with self._lock:
                self._held.pop(get_event_job_id(fl_ctx), None)

    def _look(self, fl_ctx: FLContext) -> None:
        job, meta = fl_ctx.get_prop(FLContextKey.CURRENT_JOB_ID), fl_ctx.get_prop(FLContextKey.JOB_META) or {}
        _, *sites = fl_ctx.get_prop(FLContextKey.JOB_PARTICIPANTS)  # the server is the first
        with self._lock:
            self._looked = (job, str(meta.get("name", "")), frozenset(sites))
            busy = {site: run for run, held in self._held.values() for site in held & self._looked[2]}
        away = sorted(sites_of(meta) - set(sites))
        if busy or away:
            words = reason(busy) if busy else _AWAY + ", ".join(away)
            fl_ctx.set_prop(FLContextKey.JOB_BLOCK_REASON, words, private=True, sticky=False)

    def _start(self, job: str) -> None:
        with self._lock:
            if self._looked[0] == job:
                self._held[job] = self._looked[1:]


def _check_replies(fl_ctx: FLContext) -> None:
    """Let a job wait where one of its sites has not replied: NVFlare counts a killed site as connected for minutes.

    NVFlare takes no reason here. A job without replies waits, so those that came are taken back.
    """
    replies = fl_ctx.get_prop(FLContextKey.RESOURCE_CHECK_RESULT)
    _, *sites = fl_ctx.get_prop(FLContextKey.JOB_PARTICIPANTS)
    if not replies or all(replies.get(site, (False, ""))[0] for site in sites):
        return
    fl_ctx.get_engine().cancel_client_resources(replies, fl_ctx.get_prop(FLContextKey.CLIENT_RESOURCE_SPECS), fl_ctx)
    replies.clear()


def sites_of(meta: Mapping[str, Any]) -> frozenset[str]:
    """The sites of a job, by its description."""
    deployed = meta.get("deploy_map") or {}
    names = {name for each in deployed.values() for name in each if isinstance(name, str)}
    return frozenset(name for name in names if name != _SERVER and not name.startswith("@"))


def reason(busy: Mapping[str, str]) -> str:
    """Why a job waits, as NVFlare keeps it with the job. `busy`: the run that each site is used by."""
    return _REASON + ", ".join(f"{site} ({run})" for site, run in sorted(busy.items()))


def waits_for(history: Sequence[str]) -> dict[str, str]:
    """The sites that a job waits for, each with the run that uses it, by what NVFlare has kept with the job."""
    last = str(history[-1]) if history else ""
    _, found, sites = last.partition(f": {_REASON}")
    return dict(_BUSY.findall(sites)) if found else {}
