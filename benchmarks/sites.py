"""What a round costs a server whose clients are other processes: memory and seconds, with replies of real size.

    python benchmarks/sites.py                # about five minutes, 6 GB of temporary files
    python benchmarks/sites.py --quick        # half a minute

The server is a real one: engine, guard, merge, checkpoint and adapters of `anyrank run` with `run.engine = "workers"`, in a
process of its own. Its workers are processes, too, and answer frames by the same protocol, but train nothing: they send
numbers from a table, so that 50 clients need no 50 models. Peak memory is the server's own VmHWM, with Python and torch in it.
The floor is what no server can do without: the same bytes through a pipe into a file, hashed, and read again once. CPU seconds
are of all threads of the server.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIDE, POOL = 4096, 1 << 22
RANKS = (4, 8, 16, 32, 64)
WIDE = (14, 29, 58, 116, 232)  # 64 modules of 4096 x 4096 at rank 232 in bfloat16 are 243 MB


# --- a worker that trains nothing --------------------------------------------------------------------------------------


def work(asked: dict[str, Any]) -> int:
    """Answer frames as a worker does, with numbers from a table."""
    from anyrank.worker import channel

    taken = channel.take_over().start()
    from anyrank.worker import serve

    return serve.serve(taken, Desk(asked))


class Desk:
    """In the place of `anyrank.worker.desk.Desk`."""

    def __init__(self, asked: dict[str, Any]) -> None:
        import torch

        self.asked = asked
        draw = torch.Generator().manual_seed(0)
        self.pool = (torch.randn(POOL, generator=draw) * 0.01).to(getattr(torch, asked["dtype"]))

    def answer(self, frame: Any, receive: Callable[[], Any], progress: Any) -> Iterator[Any]:
        from anyrank.messages import calls

        kinds = {calls.SETUP: self.ready, calls.START: self.start, calls.COHORT: self.cohort, calls.EVALUATE: self.scores}
        yield from kinds[frame.header.kind](frame, receive)

    def ready(self, frame: Any, receive: Any) -> Iterator[Any]:
        import numpy as np

        from anyrank.messages import calls
        from anyrank.messages.records import Facts
        from anyrank.messages.roster import Roster

        names = tuple(f"site-{i:03d}" for i in range(self.asked["clients"]))
        sizes = np.arange(100, 100 + len(names), dtype=np.int64)
        yield calls.ready_frame(
            calls.Ready(Roster(names, sizes, int(sizes.sum()), Facts("none"), in_order=True)), frame.header.run
        )

    def start(self, frame: Any, receive: Any) -> Iterator[Any]:
        import torch

        from anyrank.adapter.adapter import Adapter
        from anyrank.adapter.layer import LoraLayer
        from anyrank.messages import calls

        rank, scaling, _ = calls.start_of(frame)
        side, layers = self.asked["side"], {}
        for number in range(self.asked["modules"]):
            name = f"model.layers.{number // 2}.self_attn.{'qv'[number % 2]}_proj"
            B = torch.zeros(side, rank, dtype=self.pool.dtype)
            layers[name] = LoraLayer(self.numbers(number, (rank, side)), B, scaling.of(name, rank))
        yield calls.adapter_frame(Adapter(layers), run=frame.header.run)

    def cohort(self, frame: Any, receive: Any) -> Iterator[Any]:
        from dataclasses import replace

        from anyrank.adapter.adapter import Adapter
        from anyrank.messages import calls
        from anyrank.messages.records import ClientUpdate
        from anyrank.messages.wire import job_of, update_frame

        for _ in range(calls.cohort_of(frame).jobs):
            sent = receive()
            job = job_of(sent)
            key, layers = int(job.client.name.removeprefix("site-")) + 1, {}
            for number, (name, layer) in enumerate(job.download.adapter.layers.items()):
                A, B = (self.numbers(key * 1000 + 2 * number + i, factor.shape) for i, factor in enumerate((layer.A, layer.B)))
                layers[name] = replace(layer, A=A, B=B)
            update = ClientUpdate(Adapter(layers), job.num_examples, job.client.name, {"loss": 1.0})
            yield update_frame(update, job.download, frame.header.run, sent.header.round)

    def scores(self, frame: Any, receive: Any) -> Iterator[Any]:
        import numpy as np

        from anyrank.messages.records import Scores
        from anyrank.messages.scores import scores_frame

        labels = np.zeros(4, np.int64)
        yield scores_frame(Scores(np.ones(4, bool), np.ones(4), labels, labels), frame.header.run)

    def numbers(self, key: int, shape: tuple[int, ...]) -> Any:
        """Numbers of the table, from a place that follows from `key`."""
        size = shape[0] * shape[1]
        start = key * 7919 % (POOL - size)
        return self.pool[start : start + size].view(*shape)


# --- a server ----------------------------------------------------------------------------------------------------------


def serve(asked: dict[str, Any], out: Path) -> dict[str, Any]:
    """One run with workers that train nothing; its figures."""
    from dataclasses import replace
    from functools import partial

    import torch

    from anyrank import methods
    from anyrank.config.sections import Config
    from anyrank.config.tables import to_table
    from anyrank.engines import workers
    from anyrank.federation import assembly, guard, loop
    from anyrank.robust.norm_bound import NormBound
    from anyrank.runs.folder import RunDir

    torch.set_num_threads(1)
    command = (sys.executable, os.path.abspath(__file__), "--worker", json.dumps(asked))
    workers.Supervised = partial(workers.Supervised, command=command)
    config = Config().replace(
        run={"rounds": asked["rounds"], "engine": "workers"},
        clients={"count": asked["clients"], "participation": 1.0, "ranks": tuple(asked["ranks"])},
        method={"name": asked["method"]},
    )
    method = methods.make(config.method.name, config.method.options)
    engine = workers.Workers(to_table(config), max(asked["ranks"]))
    for _ in range(asked["workers"]):
        engine.add({"OMP_NUM_THREADS": "1"})
    clock = Clock()
    clock.watch(guard, "admit", "guard")
    clock.watch(NormBound, "screen", "norm bound")
    clock.watch(type(method), "aggregate", "merge")
    clock.watch(RunDir, "commit", "checkpoint and logs")
    clock.watch(RunDir, "finish", "adapters of the end")
    clock.watch(type(engine), "evaluate", "scores")
    built = replace(assembly.assemble(config, method, engine.ready.roster), engine=engine)
    before, seconds = status("VmRSS"), []
    began, cpu = time.perf_counter(), time.process_time()
    try:
        with RunDir.open(out, config) as store:
            if asked["spool"]:
                engine.keep_in(out)
            loop.run(built, store, lambda metrics: seconds.append(metrics["seconds"]))
    finally:
        built.close()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    found = {"before": before, "peak": status("VmHWM"), "wall": wall, "cpu": cpu, "rounds": seconds, "parts": clock.seconds}
    (out / "figures.json").write_text(json.dumps(found))
    return found


class Clock:
    """CPU seconds of the parts of a run, all threads of the process together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            began = time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - began

        setattr(owner, name, timed)


def status(name: str) -> float:
    """Memory of this process in MB, as Linux reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{name}:"))


def floor(size: int, folder: Path) -> float:
    """CPU seconds for `size` bytes from another process through a pipe into a file, hashed, and read again once."""
    script = f"import sys\nb=bytes(1<<20)\nfor _ in range({size}>>20): sys.stdout.buffer.write(b)"
    began, buffer = time.process_time(), bytearray(1 << 18)
    source = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, bufsize=0)
    with source, open(folder / "floor", "w+b", buffering=0) as file:
        digest = hashlib.sha256()
        while count := source.stdout.readinto(buffer):
            piece = memoryview(buffer)[:count]
            digest.update(piece)
            file.write(piece)
        file.seek(0)
        while file.readinto(buffer):
            pass
    (folder / "floor").unlink()
    return time.process_time() - began


# --- the table ---------------------------------------------------------------------------------------------------------


def measured(**changes: Any) -> dict[str, Any]:
    """The figures of a server in a process of its own."""
    asked = {"clients": 50, "ranks": RANKS, "modules": 64, "side": SIDE, "dtype": "bfloat16", "method": "rbla", "rounds": 1}
    asked |= {"workers": 2, "spool": True} | changes
    with tempfile.TemporaryDirectory(prefix="anyrank-bench-") as folder:
        out = Path(folder) / "run"
        subprocess.run([sys.executable, __file__, "--server", json.dumps(asked), "--out", str(out)], check=True)
        found = json.loads((out / "figures.json").read_text())
        rank = sum(asked["ranks"][i % len(asked["ranks"])] for i in range(asked["clients"]))
        width = {"bfloat16": 2, "float32": 4}[asked["dtype"]]
        found["layer"] = rank * 2 * asked["side"] * width / 1e6
        found["replies"] = found["layer"] * asked["modules"]
        found["floor"] = floor(int(found["replies"] * 1e6), Path(folder)) if asked["side"] == SIDE else 0.0
    return asked | found


def row(found: dict[str, Any]) -> list[str]:
    parts, rounds = found["parts"], found["rounds"]
    each = [f"{parts.get(name, 0) / len(rounds):.1f}" for name in ("guard", "norm bound", "merge", "checkpoint and logs")]
    each = [f"{found['cpu'] / len(rounds):.1f}", *each]
    what = f"{found['clients']} x {found['modules']}, ranks {found['ranks'][0]}–{found['ranks'][-1]}"
    memory = [f"{found['layer']:.0f}", f"{found['before']:.0f}", f"{found['peak']:.0f}"]
    way = "spool" if found["spool"] else "memory"
    return [
        what,
        found["method"],
        way,
        f"{found['replies']:.0f}",
        *memory,
        f"{min(rounds):.1f}",
        *each,
        f"{found['floor']:.1f}",
    ]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options.add_argument("--server", type=json.loads, help=argparse.SUPPRESS)
    options.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--quick", action="store_true", help="few clients")
    asked = options.parse_args()
    if asked.worker:
        return work(asked.worker)
    if asked.server:
        serve(asked.server, asked.out)
        return 0
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    sizes = [{"clients": 5}] if asked.quick else [{"clients": 10}, {"clients": 25}, {"clients": 50}]
    runs = [size | {"method": method} for method in ("rbla", "raflora") for size in sizes]
    if not asked.quick:
        runs += [{"ranks": WIDE, "clients": 10}, {"clients": 10, "spool": False}, {"clients": 10, "rounds": 3}]
    heads = ["clients x modules", "method", "replies in", "MB of replies", "MB of one layer of all", "MB before", "peak MB"]
    heads += ["wall s a round", "CPU s a round", "guard", "norm bound", "merge", "checkpoint", "floor, CPU s"]
    print("| " + " | ".join(heads) + " |\n| " + " | ".join(["---"] * 3 + ["---:"] * (len(heads) - 3)) + " |")
    for each in runs:
        print("| " + " | ".join(row(measured(**each))) + " |", flush=True)
    small = measured(clients=3, ranks=(2, 4, 8), modules=3, side=64, dtype="float32", rounds=30, workers=3, method="raflora")
    rounds = sorted(small["rounds"][1:])
    middle, least, most = (f"{1e3 * rounds[place]:.0f}" for place in (len(rounds) // 2, 0, -1))
    print(f"\n3 workers, small adapters, no training: {middle} ms a round (median of {len(rounds)}; {least} to {most})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
