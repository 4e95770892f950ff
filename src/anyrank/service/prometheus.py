"""The figures of all runs in the text format of Prometheus, version 0.0.4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from anyrank.service.run import Run
from anyrank.service.verdict import STATES
from anyrank.service.watch import Watch

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_CLIENTS = 2000  # series of clients, over all runs: each costs the scraper memory
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Sample(NamedTuple):
    labels: Mapping[str, str]
    value: float


def text(watch: Watch, now: float) -> str:
    """The page `/metrics` at the time `now` (seconds since 1970)."""
    runs = list(watch.runs.values())
    lines = [line for family in (*_of_runs(runs, now), *_of_clients(runs)) for line in family]
    return "".join(f"{line}\n" for line in lines)


def _family(name: str, kind: str, help: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
        yield f"{name}{{{inside}}} {value!r}" if inside else f"{name} {value!r}"


def escaped(value: str) -> str:
    r"""A label's value.

    >>> print(escaped('a"b\\c'))
    a\"b\\c
    """
    return value.translate(_ESCAPES)


def _of_runs(runs: list[Run], now: float) -> Iterator[Iterator[str]]:
    states = [(run, run.verdict(now).state) for run in runs]
    labels = {run.place.key: {"run": run.place.name, "key": run.place.key} for run in runs}
    yield _family(
        "anyrank_run_state", "gauge", "1 for the state that the run is in, 0 for the others.",
        [Sample(labels[run.place.key] | {"state": each}, int(each == state)) for run, state in states for each in STATES],
    )  # fmt: skip
    for name, kind, help, value in _FIGURES:
        found = [Sample(labels[run.place.key], number) for run in runs if (number := value(run)) is not None]
        yield _family(name, kind, help, found)


# name, kind, help, and the value of a run, or None where it has none
_FIGURES = (
    ("anyrank_run_round", "gauge", "The last finished round.", lambda run: run.tally.round),
    ("anyrank_run_rounds_planned", "gauge", "The rounds of the configuration.", lambda run: run.planned),
    ("anyrank_run_last_event_timestamp_seconds", "gauge", "When the files last changed.", lambda run: run.changed or None),
    ("anyrank_run_accuracy_ratio", "gauge", "Accuracy on held-out examples, 0 to 1.", lambda run: run.figure("accuracy")),
    ("anyrank_run_loss", "gauge", "Loss on held-out examples.", lambda run: run.figure("loss")),
    (
        *("anyrank_run_energy_past_smallest_rank_ratio", "gauge"),
        *("Share of the update's energy past the smallest rank, 0 to 1.", lambda run: run.figure("collapse")),
    ),
    ("anyrank_run_epsilon", "gauge", "The largest epsilon that a client has spent.", lambda run: run.figure("epsilon")),
    ("anyrank_run_round_seconds", "gauge", "Median time of the last rounds.", lambda run: run.tally.round_seconds),
    ("anyrank_run_uploaded_bytes_total", "counter", "Bytes from clients to server.", lambda run: run.tally.upload_bytes),
    ("anyrank_run_downloaded_bytes_total", "counter", "Bytes from server to clients.", lambda run: run.tally.download_bytes),
    ("anyrank_run_idle_rounds_total", "counter", "Rounds that left the state as it was.", lambda run: run.tally.idle),
    ("anyrank_run_clients", "gauge", "Clients with a row in the log.", lambda run: len(run.tally.clients)),
    ("anyrank_run_damaged_lines", "gauge", "Lines of the logs that could not be read.", lambda run: run.damaged),
)

_CLIENT_FIGURES = (
    ("anyrank_client_last_heard_round", "gauge", "The last round in which it sent anything.", lambda client: client.heard),
    ("anyrank_client_training_seconds_total", "counter", "Time of its training.", lambda client: client.seconds),
)


def _of_clients(runs: list[Run]) -> Iterator[Iterator[str]]:
    known = [(run.place, name, client) for run in runs for name, client in list(run.tally.clients.items())]
    omitted = len(known) - MOST_CLIENTS
    shown = [({"run": at.name, "key": at.key, "client": name}, client) for at, name, client in known[:MOST_CLIENTS]]
    for name, kind, help, value in _CLIENT_FIGURES:
        yield _family(name, kind, help, [Sample(labels, value(client)) for labels, client in shown])
    yield _family(
        "anyrank_client_rows_total", "counter", "Rows of the client by what became of them.",
        [Sample(labels | {"outcome": key}, count) for labels, client in shown for key, count in client.conduct.counts.items()],
    )  # fmt: skip
    yield _family(
        "anyrank_clients_omitted", "gauge", "Clients that have no series here, because there are too many.",
        [Sample({}, max(omitted, 0))],
    )  # fmt: skip
