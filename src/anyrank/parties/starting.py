"""`anyrank deploy start`: a party's engine process, watched in the foreground until somebody ends it. No NVFlare here.

NVFlare's processes start others: a job's process, and that one a worker. All of them end with this one.
"""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from anyrank import __version__, stopping
from anyrank.errors import DeployError, RunFailed, in_a_line, printable, shortened
from anyrank.files import write_whole_text
from anyrank.parties import kits, templates
from anyrank.parties.kits import Kit
from anyrank.parties.policies import RUNNING, SERVER, SITE
from anyrank.worker import sitefile

ORGANISATION = "anyrank"
LEFT = "left"  # a file in a site's state: it has left, and does not start until it returns
PID = "start.pid"
_MODULES = {SERVER: "nvflare.private.fed.app.server.server_train", SITE: "nvflare.private.fed.app.client.client_train"}
_CONNECTED = {SERVER: "Server started", SITE: "Successfully registered client:"}
_FAULTS = re.compile(r" - (ERROR|CRITICAL) - |^\w*(Error|Exception): ")
_OURS = re.compile(r" - (controller|executor|launcher) - ")  # whose errors are for the operator; the others stay in log.txt
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # before the process is started again, by the number of its ends in a row
_MOST_ENDS = 5  # ends in a row, each within `_SHORT_S`, after which `start` gives up
_SHORT_S = 60.0
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
# For glibc. It else keeps freed memory for each of NVFlare's hundreds of threads, and asks the system anew for the pages of
# each large array.
_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 27)}
_GRACE_S = 8.0  # seconds that processes have for ending by themselves
_PORT_S = 3.0  # that a port may be taken before it counts as taken
_UNREACHED_S = 6.0  # that a site may be without a connection before it is looked whether the server can be reached
_STARTED = "{}: is started already, on this machine; stop that one first"
_LONGEST = 300  # characters of a line of NVFlare's that is shown


def command(kit: Kit) -> list[str]:
    """The command of a kit's engine process: with the Python that runs this, whatever is first in PATH."""
    config = f"fed_{'server' if kit.role == SERVER else 'client'}.json"
    own = [f"uid={kit.name}"] if kit.role == SITE else []
    options = ["secure_train=true", *own, f"org={ORGANISATION}", "config_folder=config"]
    return [sys.executable, "-u", "-m", _MODULES[kit.role], "-m", str(kit.folder.absolute()), "-s", config, "--set", *options]


def ready(folder: Path) -> Kit:
    """The kit at `folder`, checked and settled: ready to be started. Raises `DeployError`."""
    kit = kits.open_kit(folder, RUNNING)
    kits.check(kit)
    if running(kit) is not None:
        raise DeployError(_STARTED.format(kit.folder))
    if (kit.state / LEFT).exists():
        raise DeployError(f"{folder}: this site has left its federation; to return: anyrank deploy leave --undo {folder}")
    if kit.role == SITE and not kit.site_file.is_file():
        example = kit.folder / kits.SITE_EXAMPLE
        raise DeployError(
            f"{kit.site_file}: no such file; write it from the example, and edit it: cp {example} {kit.site_file}"
        )
    if kit.role == SITE and (name := sitefile.load(kit.site_file).name) != kit.name:
        raise DeployError(f"{kit.site_file}: name: expected {kit.name!r}, whose kit this is, got {name!r}")
    if kit.role == SITE:
        from anyrank.parties import siting

        for each in siting.data(kit):
            if not each.ok:
                raise DeployError(f"{folder}: {each.words}")
    elif fault := _busy_port(kit):
        raise DeployError(f"{folder}: {fault}")
    kits.settle(kit)
    return kit


def _busy_port(kit: Kit) -> str:
    """Why the server's port cannot be used; empty if it can. One that an ending process of its own holds is soon free."""
    until = time.monotonic() + _PORT_S
    while (fault := port_fault(kit)) and time.monotonic() < until:
        time.sleep(0.2)
    return fault


def port_fault(kit: Kit) -> str:
    """Why the server's port cannot be used now; empty if it can."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1" if kit.host in ("localhost", "127.0.0.1") else "", kit.port))
        except OSError as error:
            words = f"port {kit.port} cannot be used ({os.strerror(error.errno)}); end what uses it, or change server.port"
            return f"{words} in federation.toml and provision again"
    return ""


def serve(kit: Kit, tell: Callable[[str], None], ready_file: Path | None = None) -> int:
    """Run the kit's engine process until SIGINT or SIGTERM: the signal's number. `tell` gets a line at each event.

    A process that ends by itself is started again; `RunFailed` where it ends time after time. `ready_file` is written when it
    is connected for the first time. One `start` a kit: `DeployError` for a second one.
    """
    stop = _Signals()
    lock = FileLock(kit.state / "start.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DeployError(_STARTED.format(kit.folder)) from None
    with stop, lock:
        kits.write_private(kit.state / PID, f"{os.getpid()}\n".encode())
        try:
            return _watch(kit, tell, stop, ready_file)
        finally:
            with contextlib.suppress(OSError):
                (kit.state / PID).unlink()


class _Signals:
    """Within it SIGINT and SIGTERM set `number`, so that processes are ended in order; before and after, they end this one."""

    def __init__(self) -> None:
        self.number = 0
        self.came = threading.Event()
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Signals:
        for each in (signal.SIGINT, signal.SIGTERM):
            self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: object) -> None:
        self.number = self.number or number
        self.came.set()


def _watch(kit: Kit, tell: Callable[[str], None], stop: _Signals, ready_file: Path | None) -> int:
    ends, reach = 0, _Reach(kit, tell)
    while True:
        began = time.monotonic()
        status, last = _one_life(kit, tell, stop, ready_file, reach)
        if stop.number:
            return stop.number
        ends = 1 if time.monotonic() - began > _SHORT_S else ends + 1
        if ends >= _MOST_ENDS:
            raise RunFailed(f"{kit.folder}: its process ended {ends} times in a row, the last time with status {status}{last}")
        pause = _PAUSES_S[min(ends, len(_PAUSES_S)) - 1]
        tell(f"its process ended with status {status}{last}; starting it again in {pause:.0f} s")
        if stop.came.wait(pause):
            return stop.number


class _Reach:
    """Says once that a site does not reach its server, which NVFlare itself goes on trying without a word."""

    def __init__(self, kit: Kit, tell: Callable[[str], None]) -> None:
        self._kit, self._tell = kit, tell
        self._next = time.monotonic() + _UNREACHED_S if kit.role == SITE else math.inf

    def connected(self) -> None:
        self._next = math.inf

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        host, port = self._kit.host, self._kit.port
        try:
            socket.create_connection((host, port), 2.0).close()
            self._next = time.monotonic() + _UNREACHED_S
        except OSError as error:
            self._next = math.inf
            self._tell(f"{self._kit.label}: cannot reach {host}:{port} ({error.strerror or in_a_line(error)}); trying again")


def _one_life(kit: Kit, tell: Callable[[str], None], stop: _Signals, ready_file: Path | None, reach: _Reach) -> tuple[int, str]:
    """One process from its start to its end: its status, and its last error in words."""
    _clear(kit)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with _process(kit) as process:
        threading.Thread(target=_listen, args=(process.stdout, lines), daemon=True).start()
        last = ""
        for line in _lines(lines, stop, reach.look):
            if _CONNECTED[kit.role] in line:
                reach.connected()
                tell(_connected(kit))
                if ready_file:
                    write_whole_text(ready_file, f"{process.pid}\n")
            elif _FAULTS.search(line):
                last = shortened(printable(line.split(" - ")[-1].strip()), _LONGEST)
                if _OURS.search(line):
                    tell(f"{kit.label}: {last}")
        if not stop.number:
            process.wait()
    return process.returncode if process.returncode is not None else 0, f": {last}" if last else ""


def _lines(lines: queue.SimpleQueue[str | None], stop: _Signals, meanwhile: Callable[[], None]) -> Iterator[str]:
    """The process's lines, until it ends or a signal comes. `meanwhile` is called between them, some times a second."""
    while not stop.number:
        meanwhile()
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=0.2)
            if line is None:
                return
            yield line


def _connected(kit: Kit) -> str:
    if kit.role == SERVER:
        return f"server of {kit.federation}: listening at {kit.host}:{kit.port}"
    return f"{kit.name}: connected to {kit.host}:{kit.port}"


def _clear(kit: Kit) -> None:
    """Remove what earlier processes left in the kit's own temporary folder."""
    for path in (kit.state / "tmp").iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def _process(kit: Kit) -> Iterator[subprocess.Popen[bytes]]:
    """The engine process, in a session of its own, so that the terminal's Ctrl-C comes to us alone. At the end, it and all that
    it started are ended."""
    env = {**_MEMORY, **os.environ, "TMPDIR": str((kit.state / "tmp").absolute()), "PYTHONDONTWRITEBYTECODE": "1"}
    if given := env.get("PYTHONPATH"):  # NVFlare changes to the kit's folder
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(each) for each in given.split(os.pathsep))
    with stopping.starting_a_child():
        process = subprocess.Popen(
            command(kit), cwd=kit.folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, umask=0o077, preexec_fn=_bound(),
        )  # fmt: skip
    with stopping.child(process):
        try:
            yield process
        finally:
            end_with_descendants(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)


def _bound() -> Callable[[], object] | None:
    """What a child does first, so that the system ends it when this process is killed; `None` where there is no such thing.

    The processes of jobs watch the engine process themselves, and end within seconds after it.
    """
    if sys.platform != "linux":
        return None
    import ctypes

    libc = ctypes.CDLL(None)  # loaded here: a child between fork and exec loads nothing
    return lambda: libc.prctl(_DEATH_SIGNAL, signal.SIGKILL)


def end_with_descendants(pid: int, grace_s: float = _GRACE_S) -> None:
    """End a process and all that it started, also those in sessions of their own: by asking, then by killing.

    Those that its end leaves behind are known before: their parent is another one afterwards.
    """
    import psutil

    try:
        top = psutil.Process(pid)
        family = [*reversed(top.children(recursive=True)), top]
    except psutil.NoSuchProcess:
        return
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    _, alive = psutil.wait_procs(family, timeout=grace_s)
    for each in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(alive, timeout=2.0)


def _listen(stream: object, lines: queue.SimpleQueue[str | None]) -> None:
    """Put a stream's lines into a queue, each cut, and `None` at its end."""
    with contextlib.suppress(OSError, ValueError), stream:
        while data := stream.readline(1 << 16):
            text = data[:4096].decode(errors="replace")
            if any(mark in text for mark in _CONNECTED.values()) or _FAULTS.search(text):
                lines.put(text)
    lines.put(None)


def running(kit: Kit) -> int | None:
    """The process number of the `start` that runs for this kit, if one does."""
    lock = FileLock(kit.state / "start.lock")
    try:
        with lock.acquire(timeout=0):
            return None
    except Timeout:
        with contextlib.suppress(OSError, ValueError):
            return int((kit.state / PID).read_text(encoding="utf-8"))
    except OSError:
        return None
    return None


def leave(kit: Kit, undo: bool = False, wait_s: float = 30.0) -> str:
    """End the site's part in its federation, from its own machine; what was done, in words. With `undo`, let it start again."""
    mark = kit.state / LEFT
    if undo:
        if not mark.exists():
            raise DeployError(f"{kit.folder}: this site has not left; nothing to undo")
        mark.unlink()
        return "returned: it can be started again"
    kits.settle(kit)
    write_whole_text(mark, "this site has left; anyrank deploy leave --undo lets it start again\n")
    pid = running(kit)
    if pid is None:
        return "left: it cannot be started until it returns; nothing was running"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + wait_s
    while running(kit) is not None:
        if time.monotonic() > until:
            raise RunFailed(f"{kit.folder}: process {pid} does not end; end it with: kill -9 {pid}")
        time.sleep(0.2)
    return "left: its processes have ended, and it cannot be started until it returns"


def service(folder: Path) -> str:
    """A systemd unit for the kit at `folder`, for this user and this Python. Raises `DeployError`."""
    kit = kits.open_kit(folder, RUNNING)
    place = str(kit.folder.resolve())
    if any(unicodedata.category(letter) == "Cc" for letter in place):
        raise DeployError(f"{folder}: a systemd unit cannot name a folder with control characters; move the kit")
    return templates.unit(place, f"{kit.name} of {kit.federation}", sys.executable, getpass.getuser())


def container(folder: Path) -> str:
    """A container file for servers and sites, for this version of Python and anyrank. Raises `DeployError`."""
    kits.open_kit(folder, RUNNING)
    return templates.container_file(f"{sys.version_info.major}.{sys.version_info.minor}", __version__)
