"""A federation of a configuration and of what is known of its clients, with every check that needs no model."""

from __future__ import annotations

from dataclasses import replace

from anyrank.config.sections import ClientsConfig, Config
from anyrank.federation import cohort
from anyrank.federation.checks import check_precondition, check_private, check_rounds
from anyrank.federation.federation import Federation
from anyrank.federation.reported import reporting_of, unscored
from anyrank.federation.standing import Clients, Labels, Sites
from anyrank.messages.roster import Roster
from anyrank.methods import Method
from anyrank.privacy.plan import plan_privacy
from anyrank.robust import central_noise, rules


def assemble(config: Config, method: Method, roster: Roster) -> Federation:
    """The federation, still without an engine. Raises `ConfigError` for what does not go together."""
    population = cohort.populate(_named(config.clients, roster), roster.sizes, config.run.seed)
    labels = None  # who scores each client: itself, or the server, which must then know something of its examples
    if config.eval.where == "server":
        labels = _clients(population, roster)  # of the registered clients, even if one client replaces all of them
    step_factor = 1
    if method.pools_data:
        step_factor, population = population.cohort_size, population.pooled(roster.pooled)
    privacy = plan_privacy(config, population.sizes)
    check_rounds(config, population, privacy)
    check_precondition(config, method)
    rules.check(config.robust, method, privacy is not None and privacy.central, population.cohort_size)
    facts = roster.facts
    if privacy:
        check_private(privacy, method)
        if privacy.central:
            central_noise.check(method, population.levels())
        labels = None  # label shares are private to the clients
        facts = replace(facts, train_examples=sum(privacy.declared(int(size)) for size in population.sizes))
    reporting = reporting_of(config, population, roster, privacy)
    return Federation(
        config, method, population, None, facts, step_factor, labels, privacy, reporting, unscored(config, privacy)
    )


def _named(clients: ClientsConfig, roster: Roster) -> ClientsConfig:
    in_order = roster.in_order and clients.rank_order == "shuffled"
    return replace(clients, names=roster.names, rank_order="cycled" if in_order else clients.rank_order)


def _clients(population: cohort.Population, roster: Roster) -> Clients | None:
    """The held-out examples or the label shares of each client, as far as they are known."""
    if roster.owners is not None:
        return Sites(population.names, roster.owners, population.ranks, population.sizes)
    if roster.by_label is None:
        return None
    return Labels.counted([population.name(i) for i in range(len(population))], roster.by_label)
