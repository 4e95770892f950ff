"""Flower's own processes at the server and at a site: their commands, their environment, and that they are started again.

Telemetry and update checks are off, and no package is installed at run time. Flower's APIs listen on loopback alone; what may
be reached from outside is for a proxy to say (docs/flower.md). No torch, no flwr here: Flower's processes are its own programs.
"""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from anyrank import stopping
from anyrank.engines.flower import clientapp_keys as keys
from anyrank.engines.flower import guarded
from anyrank.engines.flower.settings import SECRET, STATE, Server, Site
from anyrank.errors import ConfigError
from anyrank.files import write_whole_text

FOLDER, ROUNDS = "ANYRANK_FLOWER_FOLDER", "ANYRANK_FLOWER_ROUNDS"  # in the environment of a ServerApp
_LOOK_S = 0.2
_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before a start, by the number of ends in a row
_STEADY_S = 60.0  # after which an end is the first one again

# A process that is to die with this one, whatever ends this one (Linux), and becomes the command that follows.
_WRAPPED = "import os, sys; from anyrank import stopping; stopping.ask_for_death(); os.execv(sys.argv[1], sys.argv[1:])"

log = logging.getLogger(__name__)


@dataclass
class Part:
    """One of Flower's programs: a name, its command, and what its environment has besides."""

    name: str
    words: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


def program(name: str) -> str:
    """The path of one of Flower's programs, in the environment of this Python. Raises `ConfigError` without Flower."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ConfigError(
            f"{name}: not installed beside {sys.executable}; install anyrank[flower] in an environment of its own "
            "(docs/flower.md)"
        )
    return str(path)


def environment(folder: Path) -> dict[str, str]:
    """What every process of Flower's gets: all of its files under `folder`, nothing that calls home."""
    return {
        **{"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        **{"FLWR_HOME": str(folder.absolute() / STATE / "flwr"), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"},
        "PATH": os.pathsep.join([str(_guards(folder)), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _guards(folder: Path) -> Path:
    """A folder with programs that stand before Flower's own of the same names: see `guarded`."""
    room = folder.absolute() / STATE / "bin"
    room.mkdir(mode=0o700, parents=True, exist_ok=True)
    for kind in (*guarded.KINDS, *guarded.REFUSED):
        path = room / f"flwr-{kind}"
        write_whole_text(path, f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {guarded.__name__} {kind} "$@"\n')
        path.chmod(0o700)
    return room


def server(folder: Path, known: Server, rounds: str) -> list[Part]:
    """SuperLink and SuperExec. `rounds`: `module:class` of what runs the rounds of a run, with a method `serve`."""
    secret, address = _secret(folder), f"127.0.0.1:{known.port}"
    tls = ["--ssl-certfile", known.certificate, "--ssl-keyfile", known.key, "--ssl-ca-certfile", known.ca]
    registered = ["--enable-supernode-auth"] if known.names == "registered" else []
    link = [
        *(program("flower-superlink"), "--host", "127.0.0.1", "--port", str(known.port), "--isolation", "process"),
        *("--database", str(folder.absolute() / STATE / "superlink.db"), "--disable-runtime-dependency-installation"),
        *("--superexec-auth-secret-file", secret, *(tls if known.ca else ["--insecure"]), *registered),
    ]
    env = environment(folder) | {FOLDER: str(folder.absolute()), ROUNDS: rounds}
    return [Part("superlink", link, environment(folder)), _superexec(address, secret, known.ca, env)]


def site(folder: Path, known: Site, name: str, socket: Path) -> list[Part]:
    """SuperNode and SuperExec of the site `name`, whose attendant listens at `socket`."""
    if odd := [text for text in (name, str(socket)) if set(text) & set('"\\')]:
        raise ConfigError(f"{odd[0]}: expected no quotes and backslashes, which Flower's node configuration cannot have")
    secret, address = _secret(folder), f"127.0.0.1:{known.port}"
    tls = ["--root-certificates", known.ca] if known.ca else ["--insecure"]
    key = ["--auth-supernode-private-key", known.key] if known.key else []
    node = [
        *(program("flower-supernode"), "--superlink", known.server, *tls, *key, "--isolation", "process"),
        *("--host", "127.0.0.1", "--port", str(known.port), "--superexec-auth-secret-file", secret),
        *("--node-config", f'{keys.NAME}="{name}" {keys.SOCKET}="{socket}"'),
    ]
    return [Part("supernode", node, environment(folder)), _superexec(address, secret, "", environment(folder))]


def _superexec(address: str, secret: str, ca: str, env: Mapping[str, str]) -> Part:
    tls = ["--root-certificates", ca] if ca else ["--insecure"]
    words = [program("flower-superexec"), "--runtime-api-address", address, "--superexec-auth-secret-file", secret, *tls]
    return Part("superexec", words, env)


def _secret(folder: Path) -> str:
    """The file with the secret between this party's own processes, made if need be; only this user can read it."""
    path = folder.absolute() / STATE / SECRET
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    if not path.exists():
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
            out.write(secrets.token_hex(32).encode())
    return str(path)


class Family:
    """Processes that run until `close`, each started again when it ends. Their output is in files in `folder`."""

    def __init__(self, parts: Sequence[Part], folder: Path) -> None:
        self._members = [_Member(part, folder / f"{part.name}.log") for part in parts]

    def follow(self, seconds: float | None = None) -> None:
        """Keep them running; returns after `seconds` (`None`: never). Only the main thread may do so: on Linux they die with
        the thread that has started them."""
        until = None if seconds is None else time.monotonic() + seconds
        while until is None or time.monotonic() < until:
            for member in self._members:
                member.look()
            time.sleep(_LOOK_S)

    def pids(self) -> dict[str, int]:
        return {member.part.name: member.process.pid for member in self._members if member.process is not None}

    def close(self) -> None:
        for member in self._members:
            member.end()


class _Member:
    def __init__(self, part: Part, out: Path) -> None:
        self.part, self._out = part, out
        self.process: subprocess.Popen[bytes] | None = None
        self._ends, self._began, self._again = 0, 0.0, 0.0
        self._life = ExitStack()

    def look(self) -> None:
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            self._ends = 1 if now - self._began > _STEADY_S else self._ends + 1
            self._again = now + _PAUSES_S[min(self._ends, len(_PAUSES_S) - 1)]
            log.warning("%s ended with status %d; it is started again", self.part.name, self.process.returncode)
            self.end()
        if self.process is None and now >= self._again:
            self._start(now)

    def _start(self, now: float) -> None:
        env = {**os.environ, **self.part.env}
        words = [sys.executable, "-P", "-c", _WRAPPED, *self.part.words]
        if not self._ends:  # of an earlier process
            self._out.write_bytes(b"")
        with stopping.starting_a_child(), open(self._out, "ab") as out:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            self.process = subprocess.Popen(words, env=env, start_new_session=True, **pipes)
            self._life.enter_context(stopping.child(self.process))
        self._began = now

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            stopping.kill_group(process)
            process.wait()
            self._life.close()
