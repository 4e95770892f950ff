"""Processes end: at once by Ctrl-C and SIGTERM, with one line; with their parent, however that ends; and one costs one run.

`make faults` sets ANYRANK_FAULTS, and tries many more moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from anyrank import config, stopping
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.studies import grid, variants
from test_cli import wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="what is left is looked up in /proc")

MANY = bool(os.environ.get("ANYRANK_FAULTS"))
MOMENTS = 12 if MANY else 2  # of each command
LONGEST = 5.0  # seconds from a signal to the end
SMALL = '[run]\nname = "small"\nrounds = 60\n[model]\nname = "digits-mlp"\n[train]\nlocal_steps = 2\n[method]\nname = "rbla"\n'
STUDY = """
title = "t"
claim = "c"
minutes = 1
seeds = 1
methods = ["rbla", "raflora"]
columns = ["accuracy"]
figure = "none"
[[setting]]
name = "one"
config = "small.toml"
"""
COMMANDS = {  # with what ends in the same bytes as if there had been no signal
    "run": ("run", "small.toml", "--out", "out", "--json"),
    "compare": ("compare", "small.toml", "--methods", "rbla,raflora", "--jobs", "2", "--out", "out", "--json"),
    "study": ("study", "study.toml", "--jobs", "2", "--out", "out", "--json"),
    "aggregate": ("aggregate", "one", "two", "--method", "raflora", "--ranks", "2,4", "--out", "out", "--json"),
}
RESUME = {"run": ("--resume",), "compare": ("--resume",), "study": (), "aggregate": ()}
SAYS = {
    "run": "go on with the same command and --resume",
    "compare": "go on with the same command and --resume",
    "study": "go on with the same command: it keeps what is finished",
    "aggregate": "nothing is left of it; give the same command again",
}
LASTS = {"run": 5.0, "compare": 8.0, "study": 8.0, "aggregate": 4.0}  # seconds, roughly

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path, cache: Path) -> Iterator[Start]:
    """Starts the command in a folder of its own, as the head of a process group, and marks whatever it starts."""
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "study.toml").write_text(STUDY)
    marked = os.environ | {
        "ANYRANK_CACHE": str(cache),
        "ANYRANK_MARK": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TMPDIR": str(tmp_path / "tmp"),  # where it exists
    }
    started = []

    def call(*arguments: str, **variables: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "anyrank", *arguments]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=marked | variables, start_new_session=True, **pipes))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    for each in living(tmp_path):
        os.kill(each, signal.SIGKILL)


def living(mark: Path) -> dict[int, str]:
    """The processes that a test has started and that are not dead, `{id: what was called}`."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"ANYRANK_MARK={mark}\0".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it is gone, or somebody else's
            continue
    return found


def workers(mark: Path) -> list[int]:
    return [process for process, called in living(mark).items() if "spawn_main" in called]


def catches_signals(process: subprocess.Popen) -> bool:
    """Whether the command is so far that it catches SIGTERM: what Python does before that is not its own."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def adapter_bytes(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("adapter_model.safetensors"))}


def make_adapters(folder: Path, layers: int = 1500) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, rank in (("one", 4), ("two", 8)):
        made = {
            f"layer{i}": LoraLayer(
                torch.randn(rank, 192, generator=generator), torch.randn(192, rank, generator=generator), 16 / rank
            )
            for i in range(layers)
        }
        Adapter(made).save(folder / name)


def moments(verb: str) -> list[tuple[float, int, bool]]:
    """When, which signal, and whether to the whole group: a sample that is the same each time."""
    rng = random.Random(f"{verb} {MOMENTS}")
    slots = [LASTS[verb] * (i + rng.random()) / MOMENTS for i in range(MOMENTS)]
    return [(slot, (signal.SIGINT, signal.SIGTERM)[(i + len(verb)) % 2], rng.random() < 0.5) for i, slot in enumerate(slots)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, dict[str, bytes]]:
    """What each command comes to when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.toml").write_text(SMALL)
    (folder / "study.toml").write_text(STUDY)
    make_adapters(folder)
    found = {}
    for verb, command in COMMANDS.items():
        called = [sys.executable, "-m", "anyrank", *command[:-1], "--json"]
        done = subprocess.run(
            called, cwd=folder, env=os.environ | {"ANYRANK_CACHE": str(cache)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found[verb] = adapter_bytes(folder / "out")
        (folder / "out").rename(folder / f"out-{verb}")
    return found


@pytest.mark.parametrize(("verb", "moment", "number", "group"), [(verb, *each) for verb in COMMANDS for each in moments(verb)])
def test_a_signal_ends_a_command_in_one_line_and_it_goes_on(
    start: Start, tmp_path: Path, whole, verb: str, moment: float, number: int, group: bool
) -> None:
    if verb == "aggregate":
        make_adapters(tmp_path)
    process = start(*COMMANDS[verb])
    wait_until(lambda: catches_signals(process), seconds=60)
    time.sleep(moment)
    sent = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - sent
    print(
        f"{verb}: {took:.2f} s from signal {number} at {moment:.2f} s{' to the group' if group else ''}: {process.returncode}"
    )
    wait_until(lambda: not living(tmp_path), seconds=2)
    assert took < LONGEST
    if process.returncode:  # else it was done
        name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
        assert (process.returncode, err) == (128 + number, f"anyrank: stopped by {name}; {SAYS[verb]}\n")
        assert not out
        assert not [path for path in tmp_path.rglob(".*.tmp")]
        assert verb != "aggregate" or not (tmp_path / "out").exists()
        again = start(*COMMANDS[verb], *RESUME[verb])
        _, err = again.communicate(timeout=120)
        assert again.returncode == 0, err
    assert adapter_bytes(tmp_path / "out") == whole[verb]


PRIVATE = """
[run]
name = "private"
rounds = 60
[model]
name = "digits-mlp"
[data.partition]
kind = "iid"
[train]
optimizer = "sgd"
local_steps = 2
[method]
name = "ffa_lora"
[privacy]
level = "example"
epsilon = 3.0
delta = 1e-5
"""
# The commands that leave nothing that would have to be the same: how they are called, and what they say.
OTHERS = {
    "inspect": (("inspect", "one", "two", "--json"), "nothing is left of it; give the same command again"),
    "report": (("report", "done", "--out", "page.html", "--json"), "nothing is left of it; give the same command again"),
    "demo": (("demo", "--out", "out", "--jobs", "2", "--json"), "give the same command again: it starts anew"),
    "plan": (("plan", "small.toml", "--json"), "nothing is left of it; give the same command again"),
    "audit": (("audit", "private.toml", "--canaries", "20", "--json"), "nothing is left of it; give the same command again"),
    "privacy": (("privacy", "private.toml", "--json"), "nothing is left of it; give the same command again"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", OTHERS)
def test_a_signal_ends_every_other_command_in_one_line(start: Start, tmp_path: Path, verb: str, number: int) -> None:
    (tmp_path / "private.toml").write_text(PRIVATE)
    (tmp_path / "tmp").mkdir()
    if verb == "inspect":
        make_adapters(tmp_path)
    if verb == "report":
        assert start("run", "small.toml", "--set", "run.rounds=2", "--out", "done", "--json").wait(timeout=120) == 0
    called, words = OTHERS[verb]
    for moment in (0.0, 0.4, 1.0, 2.0, 4.0, 8.0) if MANY else (random.Random(f"{verb} {number}").uniform(0, 3),):
        process = start(*called)
        wait_until(lambda process=process: catches_signals(process), seconds=60)
        time.sleep(moment)
        sent = time.monotonic()
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
        took = time.monotonic() - sent
        print(f"{verb}: {took:.2f} s from signal {number} at {moment:.2f} s: {process.returncode}")
        wait_until(lambda: not living(tmp_path), seconds=2)
        assert took < LONGEST
        assert process.returncode in (0, 128 + number), err
        if process.returncode:
            name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
            assert (out, err) == ("", f"anyrank: stopped by {name}; {words}\n")
            assert not [path for path in tmp_path.rglob(".*.tmp")]
            assert not list((tmp_path / "tmp").glob("tmp*")), "an audit trains in a temporary folder"


LONG = ("--set", "run.rounds=100000")


@pytest.mark.parametrize("moment", [0.2 * 1.35**i for i in range(11)] if MANY else [0.3, 1.2, 2.0, 3.0, 4.0])
def test_a_grid_whose_parent_is_killed_leaves_nobody(start: Start, tmp_path: Path, moment: float) -> None:
    process = start(*COMMANDS["compare"], *LONG)
    time.sleep(moment)
    process.kill()
    process.wait()
    wait_until(lambda: not living(tmp_path), seconds=3)


# What a worker loses before it runs anything of ours: its request to the system, or its pipe to the parent.
WITHOUT = {
    "the system's signal": "stopping._KILL = 0\n",
    "the pipe": "stopping._follow = lambda parent: None\n",
}


@pytest.mark.skipif(sys.platform != "linux", reason="only here there are two ways")
@pytest.mark.parametrize("lost", WITHOUT)
def test_either_way_to_end_with_the_parent_suffices(start: Start, tmp_path: Path, lost: str) -> None:
    (tmp_path / "patched").mkdir()
    (tmp_path / "patched" / "sitecustomize.py").write_text(f"from anyrank import stopping\n{WITHOUT[lost]}")
    own = Path(stopping.__file__).parents[1]
    process = start(*COMMANDS["compare"], *LONG, PYTHONPATH=os.pathsep.join([str(tmp_path / "patched"), str(own)]))
    begun = [tmp_path / "out" / method / "seed-0" / "metrics.jsonl" for method in ("rbla", "raflora")]
    wait_until(lambda: all(path.exists() for path in begun), seconds=120)
    process.kill()
    process.wait()
    wait_until(lambda: not living(tmp_path), seconds=3)


def killed_once(start: Start, tmp_path: Path, ready: Callable[[], bool], jobs: str) -> tuple[list[dict], dict, str]:
    """A comparison of four runs of which one worker is killed when it is `ready`: failures, rows and stderr."""
    command = ("compare", "small.toml", "--methods", "rbla,raflora", "--seeds", "2", "--out", "out", "--json", "--jobs", jobs)
    process = start(*command)
    wait_until(ready, seconds=60)
    os.kill(workers(tmp_path)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    told = json.loads(out)
    return told["failures"], {row["label"]: row["seeds"] for row in told["rows"]}, err


@pytest.mark.parametrize("when", ["starting", "training"])
def test_a_killed_worker_costs_the_run_that_it_had(start: Start, tmp_path: Path, when: str, whole) -> None:
    begun = {"starting": lambda: workers(tmp_path), "training": lambda: list(tmp_path.glob("out/*/*/checkpoint/*"))}[when]
    failures, seeds, err = killed_once(start, tmp_path, begun, "2")
    assert len(failures) == 1
    assert sum(seeds.values()) == 3
    assert "its process ended by signal 9, from outside or because memory was short; go on by --resume" in failures[0]["reason"]
    assert err.startswith("anyrank: 1 of 4 runs failed")
    assert err.count("\n") == 1
    again = start(*COMMANDS["compare"], "--seeds", "2", "--resume")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    found = adapter_bytes(tmp_path / "out")
    assert {name: found[name] for name in whole["compare"]} == whole["compare"]


BROKEN = """
import asyncio, os, signal
from dataclasses import dataclass
from anyrank.methods import register
from anyrank.methods.rbla import RBLA

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError

@register
@dataclass(frozen=True)
class Broken(RBLA):
    name = "broken"
    how: str = "type"

    def aggregate(self, state, updates):
        if self.how == "type":
            return 1 + "1"
        if self.how == "memory":
            raise MemoryError
        if self.how == "disk":
            raise OSError(28, "No space left on device")
        if self.how == "exit":
            raise SystemExit(3)
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "cancelled":
            raise asyncio.CancelledError
        if self.how == "unprintable":
            raise Unprintable
        if self.how == "leave":
            os._exit(4)
        os.kill(os.getpid(), signal.SIGSEGV)
"""
HOW = {
    "type": "TypeError: unsupported operand",
    "memory": "MemoryError",
    "disk": "OSError: [Errno 28] No space left on device",
    "exit": "SystemExit: 3",
    "interrupt": "KeyboardInterrupt",
    "cancelled": "CancelledError",
    "unprintable": "Unprintable",
    "leave": "its process ended with status 4",
    "segfault": "its process ended by signal 11",
}


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_whatever_fails_in_a_run_costs_that_run(start: Start, tmp_path: Path, jobs: str) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    ways = [how for how in HOW if jobs == "2" or how not in ("leave", "segfault")]
    labels = ["rbla", *(f"broken:how={how}" for how in ways), "raflora"]
    settings = ("--set", "method.file=broken.py", "--set", "run.rounds=2", "--jobs", jobs, "--out", "out", "--json")
    process = start("compare", "small.toml", "--methods", ",".join(labels), *settings)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    told = json.loads(out)
    assert [row["label"] for row in told["rows"]] == ["rbla", "raflora"]
    assert [failure["label"] for failure in told["failures"]] == labels[1:-1]
    for how, failure in zip(ways, told["failures"], strict=True):
        assert failure["reason"].startswith(HOW[how])
    assert err.startswith(f"anyrank: {len(ways)} of {len(labels)} runs failed")
    assert err.count("\n") == 1


def test_where_no_process_can_be_started_those_that_run_do_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses all but the first worker, and then all."""
    config_ = config.from_table({"run": {"rounds": 1}, "model": {"name": "digits-mlp"}, "train": {"local_steps": 1}})
    cells = variants.make_cells(config_, ["rbla"], 3, tmp_path)
    started, most = [], [1]

    class Refused(grid._Worker):
        def __init__(self) -> None:
            if len(started) >= most[0]:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            started.append(self)
            super().__init__()

    monkeypatch.setattr(grid, "_Worker", Refused)
    assert grid.run_cells(cells, jobs=3) == []
    most[0] = 0
    failures = grid.run_cells(variants.make_cells(config_, ["raflora"], 2, tmp_path), jobs=2)
    reason = (
        "no process can be started for it (BlockingIOError: [Errno 11] Resource temporarily unavailable); go on by --resume"
    )
    assert [failure["reason"] for failure in failures] == [reason] * 2


def test_an_interrupt_is_no_clients_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python it comes out of a grid as what it is, side by side and one by one."""
    from anyrank.training import local
    from anyrank.training.optimizers import Optimizer

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    cells = variants.make_cells(config.from_table({"model": {"name": "digits-mlp"}}), ["rbla"], 1, tmp_path)
    for stacking, patched in (("always", (Optimizer, "step")), ("never", (local, "train"))):
        with monkeypatch.context() as patch:
            patch.setattr(*patched, interrupted)
            chosen = [variants.Cell(c.label, c.config.replace(run={"stacking": stacking}), tmp_path / stacking) for c in cells]
            with pytest.raises(KeyboardInterrupt):
                grid.run_cells(chosen, jobs=1)


def test_what_is_unfinished_goes_with_the_process(tmp_path: Path) -> None:
    program = f"""if True:
        import os, pathlib, signal, threading, time
        from anyrank import stopping
        stopping.on_signals(lambda number: f"ended by {{number}}")
        path = pathlib.Path({str(tmp_path / "half")!r})
        with stopping.unfinished(path):
            path.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (143, "ended by 15\n")
    assert not list(tmp_path.iterdir())


def test_one_long_call_of_c_does_not_hold_a_signal_up(tmp_path: Path) -> None:
    """The main thread never comes to its handler: another one ends the process."""
    program = """if True:
        import hashlib, os, signal, threading
        from anyrank import stopping
        stopping.on_signals(lambda number: f"ended by {number}")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)  # minutes, in which no Python code runs in this thread
    """
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, "ended by 2\n")
    assert time.monotonic() - began < LONGEST


def test_a_signal_waits_while_a_child_is_started() -> None:
    program = """if True:
        import os, signal
        from anyrank import stopping
        stopping.on_signals(lambda number: "ended")
        with stopping.starting_a_child():
            os.kill(os.getpid(), signal.SIGTERM)
            print("whole", flush=True)
        print("never", flush=True)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (143, "whole\n", "ended\n")


def test_the_library_leaves_signals_alone() -> None:
    assert signal.getsignal(signal.SIGTERM) is not stopping._stop
    assert signal.getsignal(signal.SIGINT) is not stopping._stop
