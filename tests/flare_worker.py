"""The stand-in worker of `flare_parts`, as a process: `python flare_worker.py FILE`."""

from __future__ import annotations

import os
import sys

from anyrank.messages.frame import Frame, Header
from anyrank.worker import channel, serve


class Desk:
    def answer(self, frame: Frame, receive, progress):
        import flare_parts

        if frame.header.kind == "setup":
            own = {"own": os.getpid()} if frame.header.body.get("another") else {}  # says something else in each process
            yield Frame(Header("ready", frame.header.run, body={"memory": os.getpid(), **own}), {})
        else:
            yield from flare_parts.replies(frame)


if __name__ == "__main__":
    sys.exit(serve.serve(channel.take_over().start(), Desk()))
