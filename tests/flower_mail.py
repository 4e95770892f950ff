"""Run by Flower's own Python: frames through Flower's real messages. Prints one JSON object for `test_flower_live.py`."""

from __future__ import annotations

import json
import sys

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from anyrank.engines.flower import clientapp, mail, serverapp
from anyrank.messages.frame import Frame, Header, read, to_bytes
from anyrank.remote import parcels
from anyrank.remote.parcels import ABOUT, FRAMES, Reply


def inflated(record: RecordDict) -> RecordDict:
    """The record as it is on the other side: Flower's own objects, by their bytes."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    contents = {number: each.deflate() for number, each in get_all_nested_objects(record).items()}
    return inflate_object_from_contents(record.object_id, contents)


def main() -> None:
    assert clientapp.app
    assert serverapp.app
    loaded = [name for name in ("torch", "nvflare", "ray") if name in sys.modules]
    bits = np.arange(1 << 16, dtype=np.uint16)  # every number that bfloat16 has, NaNs with their payloads too
    large = np.random.default_rng(0).integers(0, 255, 20_000_001, np.uint8)
    frames = [
        Frame(Header("update", "r", 1, "a"), {"b": bits}, frozenset({"b"})),
        Frame(Header("update"), {"x": large, "o": large[:0]}),
    ]
    parts = parcels.cut(frames)
    sent = parcels.message(Reply(1, "a", "ok", parcels.sizes(parts)), parts)
    came = mail.unpacked(inflated(mail.packed(sent)))
    known = parcels.about(Reply, came[ABOUT])
    found = [read(parcels.Stream(part), 1 << 30, last=True) for part in parcels.check_parts(known, came[FRAMES])]
    one = Array("uint8", (1,), "anyrank.bytes", b"x")
    table = ConfigRecord({"table": json.dumps(sent[ABOUT])})
    odd = {
        "nothing": RecordDict({}),
        "no frames": RecordDict({ABOUT: table}),
        "no table": RecordDict({FRAMES: ArrayRecord({})}),
        "a table that is none": RecordDict({ABOUT: ConfigRecord({"table": "{"}), FRAMES: ArrayRecord({})}),
        "a table of brackets": RecordDict({ABOUT: ConfigRecord({"table": "[" * 100_000}), FRAMES: ArrayRecord({})}),
        "numbers in the place of texts": RecordDict({ABOUT: ConfigRecord({"table": 5}), FRAMES: ArrayRecord({})}),
        "metrics in the place of arrays": RecordDict({ABOUT: table, FRAMES: MetricRecord({"0.0": 1.0})}),
        "a gap": RecordDict({ABOUT: table, FRAMES: ArrayRecord({"0.0": one, "0.2": one})}),
        "a frame too far": RecordDict({ABOUT: table, FRAMES: ArrayRecord({"1.0": one})}),
        "a place twice": RecordDict({ABOUT: table, FRAMES: ArrayRecord({"0.0": one, "00.0": one})}),
        "a word for a place": RecordDict({ABOUT: table, FRAMES: ArrayRecord({"first": one})}),
    }
    taken = [name for name, record in odd.items() if mail.unpacked(record)[ABOUT] is not None]
    print(
        json.dumps(
            {"loaded": loaded, "same": [to_bytes(a) == to_bytes(b) for a, b in zip(frames, found, strict=True)], "taken": taken}
        )
    )


if __name__ == "__main__":
    main()
