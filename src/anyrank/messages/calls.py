"""What a server and a worker say to each other besides a round's downloads and uploads, as frames.

    setup       what the worker is to load: a configuration, the largest rank       -> progress …, ready
    start       the adapter that a run starts from is wanted                         -> adapter
    cohort      downloads follow, of clients that train, or only score               -> one reply each: update, counts, failure
    evaluate    an adapter, and the sum in the base model, to score                  -> scores

A worker answers `error` where a request is wrong, with the kind of error and its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyrank import errors
from anyrank.adapter.adapter import Adapter
from anyrank.errors import AnyRankError, FrameError, RunFailed
from anyrank.messages import body
from anyrank.messages.body import Packing, Parts, check_least, check_type, expect, fields, made, record
from anyrank.messages.frame import Frame, Header
from anyrank.messages.records import BOTH, EVERYTHING, Facts, Scaling
from anyrank.messages.roster import Roster

SETUP, PROGRESS, READY, START, ADAPTER = "setup", "progress", "ready", "start", "adapter"
COHORT, EVALUATE, ERROR = "cohort", "evaluate", "error"


def setup_frame(config: Mapping[str, Any], largest_rank: int, run: str = "") -> Frame:
    """`config`: the table of a configuration."""
    return Frame(Header(SETUP, run, body={"config": dict(config), "largest_rank": largest_rank}), {})


def setup_of(frame: Frame) -> tuple[dict[str, Any], int]:
    expect(frame, SETUP)
    config, rank = fields("setup", dict(frame.header.body), config=dict, largest_rank=int)
    Parts(frame).finish()
    check_least("setup, largest_rank", rank, 1)
    return config, rank


def progress_frame(done: int, total: int) -> Frame:
    return Frame(Header(PROGRESS, body={"done": done, "total": total}), {})


def progress_of(frame: Frame) -> tuple[int, int]:
    expect(frame, PROGRESS)
    done, total = fields("progress", dict(frame.header.body), done=int, total=int)
    Parts(frame).finish()
    return done, total


# --- ready -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ready:
    """A worker that has loaded its task: the `roster` of the clients that it can train, whether it trains clients of a round
    `together`, the bytes of memory that it has taken, and the digest of its base model (empty: not given). A worker of a
    private run on the server's own machine gives the digests of all that it holds, as JSON.
    """

    roster: Roster
    together: bool = False
    memory: int = 0
    base_digest: str = ""


_ROSTER_ARRAYS = {"sizes": 1, "by_label": 2, "owners": 1, "held_out": 1}  # with their dimensions


def ready_frame(ready: Ready, run: str = "") -> Frame:
    known = ready.roster
    arrays = {key: np.asarray(value) for key in _ROSTER_ARRAYS if (value := getattr(known, key)) is not None}
    facts = {key: value for key, value in vars(known.facts).items() if key != "label_names"}
    values = {
        **{"names": list(known.names), "pooled": known.pooled, "in_order": known.in_order, "facts": facts},
        **{"label_names": list(known.facts.label_names), "together": ready.together, "memory": ready.memory},
        "base_digest": ready.base_digest,
    }
    return Frame(Header(READY, run, body=values), arrays)


def ready_of(frame: Frame) -> Ready:
    expect(frame, READY)
    keys = {
        **{"names": list, "pooled": int, "in_order": bool, "facts": dict, "label_names": list},
        **{"together": bool, "memory": int, "base_digest": str},
    }
    names, pooled, in_order, facts, labels, together, memory, base = fields("ready", dict(frame.header.body), **keys)
    for name in (*names, *labels):
        check_type("ready, names", name, str)
    for name, value in (("pooled", pooled), ("memory", memory)):
        check_least(f"ready, {name}", value, 0)
    parts = Parts(frame)
    arrays = {key: _integers(parts, key) if key in parts else None for key in _ROSTER_ARRAYS}
    parts.finish()
    about = record("ready, facts", Facts, facts, label_names=tuple(labels))
    if arrays["sizes"] is None:
        raise FrameError("ready, sizes: expected an array of that name, got none")
    roster = Roster(tuple(names), facts=about, pooled=pooled, in_order=in_order, **arrays)
    _check_roster(roster)
    return Ready(roster, together, memory, base)


def _integers(parts: Parts, key: str) -> np.ndarray:
    array, dimensions = parts.array(key), _ROSTER_ARRAYS[key]
    if array.dtype != np.int64 or array.ndim != dimensions:
        raise FrameError(f"ready, {key}: expected int64 of {dimensions} dimensions, got {array.dtype} of {array.ndim}")
    return array


def _check_roster(roster: Roster) -> None:
    """Raise `FrameError` where a roster's parts do not fit together."""
    sizes, by_label, owners = roster.sizes, roster.by_label, roster.owners
    if not len(sizes) or (sizes < 0).any() or (roster.names and len(roster.names) != len(sizes)):
        raise FrameError("ready, sizes: expected a number of examples for each client, at least one client, each of at least 0")
    if len(set(roster.names)) != len(roster.names):
        raise FrameError("ready, names: expected different names, got one twice")
    if by_label is not None and ((by_label < 0).any() or len(by_label) != len(sizes) or (by_label.sum(axis=1) != sizes).any()):
        raise FrameError("ready, by_label: expected rows of at least 0 that add up to the clients' sizes, got others")
    held = roster.held_out
    if held is not None and (held.shape != sizes.shape or (held < 0).any()):
        raise FrameError("ready, held_out: expected a number of examples for each client, of at least 0, got others")
    if owners is not None and ((owners < -1).any() or (owners >= len(sizes)).any()):
        raise FrameError(f"ready, owners: expected places from -1 to {len(sizes) - 1}, got others")


# --- adapters --------------------------------------------------------------------------------------------------------


def start_frame(rank: int, scaling: Scaling, seed: int, run: str = "") -> Frame:
    values = {"rank": rank, "alpha": scaling.alpha, "rule": scaling.rule, "layer_alpha": dict(scaling.layer_alpha)}
    return Frame(Header(START, run, body=values | {"seed": seed}), {})


def start_of(frame: Frame) -> tuple[int, Scaling, int]:
    expect(frame, START)
    keys = {"rank": int, "alpha": (float, int), "rule": str, "layer_alpha": dict, "seed": int}
    rank, alpha, rule, layer_alpha, seed = fields("start", dict(frame.header.body), **keys)
    Parts(frame).finish()
    check_least("start, rank", rank, 1)
    for name, value in layer_alpha.items():
        check_type(f"start, layer_alpha of {name}", value, (float, int))
    return rank, made("start", Scaling, alpha, rule, layer_alpha), seed


def adapter_frame(adapter: Adapter, merged: Adapter | None = None, kind: str = ADAPTER, run: str = "") -> Frame:
    """A whole adapter, and the sum in the base model; `kind`: `ADAPTER`, or `EVALUATE` for one to score."""
    packing = Packing()
    body.pack(packing, "", adapter, EVERYTHING)
    if merged:
        body.pack(packing, "merged-", merged, BOTH)
    values = {"adapter": body.describe(adapter), "merged": body.describe(merged) if merged else None}
    return packing.frame(Header(kind, run, body=values))


def adapter_of(frame: Frame, kind: str = ADAPTER) -> tuple[Adapter, Adapter | None]:
    expect(frame, kind)
    table, into_base = fields(kind, dict(frame.header.body), adapter=dict, merged=(dict, type(None)))
    parts = Parts(frame)
    adapter = body.unpack(parts, "", table, frozenset(), None)
    merged = body.unpack(parts, "merged-", into_base, frozenset(), None) if into_base is not None else None
    parts.finish()
    return adapter, merged


# --- cohorts and errors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cohort:
    """What is wanted of the clients whose `jobs` downloads follow. `score`: their results on their own held-out examples, of
    what they download, before they train; `train`: their training, as otherwise nothing but these results is sent. With
    neither, a site that no longer trains keeps what it is sent. `deadline_s`: seconds for each client's training.
    `mechanism`: a table of the privacy plan and the key of its noise, only for workers of the same user on the same machine.
    """

    jobs: int
    deadline_s: float | None = None
    mechanism: Mapping[str, Any] | None = None
    score: bool = False
    train: bool = True


def cohort_frame(cohort: Cohort, run: str = "") -> Frame:
    return Frame(Header(COHORT, run, body=dict(vars(cohort))), {})


def cohort_of(frame: Frame) -> Cohort:
    expect(frame, COHORT)
    keys = {"jobs": int, "deadline_s": (float, int, type(None)), "mechanism": (dict, type(None)), "score": bool, "train": bool}
    found = Cohort(*fields("cohort", dict(frame.header.body), **keys))
    Parts(frame).finish()
    check_least("cohort, jobs", found.jobs, 1)
    if found.deadline_s is not None and found.deadline_s <= 0:
        raise FrameError(f"cohort, deadline_s: expected a number above 0 or null, got {found.deadline_s}")
    return found


def error_frame(error: AnyRankError, run: str = "") -> Frame:
    return Frame(Header(ERROR, run, body={"kind": type(error).__name__, "text": str(error)}), {})


def error_of(frame: Frame) -> AnyRankError:
    """The error that a worker reports; of a kind that is not known here, `RunFailed`."""
    expect(frame, ERROR)
    kind, text = fields("error", dict(frame.header.body), kind=str, text=str)
    Parts(frame).finish()
    found = getattr(errors, kind, None)
    known = isinstance(found, type) and issubclass(found, AnyRankError)
    return (found if known else RunFailed)(text)
