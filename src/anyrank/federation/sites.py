"""The final figures and adapters of each named site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from anyrank.adapter.adapter import Adapter
from anyrank.federation.federation import Federation
from anyrank.federation.reported import Reporting
from anyrank.federation.standing import Sites, Standing
from anyrank.messages.records import Client, ServerState
from anyrank.messages.roster import MOST_CLIENTS
from anyrank.runs.names import ADAPTER, BASE_UPDATE, SITES

_UNSCORED = {"accuracy": None, "loss": None, "test_examples": None}


def final(federation: Federation, end: Standing) -> dict[str, Any]:
    """The entries of a summary: `sites`, `{name: {rank, train_examples, accuracy, loss, test_examples}}`, `worst_site`,
    `label_names` in the order of the outputs, and `sites_scored`: whose model these scores are of, the global one for all
    sites (`global`), or the one that each site has itself, of its own rank (`own`).

    Empty if no client is a site. Scores are `None` for a site without held-out examples of its own, and under privacy, where
    numbers of training examples are the declared ones.
    """
    rows = {
        name: {"rank": rank, "train_examples": federation.counted(size)} | _UNSCORED | end.sites.get(name, {})
        for name, rank, size in _known(federation)
    }
    if not rows:
        return {}
    worst = end.worst if end.sites else None
    of = "own" if federation.reporting or federation.method.private else "global"
    return {"sites": rows, "worst_site": worst, "label_names": list(federation.facts.label_names), "sites_scored": of}


def adapters(federation: Federation, state: ServerState, ranks: Mapping[int, str]) -> dict[str, Callable[[], Adapter | str]]:
    """What makes the adapter that each site runs, by its folder, and the update of its base model; `ranks`: the folder of each
    rank's adapter, whose name is given where a site has nothing of its own."""
    found: dict[str, Callable[[], Adapter | str]] = {}
    for name, rank, _ in _known(federation):
        found[f"{SITES}/{name}/{ADAPTER}"] = partial(_own, federation, state, Client(name, rank), ranks.get(rank, ""))
        if state.merged:
            found[f"{SITES}/{name}/{BASE_UPDATE}"] = lambda: BASE_UPDATE
    return found


def _own(federation: Federation, state: ServerState, client: Client, of_rank: str) -> Adapter | str:
    share = partial(federation.method.share, state)
    if of_rank and not state.extra:  # nothing in the state is of one client
        return of_rank
    own = share(client)
    return of_rank if of_rank and _same(own, share(Client(of_rank, client.rank))) else own


def _known(federation: Federation) -> list[tuple[str, int, int]]:
    """The name, rank and number of training examples of each site: of the registered clients, even if one client replaces all
    of them. Empty if no client is a site, or if there are too many."""
    population, of = federation.population, federation.reporting or federation.labels
    if isinstance(of, (Sites, Reporting)):
        known = zip(of.names, of.ranks, of.sizes, strict=True)
    elif federation.config.sites and population.names:
        known = zip(population.names, population.ranks, population.sizes, strict=True)
    else:
        return []
    sites = [(name, int(rank), int(size)) for name, rank, size in known]
    return sites if len(sites) <= MOST_CLIENTS else []


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are the same, number by number."""
    if one is other:
        return True
    if one.ranks != other.ranks or one.tensors.keys() != other.tensors.keys():
        return False
    layers = [(layer, other.layers[name]) for name, layer in one.layers.items()]
    factors = all(a.scaling == b.scaling and torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in layers)
    return factors and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
