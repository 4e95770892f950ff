"""The ledger of a private run: each client is charged before it trains, so that nothing leaves a client without an entry.

A charge is one line of `privacy.jsonl`, on disk before the client begins. An interrupted round that is repeated with the run's
key releases the same numbers again and is charged once. With noise from the system's source, it releases other numbers and is
charged again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from anyrank.errors import RunError
from anyrank.privacy import noise
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import PrivacyPlan

SPENT = "its privacy budget is spent"
_TRAINED = ("ok", "rejected", "failed")


class Books(Protocol):
    """The part of a run folder that stores the privacy ledger."""

    def keep_plan(self, table: Mapping[str, Any], key: Callable[[], str]) -> str:
        """Write the plan with the key's name, or compare it with the stored plan; returns the key's name."""
        ...

    def charges(self) -> list[dict[str, Any]]: ...

    def charge(self, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def clients(self) -> list[dict[str, Any]]: ...


class Unlimited:
    """The ledger of a run without privacy: everything is allowed and nothing is written."""

    def mechanism(self) -> None:
        return None

    def has_left(self, client: str, round: int) -> bool:
        return True

    def charge(self, round: int, counts: Mapping[str, int]) -> None:
        pass

    def figures(self, round: int) -> dict[str, Any]:
        return {}

    def summary(self, round: int) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class Ledger:
    """The ledger of a private run in progress."""

    def __init__(self, plan: PrivacyPlan, books: Books, key_name: str) -> None:
        self.plan, self.books, self.key_name = plan, books, key_name
        self.rounds: dict[str, list[int]] = {}  # rounds for which each client was charged, including interrupted rounds
        self.declared: dict[str, int] = {}
        self._note(books.charges())

    def mechanism(self) -> Mechanism:
        """The plan with its key, for the remaining rounds."""
        return Mechanism(self.plan, noise.find_key(self.key_name) if self.key_name else None)

    def has_left(self, client: str, round: int) -> bool:
        """Whether a client may take part in `round`."""
        return self._spent(client, round - 1) < self.plan.max_rounds

    def charge(self, round: int, counts: Mapping[str, int]) -> None:
        """Charge each client for `round`, by its declared count: on disk when this returns."""
        new = {name: count for name, count in sorted(counts.items()) if self.plan.secure or not self._has(name, round)}
        rows = [
            {"round": round, "client": name, "num_examples": count, **vars(self.plan.spending(count, 1))}
            for name, count in new.items()
        ]
        self.books.charge(rows)
        self._note(rows)

    def figures(self, round: int) -> dict[str, Any]:
        """The entry in a round's metrics: the largest epsilon over clients after it."""
        return {"epsilon": max(self.by_client(round).values(), default=0.0)}

    def summary(self, round: int) -> dict[str, Any]:
        """The entries of the summary: the largest epsilon, the plan, and what each client has spent."""
        return self.figures(round) | {"privacy": {"plan": self.plan.table(), "epsilon_by_client": self.by_client(round)}}

    def by_client(self, round: int) -> dict[str, float]:
        """Epsilon of each client that was charged, after `round`."""
        return {name: self.plan.epsilon_after(count, self._spent(name, round)) for name, count in sorted(self.declared.items())}

    def close(self) -> None:
        """Finish the run: its key is no longer needed and is deleted."""
        if self.key_name:
            noise.forget_key(self.key_name)

    def _note(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self.rounds.setdefault(row["client"], []).append(row["round"])
            self.declared[row["client"]] = row["num_examples"]

    def _has(self, client: str, round: int) -> bool:
        return round in self.rounds.get(client, ())

    def _spent(self, client: str, round: int) -> int:
        """The charged rounds up to `round`: each once with a key; with the system's noise, every attempt."""
        own = self.rounds.get(client, [])
        return len(own) if self.plan.secure else sum(each <= round for each in set(own))


def open_ledger(plan: PrivacyPlan | None, config: Mapping[str, Any], books: Books) -> Ledger | Unlimited:
    """The ledger of a new or resumed run; `config` is the run's whole configuration.

    Raises `RunError` if the run was started with another plan, or if a client took part that was not charged.
    """
    if plan is None:
        return Unlimited()
    make = (lambda: "") if plan.secure else (lambda: noise.keep_key(noise.new_key(config)))
    ledger = Ledger(plan, books, books.keep_plan(plan.table(), make))
    for row in books.clients():
        if row["status"] in _TRAINED and not ledger._has(row["client"], row["round"]):
            raise RunError(
                f"privacy ledger: {row['client']} took part in round {row['round']} and has no charge for it, so what was "
                "spent is not known; start a new run with another --out"
            )
    return ledger
