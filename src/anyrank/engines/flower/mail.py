"""Frames as Flower messages: a table in a record of texts, and the bytes of the frames in a record of arrays. No torch here.

Arrays of a frame travel as blocks of bytes, so that every number type arrives bit for bit, bfloat16 too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from anyrank.engines.flower.carrier import Letter
from anyrank.remote.parcels import ABOUT, FRAMES, MOST_FRAMES

HELLO, QUESTION = "query", "train"  # types of messages: two of those that Flower has
_TABLE, _BYTES = "table", "anyrank.bytes"


def hello(node: int, ttl: float) -> Message:
    """Asks a node for the name of its site."""
    return Message(RecordDict({}), node, HELLO, ttl=ttl)


def question(node: int, content: Mapping[str, Any], round: int, ttl: float) -> Message:
    return Message(packed(content), node, QUESTION, ttl=ttl, group_id=str(round))


def letter(message: Message) -> Letter:
    """What came in reply to a message, not yet checked."""
    known = message.metadata
    if message.has_error():
        return Letter(known.reply_to_message_id, known.src_node_id, error=int(message.error.code))
    return Letter(known.reply_to_message_id, known.src_node_id, unpacked(message.content))


def packed(content: Mapping[str, Any]) -> RecordDict:
    """The table and the arrays of bytes of `parcels.message`."""
    blocks = {
        f"{i}.{j}": Array("uint8", (len(block),), _BYTES, block.tobytes())
        for i, part in enumerate(content[FRAMES])
        for j, block in enumerate(part)
    }
    return RecordDict({ABOUT: ConfigRecord({_TABLE: json.dumps(content[ABOUT], allow_nan=False)}), FRAMES: ArrayRecord(blocks)})


def unpacked(content: RecordDict) -> dict[str, Any]:
    """What `packed` was given; entries that are something else are `None`. Nothing is raised."""
    try:
        return {ABOUT: json.loads(content[ABOUT][_TABLE]), FRAMES: _frames(content[FRAMES])}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {ABOUT: None, FRAMES: None}


def _frames(record: Mapping[str, Array]) -> list[list[np.ndarray]]:
    """The blocks of each frame in their order, whatever order the record has."""
    frames: list[list[np.ndarray]] = []
    for i, j in sorted(_place(key) for key in record):
        if i >= MOST_FRAMES or i > len(frames) or (i == len(frames)) != (j == 0) or (j and j != len(frames[i])):
            raise ValueError("not the blocks of frames")
        block = np.frombuffer(record.pop(f"{i}.{j}").data, np.uint8)
        if j == 0:
            frames.append([])
        frames[i].append(block)
    return frames


def _place(key: str) -> Sequence[int]:
    i, j = key.split(".")
    return int(i), int(j)
