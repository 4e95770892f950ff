"""The final figures of each named site."""

from __future__ import annotations

from typing import Any

from anyrank.federation.federation import Federation
from anyrank.federation.reported import Reporting
from anyrank.federation.standing import Sites, Standing

_UNSCORED = {"accuracy": None, "loss": None, "test_examples": None}


def final(federation: Federation, end: Standing) -> dict[str, Any]:
    """The entries of a summary: `sites`, `{name: {rank, train_examples, accuracy, loss, test_examples}}`, and `worst_site`.

    Empty if no client is a site. Scores are `None` for a site without held-out examples of its own, and under privacy, where
    numbers of training examples are the declared ones.
    """
    population, of = federation.population, federation.reporting or federation.labels
    if isinstance(of, (Sites, Reporting)):  # the registered clients, even if one client replaces all of them
        known = zip(of.names, of.ranks, of.sizes, strict=True)
    elif federation.config.sites and population.names:
        known = zip(population.names, population.ranks, population.sizes, strict=True)
    else:
        return {}
    rows = {
        name: {"rank": int(rank), "train_examples": federation.counted(int(size))} | _UNSCORED | end.sites.get(name, {})
        for name, rank, size in known
    }
    return {"sites": rows, "worst_site": end.worst if end.sites else None}
