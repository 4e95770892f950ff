"""Whose turn it is at a site, with NVFlare's own scheduler: jobs start as soon as no other job has one of their sites."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nvflare")

from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import Job
from nvflare.apis.server_engine_spec import ServerEngineSpec
from nvflare.app_common.job_schedulers.job_scheduler import DefaultJobScheduler

from anyrank.engines.nvflare import turns
from anyrank.parties import policies

SITES = ("a", "b", "c", "d")
# What the methods of the engine that are not used here would have to be.
UNUSED = {name: (lambda self, *values, **named: None) for name in ServerEngineSpec.__abstractmethods__}


class Server:
    """NVFlare's scheduler with the components of a server's kit, and sites that accept every job."""

    def __init__(self, online: tuple[str, ...] = SITES) -> None:
        self.online = online
        made = type("Engine", (ServerEngineSpec,), UNUSED | {"get_clients": lambda _: self._clients()})
        self.engine = made()
        self.engine.check_client_resources = lambda job, reqs, ctx: {site: (True, site) for site in reqs}
        self.scheduler, self.turns = DefaultJobScheduler(max_jobs=16), turns.Turns()
        self.scheduler.fire_event = self.turns.handle_event

    def _clients(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.online]

    def context(self) -> FLContext:
        context = FLContext()
        context.get_engine, context.get_identity_name = lambda: self.engine, lambda default="": "localhost"
        return context

    def tries(self, job: Job) -> tuple[list[str], str]:
        """The sites that a job starts with, none where it waits, and what is kept with the job."""
        _, found, why = self.scheduler._try_job(job, context := self.context())
        if found:
            self.event(EventType.JOB_STARTED, job)
        self.scheduler._update_schedule_history(job, why or "scheduled", context)
        return sorted(set(found or ()) - {"server"}), why

    def event(self, kind: str, job: Job) -> None:
        context = self.context()
        context.set_prop(FLContextKey.EVENT_DATA, {"job_id": job.job_id}, private=True)
        self.turns.handle_event(kind, context)


def job(name: str, *sites: str, least: int = 1) -> Job:
    meta = {"name": name, "deploy_map": {"app": ["server", *sites]}, "min_clients": least, "job_id": f"id-{name}"}
    return Job(f"id-{name}", {}, {"app": ["server", *sites]}, meta, min_sites=least, required_sites=[])


def test_a_job_waits_for_busy_sites_and_for_sites_that_are_away_also_where_it_could_start_without_them() -> None:
    """`least` is 1: NVFlare itself would start the job with one site."""
    server = Server(online=("a", "b"))
    first, second = job("first", "a"), job("second", "a", "b", "c", "d")
    assert server.tries(first) == (["a"], "")
    assert server.tries(second) == ([], "busy: a (first)")
    assert turns.waits_for(second.meta["schedule_history"]) == {"a": "first"}
    server.event(EventType.JOB_COMPLETED, first)
    assert server.tries(second) == ([], "away: c, d")
    assert turns.waits_for(second.meta["schedule_history"]) == {}
    server.online = SITES[:3]
    assert server.tries(second) == ([], "away: d")
    server.online = SITES
    assert server.tries(second) == (list(SITES), "")


@pytest.mark.parametrize("reply", [(False, ""), None], ids=["no reply", "not asked"])
def test_a_job_waits_for_a_site_that_was_killed_and_counts_as_connected(reply: tuple[bool, str] | None) -> None:
    """NVFlare lists a killed site for minutes. The sites that have replied are free for the next job."""
    server, cancelled = Server(), []
    replies = {"a": (True, "token"), "b": reply}
    server.engine.check_client_resources = lambda *_: {site: said for site, said in replies.items() if said}
    server.engine.cancel_client_resources = lambda found, specs, ctx: cancelled.append((dict(found), sorted(specs)))
    first = job("first", "a", "b")
    assert server.tries(first)[0] == []
    assert [(found["a"], asked) for found, asked in cancelled] == [((True, "token"), ["a", "b"])]
    assert server.tries(job("other", "a"))[0] == ["a"]
    server.event(EventType.JOB_COMPLETED, job("other", "a"))
    replies["b"] = (True, "token")
    assert server.tries(first) == (["a", "b"], "")
    assert len(cancelled) == 1


def test_a_job_that_could_not_be_started_holds_no_site() -> None:
    """It was looked at, and then its deployment failed."""
    server = Server()
    first, second = job("first", "a", "b"), job("second", "b")
    server.scheduler._try_job(first, server.context())
    server.event(EventType.JOB_ABORTED, first)
    assert server.tries(second) == (["b"], "")


def test_a_start_without_a_look_holds_no_site_of_another_job() -> None:
    server = Server()
    server.scheduler._try_job(job("first", "a"), server.context())  # looked at, and not started
    server.event(EventType.JOB_STARTED, job("second", "b"))
    assert server.tries(job("third", "a")) == (["a"], "")


JOBS = st.lists(st.sets(st.sampled_from(SITES), min_size=1), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(JOBS, st.data())
def test_no_site_has_two_jobs_and_no_job_waits_whose_sites_are_free(wanted: list[set[str]], data: st.DataObject) -> None:
    server, waiting, running = Server(), [job(f"r{i}", *sorted(sites)) for i, sites in enumerate(wanted)], []
    sites = {f"id-r{i}": frozenset(each) for i, each in enumerate(wanted)}
    while waiting or running:
        for each in list(waiting):
            busy = {site: one.meta["name"] for one in running for site in sites[one.job_id] & sites[each.job_id]}
            assert server.tries(each) == (([], turns.reason(busy)) if busy else (sorted(sites[each.job_id]), ""))
            assert turns.waits_for(each.meta["schedule_history"]) == busy
            if not busy:
                waiting.remove(each)
                running.append(each)
        ended = data.draw(st.sampled_from(running))
        running.remove(ended)
        server.event(data.draw(st.sampled_from([EventType.JOB_COMPLETED, EventType.JOB_ABORTED])), ended)


HISTORIES: list[tuple[list[str], dict[str, str]]] = [
    ([], {}),
    (["2026-11-30 20:00:00: scheduled"], {}),
    (["2026-11-30 20:00:00: busy: a (first)", "2026-11-30 20:00:10: connected sites (0) < min_sites (1)"], {}),
    (
        ["2026-11-30 20:00:00: connected sites (0) < min_sites (1)", "2026-11-30 20:00:10: busy: a-1 (x.y), b (z)"],
        {"a-1": "x.y", "b": "z"},
    ),
    ([""], {}),
]


@pytest.mark.parametrize(("history", "found"), HISTORIES)
def test_what_a_job_waits_for_is_the_newest_word_on_it(history: list[str], found: dict[str, str]) -> None:
    assert turns.waits_for(history) == found


def test_a_servers_kit_has_the_turns_and_runs_several_jobs(tmp_path: Any) -> None:
    made = {each["id"]: each for each in policies.resources("server", tmp_path)["components"]}
    path = f"{turns.Turns.__module__}.{turns.Turns.__qualname__}"
    assert [each["path"] for each in made.values()].count(path) == 1
    assert made["job_scheduler"]["args"]["max_jobs"] > 1
