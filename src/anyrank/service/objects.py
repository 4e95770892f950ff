"""Runs as JSON objects, for machines. Times in seconds since 1970."""

from __future__ import annotations

from typing import Any

from anyrank.service.run import Run
from anyrank.service.views import method, natural, waited_for
from anyrank.service.watch import Watch


def overview(watch: Watch, now: float) -> dict[str, Any]:
    """All runs for machines; times in seconds since 1970."""
    return {"now": now, "runs": [of_run(run, now) for run in watch.runs.values()], "notes": watch.notes}


def of_run(run: Run, now: float, with_clients: bool = False) -> dict[str, Any]:
    """One run for machines."""
    verdict, tally = run.verdict(now), run.tally
    clients = {"clients": _clients(run)} if with_clients else {}
    return {
        "key": run.place.key,
        "name": run.place.name,
        "state": verdict.state,
        "verdict": verdict.text,
        "last_event": run.changed or None,
        "round": tally.round,
        "rounds": run.planned,
        "method": method(run),
        **{name: run.figure(name) for name in ("accuracy", "loss", "collapse", "epsilon")},
        "upload_bytes": tally.upload_bytes,
        "download_bytes": tally.download_bytes,
        "idle_rounds": tally.idle,
        "waiting_for": list(waited_for(run, now)),
        "notes": run.told,
        **clients,
    }


def _clients(run: Run) -> list[dict[str, Any]]:
    """The clients of one run for machines."""
    return [
        {
            "client": name,
            "rank": client.rank,
            "num_examples": client.num_examples,
            "last_round": client.round,
            "last_heard_round": client.heard,
            "last_heard": client.heard_at,
            "status": client.status,
            "reason": client.reason,
            "seconds": client.seconds,
            "counts": dict(client.conduct.counts),
            "accuracy": client.accuracy.last[1] if client.accuracy and client.accuracy.last else None,
        }
        for name, client in sorted(run.tally.clients.items(), key=lambda item: natural(item[0]))
    ]
