"""Seconds and memory of rounds over Flower in which nobody trains: `python flower_rounds.py [--megabytes N ...] [--rounds N]`.

Run by Flower's own Python, on loopback, with two sites. In each round every site gets an array of so many megabytes and sends
one of the same size back. Prints one JSON object for each size.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from anyrank.engines.flower import attendant, launch, relay, runs, settings
from anyrank.remote.kits import Limits

SITES = ("a", "b")
MOST = 1 << 30


class Rounds:
    """Asks both sites in each round, one thread a site."""

    def serve(self, job: Any) -> None:
        from concurrent.futures import ThreadPoolExecutor

        from anyrank.messages.frame import Frame, Header

        asked = json.loads((job.folder / "asked.json").read_text())
        workers = {site: job.worker(site, lambda: Frame(Header("setup", "r"), {}), lambda ready: None, MOST) for site in SITES}
        array = np.random.default_rng(0).integers(0, 255, max(int(asked["megabytes"] * 1e6), 8), np.uint8)

        def one(site: str, number: int) -> int:
            frame = Frame(Header("download", "r", number, site), {"a": array})
            (reply,) = workers[site].ask([frame], 1, 600.0)
            return reply.arrays["a"].size

        for site in SITES:
            opened(workers[site])
        with ThreadPoolExecutor(len(SITES)) as pool:
            for number in range(1, asked["rounds"] + 1):
                began = time.monotonic()
                assert list(pool.map(one, SITES, [number] * len(SITES))) == [array.size] * len(SITES)
                with (job.folder / "seconds.jsonl").open("a") as out:
                    out.write(json.dumps({"seconds": time.monotonic() - began, "pid": os.getpid()}) + "\n")
                job.told(number, asked["rounds"])


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def opened(worker: Any) -> None:
    """Open a site's worker once its node is connected."""
    from anyrank.worker.supervisor import Died

    for _ in range(120):
        try:
            return worker.start(60.0)
        except Died:
            time.sleep(1)
    raise AssertionError("a site is not connected")


def peak(pid: int) -> float:
    """Megabytes of memory that a process has taken at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--megabytes", type=float, nargs="+", default=[0, 24, 244])
    words.add_argument("--rounds", type=int, default=5)
    asked = words.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, ports = Path(name), free_ports(3)
        (folder / "server").mkdir()
        (folder / "server" / settings.FILE).write_text(f'port = {ports[0]}\nnames = "claimed"\n')
        parts = launch.server(folder / "server", settings.Server(ports[0], "claimed"), "flower_rounds:Rounds")
        family = [launch.Family(parts, folder / "server" / settings.STATE)]
        limits, worker = Limits(MOST, MOST), str(Path(__file__).with_name("flower_worker.py"))
        for site, port in zip(SITES, ports[1:], strict=True):
            room = folder / site / settings.STATE / "socket"
            beside = attendant.Attendant(site, limits, attendant.maker(limits, (sys.executable, worker), {}))
            threading.Thread(target=beside.serve, args=(relay.listen(room),), daemon=True).start()
            known = settings.Site(f"127.0.0.1:{ports[0]}", port)
            parts = launch.site(folder / site, known, site, relay.address(room))
            family.append(launch.Family(parts, folder / site / settings.STATE))
        try:
            for megabytes in asked.megabytes:
                print(json.dumps(measured(folder / "server", family, megabytes, asked.rounds)), flush=True)
        finally:
            for each in family:
                each.close()


def measured(server: Path, family: list[launch.Family], megabytes: float, rounds: int) -> dict[str, Any]:
    from anyrank.deployment import flower

    run = f"r{megabytes:g}".replace(".", "-")
    folder = runs.keep(server, run, {})
    (folder / "asked.json").write_text(json.dumps({"megabytes": megabytes, "rounds": rounds}))
    flower._connect(server, settings.load(settings.Server, server))
    link, node, app = 0.0, 0.0, 0.0
    submitted: subprocess.Popen[bytes] | None = None
    until = time.monotonic() + 1200
    while time.monotonic() < until and runs.said(folder).get("state") not in ("done", "failed"):
        for each in family:
            each.follow(0.3)
        if submitted is None:
            flower._await_port(settings.load(settings.Server, server).port)
            words = [launch.program("flwr"), "run", str(runs.app_of(server, run)), "anyrank"]
            env = {**os.environ, **launch.environment(server)}
            submitted = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        link, node = peak(family[0].pids()["superlink"]), peak(family[1].pids()["supernode"])
        found = lines(folder)
        app = max(app, peak(found[-1]["pid"])) if found and Path(f"/proc/{found[-1]['pid']}").exists() else app
    seconds = [line["seconds"] for line in lines(folder)]
    return {"megabytes": megabytes, "seconds": seconds, "serverapp_mb": app, "superlink_mb": link, "supernode_mb": node}


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "seconds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
