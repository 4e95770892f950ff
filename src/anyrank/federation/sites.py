"""The final figures and adapters of each named site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from anyrank.adapter.adapter import Adapter
from anyrank.federation.federation import Federation
from anyrank.federation.standing import Sites, Standing
from anyrank.messages.records import Client, ServerState
from anyrank.messages.roster import MOST_CLIENTS
from anyrank.runs.names import ADAPTER, BASE_UPDATE, SITES

_UNSCORED = {"accuracy": None, "loss": None, "test_examples": None}


def final(federation: Federation, end: Standing) -> dict[str, Any]:
    """The entries of a summary: `sites`, `{name: {rank, train_examples, accuracy, loss, test_examples}}`, `worst_site`, and
    `label_names` in the order of the outputs.

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
    return {"sites": rows, "worst_site": worst, "label_names": list(federation.facts.label_names)}


def adapters(
    federation: Federation, state: ServerState, by_rank: Mapping[int, Adapter], into_base: Adapter | None
) -> dict[str, Adapter]:
    """The adapter that each site runs, by its folder, and the update of its base model.

    They are the same objects as those of the rank, `by_rank`, unless the method keeps something of the site's own.
    """
    found = {}
    for name, rank, _ in _known(federation):
        shared = by_rank.get(rank)
        own = federation.method.share(state, Client(name, rank)) if state.extra or shared is None else shared
        found[f"{SITES}/{name}/{ADAPTER}"] = shared if shared is not None and _same(own, shared) else own
        if into_base is not None:
            found[f"{SITES}/{name}/{BASE_UPDATE}"] = into_base
    return found


def _known(federation: Federation) -> list[tuple[str, int, int]]:
    """The name, rank and number of training examples of each site: of the registered clients, even if one client replaces all
    of them. Empty if no client is a site, or if there are too many."""
    population, of = federation.population, federation.labels
    if isinstance(of, Sites):
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
