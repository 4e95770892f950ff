"""A whole system on Flower for tests: server and sites as real processes in Flower's own environment, and a proxy between
them."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from flare import free_ports

HERE = Path(__file__).resolve().parent
PYTHON = Path(os.environ.get("ANYRANK_FLOWER_PYTHON") or HERE.parent / ".venv" / "flower" / "bin" / "python")
ENV = {**os.environ, "PYTHONPATH": f"{HERE.parent / 'src'}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
OPEN = re.compile(r"/v1/fleet/[a-z-]+|/health")  # the paths that the documented proxy lets through


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        if not OPEN.fullmatch(self.path):
            self.close_connection = True
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        link = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        try:
            link.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() != "host"})
            found = link.getresponse()
            content = found.read()
        except OSError:
            self.close_connection = True
            self.send_error(502)
            return
        finally:
            link.close()
        self.send_response(found.status)
        for key, value in found.getheaders():
            if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        return None


@contextlib.contextmanager
def proxy(behind: int) -> Iterator[int]:
    """A proxy that lets the fleet's paths through to the port `behind`, and nothing else; its own port."""
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    made.behind, made.daemon_threads = behind, True
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield made.server_address[1]
    finally:
        made.shutdown()
        made.server_close()


class System:
    """Folders of a server and of sites, and their processes."""

    def __init__(self, folder: Path, sites: Sequence[str]) -> None:
        self.folder, self.sites = folder, tuple(sites)
        self.server, self.port = folder / "server", free_ports(1)[0]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._write(self.server, {"port": self.port, "names": "claimed"})

    def site_files(self, through: int, own: Callable[[str], dict[str, Any]], **keys: Any) -> None:
        for name, port in zip(self.sites, free_ports(len(self.sites)), strict=True):
            self._write(self.folder / name, {"server": f"127.0.0.1:{through}", "port": port, **keys})
            (self.folder / name / "site.toml").write_text(tomli_w.dumps(own(name)))

    def _write(self, folder: Path, table: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "flower.toml").write_text(tomli_w.dumps(table))

    def start(self, *names: str) -> None:
        for name in names or ("server", *self.sites):
            verb = "server" if name == "server" else "site"
            words = [str(PYTHON), "-m", "anyrank.deployment.flower", verb, str(self.folder / name)]
            with (self.folder / f"{name}.out").open("ab") as out:
                self.processes[name] = subprocess.Popen(words, env=ENV, stdout=out, stderr=out, start_new_session=True)

    def stop(self) -> None:
        for each in self.processes.values():
            each.terminate()
        for each in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(20)
        for left in self.alive(str(self.folder)):
            left.kill()
        for each in self.processes.values():
            each.kill()
            each.wait()

    def alive(self, *words: str) -> list[psutil.Process]:
        """Processes whose command line has all of these words."""
        found = []
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                line = " ".join(each.cmdline())
                if each.status() != psutil.STATUS_ZOMBIE and all(word in line for word in words):
                    found.append(each)
        return found

    def below(self, name: str, word: str) -> list[psutil.Process]:
        """Processes that a party has started, with this word in their command line."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(self.processes[name].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if word in " ".join(each.cmdline()):
                        found.append(each)
        return found

    def submit(self, config: Path) -> subprocess.Popen[str]:
        words = [str(PYTHON), "-m", "anyrank.deployment.flower", "submit", str(config), "--server", str(self.server), "--wait"]
        return subprocess.Popen(words, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(what: Callable[[], Any], timeout_s: float = 240.0, pause_s: float = 0.1) -> Any:
    """The first true value of `what()`."""
    last = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < last, f"not within {timeout_s} s"
        time.sleep(pause_s)
    return found
