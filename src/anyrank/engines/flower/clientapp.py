"""The ClientApp: takes a message to the site's attendant, and its reply back. Flower starts it anew for each message.

It looks into nothing and loads no torch: what a question may be is for the attendant to check.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from anyrank.engines.flower import clientapp_keys as keys
from anyrank.engines.flower import mail, relay
from anyrank.engines.flower.carrier import NAME
from anyrank.errors import FrameError
from anyrank.remote import parcels
from anyrank.remote.parcels import ABOUT, FRAMES, Code, Question, Reply

_MORE_S, _MOST_S = 60.0, 86_400.0  # beside the time that the worker has; at most

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """The name of the site, for a server that lets nodes give their own."""
    content = {ABOUT: {NAME: str(context.node_config[keys.NAME])}, FRAMES: []}
    return Message(mail.packed(content), reply_to=message)


@app.train()
def question(message: Message, context: Context) -> Message:
    content = mail.unpacked(message.content)
    return Message(mail.packed(_answered(content, context.node_config)), reply_to=message)


def _answered(content: dict[str, Any], own: Any) -> relay.Message:
    """The attendant's reply. Without one the server gets a code, and no text."""
    try:
        asked = parcels.about(Question, content[ABOUT])
        parcels.check_parts(asked, content[FRAMES])
        seconds = _MOST_S if asked.seconds is None else min(asked.seconds * asked.replies + _MORE_S, _MOST_S)
        return relay.ask(Path(str(own[keys.SOCKET])), content, asked.most, seconds)
    except (FrameError, OSError) as error:
        print(f"anyrank: {type(error).__name__}: {error}", flush=True)  # in the site's own log
        number = content[ABOUT].get("number") if isinstance(content[ABOUT], dict) else 0
        return parcels.message(Reply(number if type(number) is int and number >= 0 else 0, str(own[keys.NAME]), Code.FAILED))
