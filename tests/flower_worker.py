"""A stand-in site worker for tests of the Flower engine, as a process: it answers a download with its array plus one."""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from anyrank.messages.frame import Frame, Header, to_bytes
from anyrank.worker import channel, serve


class Desk:
    def answer(self, frame: Frame, receive, progress):
        header, body = frame.header, dict(frame.header.body)
        if header.kind == "setup":
            own = {"own": os.getpid()} if body.get("another") else {}  # says something else in each process
            yield Frame(Header("ready", header.run, body={"memory": os.getpid(), **own}), {})
            return
        if body.get("die"):
            os._exit(7)
        time.sleep(body.get("sleep", 0))
        array = np.zeros(body["bytes"], np.uint8) if "bytes" in body else frame.arrays["a"] + np.uint8(1)
        about = {"got": to_bytes(frame)[-32:].hex(), "worker": os.getpid(), "path": os.environ.get("PYTHONPATH", "")}
        yield Frame(Header("update", header.run, header.round, header.client, about), {"a": array})


if __name__ == "__main__":
    sys.exit(serve.serve(channel.take_over().start(), Desk()))
