"""The ledger of a private run: each client is charged before it trains, so that nothing leaves a client without an entry.

A charge is one line of `privacy.jsonl`, on disk before the client begins. An interrupted round that is repeated with the run's
key releases the same numbers again and is charged once. With noise from the system's source, it releases other numbers and is
charged again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

from anyrank.errors import RunError
from anyrank.privacy import noise
from anyrank.privacy.accountants import Spending
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import PrivacyPlan

SPENT = "its privacy budget is spent"
EMPTY: Mapping[str, int] = MappingProxyType({})


class Account(Protocol):
    """A ledger outside of the run folder, which is charged too. `clients`: those that it is about, `None` for all."""

    clients: frozenset[str] | None

    def charge(self, rounds: Mapping[int, int]) -> None:
        """Charge until each declared count has that many rounds; on disk when this returns."""
        ...


class Books(Protocol):
    """The part of a run folder that stores the privacy ledger."""

    def keep_plan(self, table: Mapping[str, Any], key: Callable[[], str]) -> str:
        """Write the plan with the key's name, or compare it with the stored plan; returns the key's name."""
        ...

    @property
    def origin(self) -> str:
        """A digest of all files, data and versions that the run's releases are computed from."""
        ...

    def charges(self) -> list[dict[str, Any]]: ...

    def charge(self, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def check_charges(self) -> None:
        """Raise `RunError` if the charges of a run that continues are not those that its checkpoint has."""
        ...


class Unlimited:
    """The ledger of a run without privacy: everything is allowed and nothing is written."""

    def mechanism(self, round: int) -> None:
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
        self.accounts: list[Account] = []
        self._note(self._readable(books.charges()))

    def mechanism(self, round: int) -> Mechanism:
        """The plan with its key, for `round`."""
        earlier = {name: self._spent(name, round - 1) for name in sorted(self.rounds)} if self.plan.correlated else None
        return Mechanism(self.plan, noise.find_key(self.key_name) if self.key_name else None, earlier)

    def has_left(self, client: str, round: int) -> bool:
        """Whether a client may take part in `round`."""
        return self._spent(client, round - 1) < self.plan.max_rounds

    def charge(self, round: int, counts: Mapping[str, int]) -> None:
        """Charge each client for `round`, by its declared count: on disk when this returns."""
        new = {name: count for name, count in sorted(counts.items()) if self.plan.secure or not self._has(name, round)}
        for account in self.accounts:
            account.charge(self.most(account.clients, new))
        rows = [
            {"round": round, "client": name, "num_examples": count, **vars(self._more(name, count, round))}
            for name, count in new.items()
        ]
        self.books.charge(rows)
        self._note(rows)

    def _more(self, client: str, count: int, round: int) -> Spending:
        """What a round adds to what the client has spent. With correlated noise, several rounds may share one draw."""
        before = self._spent(client, round - 1)
        after, steps = self.plan.spending(count, before + 1), self.plan.spending(count, before).steps
        return replace(after, steps=after.steps - steps)

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

    def most(self, clients: frozenset[str] | None, more: Mapping[str, int] = EMPTY) -> dict[int, int]:
        """For each declared count, the most rounds that one of these clients is charged for, with one round more for each
        client in `more`, `{client: declared count}`."""
        found: dict[int, int] = {}
        for name, count in {**self.declared, **more}.items():
            if clients is None or name in clients:
                found[count] = max(found.get(count, 0), self._charged(name) + (name in more))
        return {count: rounds for count, rounds in found.items() if rounds}

    def _charged(self, client: str) -> int:
        own = self.rounds.get(client, [])
        return len(own) if self.plan.secure else len(set(own))

    def _note(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self.rounds.setdefault(row["client"], []).append(row["round"])
            self.declared[row["client"]] = row["num_examples"]

    def check_round(self, round: int, drawn: Mapping[str, int]) -> None:
        """Raise `RunError` where a client of the cohort `drawn`, `{client: declared count}`, that had budget left is not
        charged for a round that is over, or by another count."""
        for client, count in drawn.items():
            if not self._has(client, round) and self._tried_before(client, round) < self.plan.max_rounds:
                raise _lost(f"{client} took part in round {round} and is not charged for it")
            if self.declared.get(client, count) != count:
                raise _lost(f"{client} is charged for {self.declared[client]} examples and has {count}")

    def check_repeated(self, over: int) -> None:
        """Raise `RunError` if rounds after the next one, `over + 1`, were begun before, as after a damaged checkpoint.

        With a deadline, the next one may have other replies than it had; those after it would have the same noise over other
        numbers."""
        begun = max((round for rounds in self.rounds.values() for round in rounds), default=0)
        if self.key_name and begun > over + 1:
            raise RunError(
                f"privacy ledger: round {begun} was begun before, and would be repeated with the same noise after round "
                f"{over + 1}, which may have other replies this time (rounds.deadline_s); restore the last checkpoint, or "
                "start the run anew in another --out"
            )

    def _readable(self, rows: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
        for row in rows:
            kinds = [type(row.get(key)) for key in ("round", "client", "num_examples")]
            if kinds != [int, str, int] or row["num_examples"] not in self.plan.noise:
                raise _lost("one of its lines is no charge of this plan")
            yield row

    def _tried_before(self, client: str, round: int) -> int:
        """Rounds that the client was charged for before it was first drawn for `round`."""
        own = [each for each in self.rounds.get(client, []) if each < round]
        return len(own) if self.plan.secure else len(set(own))

    def _has(self, client: str, round: int) -> bool:
        return round in self.rounds.get(client, ())

    def _spent(self, client: str, round: int) -> int:
        """The charged rounds up to `round`: each once with a key; with the system's noise, every attempt."""
        own = self.rounds.get(client, [])
        return len(own) if self.plan.secure else sum(each <= round for each in set(own))


def open_ledger(
    plan: PrivacyPlan | None,
    config: Mapping[str, Any],
    books: Books,
    over: int = 0,
    drawn: Callable[[int], Mapping[str, int]] = lambda round: {},
) -> Ledger | Unlimited:
    """The ledger of a new run, or of one that continues; `config` is the run's whole configuration, `over` the rounds that the
    checkpoint has, `drawn` the cohort of a round, `{client: declared count}`.

    Raises `RunError` if the run was started with another plan, or if a client took part that was not charged.
    """
    if plan is None:
        return Unlimited()
    make = (lambda: "") if plan.secure else (lambda: noise.keep_key(noise.new_key(config, books.origin)))
    ledger = Ledger(plan, books, books.keep_plan(plan.table(), make))
    for round in range(1, over + 1):
        ledger.check_round(round, drawn(round))
    books.check_charges()
    if config.get("rounds", {}).get("deadline_s"):
        ledger.check_repeated(over)
    return ledger


def _lost(what: str) -> RunError:
    return RunError(f"privacy ledger: {what}, so what was spent is not known; start the run anew in another --out")
