"""Run the service on a socket until the process ends. Signals stay with the command, because streams have no end."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from anyrank.errors import RunError
from anyrank.files import make_folder
from anyrank.service.reading import read

LEAST_TOKEN = 16  # characters
_MOST_TOKEN, _MOST_REQUESTS = 4096, 200
_BACKLOG = 128


class Address(NamedTuple):
    """Where the service listens."""

    socket: socket.socket
    url: str


def listen(host: str, port: int) -> Address:
    """A listening socket; port 0: a free one. Raises `RunError` where that is not possible."""
    if not 0 <= port < 65536:
        raise RunError(f"--port {port}: expected a number from 0 (a free port) to 65535")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise RunError(f"--host {host}: no such host; give an address of this machine, such as 127.0.0.1") from None
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere this would let two services share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise RunError(_refused(host, port, error)) from None
    shown = f"[{host}]" if ":" in host else host
    return Address(listening, f"http://{shown}:{listening.getsockname()[1]}/")


def _refused(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; choose another --port, or --port 0 for a free one"
    return f"cannot listen on port {port} of {host} ({error.strerror or error}); choose another --host or --port"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def token_in(path: Path) -> tuple[str, bool]:
    """The token in a file, and whether the file was made now, with a new token that only this user can read.

    Raises `RunError` for a file that cannot be read, or has a shorter token than 16 characters.
    """
    try:
        data = read(path.parent.resolve(), path.name, _MOST_TOKEN)
    except FileNotFoundError:
        return _new_token(path), True
    except (OSError, ValueError) as error:
        raise RunError(f"--token-file {path}: cannot be read ({error}); name a file with a token, or a new one") from None
    token = data.decode("utf-8", "replace").strip()
    if len(token) < LEAST_TOKEN or not token.isprintable() or not token.isascii() or " " in token:
        raise RunError(
            f"--token-file {path}: expected a word of at least {LEAST_TOKEN} letters and digits, got {len(token)} characters; "
            "name a new file to have one made"
        )
    return token, False


def _new_token(path: Path) -> str:
    token = secrets.token_urlsafe(32)
    make_folder(path.parent)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(token + "\n")
    except OSError as error:
        raise RunError(f"--token-file {path}: cannot be written ({error.strerror or error}); choose another file") from None
    return token


def serve(address: Address, app: Callable, ready: Callable[[], None] = lambda: None) -> None:
    """Answer requests until the process ends; `ready` is called when the first would be answered.

    Raises `RunError` if the server ends by itself.
    """
    import uvicorn

    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, date_header=True, lifespan="on", ws="none",
        limit_concurrency=_MOST_REQUESTS, timeout_keep_alive=10, proxy_headers=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    worker = threading.Thread(target=server.run, args=([address.socket],), daemon=True)  # where it takes no signals
    worker.start()
    told = False
    while worker.is_alive():
        worker.join(0.05 if not told else 1.0)
        if server.started and not told:
            told = True
            ready()
    raise RunError("the web server has ended; see what it wrote above")
