"""Records as frames: what travels in a round, and what each side already has.

A download's frame holds what the site cannot know. Factors that are not sent (FFA-LoRA's A, which follows from the seed) and
private parts (FedSA's B and head) are absent; the site passes its own to `download_of`. For factors that follow from the seed
the frame has a digest, so that a site whose own differ is refused and does not train on something else. An upload's frame holds
exactly the factors of `Download.train` and the plain tensors, without private parts; `update_of` takes the rest from the
download.

The sum in the base model, `Download.merged`, is only read by clients. It may be sent with fewer bits (`reduced`, see
`anyrank.messages.reduction`); everything else is exact.

Each function that reads a frame raises `FrameError`, in one line, if it is not what it should be. Nothing in a frame is code.
Whether numbers are finite and changes moderate is for the guard, and whether a plan is within a site's limits for the site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import TrainConfig
from anyrank.errors import FrameError, shortened
from anyrank.messages import body, counts, reduction
from anyrank.messages.body import Packing, Parts, check_least, check_type, expect, fields, made, record
from anyrank.messages.frame import Frame, Header
from anyrank.messages.plan import Plan
from anyrank.messages.records import BOTH, EVERYTHING, Client, ClientUpdate, Code, Download, Failure, Job, Pruning, Reported
from anyrank.messages.reduction import Reduced

PLAN, DOWNLOAD, UPDATE, FAILURE, COUNTS = "plan", "download", "update", "failure", "counts"


# --- plan ------------------------------------------------------------------------------------------------------------


def plan_frame(plan: Plan, run: str = "") -> Frame:
    return Frame(Header(PLAN, run, plan.round, body={"plan": dataclasses.asdict(plan)}), {})


def plan_of(frame: Frame) -> Plan:
    """The plan in a plan's or a download's frame."""
    expect(frame, PLAN, DOWNLOAD)
    if frame.header.kind == PLAN:
        fields("plan", dict(frame.header.body), plan=dict)
        Parts(frame).finish()
    keys = {"config": dict, "learning_rate": (float, int), "round": int, "seed": int, "step_factor": int}
    config, rate, round, seed, factor = fields("plan", frame.header.body.get("plan"), **keys)
    if not rate >= 0:
        raise FrameError(f"plan, learning_rate: expected a number of at least 0, got {rate}")
    for name, value, least in (("round", round, 1), ("step_factor", factor, 1)):
        check_least(f"plan, {name}", value, least)
    if round != frame.header.round:
        raise FrameError(f"plan, round: expected {frame.header.round}, the frame's, got {round}")
    return Plan(record("plan, config", TrainConfig, config), rate, round, seed, factor)


# --- download --------------------------------------------------------------------------------------------------------


def download_frame(
    download: Download, plan: Plan, client: Client, num_examples: int, run: str = "", reduced: Reduced = ""
) -> Frame:
    """A client's job in one round: its download, with the plan, its rank and its number of examples.

    The arrays share the memory of the download's tensors. Their bytes are `download.download_bytes(reduced)`.
    """
    reduction.check(reduced)
    packing, merged = Packing(), download.merged
    body.pack(packing, "", download.adapter, _sent(download))
    if merged:
        _no_tensors(merged.tensors)
        body.pack(packing, "merged-", merged, BOTH, reduced)
    values = {
        "plan": dataclasses.asdict(plan),
        "client": {"name": client.name, "rank": client.rank, "layer_ranks": dict(client.layer_ranks)},
        "num_examples": num_examples,
        "adapter": body.describe(download.adapter),
        "slices": {name: _short(slices) for name, slices in download.slices.items()},
        **{key: sorted(getattr(download, key)) for key in ("train", "send", "private")},
        "merged": body.describe(merged) if merged else None,
        "pruning": dataclasses.asdict(download.pruning) if download.pruning else None,
        "rescale": download.rescale,
        "absent": body.digest(download.adapter, BOTH - download.send - download.private),
        "reduced": reduced,
    }
    return packing.frame(Header(DOWNLOAD, run, plan.round, client.name, values))


def absent(frame: Frame) -> frozenset[str]:
    """Which of `A`, `B` and `tensors` a download's frame does not hold: `download_of` needs the site's own."""
    expect(frame, DOWNLOAD)
    return EVERYTHING - _sent(_outline(_values(frame)))


def download_of(frame: Frame, own: Adapter | None = None) -> Download:
    """The download in a frame. `own`: what the site has itself, in the client's ranks, for what is `absent`.

    For private parts this is the client's adapter after its last training. Before the first one, and for factors that follow
    from the seed, it is the adapter of `method.dispatch` on the method's start, `method.init`, at the plan's round.
    """
    values, parts = _values(frame), Parts(frame)
    outline = _outline(values)
    lacking = EVERYTHING - _sent(outline)
    adapter = body.unpack(parts, "", values["adapter"], lacking, own)
    _check_absent(adapter, BOTH - outline.send - outline.private, values["absent"])
    merged = None
    if values["merged"] is not None:
        merged = body.unpack(parts, "merged-", values["merged"], frozenset(), None, values["reduced"])
        _no_tensors(merged.tensors)
    parts.finish()
    pruning = record("download, pruning", Pruning, values["pruning"]) if values["pruning"] is not None else None
    slices = _slices(values["slices"], adapter)
    return dataclasses.replace(outline, adapter=adapter, slices=slices, merged=merged, pruning=pruning)


def client_of(frame: Frame) -> Client:
    """The client that a download's frame is for."""
    name, rank, layer_ranks = fields("download, client", _values(frame)["client"], name=str, rank=int, layer_ranks=dict)
    for where, number in (("rank", rank), *layer_ranks.items()):
        check_least(f"download, {where}", number, 1)
    if name != frame.header.client:
        raise FrameError(f"download, client: expected {frame.header.client}, the frame's, got {name}")
    return Client(name, rank, layer_ranks)


def job_of(frame: Frame, own: Adapter | None = None) -> Job:
    """The job of a download's frame, as a trainer takes it; the download is made at once."""
    download, client, num_examples = download_of(frame, own), client_of(frame), _values(frame)["num_examples"]
    check_least("download, num_examples", num_examples, 1)
    return Job(client, num_examples, lambda: download)


def _sent(download: Download) -> frozenset[str]:
    return (download.send | {"tensors"}) - download.private


def _values(frame: Frame) -> dict[str, Any]:
    """The body of a download's frame, with known keys of known types."""
    expect(frame, DOWNLOAD)
    keys = {
        **{"plan": dict, "client": dict, "num_examples": int, "adapter": dict, "slices": dict},
        **{"train": list, "send": list, "private": list, "merged": (dict, type(None)), "pruning": (dict, type(None))},
        **{"rescale": str, "absent": str, "reduced": str},
    }
    values = dict(frame.header.body)
    fields("download", values, **keys)
    reduction.check(values["reduced"])
    return values


def _outline(values: Mapping[str, Any]) -> Download:
    """The download without its adapters."""
    train, send = (_names(key, values[key], BOTH) for key in ("train", "send"))
    private, rescale = _names("private", values["private"], EVERYTHING), values["rescale"]
    if rescale not in ("B", "both"):
        raise FrameError(f"download, rescale: expected B or both, got {shortened(rescale, 100)}")
    return Download(Adapter({}), {}, train, send, private, rescale=rescale)


def _names(key: str, names: list[Any], known: frozenset[str]) -> frozenset[str]:
    odd = [name for name in names if not isinstance(name, str) or name not in known]
    if odd or len(set(names)) != len(names):
        raise FrameError(
            f"download, {key}: expected different ones of {', '.join(sorted(known))}, got {shortened(repr(names), 100)}"
        )
    return frozenset(names)


def _short(slices: tuple[int, ...]) -> int | list[int]:
    """The first r slices as their number, others as they are."""
    return len(slices) if slices == tuple(range(len(slices))) else list(slices)


def _slices(table: Mapping[str, Any], adapter: Adapter) -> dict[str, tuple[int, ...]]:
    if table.keys() != adapter.layers.keys():
        raise FrameError("download, slices: expected one entry per layer of the adapter, got others")
    found = {}
    for name, entry in table.items():
        where, rank = f"download, slices of {name}", adapter.layers[name].rank
        first = type(entry) is int and entry == rank
        named = range(rank) if first else entry if isinstance(entry, list) else ()
        for number in named:
            check_least(where, number, 0)
        if len(set(named)) != rank or len(named) != rank:
            raise FrameError(f"{where}: expected {rank} different slices, got {shortened(repr(entry), 100)}")
        found[name] = tuple(named)
    return found


def _check_absent(adapter: Adapter, factors: frozenset[str], expected: str) -> None:
    found = body.digest(adapter, factors)
    if found != expected:
        raise FrameError(
            f"download, {', '.join(sorted(factors)) or 'factors'}: expected the digest {expected[:16] or 'none'}, got "
            f"{found[:16] or 'none'}, the site's own; use one version of anyrank and torch, one method and seed everywhere"
        )


def _no_tensors(tensors: Mapping[str, Any]) -> None:
    if tensors:
        raise FrameError(f"download, merged: expected no plain tensors, got {next(iter(tensors))}; put them into the adapter")


# --- update and failure ----------------------------------------------------------------------------------------------


def update_frame(update: ClientUpdate, download: Download, run: str = "", round: int = 0) -> Frame:
    """A client's upload: what `download` asks to train, without private parts. Its arrays are `download.upload_bytes(...)`
    bytes; counts, if there are any, stand in the header."""
    for what in ("layers", "tensors"):
        _same_names(what, getattr(download.adapter, what), getattr(update.adapter, what))
    packing = Packing()
    body.pack(packing, "", update.adapter, (download.train | {"tensors"}) - download.private)
    values = {"num_examples": update.num_examples, "metrics": dict(update.metrics)}
    values |= {"counts": counts.table(update.counts)} if update.counts else {}
    return packing.frame(Header(UPDATE, run, round, update.client, values))


def update_of(frame: Frame, download: Download) -> ClientUpdate:
    """The update in a frame, in the form of `download`, from which everything is taken that was not to be uploaded.

    A layer may have the rank that `download.pruning` leaves. The server knows what it sent: `download` is its own.
    """
    expect(frame, UPDATE)
    table = dict(frame.header.body)
    reported = counts.of("update, counts", table.pop("counts")) if "counts" in table else None
    num_examples, metrics = fields("update", table, num_examples=int, metrics=dict)
    for name, value in metrics.items():
        check_type(f"update, metric {name}", value, (float, int))
    parts, sent = Parts(frame), download.adapter
    layers = {name: _trained(parts, name, layer, download) for name, layer in sent.layers.items()}
    tensors = dict(sent.tensors)
    if "tensors" not in download.private:
        tensors = {name: parts.tensor(f"tensor/{name}", t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    parts.finish()
    adapter = Adapter(layers, tensors, sent.config)
    return made("update", ClientUpdate, adapter, num_examples, frame.header.client, metrics, reported)


def counts_frame(reported: Reported, run: str = "", round: int = 0) -> Frame:
    """The reply of a client that only scores."""
    values = {"counts": counts.table(reported.counts) if reported.counts else None}
    return Frame(Header(COUNTS, run, round, reported.client, values), {})


def counts_of(frame: Frame) -> Reported:
    expect(frame, COUNTS)
    (table,) = fields("counts", dict(frame.header.body), counts=(dict, type(None)))
    Parts(frame).finish()
    return Reported(frame.header.client, None if table is None else counts.of("counts", table))


def failure_frame(failure: Failure, run: str = "", round: int = 0, with_reason: bool = False) -> Frame:
    """A client's failure: its code. The reason may say something about the site's data; it is sent only if that is allowed."""
    values = {"code": failure.code.name, "reason": failure.reason if with_reason else ""}
    return Frame(Header(FAILURE, run, round, failure.client, values), {})


def failure_of(frame: Frame) -> Failure:
    expect(frame, FAILURE)
    code, reason = fields("failure", dict(frame.header.body), code=str, reason=str)
    Parts(frame).finish()
    if code not in Code.__members__:
        raise FrameError(f"failure, code: expected one of {', '.join(Code.__members__)}, got {shortened(code, 100)}")
    return Failure(frame.header.client, Code[code], reason)


def reply_of(frame: Frame, download: Download) -> ClientUpdate | Failure:
    """The reply to a job: an update or a failure."""
    expect(frame, UPDATE, FAILURE)
    return failure_of(frame) if frame.header.kind == FAILURE else update_of(frame, download)


def _trained(parts: Parts, name: str, sent: LoraLayer, download: Download) -> LoraLayer:
    """A layer with its trained factors from the frame, at the rank that they have."""
    factors, ranks = {"A": sent.A, "B": sent.B}, {sent.rank}
    if download.pruning:
        ranks.add(download.pruning.kept(sent.rank))
    came = sorted(download.train - download.private)
    for factor in came:
        shapes = [(r, sent.shape[1]) if factor == "A" else (sent.shape[0], r) for r in sorted(ranks)]
        factors[factor] = parts.tensor(f"{factor}/{name}", sent.A.dtype, *shapes)
        ranks = {factors[factor].shape[0 if factor == "A" else 1]}
    rank = min(ranks) if came else sent.rank
    return sent.with_factors(factors["A"][:rank], factors["B"][:, :rank])


def _same_names(what: str, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    differing = sorted(expected.keys() ^ got.keys())
    if differing:
        has, lacks = ("the download", "the update") if differing[0] in expected else ("the update", "the download")
        raise FrameError(f"update, {what}: expected those of the download; {differing[0]} is in {has} and not in {lacks}")
