"""The frozen privacy plan of a run: unit, budget, clip norm, sampling rates, steps; and the noise that follows from them.

The guarantee at `level = "example"`: for every client, all that it releases during the whole run is (epsilon, delta)
differentially private with respect to adding or removing one of its examples. Clients hold disjoint examples, so the largest
of their epsilons holds for the federation. Every step draws each example with probability `batch_size / count` of its client
and adds noise; a client takes `local_steps` steps in each round that it takes part in. The random choice of the cohort is not
used to reduce the noise, because the server, and anybody who knows the run seed, knows which clients were drawn.

The guarantee at `level = "person"` is the same for one person, whatever the number of their examples, all of which are at one
client. Every step draws each person with probability `batch_size / count`; counts, and `batch_size`, are of persons.

The guarantee at `level = "client"`: everything that a client ever uploads is (epsilon, delta) differentially private with
respect to the presence or absence of its whole data set; each upload is one release. With `noise_at = "server"`, the same holds
for everything that leaves the server, with respect to whether the client's training changed its uploads; each round that the
client takes part in is one release.

With `noise = "correlated"`, the noise of a client's steps is correlated, and each example is drawn in every `bands`-th step
only: see `anyrank.privacy.correlated`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyrank.config.sections import Config
from anyrank.errors import ConfigError
from anyrank.privacy import correlated
from anyrank.privacy.accountants import Spending, epsilon, noise_for

_SAMPLED = {"example": "examples", "person": "persons"}  # levels whose steps draw units, and what these are called
_DIGITS = 3  # binary digits that a rounded count keeps: it is within 25 % of the exact one


@dataclass(frozen=True)
class PrivacyPlan:
    """The privacy guarantee and everything that it depends on, fixed before round 1.

    `epsilon`: the target, 0 if the noise was given instead; `noise`: `{declared count: noise multiplier}` for every count
    in the federation; `local_steps` in one round; `max_rounds` of the `rounds` that one client may take part in;
    `noise_at`: who adds the noise, each client or the server; `examples_per_person`: the most examples of a person that a step
    uses, 0 for all; `bands`: `{declared count: bands}` if the noise of steps is correlated.
    """

    level: str
    epsilon: float
    delta: float
    clip_norm: float
    accountant: str
    secure: bool
    counts: str
    batch_size: int
    local_steps: int
    rounds: int
    max_rounds: int
    participation: float
    noise: Mapping[int, float]
    noise_at: str = "client"
    examples_per_person: int = 0
    bands: Mapping[int, int] = field(default_factory=dict)

    @property
    def correlated(self) -> bool:
        """Whether the noise of a client's steps is correlated."""
        return bool(self.bands)

    @property
    def central(self) -> bool:
        """Whether uploads have no noise, and the server adds noise to their mean."""
        return self.noise_at == "server"

    @property
    def upload_bound(self) -> float:
        """The largest norm that the server accepts for each upload's change."""
        return self.clip_norm if self.central else math.inf

    def declared(self, num_examples: int) -> int:
        """The declared count, which replaces a client's own count wherever it is used or sent; the plan makes it public."""
        return declare(num_examples, self.counts)

    def sampling_rate(self, declared: int) -> float:
        """The probability with which each example, or person, of a client whose turn it is enters a step; a whole client's is
        1."""
        return self.bands.get(declared, 1) * self.batch_size / declared if self.level in _SAMPLED else 1.0

    def multiplier(self, declared: int) -> float:
        """The standard deviation of the fresh noise of a step over the clip norm: the accountant's, for a change of norm 1 in
        one step, times how far such a change reaches."""
        return self.noise[declared] * correlated.norm(self.bands.get(declared, 1))

    def spending(self, declared: int, rounds: int) -> Spending:
        """What a client of that declared count has spent after this many rounds."""
        steps = rounds * (self.local_steps if self.level in _SAMPLED else 1)
        draws = correlated.draws(self.bands.get(declared, 1), steps)
        return Spending(self.sampling_rate(declared), self.noise[declared], draws)

    def epsilon_after(self, declared: int, rounds: int) -> float:
        return epsilon(self.accountant, self.spending(declared, rounds), self.delta)

    def table(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        by_count = {"noise": self.noise, "bands": self.bands}
        texts = {key: {str(count): value for count, value in values.items()} for key, values in by_count.items()}
        return dataclasses.asdict(self) | texts


def plan_privacy(config: Config, sizes: Sequence[int]) -> PrivacyPlan | None:
    """The plan that `config` asks for, for clients of `sizes` examples (persons at their level); `None` without privacy.

    Each declared count gets its own noise, the least that keeps its clients within the budget if they take part in
    `max_rounds` rounds. Raises `ConfigError` for a plan that could not be kept.
    """
    asked, train = config.privacy, config.train
    if asked.level == "none":
        return None
    if asked.level in _SAMPLED:
        _check_sampling(config)
    max_rounds = min(asked.max_rounds or config.run.rounds, config.run.rounds)
    counts = sorted({declare(int(size), asked.counts) for size in sizes})
    _check_counts(config, counts, len(sizes))
    base = PrivacyPlan(
        level=asked.level,
        epsilon=asked.epsilon,
        delta=asked.delta,
        clip_norm=asked.clip,
        accountant=asked.accountant,
        secure=asked.secure,
        counts=asked.counts,
        batch_size=train.batch_size,
        local_steps=train.local_steps,
        rounds=config.run.rounds,
        max_rounds=max_rounds,
        participation=config.clients.participation,
        noise=dict.fromkeys(counts, asked.noise_multiplier),
        noise_at=asked.noise_at,
        examples_per_person=asked.examples_per_person,
    )
    if asked.noise == "correlated":
        base = dataclasses.replace(base, bands={count: _bands(base, count, asked.bands) for count in counts})
    if asked.noise_multiplier:
        return base
    return dataclasses.replace(base, noise={count: _solved(base, count) for count in counts})


def _solved(plan: PrivacyPlan, declared: int) -> float:
    whole = plan.spending(declared, plan.max_rounds)
    return noise_for(plan.accountant, plan.epsilon, plan.delta, whole.sampling_rate, whole.steps)


def _bands(plan: PrivacyPlan, declared: int, asked: int) -> int:
    """The bands of a client's noise: as many as `asked` where its examples and steps are enough, or, if that is 0, those with
    the least noise in the sums of its steps. The quick accountant is enough to choose; the plan's own solves the noise."""
    steps = plan.local_steps * plan.max_rounds
    most = min(declared // plan.batch_size, steps)
    if asked:
        return min(asked, most)

    def error(bands: int) -> float:
        trial = dataclasses.replace(plan, accountant="rdp", bands={declared: bands})
        return _solved(trial, declared) * correlated.error(bands, steps)

    best = 1
    for bands in correlated.choices(most)[1:]:
        if error(bands) >= error(best):
            break
        best = bands
    return min((best, most), key=error)  # with most bands, the fewest draws, whose number is whole


def _check_sampling(config: Config) -> None:
    if config.train.local_epochs:
        raise ConfigError(
            "train.local_epochs: private training draws every step's examples at random (Poisson sampling), so that an epoch "
            "has no meaning; expected train.local_steps"
        )
    if config.data.partition.kind == "sampled":
        raise ConfigError(
            "data.partition.kind: with 'sampled', clients share examples, whose privacy costs would add up over clients; "
            "expected a kind that gives each example to one client"
        )


def declare(num_examples: int, counts: str) -> int:
    """`num_examples`, or, if `counts` are rounded, the number with only its first three binary digits.

    >>> [declare(n, "rounded") for n in (0, 5, 13, 100, 187, 1000)]
    [0, 5, 12, 96, 160, 896]
    """
    lost = max(0, num_examples.bit_length() - _DIGITS) if counts == "rounded" else 0
    return num_examples >> lost << lost


def _check_counts(config: Config, counts: list[int], clients: int) -> None:
    smallest, largest, asked = counts[0], counts[-1], config.privacy
    if asked.level == "client":
        if asked.delta >= 1 / clients:
            raise ConfigError(f"privacy.delta: expected less than 1 over the {clients} clients, got {asked.delta}")
        return
    units = _SAMPLED[asked.level]
    if smallest < config.train.batch_size:
        raise ConfigError(
            f"train.batch_size: expected at most the declared {units} of the smallest client, {smallest} "
            f"(privacy.counts = {asked.counts!r}), got {config.train.batch_size}; lower it, or raise "
            "data.partition.min_examples"
        )
    if asked.delta >= 1 / largest:
        raise ConfigError(
            f"privacy.delta: expected less than 1 over the {largest} {units} that the largest client declares, got "
            f"{asked.delta}: with such a delta, a whole {asked.level} could be published"
        )
