"""A federation of real processes on loopback: it starts, is looked at, loses a process, ends, and leaves nothing behind.

The tests in the order of the file share one federation. `ANYRANK_SITES=all` adds the longer ones (`make sites`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("nvflare")
pytest.importorskip("transformers")
import psutil
import tomli_w

from anyrank.config import load
from anyrank.config.federation import FederationFile, ServerPlace
from anyrank.errors import DeployError
from anyrank.parties import commanding, provisioning, rehearsal, starting
from anyrank.parties.kits import open_kit
from deploy_world import OWNER, SITES, VIEWER, call, founded, free_port, settled, texts
from tiny import make_model

LONG = pytest.mark.skipif(os.environ.get("ANYRANK_SITES") != "all", reason="ANYRANK_SITES=all runs it (`make sites`)")
_WAIT_S = 120.0
LABELS = ("in", "out")


def until(holds: Callable[[], bool], what: str, wait_s: float = _WAIT_S) -> None:
    end = time.monotonic() + wait_s
    while not holds():
        assert time.monotonic() < end, f"within {wait_s:.0f} s: {what}"
        time.sleep(0.2)


def of_kits(place: Path) -> list[psutil.Process]:
    """All processes of this machine that have a kit of this place in their command or as their folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and str(place) in " ".join([*process.cmdline(), process.cwd()]):
                found.append(process)
    return found


class Started:
    """`anyrank deploy start` for a kit, and what it has printed."""

    def __init__(self, kit: Path, env: dict[str, str] | None = None) -> None:
        self.kit, self.ready, self.log = kit, kit.with_name(f".{kit.name}.ready"), kit.with_name(f".{kit.name}.log")
        self.ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "anyrank", "deploy", "start", str(kit), "--ready-file", str(self.ready)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)

    def connected(self) -> Started:
        until(lambda: self.ready.exists() or self.process.poll() is not None, f"{self.kit.name} is connected")
        assert self.ready.exists(), self.said
        return self

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def engine(self) -> int:
        """The engine process of this moment."""
        children = psutil.Process(self.process.pid).children()
        return next(child.pid for child in children if any("_train" in word for word in child.cmdline()))

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    folder = founded(tmp_path_factory.mktemp("live") / "fed", port=free_port())
    for name in SITES:
        settled(folder / "kits" / name, texts(folder / f"{name}.csv", 12))
    yield folder
    left = of_kits(folder)
    for process in left:
        process.kill()
    assert left == []


@pytest.fixture(scope="module")
def world(place: Path) -> Iterator[dict[str, Started]]:
    """The server and both sites, connected."""
    started: dict[str, Started] = {}
    try:
        started["server"] = Started(place / "kits/server").connected()
        for name in SITES:
            started[name] = Started(place / "kits" / name)
        yield {name: each.connected() for name, each in started.items()}
    finally:
        for each in started.values():
            if each.process.poll() is None:
                each.end()


def both(table: dict) -> bool:
    return all(each["seen_s"] is not None for each in table["sites"])


def test_the_server_says_who_is_connected_to_owners_and_viewers(place: Path, world) -> None:
    for person in (OWNER, VIEWER):
        member = commanding.reader(place / "kits" / person)
        until(
            lambda member=member: all(each["seen_s"] is not None for each in commanding.status(member)["sites"]),
            "both are seen",
        )
        table = commanding.status(member)
        assert [each["name"] for each in table["sites"]] == list(SITES)
        assert commanding.in_words(table)[0].endswith("2 of 2 sites connected")
    assert "connected to localhost" in world["a"].said


def test_the_doctor_reaches_the_server_and_its_clock(place: Path, world, monkeypatch, capsys) -> None:
    assert call(monkeypatch, "deploy", "doctor", str(place / "kits/a"), "--json") == (0, "")
    states = {each["what"]: each["state"] for each in json.loads(capsys.readouterr().out)["findings"]}
    assert states["server"] == states["clock"] == "ok"


def test_a_viewer_and_a_stranger_cannot_submit(place: Path, world, tmp_path: Path) -> None:
    """The viewer's own kit is refused by the server too: the command's own check is taken away here."""
    asked = commanding.request_of(SITES, load(place / "run.toml").replace(data={"label_names": ("no", "yes")}))
    kit = open_kit(place / "kits" / VIEWER)
    (kit.state / "submitted").mkdir(parents=True, exist_ok=True)
    viewer = commanding.Member(kit)
    with pytest.raises(DeployError, match="this kit's role may not do that; it needs an owner's kit"):
        commanding.submit(viewer, asked)
    other = founded(tmp_path / "fed", port=open_kit(place / "kits/server").port)
    stranger = commanding.owner(other / "kits" / OWNER)
    with pytest.raises(DeployError) as error:
        commanding.status(stranger)
    assert "\n" not in str(error.value)


def test_what_processes_write_stays_in_the_kit_and_private(place: Path, world) -> None:
    for name in ("server", *SITES):
        written = [path for path in (place / "kits" / name).rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o077 for path in written if path.name != "start.lock"} == {0}, name
        (engine,) = [psutil.Process(world[name].engine)]
        assert engine.environ()["TMPDIR"] == str(place / "kits" / name / "state/tmp")
        assert engine.environ()["MALLOC_ARENA_MAX"] == "1"


def test_a_kit_is_started_once(place: Path, world) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "anyrank", "deploy", "start", str(place / "kits/a")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is started already" in done.stderr
    assert world["a"].process.poll() is None


def test_an_engine_process_that_is_killed_is_started_again(place: Path, world) -> None:
    before = world["a"].engine
    world["a"].ready.unlink()
    os.kill(before, signal.SIGKILL)
    until(world["a"].ready.exists, "a is connected again")
    assert world["a"].engine != before
    assert "starting it again in 1 s" in world["a"].said
    assert world["a"].said.count("connected to localhost") == 2


def test_a_start_that_is_killed_takes_its_engine_process_with_it(place: Path, world) -> None:
    """kill -9 of `start` itself: nothing goes on unwatched, and the kit can be started again."""
    world["a"].process.kill()
    world["a"].process.wait()
    until(lambda: of_kits(place / "kits/a") == [], "its processes have ended", 30.0)
    world["a"] = Started(place / "kits/a").connected()


def test_a_site_leaves_from_its_own_machine_and_can_return(place: Path, world, monkeypatch, capsys) -> None:
    kit = place / "kits/b"
    assert call(monkeypatch, "deploy", "leave", str(kit)) == (0, "")
    assert "its processes have ended" in capsys.readouterr().out
    assert world["b"].process.wait(30) == 143
    assert of_kits(kit) == []
    with pytest.raises(DeployError, match="has left its federation"):
        starting.ready(kit)
    assert call(monkeypatch, "deploy", "leave", str(kit), "--undo") == (0, "")
    starting.ready(kit)


@pytest.mark.parametrize(("name", "number"), [("a", signal.SIGTERM), ("server", signal.SIGINT)])
def test_a_party_ends_with_all_that_it_started(place: Path, world, name: str, number: int) -> None:
    assert world[name].end(number) == 128 + number
    assert of_kits(place / "kits" / name) == []
    assert world[name].said.splitlines()[-1].endswith("stopped; nothing of it is running")


# --- whole runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    """A folder with a base model, the data of two sites, and a run over them."""
    folder = tmp_path_factory.mktemp("rehearsed")
    make_model(folder / "model")
    sites = [{"name": name, "rank": rank, "source": f"{name}.csv"} for name, rank in (("a", 4), ("b", 8))]
    for site in sites:
        texts(folder / site["source"], 30, LABELS)
    table = {
        "run": {"name": "first", "rounds": 3},
        "model": {"task": "text-classification", "path": "model", "head": "frozen", "dtype": "float32"},
        "data": {"label_names": list(LABELS)},
        "lora": {"target_modules": ["query", "value"]},
        "train": {"local_steps": 2, "batch_size": 8},
        "eval": {"where": "sites"},
        "sites": sites,
    }
    (folder / "run.toml").write_text(tomli_w.dumps(table))
    return folder


def test_a_rehearsal_gives_the_bytes_of_one_process(rehearsed: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    status = call(monkeypatch, "deploy", "rehearse", str(rehearsed / "run.toml"), "--out", str(out), "--json")
    assert status == (0, "")
    table = json.loads(capsys.readouterr().out)
    assert (table["state"], table["jobs"]) == ("done", 1)
    assert [(row["name"], row["rank"], row["rounds"]) for row in table["sites"]] == [("a", 4, 3), ("b", 8, 3)]
    assert of_kits(out) == []
    run = Path(table["folder"])
    assert call(monkeypatch, "run", str(rehearsed / "run.toml"), "--out", str(tmp_path / "alone"), "--json") == (0, "")
    adapter = "adapter/adapter_model.safetensors"
    assert (run / adapter).read_bytes() == (tmp_path / "alone" / adapter).read_bytes()
    for path in (out / "kits/server").rglob("*"):
        if path.is_file():
            assert str(rehearsed).encode() not in path.read_bytes(), path


@LONG
def test_a_run_goes_on_after_its_server_is_killed(rehearsed: Path, tmp_path: Path) -> None:
    """kill -9 of the server while a run is under way: it seems to run, is noticed, and ends with the bytes of a quiet run."""
    out = tmp_path / "fed"
    text = (rehearsed / "run.toml").read_text().replace("rounds = 3", "rounds = 12")
    (rehearsed / "long.toml").write_text(text)
    config = load(rehearsed / "long.toml")
    rehearsal._write(config, _federation(), out)
    provisioning.provision(out)
    started = [Started(out / "kits" / name) for name in ("server", *SITES)]
    try:
        for each in started:
            each.connected()
        owner = commanding.owner(out / "kits" / rehearsal.OWNER.name)
        commanding.submit(owner, commanding.request_of(SITES, config))
        rounds = out / "kits/server/state/runs/first/run/metrics.jsonl"
        until(lambda: rounds.exists() and rounds.read_text().count("\n") >= 2, "two rounds")
        server = psutil.Process(started[0].engine)
        for process in [server, *server.children(recursive=True)]:
            process.kill()
        end = commanding.keep_going(owner, "first", lambda line: None, 1.0)
        assert end["state"] == "done"
        assert end["jobs"] == 2
    finally:
        for each in started:
            each.end()
    assert of_kits(out) == []
    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "anyrank", "run", str(rehearsed / "long.toml"), "--out", str(alone)]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    adapter = "adapter/adapter_model.safetensors"
    assert (rounds.parent / adapter).read_bytes() == (alone / adapter).read_bytes()


def _federation():
    return FederationFile("rehearsal", SITES, ServerPlace("localhost", (), free_port()), people=(rehearsal.OWNER,))


@LONG
def test_a_rehearsal_that_cannot_work_ends_in_one_line_with_nothing_left(rehearsed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rehearsed, tmp_path / "data"))
    (folder / "b.csv").write_text("text,label\none two,elsewhere\n")  # a label that no other site knows
    command = [sys.executable, "-m", "anyrank", "deploy", "rehearse", str(folder / "run.toml"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "site b" in done.stderr
    assert of_kits(tmp_path / "out") == []


@LONG
def test_a_rehearsal_that_is_interrupted_leaves_nothing_running(rehearsed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "anyrank", "deploy", "rehearse", str(rehearsed / "run.toml"), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until((out / "kits/.a.ready").exists, "a is connected")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr.read().count("\n") == 1
    until(lambda: of_kits(out) == [], "all have ended", 30.0)
