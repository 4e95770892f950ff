"""Replies that arrive one round late: left out, or carried over into the next round (`rounds.late`).

A carried update counts as if its client had sent it in the next round: the method averages the adapter that it trained, though
it started from the state of one round ago. That is only sound if the method would hand the client the same slices, and have it
train the same factors, in both rounds. Where it would not (rotating slices, alternating factors), the reply is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from anyrank.adapter.adapter import Adapter
from anyrank.federation import guard
from anyrank.federation.asking import Work
from anyrank.federation.federation import Federation
from anyrank.federation.intake import Collected
from anyrank.messages.records import Client, ClientUpdate, Job, ServerState

# Begins the entries of `ServerState.extra` that hold such replies between two rounds. No name of a client has this character.
_MARK = "late\x1f"


def split(state: ServerState) -> tuple[ServerState, dict[str, Adapter]]:
    """A stored state without late replies, and these, `{client: adapter}`."""
    held = {name.removeprefix(_MARK): adapter for name, adapter in state.extra.items() if name.startswith(_MARK)}
    return replace(state, extra={name: each for name, each in state.extra.items() if not name.startswith(_MARK)}), held


def joined(state: ServerState, held: Mapping[str, Adapter]) -> ServerState:
    """The state as it is stored, with the replies that the next round takes in."""
    return replace(state, extra={**state.extra, **{_MARK + name: adapter for name, adapter in sorted(held.items())}})


def exchange(
    federation: Federation, state: ServerState, work: Work, held: Mapping[str, Adapter], collected: Collected
) -> tuple[Sequence[Job], dict[str, Adapter]]:
    """Take late replies out of the round, and those `held` from the round before into it; both are recorded in `collected`.

    Returns the jobs that count for the round, and the replies that wait for the next one.
    """
    late = [job.client.name for job in work.asked if federation.is_late(job.client.name, collected.round)]
    waiting = withhold(collected, late, federation.config.rounds.late == "carry")
    return [*work.jobs, *take_in(federation, state, held, collected)], waiting


def withhold(collected: Collected, names: Iterable[str], carried: bool) -> dict[str, Adapter]:
    """Take the replies of the clients `names` out of their round, `{client: adapter}`."""
    late = set(names)
    held = {update.client: update.adapter for update in collected.updates if update.client in late}
    collected.updates = [update for update in collected.updates if update.client not in held]
    collected.counts = {name: counts for name, counts in collected.counts.items() if name not in late}
    end = "joins the next one" if carried else "is left out"
    for row in collected.rows:
        if row["client"] in held and row["status"] == "ok":
            row |= {"status": "late", "reason": f"its reply arrived after the round and {end}"}
    return held if carried else {}


def take_in(federation: Federation, state: ServerState, held: Mapping[str, Adapter], collected: Collected) -> list[Job]:
    """Add replies of the round before to `collected`, each with a row; returns the jobs that they count for."""
    jobs, present = [], {update.client for update in collected.updates}
    for name, adapter in sorted(held.items()):
        population = federation.population
        index = population.index(name)
        client, count = population.client(index), federation.counted(int(population.sizes[index]))
        job = Job(client, count, partial(federation.method.dispatch, state, client))
        reason = "a newer reply of the client counts" if name in present else _unfit(federation, state, client)
        if not reason:
            try:
                collected.updates.append(_admitted(federation, job, adapter))
                jobs.append(job)
            except guard.Rejected as error:
                reason = str(error)
        collected.carried(client, count, reason)
        job.settle()
    return jobs


def _admitted(federation: Federation, job: Job, adapter: Adapter) -> ClientUpdate:
    update = ClientUpdate(adapter, job.num_examples, job.client.name)
    return guard.admit(update, job.download, job.client.name, job.num_examples, federation.upload_bound)


def _unfit(federation: Federation, state: ServerState, client: Client) -> str:
    """Why a reply of the round before does not fit the round after `state`; empty if it does."""
    now, before = (federation.method.dispatch(replace(state, round=round), client) for round in (state.round, state.round - 1))
    if now.slices != before.slices or now.train != before.train:
        return f"{federation.method.name} has the client train other slices or factors in this round"
    return ""
