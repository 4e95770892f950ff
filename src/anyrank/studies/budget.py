"""Compute the cost of privacy before anyone trains: noise for a budget, or the budget for a noise."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from anyrank.config.sections import PrivacyConfig
from anyrank.errors import ConfigError
from anyrank.privacy.accountants import Spending, epsilon, noise_for

if TYPE_CHECKING:
    from anyrank.federation.federation import Federation


def of_run(federation: Federation) -> dict[str, Any]:
    """The figures of a federation's plan, one row for each declared count; `drawn`: the rounds that the seed draws a client in.

    Raises `ConfigError` if the run would not be private.
    """
    plan, population = federation.privacy, federation.population
    if plan is None:
        raise ConfigError(
            "[privacy]: expected level = 'example', 'person' or 'client', with epsilon and delta, got a run without privacy"
        )
    clients = Counter(plan.declared(int(size)) for size in population.sizes)
    whole = {count: plan.spending(count, plan.max_rounds) for count in sorted(clients)}
    rows = [
        {
            **{"num_examples": count, "clients": clients[count], **_row(plan.accountant, spending, plan.delta)},
            **({"bands": plan.bands[count], "step_noise": plan.multiplier(count)} if plan.correlated else {}),
        }
        for count, spending in whole.items()
    ]
    drawn = Counter(index for round in range(1, plan.rounds + 1) for index in population.draw(round))
    return {
        "name": federation.config.run.name,
        **{key: value for key, value in plan.table().items() if key not in ("noise", "bands")},
        "target_epsilon": plan.epsilon or None,
        "epsilon": max(row["epsilon"] for row in rows),
        "drawn": {"least": min(drawn[index] for index in range(len(population))), "most": max(drawn.values())},
        "counts": rows,
    }


def of_steps(num_examples: int, batch_size: int, steps: int, asked: PrivacyConfig) -> dict[str, Any]:
    """The figures of `steps` steps over `num_examples` examples; `asked` gives either the noise or epsilon.

    Raises `ConfigError` for steps that could not be sampled, or a delta that gives no protection.
    """
    if not 1 <= batch_size <= num_examples:
        raise ConfigError(f"--batch-size: expected a whole number from 1 to the {num_examples} examples, got {batch_size}")
    if steps < 1:
        raise ConfigError(f"--steps: expected a whole number of at least 1, got {steps}")
    if asked.delta >= 1 / num_examples:
        raise ConfigError(f"--delta: expected less than 1 over the {num_examples} examples, got {asked.delta}")
    rate = batch_size / num_examples
    noise = asked.noise_multiplier or noise_for(asked.accountant, asked.epsilon, asked.delta, rate, steps)
    row = _row(asked.accountant, Spending(rate, noise, steps), asked.delta)
    return {
        "level": asked.level,
        "delta": asked.delta,
        "accountant": asked.accountant,
        "target_epsilon": asked.epsilon or None,
        "epsilon": row["epsilon"],
        "counts": [{"num_examples": num_examples, "clients": 1, **row}],
    }


def _row(accountant: str, spending: Spending, delta: float) -> dict[str, Any]:
    return {**vars(spending), "epsilon": epsilon(accountant, spending, delta)}
