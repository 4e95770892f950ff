"""The figures of each round, and the adapters of a finished run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.lazy import Lazy
from anyrank.algebra.spectra import effective_rank, energy_beyond, spectra
from anyrank.federation import sites
from anyrank.federation.federation import Federation
from anyrank.federation.intake import Collected
from anyrank.federation.standing import UNSCORED, Standing, of_global, of_personal
from anyrank.messages.records import Client, ServerState
from anyrank.runs.names import ADAPTER, BASE_UPDATE


def measure(
    federation: Federation, state: ServerState, collected: Collected, standing: Standing | None, idle: str = ""
) -> dict[str, Any]:
    """The round's figures; `idle`: why the round left the state as it was.

    In rounds that are not scored, accuracy and loss are `None` and the task's metrics are missing; without a global model,
    spectra are `None`.
    """
    served = federation.method.served(state)
    figures = standing.figures() if standing else UNSCORED
    values = spectra(served["global"], state.merged) if "global" in served else None
    losses = [update.metrics["loss"] for update in collected.updates if "loss" in update.metrics]
    smallest = federation.population.levels()[0]
    return {
        "round": state.round,
        **figures,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "collapse": energy_beyond(values, smallest) if values else None,
        "effective_rank": effective_rank(values) if values else None,
        "spectrum": {name: [float(f"{v:.6g}") for v in each.tolist()] for name, each in values.items()} if values else None,
        "upload_bytes": collected.upload_bytes,
        "download_bytes": collected.download_bytes,
        "clients": collected.count("ok"),
        "rejected": collected.count("rejected", "excluded", "failed", "stray"),
        "shortened": sum(row["shortened"] is not None for row in collected.rows),
        "idle": idle,
    }


def score(federation: Federation, state: ServerState) -> Standing:
    """The standing of the models that users of the federation run: the global model, or the personal ones."""
    served = federation.method.served(state)
    scores = {name: federation.engine.evaluate(adapter, state.merged) for name, adapter in sorted(served.items())}
    if len(scores) == 1 and not scores.keys() & set(federation.labels.names if federation.labels else ()):
        return of_global(next(iter(scores.values())), federation.labels)
    return of_personal(scores, federation.labels)


def shares(federation: Federation, state: ServerState) -> Mapping[str, Adapter | str]:
    """The adapters of a finished run by folder: the global one, the one for a client of each rank, the update of the base
    model, and those of named sites, each made when it is asked for. A name stands for the adapter of that folder."""
    ranks = {rank: f"adapter-rank-{rank}" for rank in federation.population.levels()}
    share = federation.method.share
    made: dict[str, Callable[[], Adapter | str]] = {ADAPTER: lambda: state.adapter}
    made |= {folder: partial(share, state, Client(folder, rank)) for rank, folder in ranks.items()}
    made |= {BASE_UPDATE: lambda: state.merged} if state.merged else {}
    made |= sites.adapters(federation, state, ranks)
    return Lazy(dict.fromkeys(made), lambda folder: made[folder]())
