"""Run folders for the tests of the status page, and two ways to ask it: in this process, and over a socket."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anyio

from anyrank.service.app import build
from anyrank.service.watch import Watch

NOW = 1_800_000_000.0
CONFIG = '[run]\nname = "x"\nrounds = {rounds}\nseed = 5\n[method]\nname = "raflora"\n'


def metrics(round: int, **changes: Any) -> dict[str, Any]:
    row = {"round": round, "accuracy": 0.5, "loss": 1.0, "collapse": 0.25, "upload_bytes": 100, "download_bytes": 200}
    return row | {"seconds": 2.0, "clients": 2, "rejected": 0, "shortened": 0, "idle": ""} | changes


def client(round: int, name: str, status: str = "ok", reason: str = "", **changes: Any) -> dict[str, Any]:
    row = {"round": round, "client": name, "rank": 4, "num_examples": 30, "loss": 1.0, "seconds": 0.5, "shortened": None}
    return row | {"status": status, "reason": reason} | changes


def add(folder: Path, log: str, *rows: Mapping[str, Any]) -> None:
    with open(folder / log, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_run(
    folder: Path, rounds: int = 3, planned: int = 10, names: Sequence[str] = ("north", "south"), config: str = ""
) -> Path:
    """A run of some finished rounds, whose process is gone."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.format(rounds=planned) + config, encoding="utf-8")
    for round in range(1, rounds + 1):
        add(folder, "clients.jsonl", *(client(round, name) for name in names))
        add(folder, "metrics.jsonl", metrics(round))
    return folder


def aged(folder: Path, seconds: float) -> None:
    """Let all files in a folder be of so long before `NOW`."""
    for path in folder.iterdir():
        os.utime(path, (NOW - seconds, NOW - seconds))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run, as its process does."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def watching(*folders: Path, now: float = NOW) -> Watch:
    """The service's view of these folders, all of it read."""
    watch = Watch(folders, clock=lambda: now)
    read_all(watch)
    return watch


def read_all(watch: Watch) -> None:
    for _ in range(1000):
        if not watch.refresh():
            return
    raise AssertionError("there is no end of reading")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(app: Any, path: str, method: str = "GET", headers: Sequence[tuple[str, str]] | None = None) -> Answer:
    """One request to an ASGI app, without a socket. `headers`: by default, that the host is localhost."""
    headers = [("host", "localhost")] if headers is None else headers
    route, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "path": route, "raw_path": route.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
        "headers": [(key.lower().encode(), value.encode("latin-1")) for key, value in headers], "server": ("localhost", 80),
        "client": ("127.0.0.1", 1),
    }  # fmt: skip
    sent: list[Mapping[str, Any]] = []

    async def call() -> None:
        done = anyio.Event()

        async def receive() -> Mapping[str, Any]:
            if len(sent) and not sent[-1].get("more_body", False) and sent[-1]["type"] == "http.response.body":
                done.set()
            await anyio.sleep(0)
            return {"type": "http.disconnect"} if done.is_set() else {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Mapping[str, Any]) -> None:
            sent.append(message)

        with anyio.fail_after(60):
            await app(scope, receive, send)

    anyio.run(call)
    start = next(message for message in sent if message["type"] == "http.response.start")
    body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return Answer(start["status"], {key.decode(): value.decode("latin-1") for key, value in start["headers"]}, body)


def page_of(folder: Path, **how: Any) -> str:
    """The page of the only run in a folder."""
    answer = ask(build(watching(folder), **how), "/")
    assert answer.status == 200, answer.text
    return answer.text


class Served(NamedTuple):
    process: subprocess.Popen
    port: int
    url: str

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
        """The answer to a request, whose body may have no end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path, headers=dict(headers or {}))
        return connection.getresponse()


@contextlib.contextmanager
def served(*arguments: str | Path, cwd: Path) -> Iterator[Served]:
    """The command `anyrank serve`, on a free port of loopback. It is killed at the end, or after some minutes."""
    command = [sys.executable, "-m", "anyrank", "serve", *map(str, arguments), "--port", "0", "--json"]
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    guard = threading.Timer(400, process.kill)
    guard.start()
    try:
        line = process.stdout.readline()
        if not line:
            raise AssertionError(f"it did not start: {process.stderr.read()}")
        found = json.loads(line)
        yield Served(process, found["port"], found["url"])
    finally:
        guard.cancel()
        process.kill()
        process.communicate(timeout=30)


def interrupted(process: subprocess.Popen) -> tuple[int, str]:
    """How a process ends on Ctrl-C: its exit status, and what it wrote on stderr."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    return process.returncode, err


def events(answer: http.client.HTTPResponse, count: int) -> list[dict[str, Any]]:
    """The next `count` events of a stream, `{id, event, data}`; fails if they do not come within the time of the socket."""
    found: list[dict[str, Any]] = []
    current: dict[str, Any] = {}
    while len(found) < count:
        line = answer.readline().decode().rstrip("\n")
        if not line and "event" in current:
            found.append(current | {"data": json.loads(current["data"])})
        if not line:
            current = {}
            continue
        key, _, value = line.partition(": ")
        current[key] = value
    return found
