"""What the pages show: plain values, made from runs as they were read so far."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from anyrank.errors import shortened
from anyrank.report import words
from anyrank.report.runs import finite, section
from anyrank.service import charts, downloads
from anyrank.service.run import Run
from anyrank.service.tally import ClientTally, Event, number, text
from anyrank.service.verdict import STATES, Verdict, duration
from anyrank.service.watch import Watch

MOST_ROWS = 500  # clients on a page
_LONGEST_CELL = 60  # characters
_USED = ("used", "rejected", "shortened", "excluded", "failed", "late", "rested", "stray")
_AWAY = ("failed", "rejected", "excluded", "late")  # statuses of a client that gave nothing that counts
_TITLES = {
    "accuracy": "Accuracy, %", "loss": "Loss", "collapse": "Energy past the smallest rank, %",
    "epsilon": "ε spent, the largest of all clients",
}  # fmt: skip


def overview(watch: Watch, now: float) -> dict[str, Any]:
    """All runs, what needs somebody first, then the one with the newest event."""
    shown = [(run, run.verdict(now)) for run in watch.runs.values()]
    shown.sort(key=lambda pair: (STATES.index(pair[1].state), -pair[0].changed))
    counts = Counter(verdict.state for _, verdict in shown)
    told = [f"{counts[state]} {_STATE_WORDS[state]}" for state in STATES if counts[state]]
    return {
        "runs": [_row(run, verdict, now) for run, verdict in shown],
        "headline": f"{words.count(len(shown), 'run')}: {', '.join(told)}" if shown else "No run yet in these folders",
        "notes": watch.notes,
        "any_accuracy": any(run.figure("accuracy") is not None for run, _ in shown),
        "any_epsilon": any(run.figure("epsilon") is not None for run, _ in shown),
    }


_STATE_WORDS = {
    "failed": "failed", "unreadable": "cannot be read", "stopped": "stopped", "slow": "running but quiet",
    "running": "running", "done": "done",
}  # fmt: skip


def _row(run: Run, verdict: Verdict, now: float) -> dict[str, Any]:
    return _head(run, verdict, now) | {
        "round": f"{run.tally.round} of {run.planned}" if run.planned is not None else str(run.tally.round),
        "accuracy": _percent(run.figure("accuracy")),
        "collapse": _percent(run.figure("collapse")),
        "epsilon": _places(run.figure("epsilon")),
        "clients": len(run.tally.clients),
        "rejected": sum(each.conduct.counts["rejected"] for each in run.tally.clients.values()),
        "method": method(run),
    }


def _head(run: Run, verdict: Verdict, now: float) -> dict[str, Any]:
    return {
        "key": run.place.key,
        "name": run.place.name,
        "state": verdict.state,
        "text": verdict.text,
        "hint": verdict.hint,
        "changed": moment(run.changed, now),
        "of_all": run.tally.round / run.planned if run.planned else None,
    }


def moment(at: float | None, now: float) -> dict[str, Any] | None:
    """A time (seconds since 1970) as the page shows it; `None` if it is not known."""
    if not at or not 0 < at < 4e9:  # the year 2096
        return None
    stamp = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"at": int(at), "stamp": stamp, "ago": f"{duration(now - at)} ago"}


def page(run: Run, now: float) -> dict[str, Any]:
    """Everything on the page of a run."""
    verdict = run.verdict(now)
    rows = _clients(run, now)
    return _head(run, verdict, now) | {
        "facts": [(name, value) for name, value in _facts(run) if value not in (None, "")],
        "notes": run.told,
        "attention": _attention(run),
        "charts": _charts(run),
        "clients": {"rows": rows[:MOST_ROWS], "more": max(len(rows) - MOST_ROWS, 0), **_columns(rows)},
        "sites": bool(run.config.get("sites")),
        "events_shown": [_event(event, now) for event in _events(run)],
        "rounds": [_round(row, now) for row in reversed(run.tally.recent)],
        "files": [item._asdict() | {"size": size(item.bytes)} for item in downloads.listed(run.place.folder)],
        "files_of_sites": [item._asdict() | {"size": size(item.bytes)} for item in downloads.of_sites(run.place.folder)],
        "total_clients": len(rows),
        "any_round": run.tally.round > 0,
        "any_idle": any(row["idle"] for row in run.tally.recent),
    }


def method(run: Run) -> str:
    return text(run.summary.get("label") or run.summary.get("method") or section(run.config, "method").get("name") or "", 60)


def _facts(run: Run) -> list[tuple[str, Any]]:
    tally, seed = run.tally, run.summary.get("seed", section(run.config, "run").get("seed"))
    per_round = tally.round_seconds
    return [
        ("method", method(run)),
        ("seed", str(seed) if number(seed) is not None else ""),
        ("time of a round", _seconds(per_round) if per_round is not None else ""),
        ("accuracy", _percent(run.figure("accuracy"))),
        ("energy past the smallest rank", _percent(run.figure("collapse"))),
        ("ε spent", _spent(run)),
        ("uploaded by all", size(tally.upload_bytes) if tally.upload_bytes else ""),
        ("downloaded by all", size(tally.download_bytes) if tally.download_bytes else ""),
        ("idle rounds", str(tally.idle) if tally.idle else ""),
    ]


def _spent(run: Run) -> str:
    epsilon, target, delta = run.figure("epsilon"), finite(run.plan.get("epsilon")), finite(run.plan.get("delta"))
    if epsilon is None:
        return ""
    return f"{epsilon:.3g}" + (f" of {target:.3g}" if target else "") + (f", δ {delta:.1g}" if delta else "")


def _charts(run: Run) -> list[dict[str, Any]]:
    """Accuracy, or loss where there is none; energy past the smallest rank; ε of a private run."""
    curves, rings = run.tally.curves, [event["round"] for event in run.tally.recent if event["idle"]]
    first = "accuracy" if curves["accuracy"].points else "loss"
    shown = []
    for name, scale in ((first, 100.0 if first == "accuracy" else 1.0), ("collapse", 100.0), ("epsilon", 1.0)):
        if points := curves[name].points:
            shown.append({"title": _TITLES[name], "svg": charts.line(points, _TITLES[name], rings, scale, run.planned)})
    return shown


def _clients(run: Run, now: float) -> list[dict[str, Any]]:
    """One row a client, by name, those that are waited for by the minute first: those of the log, and sites of the
    configuration that have no row yet."""
    tally, known = run.tally, dict(run.tally.clients)
    for site in _listed(run.config.get("sites")):
        if isinstance(site, Mapping) and len(known) < MOST_ROWS:
            known.setdefault(text(site.get("name"), 100), ClientTally(rank=number(site.get("rank"))))
    epsilons = section(section(run.summary, "privacy"), "epsilon_by_client")
    most, waited = number(run.plan.get("max_rounds")), waited_for(run, now)
    return [
        {
            "name": shortened(name, _LONGEST_CELL),
            "rank": "–" if client.rank is None else client.rank,
            "examples": "–" if client.num_examples is None else f"{client.num_examples:,.0f}",
            "heard": f"round {client.heard}" if client.heard else "not yet",
            "heard_at": moment(client.heard_at, now),
            "status": _status(client, tally.round) if name not in waited else _waited(waited[name]),
            "state": "late" if name in waited else client.status if client.status in _AWAY else "",
            "reason": client.reason,
            "counts": Counter(client.conduct.counts),
            "least": words.share(client.conduct.least) if client.conduct.counts["shortened"] else "",
            "seconds": _seconds(client.seconds) if client.seconds else "",
            "bytes": size(client.bytes) if client.bytes else "",
            "epsilon": _epsilon(finite(epsilons.get(name)), run.charges.get(name), most),
            "accuracy": _percent(client.accuracy.last[1]) if client.accuracy and client.accuracy.last else "",
            "spark": charts.spark(client.accuracy.points, f"accuracy of {name}") if client.accuracy else "",
        }
        for name, client in sorted(known.items(), key=lambda item: (not waited.get(item[0]), natural(item[0])))
    ]


def waited_for(run: Run, now: float) -> dict[str, str]:
    """The clients that a run in progress waits for, and how long; empty within the first minute."""
    facts = run.facts()
    if not facts.waits or run.verdict(now).state not in ("running", "slow"):
        return {}
    seconds = now - facts.waits.began
    return dict.fromkeys(facts.waits.clients, duration(seconds) if seconds >= 60 else "")


def _waited(how_long: str) -> str:
    return f"waited for ({how_long})" if how_long else "waited for"


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which `client-10` comes after `client-2`.

    >>> sorted(["client-10", "client-2"], key=natural)
    ['client-2', 'client-10']
    """
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", name)
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts]


def _status(client: ClientTally, round: int) -> str:
    if not client.round:
        return "no row yet"
    shown = client.event.kind if client.event and client.event.last == client.round else client.status
    return shown if client.round == round else f"{shown} (round {client.round})"


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which columns have anything in them."""
    counts = [name for name in _USED if name == "used" or any(row["counts"][name] for row in rows)]
    return {"counts": counts} | {f"any_{name}": any(row[name] for row in rows) for name in _OPTIONAL}


_OPTIONAL = ("reason", "seconds", "bytes", "epsilon", "accuracy")


def _attention(run: Run) -> str:
    """Whose updates did not count in the last round."""
    round, clients = run.tally.round, run.tally.clients
    of_round = {name: client for name, client in clients.items() if client.round == round and round}
    away = [f"{shortened(name, 40)} ({client.status})" for name, client in of_round.items() if client.status in _AWAY]
    if not away:
        return ""
    away.sort(key=natural)
    of = f"{len(away)} of {words.count(len(of_round), 'client')}"
    return f"In round {round}, {of} gave nothing that counts: {words.few(away)}."


def _events(run: Run) -> list[Event]:
    """The events, newest first."""
    listed = [*run.tally.events.values(), *run.resumes]
    return sorted(reversed(listed), key=lambda event: -event.last)


def _event(event: Event, now: float) -> dict[str, Any]:
    rounds = f"round {event.last}" if event.first == event.last else f"rounds {event.first}–{event.last}"
    times = f" ({event.times} times)" if event.times > 1 else ""
    who = shortened(event.client, _LONGEST_CELL)
    return {"kind": event.kind, "who": who, "rounds": rounds + times, "reason": event.reason, "at": moment(event.at, now)}


def _round(row: Mapping[str, Any], now: float) -> dict[str, Any]:
    count = {name: "–" if row[name] is None else f"{row[name]:,.0f}" for name in ("clients", "rejected")}
    shown = {"round": row["round"], "accuracy": _percent(row["accuracy"]) or "–", "collapse": _percent(row["collapse"]) or "–"}
    seconds = "–" if row["seconds"] is None else _seconds(row["seconds"])
    loss = "–" if row["loss"] is None else f"{row['loss']:.4g}"
    return shown | count | {"loss": loss, "seconds": seconds, "idle": row["idle"], "at": moment(row["at"], now)}


def _epsilon(epsilon: float | None, charged: int | None, most: int | None) -> str:
    if epsilon is not None:
        return f"{epsilon:.3g}"
    if not charged:
        return ""
    return f"{charged} of {most} rounds charged" if most else f"{charged} rounds charged"


def _percent(value: float | None) -> str:
    return "" if value is None else words.share(max(min(value, 1e6), -1e6))


def _places(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else duration(value) if value < 1e12 else "–"


def size(count: float) -> str:
    """A number of bytes for people.

    >>> size(900), size(24_100_000), size(244e6)
    ('900 B', '24.1 MB', '244.0 MB')
    """
    unit, name = next(((unit, name) for unit, name in _SIZES if count >= unit), (1, "B"))
    return f"{count:,.0f} B" if unit == 1 else f"{count / unit:,.1f} {name}"


_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def _listed(value: Any) -> list[Any]:
    return value[:MOST_ROWS] if isinstance(value, list) else []
