"""A whole NVFlare system of its own for tests: one server and some sites as real processes, over mutual TLS on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
OWNER = "owner@example.org"
ALLOWED = ["anyrank.", "flare_parts."]  # the second: stand-ins of the tests


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def provision(folder: Path, sites: Sequence[str]) -> Path:
    """Kits for a server, these sites and an owner; the folder that has them."""
    from nvflare.lighter.provision import prepare_builders, prepare_packager, prepare_project
    from nvflare.lighter.provisioner import Provisioner

    port, admin = free_ports(2)
    server = {"name": "localhost", "type": "server", "org": "lab", "fed_learn_port": port, "admin_port": admin}
    owner = {"name": OWNER, "type": "admin", "org": "lab", "role": "project_admin"}
    clients = [{"name": name, "type": "client", "org": "lab"} for name in sites]
    impl = "nvflare.lighter.impl"
    builders = [
        {"path": f"{impl}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
        {"path": f"{impl}.static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": "http"}},
        {"path": f"{impl}.cert.CertBuilder", "args": {}},
        {"path": f"{impl}.signature.SignatureBuilder", "args": {}},
    ]
    project = {"api_version": 3, "name": "tests", "participants": [server, owner, *clients], "builders": builders}
    with contextlib.redirect_stdout(None):
        Provisioner(str(folder), prepare_builders(project), prepare_packager(project)).provision(prepare_project(project))
    kits = folder / "tests" / "prod_00"
    for name in ("localhost", *sites):
        _own_resources(kits / name)
    return kits


def _own_resources(kit: Path) -> None:
    """Storage inside the kit, our classes allowed, no streaming of logs."""
    table = json.loads((kit / "local" / "resources.json.default").read_text())
    table |= {"class_allow_list": [*table["class_allow_list"], *ALLOWED], "class_list_enforcement_mode": "enforce"}
    if "snapshot_persistor" in table:
        table["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "snapshots")
    else:
        table["allow_log_streaming"] = False
    for component in table["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit / "jobs")
        if component["id"] == "process_launcher" and "snapshot_persistor" not in table:
            component["path"] = "anyrank.engines.nvflare.launcher.Launcher"
    (kit / "local" / "resources.json").write_text(json.dumps(table))


def words(process: psutil.Process) -> list[str]:
    """A process's command line; none of one that has ended meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.cmdline()
    return []


class System:
    """Server and sites as processes. `kits`: what `provision` made."""

    def __init__(self, kits: Path, sites: Sequence[str]) -> None:
        self.kits, self.sites = kits, tuple(sites)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *names: str) -> None:
        for name in names or ("localhost", *self.sites):
            kit = self.kits / name
            kind, program = ("server", "server_train") if name == "localhost" else ("client", "client_train")
            options = ["secure_train=true", "org=lab", "config_folder=config", *([f"uid={name}"] if kind == "client" else [])]
            command = [
                sys.executable,
                "-m",
                f"nvflare.private.fed.app.{kind}.{program}",
                "-m",
                str(kit),
                "-s",
                f"fed_{kind}.json",
            ]
            env = {**os.environ, "PYTHONPATH": f"{HERE.parent / 'src'}:{HERE}", "OMP_NUM_THREADS": "1"}
            env["NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT"] = "20"  # seconds that the end of a job waits for a site that is gone
            with (kit / "out.txt").open("ab") as out:
                # A group of its own: what it starts can be ended with it.
                self.processes[name] = subprocess.Popen(
                    [*command, "--set", *options], env=env, stdout=out, stderr=out, cwd=kit, start_new_session=True
                )

    def family(self, name: str) -> list[psutil.Process]:
        """The party's process and all below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.processes[name].pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def job_process(self, name: str) -> psutil.Process:
        """The process of the job at a party."""
        (found,) = [
            each
            for each in self.family(name)[1:]
            if any("runner_process" in part or "worker_process" in part for part in words(each))
        ]
        return found

    def alive(self, *names: str) -> list[psutil.Process]:
        """All processes of these parties, also those whose parent is gone: the kit's folder stands in their command lines."""
        marks = [str(self.kits / name) for name in names or ("localhost", *self.sites)]
        found = []
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if each.status() != psutil.STATUS_ZOMBIE and any(
                    f"{mark}/" in f"{part}/" for mark in marks for part in each.cmdline()
                ):
                    found.append(each)
        return found

    def stop(self, *names: str) -> None:
        """End these parties, with all that they have started."""
        while found := self.alive(*names):
            for each in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(found, 5)
        for name in names or tuple(self.processes):
            self.processes[name].wait()

    @contextlib.contextmanager
    def session(self) -> Iterator[Any]:
        """The owner's session, once the server takes it."""
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        last = time.monotonic() + 60
        while True:
            try:
                found = new_secure_session(OWNER, str(self.kits / OWNER), timeout=10.0)
                break
            except Exception:
                if time.monotonic() > last:
                    raise
                time.sleep(0.3)
        try:
            yield found
        finally:
            found.close()


def wait_for(what: Any, timeout_s: float = 60.0, pause_s: float = 0.1) -> Any:
    """The first true value of `what()`."""
    last = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < last, f"not within {timeout_s} s"
        time.sleep(pause_s)
    return found


def wait_for_sites(session: Any, count: int) -> None:
    wait_for(lambda: len(session.get_system_info().client_info) >= count, pause_s=0.3)


@contextlib.contextmanager
def running(folder: Path, sites: Sequence[str]) -> Iterator[System]:
    """A system that is provisioned, started, and ended whatever happens."""
    system = System(provision(folder, sites), sites)
    try:
        system.start()
        yield system
    finally:
        system.stop()
