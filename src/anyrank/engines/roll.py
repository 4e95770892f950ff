"""Many sites as one federation: what each of them says it is, checked against the others, in one roster."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anyrank.adapter.adapter import Adapter
from anyrank.errors import RunFailed, printable, shortened
from anyrank.messages import body
from anyrank.messages.calls import Ready
from anyrank.messages.records import BOTH, EVERYTHING, Facts
from anyrank.messages.roster import Roster

_ALIKE = ("task", "head", "label_names", "model_bytes")  # facts that all sites must agree on
_BASE = "base_model_name_or_path"  # an entry of an adapter's config: at a site, it may be a folder of its own
_MOST = 2**53  # examples of a site: a weight that float64 holds exactly


@dataclass(frozen=True, eq=False)
class Joined:
    """What a site said when it was set up: `ready`, and the digest of the adapter that it starts from."""

    ready: Ready
    start: str = ""

    @property
    def declared(self) -> tuple[int, int]:
        """Its numbers of training and of held-out examples."""
        return int(self.ready.roster.sizes[0]), _held_out(self.ready)


def check_one(name: str, ready: Ready) -> None:
    """Raise `RunFailed` unless `ready` is of the one site `name`, with plausible numbers."""
    roster = ready.roster
    if roster.names != (name,) or len(roster.sizes) != 1:
        told = ", ".join(map(_told, roster.names[:3])) or "no name"
        raise RunFailed(f"site {name}: expected to hear from it alone, got {told}; correct the name in the site's own file")
    if max(int(roster.sizes[0]), _held_out(ready)) > _MOST:
        raise RunFailed(f"site {name}: expected at most 2^53 examples, got more")


def check_same(name: str, before: Joined, now: Joined) -> None:
    """Raise `RunFailed` if a site that was started anew is not what it was before."""
    if before.declared != now.declared:
        was, came = (" and ".join(map(str, each.declared)) for each in (before, now))
        raise RunFailed(
            f"site {name}: declared {was} training and held-out examples when the run began, and {came} now; a run goes on "
            "with the same examples"
        )
    if _digests(before) != _digests(now):
        raise RunFailed(f"site {name}: has another base model or version than when the run began; go on with the same ones")


def roster_of(joined: Mapping[str, Joined]) -> Roster:
    """The roster of all sites, in the order of their names. Raises `RunFailed` that names a site which differs."""
    names = sorted(joined)
    _agree({name: _digests(joined[name]) for name in names}, "base model, or version of anyrank and torch")
    for fact in _ALIKE:
        values = {name: getattr(joined[name].ready.roster.facts, fact) for name in names}
        _agree(values, fact.replace("_", " "), show=True)
    facts = [joined[name].ready.roster.facts for name in names]
    return Roster(
        names=tuple(names),
        sizes=np.array([joined[name].declared[0] for name in names], np.int64),
        pooled=0,
        facts=_sum(facts),
        in_order=True,
        held_out=np.array([joined[name].declared[1] for name in names], np.int64),
    )


def digest_of(adapter: Adapter) -> str:
    """SHA-256 of all of an adapter but the name of its base model: names, shapes, types, scalings and numbers."""
    total = hashlib.sha256(json.dumps(body.describe(adapter), sort_keys=True).encode())
    for name in sorted(adapter.layers):  # one layer in memory at a time
        one = Adapter({name: adapter.layers[name]})
        _add(total, one, BOTH)
    _add(total, Adapter({}, adapter.tensors), EVERYTHING)
    return total.hexdigest()


def with_base(adapter: Adapter, name: str) -> Adapter:
    """The adapter with the `name` of its base model (empty: without one)."""
    return replace(adapter, config={**adapter.config, _BASE: name or None})


def _add(total: Any, adapter: Adapter, parts: frozenset[str]) -> None:
    packing = body.Packing()
    body.pack(packing, "", adapter, parts)
    for name, array in sorted(packing.arrays.items()):
        total.update(f"{name}\0".encode() + np.ascontiguousarray(array).tobytes())


def _sum(facts: list[Facts]) -> Facts:
    """The facts of all sites: numbers of examples are added up, everything else is the same. A name of the base model that is
    not the same everywhere, as that of a folder, is left out: digests show that it is the same model."""
    sums: dict[str, Any] = {
        key: sum(getattr(each, key) for each in facts) for key in ("train_examples", "test_examples", "inputs_bytes")
    }
    named = len({each.base_model for each in facts}) == 1
    sums |= {"base_model": facts[0].base_model if named else ""}
    return replace(facts[0], **sums, inputs_on_disk=any(each.inputs_on_disk for each in facts))


def _agree(values: Mapping[str, object], what: str, show: bool = False) -> None:
    """Raise `RunFailed` that names the site whose value most others do not have."""
    by_value: dict[object, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    if len(by_value) < 2:
        return
    usual = max(by_value, key=lambda value: len(by_value[value]))  # of equally many, that of the first site by name
    odd = next(name for name, value in values.items() if value != usual)
    got = f" ({_told(str(values[odd]))}, not {_told(str(usual))})" if show else ""
    raise RunFailed(f"site {odd}: has another {what} than site {by_value[usual][0]}{got}; use the same one at every site")


def _digests(joined: Joined) -> tuple[str, str]:
    return joined.ready.base_digest, joined.start


def _held_out(ready: Ready) -> int:
    held = ready.roster.held_out
    return 0 if held is None else int(held[0])


def _told(text: str) -> str:
    return shortened(printable(text), 100)
