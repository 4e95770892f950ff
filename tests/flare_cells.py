"""NVFlare's cells in one process: requests go from one to the other by name, through NVFlare's own download service."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.utils import fobs


class Cell:
    """A cell named `name`. `lies` may change each reply to it on its way: it gets the number of the request and the reply."""

    known: ClassVar[dict[str, Cell]] = {}

    def __init__(self, name: str, lies: Callable[[int, Message], Message] = lambda number, reply: reply) -> None:
        self.name, self.lies, self.handlers, self.requests = name, lies, {}, 0
        self.known[name] = self

    def get_fqcn(self) -> str:
        return self.name

    def register_request_cb(self, channel: str, topic: str, cb: Callable[[Message], Message]) -> None:
        self.handlers[channel, topic] = cb

    def send_request(self, channel: str, target: str, topic: str, request: Message, **named: Any) -> Message:
        self.requests += 1
        number = self.requests
        if target not in self.known or (channel, topic) not in self.known[target].handlers:
            return make_reply(ReturnCode.TARGET_UNREACHABLE)
        request.set_header(MessageHeaderKey.ORIGIN, self.name)
        request.payload = fobs.loads(fobs.dumps(request.payload))
        reply = copy.copy(self.known[target].handlers[channel, topic](request))
        reply.payload = fobs.loads(fobs.dumps(reply.payload)) if reply.payload is not None else None
        return self.lies(number, reply)

    def fire_and_forget(self, channel: str, topic: str, targets: Any, message: Message, **named: Any) -> None:
        for target in [targets] if isinstance(targets, str) else targets:
            self.send_request(channel, target, topic, message)
