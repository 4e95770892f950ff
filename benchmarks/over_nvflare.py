"""A round over NVFlare: this project's rounds beside NVFlare's own averaging, with sites that train nothing.

    python benchmarks/over_nvflare.py --megabytes 0 24 244 --sites 2
    python benchmarks/over_nvflare.py --megabytes 0 24 --sites 8

For each number of sites and each size, one provisioned federation on loopback (mutual TLS, real server and site processes), on
which the two ways take turns, as jobs. The adapter is the same: 64 layers of 4096 x 4096, float32, of the rank that gives the
size. In both, sites ask every 0.2 s for a task (NVFlare's own default is 2 s).

*ours*: `anyrank.deployment.nvflare.Rounds` with rbla as it is, guard, checkpoint and logs included. At a site, the client
process and a worker process, which answers by the real protocol with numbers from a table.
*unguarded*: the same with `guard.norm = 0`, `guard.far = 0`, `guard.owner = 1`: without limits of lengths.
*stock*: the job of `NumpyFedAvgRecipe`, whose script, in the client process, sends back what it received, and a persistor that
starts from these 128 arrays and saves them after each round with `numpy.savez`.

A round's seconds are from the end of the round before; the first one, in which the sites join, is left out. Memory is the
largest anonymous memory (RssAnon) of a process during the job, read every 50 ms. CPU seconds are of the server's
job process, all clients' processes, and all workers, start and end included, over the number of rounds. The floor: the adapter
once each way for each site through one TLS connection on loopback (`ssl`), and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import psutil  # noqa: E402

SIDE, MODULES = 4096, 64
RANKS = {0: 1, 24: 11, 100: 48, 244: 116}  # MB of an adapter: its rank; 0: three layers of 64 x 64
ASKED = "ANYRANK_BENCH"  # the environment variable that says how large adapters are


def shape(megabytes: int) -> dict[str, Any]:
    small = {"side": 64, "modules": 3} if not megabytes else {"side": SIDE, "modules": MODULES}
    return {**small, "rank": RANKS[megabytes], "dtype": "float32", "clients": 1}


def size_of(asked: dict[str, Any]) -> float:
    return asked["modules"] * asked["rank"] * 2 * asked["side"] * 4 / 1e6


def now(path: str) -> None:
    """Write that a round has ended."""
    with open(path, "a") as file:
        file.write(f"{time.time()}\n")


# --- ours: what runs in NVFlare's processes ------------------------------------------------------------------------------


def __getattr__(name: str) -> Any:
    """Classes for NVFlare's processes, made when they are asked for: this file is a site's worker too, without NVFlare."""
    makes = {"StandIn": _executor, "Timed": _rounds, "Start": _persistor}
    if name not in makes:
        raise AttributeError(name)
    return makes[name]()


def _executor() -> type:
    from anyrank.engines.nvflare.executor import AnyRankExecutor

    class StandIn(AnyRankExecutor):
        command = (sys.executable, str(HERE / "over_nvflare.py"), "--worker")

    return StandIn


def _rounds() -> type:
    from anyrank.deployment.nvflare import Rounds

    class Timed(Rounds):
        def __init__(self, times: str, config: str, segment: int) -> None:
            super().__init__(config, segment)
            self._times = times

        def serve(self, job: Any) -> bool:
            def told(number: int, of: int) -> None:
                job.told(number, of)
                now(self._times)

            return super().serve(dataclasses.replace(job, told=told))

    return Timed


def work(site_file: str) -> int:
    """A site's worker that trains nothing."""
    from anyrank.worker import channel

    taken = channel.take_over().start()
    sys.path.insert(0, str(HERE))
    from sites import Desk

    from anyrank.worker import serve

    class SiteDesk(Desk):
        def ready(self, frame: Any, receive: Any) -> Iterator[Any]:
            import numpy as np

            from anyrank.messages import calls
            from anyrank.messages.records import Facts
            from anyrank.messages.roster import Roster

            name, sizes = Path(site_file).parents[1].name, np.array([100], np.int64)
            roster = Roster((name,), sizes, 0, Facts("none"), in_order=True, held_out=sizes)
            yield calls.ready_frame(calls.Ready(roster), frame.header.run)

        def cohort(self, frame: Any, receive: Any) -> Iterator[Any]:
            from anyrank.messages import calls
            from anyrank.messages.records import Counts, Reported
            from anyrank.messages.wire import counts_frame, job_of

            if calls.cohort_of(frame).train:
                yield from super().cohort(frame, receive)
                return
            sent = receive()
            found = Reported(job_of(sent).client.name, Counts(100, 100.0, 50, {}))
            yield counts_frame(found, frame.header.run, sent.header.round)

    return serve.serve(taken, SiteDesk(json.loads(os.environ[ASKED])))


def _persistor() -> type:
    import numpy as np
    from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
    from nvflare.app_common.abstract.model_persistor import ModelPersistor

    class Start(ModelPersistor):
        def __init__(self, times: str) -> None:
            super().__init__()
            self.times = times

        def load_model(self, fl_ctx: Any) -> Any:
            asked, draw = json.loads(os.environ[ASKED]), np.random.default_rng(0)
            shapes = {"A": (asked["rank"], asked["side"]), "B": (asked["side"], asked["rank"])}
            names = [f"{number}.{factor}" for number in range(asked["modules"]) for factor in shapes]
            weights = {name: draw.standard_normal(shapes[name[-1]], np.float32) for name in names}
            return make_model_learnable(weights=weights, meta_props={})

        def save_model(self, model: Any, fl_ctx: Any) -> None:
            np.savez(f"{self.times}.npz", **model[ModelLearnableKey.WEIGHTS])
            now(self.times)

    return Start


# --- the federation ------------------------------------------------------------------------------------------------------


def federation(folder: Path, names: Sequence[str], asked: dict[str, Any]) -> Any:
    """`flare.System` of the tests, with this file's classes allowed and found."""
    import flare

    flare.ALLOWED[:] = ["anyrank.", "over_nvflare."]
    os.environ[ASKED] = json.dumps(asked)

    class Found(flare.System):
        def start(self, *which: str) -> None:
            with _popen_with_path():
                super().start(*which)

    kits = flare.provision(folder, names)
    for name in ("localhost", *names):  # the script of a recipe's job is code, which the tests' federation refuses
        path = kits / name / "local" / "resources.json"
        table = json.loads(path.read_text())
        del table["class_list_enforcement_mode"]
        path.write_text(json.dumps(table))
    for name in names:
        limits = "[limits]\ndownload_mb = 1000\nupload_mb = 1000\n"
        (kits / name / "local" / "site.toml").write_text(limits)
    return Found(kits, names)


@contextlib.contextmanager
def _popen_with_path() -> Iterator[None]:
    """Processes that are started within it find this file, too."""
    begin = subprocess.Popen.__init__

    def started(self: Any, *values: Any, env: dict[str, str] | None = None, **named: Any) -> None:
        begin(self, *values, env=env and {**env, "PYTHONPATH": f"{env['PYTHONPATH']}:{HERE}"}, **named)

    subprocess.Popen.__init__ = started  # type: ignore[method-assign]
    try:
        yield
    finally:
        subprocess.Popen.__init__ = begin  # type: ignore[method-assign]


def ours(
    folder: Path, name: str, names: Sequence[str], asked: dict[str, Any], rounds: int, times: Path, **sections: Any
) -> Path:
    import tomli_w

    from anyrank.engines.nvflare import job

    config = {
        "run": {"rounds": rounds, "name": name},
        "model": {"name": "none", "task": "text-classification"},
        "data": {"label_names": ["a", "b"]},
        "method": {"name": "rbla"},
        "eval": {"where": "sites", "every": 1_000_000},
        "sites": [{"name": site, "rank": asked["rank"], "source": "at the site"} for site in names],
    }
    arguments = {"times": str(times), "config": job.enclosed(tomli_w.dumps(config | sections)), "segment": rounds}
    return job.write(folder, name, names, len(names), "over_nvflare.Timed", arguments, "over_nvflare.StandIn")


def unguarded(*values: Any) -> Path:
    """`ours` without limits of lengths and of single owners, which stock averaging does not have either."""
    return ours(*values, guard={"norm": 0.0, "far": 0.0, "owner": 1.0})


SCRIPT = """import nvflare.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params=model.params, meta={"NUM_STEPS_CURRENT_ROUND": 100}))
"""


def stock(folder: Path, name: str, names: Sequence[str], asked: dict[str, Any], rounds: int, times: Path) -> Path:
    config, script = folder / "app" / "config", folder / "app" / "custom" / "client.py"
    for each in (config, script.parent):
        each.mkdir(parents=True)
    script.write_text(SCRIPT)
    flow = {"path": "nvflare.app_common.workflows.fedavg.FedAvg", "args": {"num_clients": len(names), "num_rounds": rounds}}
    server = {
        **{"format_version": 2, "server": {"task_request_interval": 0.2}, "workflows": [{"id": "controller", **flow}]},
        "components": [{"id": "persistor", "path": "over_nvflare.Start", "args": {"times": str(times)}}],
    }
    executor = {
        "path": "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor",
        "args": {"execution_mode": "in_process", "task_script_path": script.name, "params_exchange_format": "numpy"},
    }
    client = {"format_version": 2, "executors": [{"tasks": ["*"], "executor": executor}], "components": []}
    meta = {"name": name, "resource_spec": {}, "min_clients": len(names), "deploy_map": {"app": ["server", *names]}}
    for path, table in {"config_fed_server": server, "config_fed_client": client}.items():
        (config / f"{path}.json").write_text(json.dumps(table))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


class Memory(threading.Thread):
    """The largest anonymous memory in MB of processes of a job, by what they are, until it is stopped."""

    def __init__(self, system: Any) -> None:
        super().__init__(daemon=True)
        self.system, self.peaks, self.series, self.over = system, {}, [], threading.Event()
        self.cpu: dict[tuple[str, int], float] = {}

    def run(self) -> None:
        turn = 0
        while not self.over.wait(0.05):
            if turn % 20 == 0:
                known = self._processes()
            turn += 1
            for pid, what in known.items():
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    found = next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon:"))
                    self.peaks[what] = max(self.peaks.get(what, 0.0), found)
                    if what == "server":
                        self.series.append((time.time(), found))

    def _processes(self) -> dict[int, str]:
        found = {}
        for name in ("localhost", *self.system.sites):
            for each in self.system.family(name)[1:]:
                with contextlib.suppress(psutil.Error):
                    line = " ".join(each.cmdline())
                    kinds = {"runner_process": "server", "worker_process": "client", "--worker": "worker"}
                    for mark, what in kinds.items():
                        if mark in line:
                            found[each.pid] = what
                            self.cpu[what, each.pid] = sum(each.cpu_times()[:2])
        return found


def job(system: Any, session: Any, folder: Path, way: Any, asked: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One job: seconds of each round after the first, largest memory by process, memory of the server in each round."""
    name = f"{way.__name__}-{time.time_ns()}"
    times = folder / f"{name}.times"
    made = way(folder / name, name, list(system.sites), asked, rounds, times)
    memory = Memory(system)
    memory.start()
    try:
        identity, until = session.submit_job(str(made)), time.monotonic() + 900
        while not (status := session.get_job_meta(identity)["status"]).startswith("FINISHED"):
            if time.monotonic() > until:
                raise TimeoutError(f"{name}: {status}")
            time.sleep(0.5)
    finally:
        memory.over.set()
        memory.join()
    ends = [float(line) for line in times.read_text().split()] if times.exists() else []
    if len(ends) < rounds:
        for party in ("localhost", system.sites[0]):
            print((system.kits / party / "out.txt").read_text()[-3000:], file=sys.stderr)
        raise RuntimeError(f"{name}: {len(ends)} of {rounds} rounds, {status}")
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    by_round = [max((m for at, m in memory.series if a < at <= b), default=0.0) for a, b in itertools.pairwise(ends)]
    cpu: dict[str, float] = {}
    for (what, _), each in memory.cpu.items():
        cpu[what] = cpu.get(what, 0.0) + each / rounds
    for each in folder.glob("*.npz"):
        each.unlink()
    return {"seconds": seconds, "peaks": memory.peaks, "by_round": by_round, "cpu": cpu}


# --- the floor -----------------------------------------------------------------------------------------------------------


def floor(system: Any, size: int) -> float:
    """Seconds for `size` bytes through one TLS connection on loopback, from a thread to another process."""
    kit = system.kits / "localhost" / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit / "server.crt", kit / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))
    read = f"""
import socket, ssl
context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
with context.wrap_socket(socket.create_connection(("127.0.0.1", {listener.getsockname()[1]}))) as sock:
    buffer = bytearray(1 << 20)
    while sock.recv_into(buffer): pass
"""
    with subprocess.Popen([sys.executable, "-c", read]) as reader, listener:
        with context.wrap_socket(listener.accept()[0], server_side=True) as sent:
            block, began = bytes(1 << 20), time.perf_counter()
            for _ in range(size >> 20):
                sent.sendall(block)
            seconds = time.perf_counter() - began
        reader.wait()
    return seconds


# --- the table -----------------------------------------------------------------------------------------------------------


def measure(count: int, megabytes: int, rounds: int, turns: int, keep: Path | None, ways: Sequence[Any]) -> None:
    import flare

    names = [f"site-{number:03d}" for number in range(1, count + 1)]
    asked = shape(megabytes)
    with tempfile.TemporaryDirectory(prefix="anyrank-bench-", dir=keep) as text:
        folder = Path(text)
        system = federation(folder / "flare", names, asked)
        found: dict[str, list[dict[str, Any]]] = {way.__name__: [] for way in ways}
        try:
            system.start()
            with system.session() as session:
                flare.wait_for(lambda: len(session.get_system_info().client_info) >= count, 120.0)
                for _ in range(turns):
                    for way in ways:
                        found[way.__name__].append(job(system, session, folder, way, asked, rounds))
            least = floor(system, int(2 * count * size_of(asked) * 1e6))
        finally:
            system.stop()
    for way, jobs in found.items():
        print("| " + " | ".join(row(way, count, asked, jobs, least)) + " |", flush=True)


def row(way: str, count: int, asked: dict[str, Any], jobs: list[dict[str, Any]], least: float) -> list[str]:
    seconds = sorted(second for each in jobs for second in each["seconds"])
    peaks = [f"{max(each['peaks'].get(what, 0) for each in jobs):.0f}" for what in ("server", "client", "worker")]
    rounds = jobs[-1]["by_round"]
    flat = f"{rounds[0]:.0f} to {rounds[-1]:.0f}"
    middle = f"{statistics.median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"
    load = f"{os.getloadavg()[0]:.1f}"
    kinds = ("server", "client", "worker")
    cpu = " + ".join(f"{statistics.median(each['cpu'].get(kind, 0.0) for each in jobs):.1f}" for kind in kinds)
    return [way, str(count), f"{size_of(asked):.0f}", middle, cpu, *peaks, flat, f"{least:.2f}", load]


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2])
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--megabytes", type=int, nargs="+", default=list(RANKS), choices=list(RANKS))
    options.add_argument("--sites", type=int, nargs="+", default=[2, 8])
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--turns", type=int, default=2, help="jobs of each way, in turn")
    ways = {"ours": ours, "unguarded": unguarded, "stock": stock}
    options.add_argument("--ways", nargs="+", default=["ours", "stock"], choices=list(ways))
    options.add_argument("--folder", type=Path, help="where temporary files go")
    asked = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}\n")
    heads = [
        "way",
        "sites",
        "MB",
        "s a round",
        "CPU s a round",
        "server MB",
        "client MB",
        "worker MB",
        "server MB, round 2 to last",
    ]
    print(
        "| " + " | ".join([*heads, "floor s", "load after"]) + " |\n| " + " | ".join(["---"] + ["---:"] * 10) + " |", flush=True
    )
    for count in asked.sites:
        for megabytes in asked.megabytes:
            measure(count, megabytes, asked.rounds, asked.turns, asked.folder, [ways[name] for name in asked.ways])
    return 0


if __name__ == "__main__":
    sys.exit(main())
