"""The ledgers of data sets that a private run is charged to: refused in time, and charged before each round."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyrank.federation.federation import Federation
from anyrank.privacy import datasets, spent
from anyrank.privacy.datasets import Source
from anyrank.privacy.ledger import Ledger, Unlimited
from anyrank.privacy.spent import Account, Planned
from anyrank.privacy.statement import DEALT
from anyrank.runs.names import PRIVACY, read_object


def check(federation: Federation, out: Path) -> None:
    """Raise `ConfigError` if the run in `out`, begun or not, would spend more on a data set than a ceiling allows."""
    key = name_of(out)
    if federation.privacy is None or key == "":  # noise of the system's source: what was charged has names that are not known
        return
    for source in federation.sources():
        work = planned(federation, source, key or "planned", out)
        spent.check(source.data, [work], {work.plan.delta: federation.config.privacy.ceiling})


def notices(federation: Federation) -> list[str]:
    """What a person should know before a private run: of other ledgers of the same data, and of what is assumed of clients."""
    if federation.privacy is None:
        return []
    lines = [line for source in federation.sources() for line in datasets.alike(source.data)]
    kind = federation.config.data.partition.kind
    if federation.config.sites or kind not in DEALT:
        return lines
    return [
        *lines,
        f"privacy: data.partition.kind = '{kind}' divides the rows of one source by their number and labels, so that one row "
        "more moves other rows to other clients; the guarantee is for the examples of each client as they were divided. "
        "[[sites]], a list of files or kind = 'column' do not have this limit",
    ]


def join(federation: Federation, ledger: Ledger | Unlimited, out: Path) -> None:
    """Let `ledger` charge the data sets of the run, too. A data set gets a ledger if it has none."""
    if isinstance(ledger, Unlimited):
        return
    run = ledger.key_name or f"system-{secrets.token_hex(8)}"
    for source in federation.sources():
        work = planned(federation, source, run, out)
        before = Counter() if ledger.key_name else Counter(ledger.most(source.clients))  # charged under another name
        for kept in datasets.opened(source.data):
            account = Account(kept, work, source.clients, federation.config.privacy.ceiling)
            ledger.accounts.append(_Continued(account, before) if before else account)


class _Continued:
    """An account of a run that has a new name since it went on: `before` are the rounds that were charged under old names."""

    def __init__(self, account: Account, before: Mapping[int, int]) -> None:
        self.clients, self._account, self._before = account.clients, account, before

    def charge(self, rounds: Mapping[int, int]) -> None:
        self._account.charge({count: most - self._before[count] for count, most in rounds.items()})


def planned(federation: Federation, source: Source, run: str, out: Path | None = None) -> Planned:
    """What the whole run releases on a data set, by the cohorts that its seed draws."""
    plan, config = federation.privacy, federation.config
    drawn: Counter[str] = Counter()
    declared: dict[str, int] = {}
    for round in range(1, config.run.rounds + 1):
        cohort = federation.drawn(round)
        drawn.update(cohort.keys())
        declared |= cohort
    rounds: Counter[int] = Counter()
    for name, count in declared.items():
        if source.clients is None or name in source.clients:
            rounds[count] = max(rounds[count], min(drawn[name], plan.max_rounds))
    return Planned(run, source.group, plan, rounds, _about(federation, out))


def _about(federation: Federation, out: Path | None) -> dict[str, Any]:
    config = federation.config
    return {
        "name": config.run.name,
        "method": config.method.name,
        "seed": config.run.seed,
        "out": str(out.resolve()) if out else "",
        "delta": float(config.privacy.delta),
        "noise_at": config.privacy.noise_at,
    }


def name_of(out: Path) -> str | None:
    """The name of the noise key of the run in `out`; `None` if there is no run yet."""
    return str(read_object(out / PRIVACY).get("key")) if (out / PRIVACY).is_file() else None
