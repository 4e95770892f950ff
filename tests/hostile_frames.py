"""Frames that a stranger may send: damaged bytes, and frames whole in form that say something else than they should.

`frames` takes any bytes, for `tests/fuzz.py`; `tests/test_frames.py` tries some of each kind.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import TrainConfig
from anyrank.errors import FrameError, RunFailed, printable
from anyrank.messages import calls, wire
from anyrank.messages import frame as framing
from anyrank.messages.frame import Frame
from anyrank.messages.plan import Plan
from anyrank.messages.records import Client, ClientUpdate, Counts, Download, Facts, Pruning, Reported, Scaling
from anyrank.messages.roster import Roster
from anyrank.messages.scores import scores_of

LIMIT = 1 << 20
PREFIX = struct.Struct("<7sBQQ")
VALUES = (
    None, True, 0, 1, -1, 2, 3.0, 0.5, -0.0, 1e308, 2**53, 2**62, -(2**63), 10**400, "", "A", "x" * 1000, "\x1b[31m\n",
    "\ud800", "\u202e", [], [[]], {}, {"": 0}, [0, 1], [1, 0], ["A", "B"], ["B"], ["tensors"],
    "bfloat16", "int8", "float64", "B", "both",
)  # fmt: skip


def good_download() -> Download:
    layer = LoraLayer(torch.arange(12.0).view(2, 6), torch.ones(5, 2), 2.0)
    narrow = LoraLayer(torch.ones(2, 9, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.bfloat16), 1.0, "conv2d", (3, 3))
    adapter = Adapter({"q": layer, "conv": narrow}, {"head": torch.ones(3), "mask": torch.tensor([True, False])}, {"a": [1]})
    return Download(adapter, {"q": (0, 1), "conv": (3, 1)}, merged=Adapter({"q": layer}), pruning=Pruning(0.5, 0.1, 1))


def good_frames() -> list[Frame]:
    """A download, exact and with fewer bits, one that lacks parts, updates, counts; and what server and worker say besides."""
    download, plan, client = good_download(), Plan(TrainConfig(), 1e-3, 2, 7), Client("ada", 2, {"q": 2})
    lacking = Download(download.adapter, download.slices, frozenset("B"), frozenset("B"), frozenset({"tensors"}))
    return [
        wire.download_frame(download, plan, client, 17, "run"),
        wire.download_frame(download, plan, client, 17, "run", "int8"),
        wire.download_frame(lacking, plan, client, 17, "run"),
        wire.update_frame(ClientUpdate(download.adapter, 17, "ada", {"loss": 1.0}), download, "run", 2),
        wire.update_frame(ClientUpdate(download.adapter, 17, "ada", {}, good_counts()), download, "run", 2),
        wire.counts_frame(Reported("ada", good_counts()), "run", 2),
        wire.counts_frame(Reported("ada", None), "run", 2),
        *good_calls(download.adapter),
    ]


def good_counts() -> Counts:
    return Counts(5, 2.5, 3, {"yes": (2, 1), "no": (3, 2)})


def good_calls(adapter: Adapter) -> list[Frame]:
    """One frame of each kind of `anyrank.messages.calls`."""
    return [
        calls.setup_frame({"run": {"seed": 1}}, 4, "run"),
        calls.progress_frame(1, 2),
        calls.ready_frame(good_ready(), "run"),
        calls.start_frame(4, Scaling(16.0, "rslora", {"q": 8.0}), 7, "run"),
        calls.adapter_frame(adapter, Adapter({"q": adapter.layers["q"]}), calls.EVALUATE, "run"),
        calls.cohort_frame(calls.Cohort(2, 1.5, {"key": None}, score=True, train=False), "run"),
        calls.error_frame(RunFailed("it failed"), "run"),
    ]


def good_ready() -> calls.Ready:
    facts = Facts("texts", "trained", "tiny", ("yes", "no"), 12, 5, 1000, True, 4000)
    by_label, owners = np.array([[3, 4], [5, 0]]), np.array([0, 1, -1, 0, 0])
    roster = Roster(("ada", "bob"), np.array([7, 5]), 12, facts, True, by_label, owners, np.array([3, 1]))
    return calls.Ready(roster, True, 10**9, "0f")


def frames(data: bytes) -> str:
    """Read `data` as a frame, and what it has as each record: everything is taken or refused in a line. The outcome."""
    try:
        frame = framing.from_bytes(data, LIMIT)
    except FrameError as error:
        return _refused(error)
    assert framing.to_bytes(frame) == framing.to_bytes(framing.from_bytes(framing.to_bytes(frame), LIMIT))
    outcomes = [_tried(read) for read in _readers(frame)]
    return "read" if "read" in outcomes else "refused as a record"


def sealed(text: bytes, numbers: bytes, version: int = framing.VERSION, **lengths: int) -> bytes:
    """A header and arrays with the lengths and the digest that belong to them; `header`, `arrays`: lengths of other numbers."""
    said = {"header": len(text), "arrays": len(numbers)} | lengths
    data = PREFIX.pack(b"ANYRANK", version, said["header"], said["arrays"]) + text + numbers
    return data + hashlib.sha256(data).digest()


def unsealed(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the arrays of a frame's bytes."""
    length = PREFIX.unpack_from(data)[2]
    start = PREFIX.size + length
    return json.loads(data[PREFIX.size : start]), data[start:-32]


def spoiled_frame(chance: random.Random) -> bytes:
    """A frame with a right digest whose header says something else than it should, or whose bytes are damaged."""
    data = framing.to_bytes(chance.choice(good_frames()))
    if chance.random() < 0.3:
        place = chance.randrange(len(data))
        return (
            data[:place] + chance.choice((b"", chance.randbytes(1), chance.randbytes(9))) + data[place + chance.randrange(9) :]
        )
    header, arrays = unsealed(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        _spoil(header["body"] if chance.random() < 0.6 and isinstance(header.get("body"), dict) else header, chance)
    if chance.random() < 0.2:
        arrays = arrays[: chance.randrange(len(arrays) + 1)] + chance.randbytes(chance.randrange(9))
    text = json.dumps(header).encode()
    if chance.random() < 0.1:
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice((b"{", b"[" * 5000, b"1e999", b"NaN", b"\xff", b'"a":1,')) + text[place:]
    return sealed(text, arrays)


def _spoil(value: Any, chance: random.Random) -> None:
    """Change, remove or add one entry somewhere in tables and lists."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and chance.random() < 0.8:
            value = value[key]
            continue
        deed = chance.randrange(4)
        if deed == 0:
            del value[key]
        elif deed == 1 and isinstance(value, dict):
            value[chance.choice(("x", "", "A", *map(str, keys)))] = copy.deepcopy(chance.choice(VALUES))
        else:
            value[key] = copy.deepcopy(chance.choice(VALUES))
        return


def _readers(frame: Frame) -> list[Callable[[], object]]:
    download = good_download()
    return [
        lambda: wire.job_of(frame, download.adapter),
        lambda: wire.job_of(frame),
        lambda: wire.plan_of(frame),
        lambda: wire.reply_of(frame, download),
        lambda: wire.counts_of(frame),
        lambda: scores_of(frame),
        *(partial(read, frame) for read in (calls.setup_of, calls.progress_of, calls.ready_of, calls.start_of)),
        *(partial(read, frame) for read in (calls.cohort_of, calls.error_of, calls.adapter_of)),
        lambda: calls.adapter_of(frame, calls.EVALUATE),
    ]


def _tried(read: Callable[[], object]) -> str:
    try:
        read()
    except FrameError as error:
        return _refused(error)
    return "read"


def _refused(error: FrameError) -> str:
    told = str(error)
    assert told
    assert told == printable(told), "an error that is not one printable line"
    assert len(told) < 2500, "an error without end"
    return "refused"
