"""The Flower engine without Flower: a Grid of the test's own, and the attendant of a site over its socket.

What needs Flower's processes is in `test_flower_live.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank.deployment import flower
from anyrank.engines.flower import attendant, carrier, guarded, launch, relay, runs
from anyrank.engines.flower import settings as folders
from anyrank.engines.flower.attendant import Attendant
from anyrank.engines.flower.carrier import Carrier, Letter
from anyrank.errors import ConfigError, FrameError, RunFailed
from anyrank.messages.frame import Frame, Header, read, to_bytes
from anyrank.remote import parcels
from anyrank.remote.kits import Limits
from anyrank.remote.link import Asked
from anyrank.remote.parcels import ABOUT, ASK, FRAMES, OPEN, Question, Reply
from anyrank.worker.supervisor import Died, Late

WORKER = Path(__file__).with_name("flower_worker.py")
LIMITS = Limits(10_000, 10_000)


def frame(size: int = 8, kind: str = "download", site: str = "a", number: int = 1, run: str = "r", **body: Any) -> Frame:
    return Frame(Header(kind, run, number, site, body), {"a": np.arange(size, dtype=np.uint8)})


def question(*frames: Frame, kind: str = ASK, seconds: float | None = 30.0, **changed: Any) -> dict[str, Any]:
    """A question as the server makes it; `changed` keys of its table."""
    parts = parcels.cut(frames)
    known = Question(1, "a", kind, frames[0].header.run, frames[-1].header.round, 1, seconds, 10_000, parcels.sizes(parts))
    made = parcels.message(known, parts)
    return {ABOUT: made[ABOUT] | changed, FRAMES: made[FRAMES]}


def reply_to(asked: Asked, *frames: Frame, **changed: Any) -> dict[str, Any]:
    parts = parcels.cut(frames)
    made = parcels.message(Reply(asked.number, asked.site, "ok", parcels.sizes(parts)), parts)
    return {ABOUT: made[ABOUT] | changed, FRAMES: made[FRAMES]}


# --- the server's side: a Grid whose nodes are functions -------------------------------------------------------------


@dataclass
class Post:
    """A message of the test's Grid."""

    node: int
    kind: str
    content: Any
    ttl: float
    number: str = ""


class Mail:
    @staticmethod
    def hello(node: int, ttl: float) -> Post:
        return Post(node, "hello", None, ttl)

    @staticmethod
    def question(node: int, content: Any, round: int, ttl: float) -> Post:
        return Post(node, "question", content, ttl)

    @staticmethod
    def letter(message: Letter) -> Letter:
        return message


class Grid:
    """`nodes`: names by number. `answers[number]`: what a node makes of a message; `None`: nothing yet."""

    def __init__(self, nodes: dict[int, str], answers: Callable[[Post], Letter | None] = lambda post: None) -> None:
        self.nodes, self.answers = nodes, answers
        self.pushed: list[Post] = []
        self.ready: dict[str, Letter] = {}
        self.threads: set[int] = set()
        self.broken: Exception | None = None

    def get_nodes(self) -> list[Any]:
        self._used()
        return [SimpleNamespace(node_id=number, name=name) for number, name in self.nodes.items()]

    def push_messages(self, messages: list[Post]) -> list[str]:
        self._used()
        for post in messages:
            post.number = f"m{len(self.pushed)}"
            self.pushed.append(post)
            if (letter := self.answers(post)) is not None:
                self.ready[letter.reply_to] = letter
        return [post.number for post in messages]

    def pull_messages(self, numbers: list[str]) -> list[Letter]:
        self._used()
        return [self.ready.pop(number) for number in list(numbers) if number in self.ready]

    def _used(self) -> None:
        self.threads.add(threading.get_ident())
        if self.broken is not None:
            raise self.broken


def ask(site: str = "a", number: int = 5, seconds: float | None = 30.0) -> Asked:
    return Asked(number, site, ASK, [frame(site=site)], 1, seconds, 10_000)


def echo(post: Post) -> Letter:
    """A node that answers a question with the question's own frames, and a hello with its number as a name."""
    if post.kind == "hello":
        return Letter(post.number, post.node, {ABOUT: {"name": f"node-{post.node}"}, FRAMES: []})
    about = post.content[ABOUT]
    reply = {"version": 1, "number": about["number"], "site": about["site"], "code": "ok", "sizes": about["sizes"]}
    return Letter(post.number, post.node, {ABOUT: reply, FRAMES: post.content[FRAMES]})


def now(asked: Asked) -> Any:
    return asked.came.get_nowait()


def test_frames_come_back_bit_for_bit_through_the_carriers_thread() -> None:
    """With bfloat16: 0x3f81 is the number 1.0078125, which float16 could not hold next to 3e38 (0x7f61)."""
    sent = Frame(Header("download", "r", 1, "a"), {"b": np.array([0x3F81, 0x7F61, 0xFFC1], np.uint16)}, frozenset({"b"}))
    grid = Grid({7: "a"}, lambda post: echo(post))
    port = Carrier(grid, Mail).start()
    try:
        worker = port.worker("a", lambda: frame(kind="setup"), lambda ready: None, 10_000, opening_s=30.0)
        (came,) = worker.ask([sent], 1, 30.0)
    finally:
        port.close()
    assert to_bytes(came) == to_bytes(sent)
    assert came.bfloat16 == frozenset({"b"})
    assert len(grid.threads) == 1  # Flower's Grid is not used by two threads
    assert threading.get_ident() not in grid.threads


def test_a_reply_belongs_to_the_message_that_it_replies_to_whoever_it_comes_from_first() -> None:
    grid = Grid({1: "a", 2: "b", 3: "c"})
    port, asked = Carrier(grid, Mail), {name: ask(name, number) for number, name in enumerate("abc")}
    for each in asked.values():
        port.send(each)
    port.turn()
    assert [(post.node, post.content[ABOUT]["site"]) for post in grid.pushed] == [(1, "a"), (2, "b"), (3, "c")]
    for post in reversed(grid.pushed):
        grid.ready[post.number] = echo(post)
    port.turn()
    assert [now(asked[name]).about["site"] for name in "abc"] == ["a", "b", "c"]


ODD_LETTERS: dict[str, tuple[Callable[[Post], Letter], str]] = {
    "Flower's own error, from node 1": (lambda post: Letter(post.number, 1, error=3), "Flower reports error 3"),
    "a reply from another node": (lambda post: replace(echo(post), node=9), "another node"),
}


@pytest.mark.parametrize("odd", ODD_LETTERS)
def test_an_odd_reply_costs_that_question_alone(odd: str) -> None:
    make, words = ODD_LETTERS[odd]
    grid = Grid({1: "a", 2: "b"}, lambda post: make(post) if post.node == 1 else echo(post))
    port, first, second = Carrier(grid, Mail), ask("a"), ask("b")
    port.send(first)
    port.send(second)
    port.turn()
    found = now(first)
    assert isinstance(found, Died)
    assert words in str(found)
    assert now(second).about["site"] == "b"


def test_a_reply_to_a_message_that_nobody_sent_is_dropped() -> None:
    grid = Grid({1: "a"})
    port, asked = Carrier(grid, Mail), ask("a")
    port.send(asked)
    port.turn()
    grid.pull_messages = lambda numbers: [Letter("unknown", 1, {ABOUT: {}, FRAMES: []}), echo(grid.pushed[0])]
    port.turn()
    assert now(asked).about["code"] == "ok"
    with pytest.raises(queue.Empty):
        now(asked)


def test_a_site_without_a_node_is_said_at_once() -> None:
    port, asked = Carrier(Grid({}), Mail), ask("a")
    port.send(asked)
    port.turn()
    assert isinstance(now(asked), Died)


def test_what_is_given_up_is_not_sent_and_its_late_reply_is_dropped() -> None:
    grid = Grid({1: "a"})
    port, early, late = Carrier(grid, Mail), ask("a"), ask("a", 6)
    port.send(early)
    port.cancel(early)
    port.send(late)
    port.turn()
    assert len(grid.pushed) == 1
    port.cancel(late)
    grid.ready[grid.pushed[0].number] = echo(grid.pushed[0])
    port.turn()
    assert not grid.ready  # it was taken, so that Flower can forget it
    with pytest.raises(queue.Empty):
        now(late)


def test_every_wait_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question without a limit of its own has one all the same, in Flower and here; one that nobody answers is late."""
    clock = [1000.0]
    monkeypatch.setattr(carrier.time, "monotonic", lambda: clock[0])
    grid = Grid({1: "a", 2: "b"})
    port, limited, endless = Carrier(grid, Mail), ask("a", seconds=10.0), ask("b", seconds=None)
    port.send(limited)
    port.send(endless)
    port.turn()
    assert [post.ttl for post in grid.pushed] == [70.0, 86_400.0]  # 10 s for one reply, and a minute more; a day
    clock[0] += 71
    port.turn()
    assert isinstance(now(limited), Late)
    clock[0] += 86_400
    port.turn()
    assert isinstance(now(endless), Late)


def test_a_grid_that_fails_or_hangs_holds_nobody_up() -> None:
    grid = Grid({1: "a"})
    grid.broken = OSError("the SuperLink is away")
    port = Carrier(grid, Mail).start()
    began = time.monotonic()
    worker = port.worker("a", lambda: frame(kind="setup"), lambda ready: None, 10_000)
    with pytest.raises(Late):
        worker.start(0.5)
    grid.broken, grid.answers = None, echo
    worker.revive()
    worker.start(60.0)  # it goes on once the Grid is back
    port.close()
    assert time.monotonic() - began < 60


def test_a_stopped_carrier_fails_all_who_wait_and_all_who_come() -> None:
    grid = Grid({1: "a"})
    port, asked = Carrier(grid, Mail), ask("a")
    port.send(asked)
    port.turn()
    port.close()
    assert isinstance(now(asked), RunFailed)
    with pytest.raises(RunFailed):
        port.send(ask("a"))


# --- names -----------------------------------------------------------------------------------------------------------


def looks(port: Carrier, count: int = 1) -> None:
    for _ in range(count):
        port._looked = -1e9  # as if the time to look had come
        port.turn()


def sent_to(grid: Grid, port: Carrier, site: str) -> int | None:
    """The node that a question to a site goes to."""
    before = len(grid.pushed)
    asked = ask(site)
    port.send(asked)
    port.turn()
    new = [post.node for post in grid.pushed[before:] if post.kind == "question"]
    return new[0] if new else None


def test_a_registered_name_is_the_owners_and_no_claim_counts_beside_it() -> None:
    grid = Grid({1: "a", 2: ""}, lambda post: Letter(post.number, post.node, {ABOUT: {"name": "a"}, FRAMES: []}))
    port = Carrier(grid, Mail, claimed=False)
    looks(port, 3)
    assert [post for post in grid.pushed if post.kind == "hello"] == []  # an unregistered node is not even asked
    assert sent_to(grid, port, "a") == 1


def test_two_nodes_that_claim_one_name_are_the_first_of_them() -> None:
    grid = Grid({1: "", 2: ""}, lambda post: Letter(post.number, post.node, {ABOUT: {"name": "a"}, FRAMES: []}))
    port = Carrier(grid, Mail, claimed=True)
    looks(port, 2)
    assert sent_to(grid, port, "a") == 1


def test_a_site_whose_node_has_another_number_after_a_restart_keeps_its_name() -> None:
    grid = Grid({1: ""}, lambda post: Letter(post.number, post.node, {ABOUT: {"name": "a"}, FRAMES: []}))
    port = Carrier(grid, Mail, claimed=True)
    looks(port)
    open_question = ask("a")
    grid.answers = lambda post: (
        Letter(post.number, post.node, {ABOUT: {"name": "a"}, FRAMES: []}) if post.kind == "hello" else None
    )
    port.send(open_question)
    port.turn()
    grid.nodes = {44: ""}
    looks(port, 2)
    assert isinstance(now(open_question), Died)
    assert sent_to(grid, port, "a") == 44


def test_a_node_that_is_not_listed_for_a_while_keeps_its_question_and_then_loses_it() -> None:
    """A SuperLink that was restarted lists a node again only when it has heard from it."""
    grid = Grid({1: "a"})
    port, asked = Carrier(grid, Mail), ask("a")
    port.send(asked)
    port.turn()
    grid.nodes = {}
    looks(port, carrier._MISSES - 1)
    with pytest.raises(queue.Empty):
        now(asked)
    looks(port)
    assert isinstance(now(asked), Died)


ODD_NAMES = [None, 5, "", "a\x1b[31m", "a" * 5000, ["a"], {"a": 1}]


@pytest.mark.parametrize("name", ODD_NAMES, ids=map(str, range(len(ODD_NAMES))))
def test_a_name_that_no_site_can_have_is_none(name: Any) -> None:
    grid = Grid({1: ""}, lambda post: Letter(post.number, post.node, {ABOUT: {"name": name}, FRAMES: []}))
    port = Carrier(grid, Mail, claimed=True)
    looks(port, 2)
    assert all(known == "" for known in port._names.values())


# --- the relay -------------------------------------------------------------------------------------------------------


def pair() -> tuple[socket.socket, socket.socket]:
    here, there = socket.socketpair()
    for each in (here, there):
        each.settimeout(10)
    return here, there


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=5))
def test_what_is_written_is_read(sizes: list[int]) -> None:
    here, there = pair()
    with here, there:
        message = {ABOUT: {"sizes": sizes}, FRAMES: [[np.arange(size, dtype=np.uint8)] for size in sizes]}
        relay.write(here, message)
        found = relay.read(there, lambda table: relay.check_sizes(table, 10_000))
    assert found[ABOUT] == message[ABOUT]
    assert [b"".join(part) for part in found[FRAMES]] == [b"".join(part) for part in message[FRAMES]]


def table(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text


ODD_BYTES = {
    "a table of 2^62 bytes": struct.pack("<Q", 1 << 62),
    "a table that is none": struct.pack("<Q", 3) + b"{{{",
    "a table of brackets": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a list": table([1]),
    "no sizes": table({}),
    "sizes that are no numbers": table({"sizes": ["1"]}),
    "a size that is true": table({"sizes": [True]}),
    "a size of 0": table({"sizes": [0]}),
    "sizes of 2^70": table({"sizes": [2**70]}),
    "too many sizes": table({"sizes": [1] * 5000}),
    "more bytes than allowed": table({"sizes": [10_001]}),
    "fewer bytes than declared": table({"sizes": [5]}) + b"1234",
    "half a length": b"123",
}


def send_all(link: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        link.sendall(data)
        link.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("odd", ODD_BYTES)
def test_odd_bytes_are_refused_before_they_are_taken(odd: str) -> None:
    here, there = pair()
    with here, there:
        sending = threading.Thread(target=send_all, args=(here, ODD_BYTES[odd]), daemon=True)
        sending.start()
        with pytest.raises(FrameError):
            relay.read(there, lambda found: relay.check_sizes(found, 10_000))
    sending.join(10)


# --- the attendant ---------------------------------------------------------------------------------------------------


class Beside:
    """An attendant with the stand-in worker, over its socket."""

    def __init__(self, folder: Path, **opening: Any) -> None:
        self.folder, self.opening = folder, opening
        make = attendant.maker(LIMITS, (sys.executable, str(WORKER)), {})
        self.attendant = Attendant("a", LIMITS, make)
        self.listener = relay.listen(folder)
        threading.Thread(target=self.attendant.serve, args=(self.listener,), daemon=True).start()

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        return dict(relay.ask(relay.address(self.folder), message, 100_000, 120.0))

    def code(self, message: dict[str, Any]) -> str:
        return self.ask(message)[ABOUT]["code"]

    def open(self, run: str = "r") -> str:
        return self.code(question(frame(kind="setup", site="", number=0, run=run, **self.opening), kind=OPEN))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread that accepts
        self.listener.close()
        self.attendant.close()


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Beside]:
    made = Beside(tmp_path / "s")
    yield made
    made.close()


def update(found: dict[str, Any]) -> Frame:
    assert found[ABOUT]["code"] == "ok", found[ABOUT]
    (part,) = found[FRAMES]
    return read(parcels.Stream(list(part)), 100_000, last=True)


def test_one_worker_answers_many_messages_bit_for_bit(beside: Beside) -> None:
    assert beside.open() == "ok"
    found = []
    for number in (1, 2, 3):
        sent = frame(number=number)
        reply = update(beside.ask(question(sent)))
        assert reply.header.body["got"] == to_bytes(sent)[-32:].hex()
        assert np.array_equal(reply.arrays["a"], np.arange(1, 9))
        found.append(reply.header.body["worker"])
    assert len(set(found)) == 1  # the same process: what it has loaded is kept between messages


def test_a_worker_that_dies_costs_one_reply(beside: Beside) -> None:
    beside.open()
    before = update(beside.ask(question(frame()))).header.body["worker"]
    assert beside.code(question(frame(die=True))) == "died"
    after = update(beside.ask(question(frame()))).header.body["worker"]
    assert after != before


def test_a_worker_that_takes_too_long_is_late_and_is_ended(beside: Beside) -> None:
    beside.open()
    first = update(beside.ask(question(frame()))).header.body["worker"]
    assert beside.code(question(frame(sleep=3600), seconds=0.5)) == "late"
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_client_app_that_is_gone_ends_what_the_worker_does_for_it(beside: Beside) -> None:
    """Flower ends its process when a run is stopped: the site's worker must not go on for an hour, nor block the next one."""
    beside.open()
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(relay.address(beside.folder)))
        relay.write(link, question(frame(sleep=3600), seconds=3600.0))
        time.sleep(1.0)
    assert beside.code(question(frame())) == "ok"


def test_a_worker_must_be_opened_for_the_run_that_asks(beside: Beside) -> None:
    assert beside.code(question(frame())) == "closed"
    assert beside.open("other") == "ok"
    assert beside.code(question(frame())) == "closed"
    assert beside.open() == "ok"
    assert beside.code(question(frame())) == "ok"


def test_a_worker_started_anew_that_answers_otherwise_is_said(tmp_path: Path) -> None:
    beside = Beside(tmp_path / "s", another=True)
    try:
        assert beside.open() == "ok"
        assert beside.code(question(frame(die=True))) == "died"
        assert beside.code(question(frame())) == "changed"
    finally:
        beside.close()


def test_a_reply_larger_than_the_site_allows_does_not_leave(beside: Beside) -> None:
    beside.open()
    assert beside.code(question(frame(bytes=9_000))) == "ok"
    assert beside.code(question(frame(bytes=9_990))) in ("too-large", "died")  # by the limit on all frames, or on one
    assert beside.code(question(frame(bytes=9_000), most=100)) == "too-large"


REFUSED: dict[str, Callable[[], dict[str, Any]]] = {
    "to another site": lambda: question(frame(), site="b"),
    "with a download for another site": lambda: question(frame(site="b")),
    "with a frame of another run": lambda: question(frame(), run="s"),
    "with a frame of another round": lambda: question(frame(), round=2),
    "with a setup in the middle of a run": lambda: question(frame(kind="setup")),
    "that opens with a download": lambda: question(frame(), kind=OPEN),
    "that opens with two frames": lambda: question(frame(kind="setup", site=""), frame(kind="setup", site=""), kind=OPEN),
    "of an unknown kind": lambda: question(frame(kind="shell")),
    "of another version": lambda: question(frame(), version=2),
    "without end": lambda: question(frame(), seconds=float("nan")) | {},
    "larger than the site allows": lambda: question(frame(10_001)),
    "whose bytes are no frame": lambda: question(frame()) | {FRAMES: [[np.zeros(len(to_bytes(frame())), np.uint8)]]},
}


@pytest.mark.parametrize("wrong", [name for name in REFUSED if name != "without end"])
def test_a_wrong_question_is_a_code_and_no_text(beside: Beside, wrong: str) -> None:
    beside.open()
    found = beside.ask(REFUSED[wrong]())
    assert (found[ABOUT]["code"], found[FRAMES]) == ("refused", [])
    assert found[ABOUT].keys() == {"version", "number", "site", "code", "sizes"}
    assert beside.code(question(frame())) == "ok"  # and costs nothing more


def test_the_socket_is_for_this_user_alone_and_for_one_process(beside: Beside, tmp_path: Path) -> None:
    assert beside.folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="one process"):
        relay.listen(beside.folder)
    beside.close()
    relay.listen(beside.folder).close()  # what a killed process left behind is no obstacle
    with pytest.raises(ConfigError, match="100 bytes"):
        relay.address(tmp_path / ("x" * 100))


def test_another_interpreter_does_not_find_this_ones_packages() -> None:
    words, env = attendant.command(Path("s.toml"), "/opt/other/bin/python")
    assert words[0] == "/opt/other/bin/python"
    assert env == {"PYTHONPATH": ""}
    assert attendant.command(Path("s.toml")) == ((sys.executable, "-P", "-m", "anyrank.worker", "--site", "s.toml"), {})


# --- folders, commands, runs -----------------------------------------------------------------------------------------


def settings_of(folder: Path, text: str) -> Path:
    (folder / folders.FILE).write_text(text)
    return folder


WRONG_SERVER = {
    "no TLS for keys": "port = 8000",
    "half of TLS": 'names = "claimed"\nca = "ca.pem"',
    "a port that is none": 'names = "claimed"\nport = 70000',
    "a port that is a text": 'names = "claimed"\nport = "8000"',
    "a port that is true": 'names = "claimed"\nport = true',
    "an unknown key": 'names = "claimed"\nprot = 8000',
    "names of a third kind": 'names = "any"',
    "replies without end": 'names = "claimed"\nreply_mb = inf',
    "no TOML": "port =",
}
WRONG_SITE = {
    "no port of the server": 'server = "host"',
    "an option as a server": 'server = "--insecure"',
    "a space": 'server = "a b:8000"',
    "a key without TLS": 'server = "host:8000"\nkey = "k"',
}


@pytest.mark.parametrize(
    ("kind", "text"),
    [*((folders.Server, text) for text in WRONG_SERVER.values()), *((folders.Site, text) for text in WRONG_SITE.values())],
    ids=[*WRONG_SERVER, *WRONG_SITE],
)
def test_wrong_settings_are_one_line_with_the_file(tmp_path: Path, kind: type, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        folders.load(kind, settings_of(tmp_path, text))
    assert str(tmp_path / folders.FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "program", lambda name: f"/flower/{name}")


@pytest.mark.usefixtures("programs")
def test_what_is_started_calls_nobody_and_listens_on_loopback_alone(tmp_path: Path) -> None:
    server = folders.Server(18000, "claimed")
    site = folders.Site("fl.example.org:443", 19094)
    for part in [*launch.server(tmp_path, server, "x:y"), *launch.site(tmp_path, site, "a", tmp_path / "s")]:
        assert (part.env["FLWR_TELEMETRY_ENABLED"], part.env["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
        assert part.env["FLWR_HOME"].startswith(str(tmp_path))
        assert "--allow-runtime-dependency-installation" not in part.words
        words = list(part.words)
        if "--host" in words:
            assert words[words.index("--host") + 1] == "127.0.0.1"
        if part.name != "superexec":
            assert words[words.index("--isolation") + 1] == "process"
    assert "--disable-runtime-dependency-installation" in launch.server(tmp_path, server, "x:y")[0].words


@pytest.mark.usefixtures("programs")
def test_registered_names_need_keys_and_the_secret_is_this_users_alone(tmp_path: Path) -> None:
    tls = {"certificate": "/c.pem", "key": "/k.pem", "ca": "/ca.pem"}
    link, exec_ = launch.server(tmp_path, folders.Server(**tls), "x:y")
    assert "--enable-supernode-auth" in link.words
    assert "--insecure" not in [*link.words, *exec_.words]
    node, _ = launch.site(tmp_path, folders.Site("h:1", ca="/ca.pem", key="/k"), "a", tmp_path / "s")
    assert node.words[list(node.words).index("--auth-supernode-private-key") + 1] == "/k"
    assert "--insecure" not in node.words
    secret = Path(link.words[list(link.words).index("--superexec-auth-secret-file") + 1])
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.parent.stat().st_mode & 0o777 == 0o700
    assert len(secret.read_bytes()) == 64


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("path", ['/srv/"a"/s', "/srv/a\\b/s"])
def test_a_folder_that_a_nodes_configuration_cannot_have_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="no quotes and backslashes"):
        launch.site(tmp_path, folders.Site(), "a", Path(path))


def test_without_flower_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.sys, "executable", str(tmp_path / "python"))
    settings_of(tmp_path, 'names = "claimed"\nport = 18000')
    with pytest.raises(ConfigError, match=r"flower-superlink: not installed .* environment of its own \(docs/flower.md\)"):
        flower.server(tmp_path)


def test_the_command_refuses_in_one_line_with_status_2(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "anyrank.deployment.flower", "site", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"{tmp_path}/flower.toml: no such file; expected a TOML settings\n"


def test_an_app_has_a_name_and_no_code(tmp_path: Path) -> None:
    folder = runs.app_of(tmp_path, "winter")
    assert [path.name for path in folder.iterdir()] == ["pyproject.toml"]
    assert "winter" in (folder / "pyproject.toml").read_text()


def bundle(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return made.getvalue()


def app(tmp_path: Path, old: str = "", new: str = "", **more: bytes) -> bytes:
    """The bundle of a run's app, with one text replaced by another, or with more files."""
    text = (runs.app_of(tmp_path, "winter") / "pyproject.toml").read_text()
    assert old in text
    return bundle({"pyproject.toml": text.replace(old, new).encode(), ".info/CONTENT": b"", **more})


WRONG_APPS: dict[str, Callable[[Path], Any]] = {
    "code beside it": lambda at: app(at, **{"anyrank.py": b"raise SystemExit"}),
    "a file in the place of the package": lambda at: app(at, **{"flwr/__init__.py": b""}),
    "another server module": lambda at: app(at, "anyrank.engines.flower.serverapp", "os"),
    "another client module": lambda at: app(at, "anyrank.engines.flower.clientapp", "os"),
    "packages to install": lambda at: app(at, "[project]", '[project]\ndependencies = ["evil"]'),
    "more configuration": lambda at: app(at, 'run = "winter"', 'run = "winter"\npath = "x"'),
    "a file of a gigabyte, packed": lambda at: bundle({"pyproject.toml": bytes(1 << 20), ".info/CONTENT": b""}),
    "no bundle": lambda at: b"PK",
    "a path": lambda at: at,
    "nothing": lambda at: bundle({}),
}


@pytest.mark.parametrize("wrong", WRONG_APPS)
def test_an_app_with_anything_of_its_own_is_not_unpacked(tmp_path: Path, wrong: str) -> None:
    unpacked: list[Any] = []
    module = SimpleNamespace(install_from_fab=lambda found, skip_prompt=False: unpacked.append(found))
    guarded.guard(module)
    right = app(tmp_path)
    module.install_from_fab(right, skip_prompt=True)
    with pytest.raises(ConfigError, match="it is not run"):
        module.install_from_fab(WRONG_APPS[wrong](tmp_path), skip_prompt=True)
    assert unpacked == [right]


def test_a_version_of_flower_without_what_is_guarded_runs_nothing() -> None:
    with pytest.raises(AttributeError):
        guarded.guard(SimpleNamespace())


@pytest.mark.parametrize("kind", ["agentapp", "model", "connector", "simulation", "anything"])
def test_other_processes_of_flower_are_not_run(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded.main([kind, "--token", "x"]) == 2
    assert capsys.readouterr().err == f"flwr-{kind}: a server or site of anyrank does not run it\n"


def test_the_guarded_programs_come_first_on_the_path(tmp_path: Path) -> None:
    first = Path(launch.environment(tmp_path)["PATH"].split(os.pathsep)[0])
    assert sorted(path.name for path in first.iterdir()) == sorted(
        f"flwr-{kind}" for kind in ("serverapp", "clientapp", "agentapp", "model", "connector", "simulation")
    )
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in first.iterdir())
    found = subprocess.run([first / "flwr-model"], capture_output=True, text=True, timeout=60, env=os.environ)
    assert (found.returncode, "does not run it" in found.stderr) == (2, True)


def test_a_name_is_used_for_one_configuration(tmp_path: Path) -> None:
    folder = runs.keep(tmp_path, "winter", {"run": {"rounds": 3}})
    assert runs.keep(tmp_path, "winter", {"run": {"rounds": 3}}) == folder
    with pytest.raises(ConfigError, match="another configuration"):
        runs.keep(tmp_path, "winter", {"run": {"rounds": 4}})


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "A", 5, None])
def test_a_run_is_no_path(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError):
        runs.folder_of(tmp_path, name)


def test_a_run_that_was_not_submitted_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing was submitted"):
        runs.folder_of(tmp_path, "winter")


def test_how_a_run_stands_is_what_was_said_last_and_damage_is_nothing_known(tmp_path: Path) -> None:
    standing = runs.Standing("winter", 5)
    runs.say(tmp_path, standing, 2, 9)
    runs.say(tmp_path, standing, state="failed", code="RunFailed", text="below quorum")
    assert {key: runs.said(tmp_path)[key] for key in ("state", "round", "rounds", "text")} == {
        **{"state": "failed", "round": 2, "rounds": 9, "text": "below quorum"}
    }
    (tmp_path / runs.STANDING).write_text("[")
    assert runs.said(tmp_path) == {}


def test_a_part_that_ends_is_started_again_and_all_end_with_the_family(tmp_path: Path) -> None:
    mark = tmp_path / "starts"
    code = (
        f"import sys, time; open({str(mark)!r}, 'a').write('x'); time.sleep(600 if open({str(mark)!r}).read() == 'xx' else 0)"
    )
    family = launch.Family([launch.Part("part", [sys.executable, "-c", code])], tmp_path)
    try:
        for _ in range(120):
            family.follow(0.5)
            if mark.exists() and mark.read_text() == "xx":
                break
        assert mark.read_text() == "xx"
        (pid,) = family.pids().values()
    finally:
        family.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_nothing_of_flower_is_loaded_outside_its_room() -> None:
    """The parts that a server and a site run beside Flower's own processes need neither flwr nor torch nor nvflare."""
    code = (
        "import sys; from anyrank.deployment import flower; from anyrank.engines.flower import attendant, carrier, launch\n"
        "print([name for name in ('flwr', 'torch', 'nvflare', 'typer') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == "[]\n"
