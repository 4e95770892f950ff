"""The parts of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anyrank import keys
from anyrank.config.sections import Config
from anyrank.federation.cohort import Population
from anyrank.federation.engine import Engine
from anyrank.federation.reported import Reporting
from anyrank.federation.standing import Clients
from anyrank.messages.plan import Plan, plan_round
from anyrank.messages.records import Facts
from anyrank.methods import Method
from anyrank.privacy.datasets import Source
from anyrank.privacy.plan import PrivacyPlan


@dataclass(frozen=True, eq=False)
class Federation:
    """The parts of a run. `facts`: facts about its task; `step_factor` multiplies the local steps of the round plan (1, except
    for `centralized`); `labels`: the held-out examples or the label shares of each client, if clients are reported separately;
    `privacy`: the privacy plan of their uploads; `reporting`: the clients that score what they download, if they do so instead
    of the server; `unscored`: why nobody scores, if nobody does; `hands_over`: whether clients keep the last state that they
    are sent, so that it is sent to all of them, whether they score it or not; `sources()`: the data sets whose ledgers a
    private run is charged to, none where sites keep ledgers of their own.
    """

    config: Config
    method: Method
    population: Population
    engine: Engine
    facts: Facts
    step_factor: int = 1
    labels: Clients | None = None
    privacy: PrivacyPlan | None = None
    reporting: Reporting | None = None
    unscored: str = ""
    hands_over: bool = False
    sources: Callable[[], Sequence[Source]] = tuple

    def plan(self, round: int) -> Plan:
        """How clients train in `round`."""
        run = self.config.run
        return plan_round(self.config.train, round, run.rounds, run.seed, self.step_factor)

    @property
    def scored_here(self) -> bool:
        """Whether the server scores models."""
        return not (self.reporting or self.unscored)

    def scores(self, round: int) -> bool:
        """Whether the server scores the state after `round`."""
        return self.scored_here and (round % self.config.eval.every == 0 or round == self.config.run.rounds)

    def wants_scores(self, round: int) -> bool:
        """Whether clients score what they download in `round`: every so many states, beginning with the first one."""
        return self.reporting is not None and (round - 1) % self.config.eval.every == 0

    def close(self) -> None:
        """Release what the engine holds; the model is then as it was before."""
        self.engine.close()

    def counted(self, num_examples: int) -> int:
        """The client's number of examples as its weight: its own number, or the count that a privacy plan declares."""
        return self.privacy.declared(num_examples) if self.privacy else num_examples

    def drawn(self, round: int) -> dict[str, int]:
        """Who is drawn for `round` and has examples to train on: `{client: how many it counts as}`."""
        population = self.population
        cohort = [(population.name(i), self.counted(int(population.sizes[i]))) for i in population.draw(round)]
        return {name: count for name, count in cohort if count}

    def drops_out(self, client: str, round: int) -> bool:
        """Whether the client sends nothing in `round`, as `clients.dropout` simulates it: drawn by seed, round and client."""
        return self._happens("dropout", self.config.clients.dropout, client, round)

    def is_late(self, client: str, round: int) -> bool:
        """Whether the client's reply of `round` arrives one round late, as `clients.late` simulates it."""
        return self._happens("late", self.config.clients.late, client, round)

    def _happens(self, what: str, share: float, client: str, round: int) -> bool:
        return share > 0 and bool(keys.rng(self.config.run.seed, what, round, client).random() < share)

    @property
    def upload_bound(self) -> float:
        """The largest norm that an upload's change may have."""
        return self.privacy.upload_bound if self.privacy else math.inf
