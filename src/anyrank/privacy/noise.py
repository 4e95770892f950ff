"""The randomness of private training, and the storage of its key.

Anybody who can draw a run's noise and samples again can remove the noise. They are therefore drawn from a key that is not in
the run folder. It is in the user's own state folder, readable only by the user, and is deleted when the run is finished. A run
that was killed resumes with the same key: the repeated round releases the same numbers again, which reveals nothing new.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from anyrank import files
from anyrank.errors import RunError
from anyrank.privacy import correlated
from anyrank.privacy.owned import SEED, key_folder, seed, write_for_owner
from anyrank.privacy.plan import PrivacyPlan

__all__ = ["SEED", "Draws", "Mechanism", "SystemDraws", "find_key", "keep_key", "key_folder", "name_of", "new_key"]


class Draws(Protocol):
    """A source of random numbers, drawn one after another."""

    def random(self, size: int) -> np.ndarray:
        """Uniform in [0, 1), float64 `[size]`."""
        ...

    def standard_normal(self, size: int) -> np.ndarray:
        """Standard normal, float64 `[size]`."""
        ...


@dataclass(frozen=True)
class SystemDraws:
    """Numbers from the system's cryptographic source, which cannot be drawn again.

    A normal number is half the sum of four Box-Muller numbers, so that its rounding does not reveal the value to which it was
    added (Holohan and Braghin, ESORICS 2021).
    """

    def random(self, size: int) -> np.ndarray:
        words = np.frombuffer(os.urandom(8 * size), dtype=np.uint64)
        return (words >> np.uint64(11)) * 2.0**-53

    def standard_normal(self, size: int) -> np.ndarray:
        radius = np.sqrt(-2 * np.log1p(-self.random(4 * size)))
        return (radius * np.cos(2 * np.pi * self.random(4 * size))).reshape(4, size).sum(axis=0) / 2


@dataclass
class Row:
    """A source whose noise is a row of numbers that are known already, given one after another. It has no uniform numbers."""

    values: np.ndarray
    given: int = 0

    def random(self, size: int) -> np.ndarray:
        raise RunError(f"noise: a row of correlated noise was asked for {size} uniform numbers, which it does not have")

    def standard_normal(self, size: int) -> np.ndarray:
        self.given += size
        if self.given > len(self.values):
            raise RunError(f"noise: expected at most the {len(self.values)} numbers of a step, {self.given} were asked for")
        return self.values[self.given - size : self.given]


@dataclass(frozen=True)
class Mechanism:
    """A plan with the source of its randomness: `key`, or the system's own source if it is `None`.

    `earlier`: the rounds that each client was charged for before this one; correlated noise goes on from there.
    """

    plan: PrivacyPlan
    key: bytes | None = field(default=None, repr=False)
    earlier: Mapping[str, int] | None = None

    def draws(self, round: int, client: str) -> Draws:
        """The random numbers of one client in one round. Without the key, they cannot be predicted.

        Philox has a key of 128 bits; torch's own generator would use only 32 bits of its seed, which could be searched.
        """
        return SystemDraws() if self.key is None else self._drawn("private", round, client)

    def steps(
        self, round: int, client: str, declared: int, examples: int, numbers: int, draws: Draws
    ) -> Iterator[tuple[np.ndarray, Draws]]:
        """For each local step of a client of `examples` examples in a round: whose turn it is, bool `[examples]`, and the
        source of the step's noise, of `numbers` numbers. `draws`: the source of the round, which independent noise comes from.
        """
        plan = self.plan
        if not plan.correlated:
            yield from ((np.ones(examples, dtype=bool), draws) for _ in range(plan.local_steps))
            return
        if self.key is None or self.earlier is None:
            raise RunError("noise: correlated noise needs the run's key and the rounds that were charged before; got none")
        bands, first = plan.bands[declared], self.earlier.get(client, 0) * plan.local_steps
        groups = (self._drawn("group", 0, client).random(examples) * bands).astype(np.int64)  # of each example, for the run
        fresh = functools.partial(self._fresh, client, numbers)
        for step, row in enumerate(correlated.combined(fresh, bands, first, plan.local_steps), first):
            yield groups == step % bands, Row(row)

    def _fresh(self, client: str, numbers: int, step: int) -> np.ndarray:
        """The independent noise of one of a client's steps, counted over all its rounds; `[numbers]`."""
        return self._drawn("step", step, client).standard_normal(numbers)

    def _drawn(self, what: str, place: int, client: str) -> np.random.Generator:
        digest = hmac.digest(self.key, f"{what}\x1f{place}\x1f{client}".encode(), "sha256")
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))

    def observe(self, parameters: Sequence[Any]) -> None:
        """What is done before each private step: nothing. An audit, with a mechanism of its own, reads the noisy gradients."""

    def table(self) -> dict[str, Any]:
        """The mechanism as a JSON object, with its key: only for processes that may have the key."""
        return {"plan": self.plan.table(), "key": self.key.hex() if self.key else None, "earlier": self.earlier}

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Mechanism:
        """The mechanism of a `table()`."""
        plan = dict(table["plan"])
        by_count = {key: {int(count): value for count, value in plan.pop(key).items()} for key in ("noise", "bands")}
        return cls(PrivacyPlan(**plan, **by_count), bytes.fromhex(table["key"]) if table["key"] else None, table["earlier"])


def new_key(config: Mapping[str, Any], origin: str = "") -> bytes:
    """A run's key: 32 fresh random bytes, or, if `$ANYRANK_PRIVACY_SEED` is set, bytes derived from that secret and all that
    the run's releases are computed from: `config`, and `origin`, a digest of data, base model, code and versions.

    With the secret, the same run gives the same bytes again. Another configuration, other data, another base model or another
    version never gets the same noise: the difference of two results would have no noise in it.
    """
    given = seed()
    if given is None:
        return secrets.token_bytes(32)
    if config.get("rounds", {}).get("deadline_s"):
        raise RunError(
            f"${SEED}: with rounds.deadline_s, another client may be late in a second run, whose later rounds would have the "
            "same noise over other values; unset the variable, or set deadline_s = 0"
        )
    return hmac.digest(given, json.dumps([config, origin], sort_keys=True).encode(), "sha256")


def name_of(key: bytes) -> str:
    """A name for a key, which reveals nothing about it."""
    return hashlib.sha256(b"anyrank key name" + key).hexdigest()[:32]


def keep_key(key: bytes) -> str:
    """Store a key so that only its owner can read it; returns its name.

    This uses the mode of the file, if the system has modes. On Windows, other users cannot read the user's profile.
    """
    folder, name = key_folder(), name_of(key)
    files.make_folder(folder, mode=0o700)
    files.sweep(folder)
    files.write_whole(folder / name, lambda path: write_for_owner(path, key.hex()))
    return name


def find_key(name: str) -> bytes:
    """The key of that name; `RunError` if it is missing, does not match its name, or can be read by other users.

    The permissions are checked on POSIX only, because the modes on Windows do not show them.
    """
    path = key_folder() / name
    if not path.is_file():
        raise RunError(
            f"{path}: the noise key of this run is missing, so an interrupted round cannot be repeated with the same "
            "noise; copy the key from the machine where the run started, or start a new run with another --out"
        )
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise RunError(f"{path}: other users can read this noise key, expected mode 600; start a new run with another --out")
    try:
        key = bytes.fromhex(path.read_text(encoding="utf-8"))
    except ValueError:
        key = b""
    if name_of(key) != name:
        raise RunError(f"{path}: is not the noise key that this run started with; start a new run with another --out")
    return key


def forget_key(name: str) -> None:
    """Delete the key of a run that is finished."""
    files.remove(key_folder() / name)
