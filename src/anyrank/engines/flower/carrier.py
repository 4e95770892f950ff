"""Carries questions to sites over Flower's Grid: the port of `anyrank.remote.link`. No torch and no flwr here.

One thread alone uses the Grid. Every question is a message of its own to one node, and what comes belongs to the question whose
message it replies to: Flower's own error replies come from another node. Sites have names, nodes have numbers that change: a
node's name is the one that it was registered with, or, where the server allows it, the one that it gives.

The Grid may hang for as long as its SuperLink is away. Nobody waits for it: who has asked has a limit of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from anyrank.errors import FrameError, RunFailed, in_a_line
from anyrank.messages.frame import Readable
from anyrank.messages.limits import check_text
from anyrank.remote import parcels
from anyrank.remote.link import Asked, Came, RemoteWorker
from anyrank.remote.parcels import ABOUT, FRAMES
from anyrank.worker.supervisor import Died, Late

NAME = "name"  # in a node's reply to a hello
_TURN_S = 0.2  # between two looks for replies
_LOOK_S = 2.0  # between two looks for nodes
_HELLO_S = 120.0  # that a node may take to give its name
_MORE_S = 60.0  # that a message lives longer than somebody waits for its reply
_MOST_S = 86_400.0  # that a question waits which has no limit of its own: a site must not hold up a run for ever
_END_S = 5.0
_MISSES = 30  # looks in a row without a node, after which it is gone; a SuperLink that was restarted lists its nodes one by one
_TOGETHER = 4  # messages whose replies are asked for at the same time, and may lie in memory together
_MOST_TOLD = 1_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Letter:
    """What came in reply to the message `reply_to`: its `content`, or the code of Flower's `error`. `node`: who sent it."""

    reply_to: str
    node: int
    content: Mapping[str, Any] | None = None
    error: int = 0


class Node(Protocol):
    node_id: int
    name: str


class Grid(Protocol):
    """What is used of Flower's Grid."""

    def get_nodes(self) -> Iterable[Node]: ...

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]: ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]: ...


class Mail(Protocol):
    """Makes and reads Flower's messages: see `anyrank.engines.flower.mail`."""

    def hello(self, node: int, ttl: float) -> Any: ...

    def question(self, node: int, content: Mapping[str, Any], round: int, ttl: float) -> Any: ...

    def letter(self, message: Any) -> Letter: ...


@dataclass(eq=False)
class _Sent:
    """A message without a reply yet. `asked`: the question in it; `None`: a hello."""

    node: int
    until: float
    asked: Asked | None = None


class Carrier:
    """The port over `grid`. `claimed`: whether a node that was not registered under a name may give its own."""

    def __init__(self, grid: Grid, mail: Mail, claimed: bool = False) -> None:
        self._grid, self._mail, self._claimed = grid, mail, claimed
        self._wanted: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self._sent: dict[str, _Sent] = {}  # by the message's ID
        self._names: dict[int, str] = {}  # of the nodes that are connected and have one
        self._misses: dict[int, int] = {}  # of these nodes: looks in a row without them
        self._greeted: dict[int, float] = {}  # until when the reply to a hello is waited for
        self._told: set[str] = set()  # what has been logged once
        self._looked = -_LOOK_S
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="carrier", daemon=True)

    def start(self) -> Carrier:
        self._thread.start()
        return self

    def close(self) -> None:
        """From now on every question raises `RunFailed`, also those that are open."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_END_S)
        for sent in list(self._sent.values()):
            if sent.asked is not None:
                sent.asked.give_up(RunFailed("the run was stopped"))

    def worker(self, site: str, *values: Any, **named: Any) -> RemoteWorker:
        """The worker of a site; it takes the other arguments of `RemoteWorker`."""
        return RemoteWorker(self, site, *values, **named)

    # --- the port of `link`; any thread ---

    def send(self, asked: Asked) -> None:
        if self._stopped.is_set():
            raise RunFailed("the run was stopped")
        self._wanted.put(asked)

    def cancel(self, asked: Asked) -> None:
        """Its reply will be dropped. The site's worker ends by the limit that the question has: Flower carries no word to a
        node that is busy."""
        asked.given_up.set()

    @contextlib.contextmanager
    def fetch(self, asked: Asked, known: parcels.Reply, parts: Any, until: float | None) -> Iterator[Readable]:
        """What came, which Flower has put into memory as a whole before anybody can look at it."""
        yield parcels.Stream(list(itertools.chain(*parcels.check_parts(known, parts))))

    # --- the carrier's thread ---

    def _follow(self) -> None:
        while not self._stopped.wait(_TURN_S):
            try:
                self.turn()
            except Exception as error:  # the SuperLink is away, or has dropped what was asked for: questions have limits
                self._once(f"Flower: {in_a_line(error)}")

    def turn(self) -> None:
        """Look for nodes, send what waits, take what came, give up what has waited too long."""
        self._expire()
        self._look()
        while True:
            try:
                asked = self._wanted.get_nowait()
            except queue.Empty:
                break
            self._push(asked)
        self._pull()

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        nodes = {node.node_id: node.name for node in self._grid.get_nodes()}
        self._looked = now  # only now: without a look nothing is sent, and no site counts as missing
        for node in list(self._names):
            self._misses[node] = 0 if node in nodes else self._misses[node] + 1
            if self._misses[node] >= _MISSES:
                self._leave(node)
        for node, name in nodes.items():
            if node not in self._names:
                self._meet(node, name, now)

    def _leave(self, node: int) -> None:
        log.warning("site %s is not connected any more", self._names.pop(node))
        del self._misses[node]
        for sent in list(self._sent.values()):
            if sent.asked is not None and sent.node == node:
                self._let_go(sent, Died("its node is not connected any more"))

    def _meet(self, node: int, name: str, now: float) -> None:
        if name:
            self._enter(node, name)
        elif not self._claimed:
            self._once(f"node {node} was not registered under a name, and is not asked (names = 'registered')")
        elif now >= self._greeted.get(node, 0.0):
            self._greeted[node] = now + _HELLO_S
            self._push_one(self._mail.hello(node, _HELLO_S), _Sent(node, now + _HELLO_S))

    def _enter(self, node: int, name: str) -> None:
        """A node is a site, unless another one is: the first keeps its name for as long as it is connected. A site whose
        SuperNode was started again may be another node."""
        try:
            check_text("name", name)
        except FrameError:
            return self._once(f"node {node} has no name that a site can have")
        other = next((other for other, taken in self._names.items() if taken == name), None)
        if other is not None and not self._misses[other]:
            return self._once(f"node {node} is not asked: site {name} is connected already, as node {other}")
        if other is not None:
            self._leave(other)
        self._names[node], self._misses[node] = name, 0
        log.info("site %s is node %d", name, node)
        return None

    def _push(self, asked: Asked) -> None:
        if asked.given_up.is_set():
            return
        node = next((node for node, name in self._names.items() if name == asked.site), None)
        if node is None:
            return asked.came.put(Died("the site is not connected"))
        seconds = _MOST_S if asked.seconds is None else min(asked.seconds * asked.replies + _MORE_S, _MOST_S)
        content = asked.message()
        try:
            message = self._mail.question(node, content, content[ABOUT]["round"], seconds)
            self._push_one(message, _Sent(node, time.monotonic() + seconds, asked))
        except Exception as error:
            asked.came.put(Died(f"its question cannot be sent: {type(error).__name__}"))
            raise
        return None

    def _push_one(self, message: Any, sent: _Sent) -> None:
        (number,) = list(self._grid.push_messages([message])) or [None]
        if number is None:
            raise FrameError("Flower did not take the message")
        self._sent[number] = sent

    def _pull(self) -> None:
        """A few messages at a time, so that few replies lie in memory."""
        waiting = list(self._sent)
        for start in range(0, len(waiting), _TOGETHER):
            for message in self._grid.pull_messages(waiting[start : start + _TOGETHER]):
                letter = self._mail.letter(message)
                if (sent := self._sent.pop(letter.reply_to, None)) is not None:
                    self._take(letter, sent)

    def _take(self, letter: Letter, sent: _Sent) -> None:
        content = letter.content or {}
        if sent.asked is None:
            self._take_name(letter, sent, content)
        elif not sent.asked.given_up.is_set():
            sent.asked.came.put(self._came(letter, sent, content))

    def _came(self, letter: Letter, sent: _Sent, content: Mapping[str, Any]) -> Came | Exception:
        if letter.error:
            return Died(f"Flower reports error {letter.error}")
        if letter.node != sent.node:
            return Died("its reply came from another node")
        return Came(content.get(ABOUT), content.get(FRAMES))

    def _take_name(self, letter: Letter, sent: _Sent, content: Mapping[str, Any]) -> None:
        table = content.get(ABOUT)
        name = table.get(NAME) if isinstance(table, Mapping) else None
        if not letter.error and letter.node == sent.node and isinstance(name, str) and sent.node not in self._names:
            self._enter(sent.node, name)

    def _expire(self) -> None:
        now = time.monotonic()
        for number, sent in list(self._sent.items()):
            if now >= sent.until:
                del self._sent[number]
                if sent.asked is not None:
                    self._let_go(sent, Late("the site did not reply in time"))

    def _let_go(self, sent: _Sent, why: Exception) -> None:
        if not sent.asked.given_up.is_set():
            sent.asked.give_up(why)

    def _once(self, text: str) -> None:
        if text not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(text)
            log.warning("%s", text)
