"""Killed at any moment, and killed again while it continues, a command ends in the bytes that it would have ended in anyway.

The processes here are really killed. Most are forked from this one, which has imported everything: a process that imports for
seconds before it writes is killed in vain. Some are started afresh, as a user starts them.

`make faults` kills 300 times, and once at every write event; here a sample. ANYRANK_KILLS: how often; ANYRANK_KILLS_SEED: when.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import kinds_of_run
from anyrank import files
from anyrank.cli import main
from anyrank.privacy import noise
from kinds_of_run import GRIDS, RESUME, RUNS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no SIGKILL, and no fork")

MANY = os.environ.get("ANYRANK_FAULTS") == "all"
KILLS = int(os.environ.get("ANYRANK_KILLS", 300 if MANY else 24))
SEED = int(os.environ.get("ANYRANK_KILLS_SEED", 0))
EVENTS = 10**9 if MANY else 3  # write events of each command at which it is killed
MOST = 3  # kills of one command before it is left alone
FRESH = 12  # every so many processes, one that is started afresh
LONGEST_S = 300.0  # of any process, however busy the machine
KINDS = {**RUNS, **{name: (*words, "--jobs", "1") for name, words in GRIDS.items()}}


@dataclass
class Tally:
    """What was done to the commands of this file."""

    kills: Counter = field(default_factory=Counter)  # by where they hit
    commands: int = 0
    again: int = 0  # kills of a process that continued one which was killed

    def line(self) -> str:
        where = ", ".join(f"{count} {what}" for what, count in sorted(self.kills.items()))
        return f"{self.commands} commands, {sum(self.kills.values())} kills ({where}), {self.again} of them at a resume"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the configurations; keys and caches stay in it."""
    folder = kinds_of_run.make_folder(tmp_path_factory.mktemp("kills"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("ANYRANK_CACHE", str(folder / "cache"))
        patch.setenv(noise.SEED, "0123456789abcdef" * 2)
        yield folder


def forked(place: Path, words: tuple[str, ...], reached: Callable[[str, Path], None] | None = None) -> int:
    """The command in a process of its own, forked from this one; its number. `reached`: called at each of its write events."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.chdir(place)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if reached:
            files.reached = reached
        sys.argv = ["anyrank", *words]
        main()
    except SystemExit as done:
        status = done.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # nothing of pytest's


def fresh(place: Path, words: tuple[str, ...]) -> int:
    """The command as a user starts it; the process's number."""
    with open(place / "said", "w") as said:
        jobs = ["--jobs", "2"] if "--jobs" in words else []
        command = [sys.executable, "-m", "anyrank", *words, *jobs]
        return subprocess.Popen(command, cwd=place, stdout=said, stderr=said).pid


def ended(place: Path, process: int, after_s: float) -> bool:
    """Wait until the process ends, `after_s` at most. Whether it ended, which it has to do well."""
    last = time.monotonic() + after_s
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(status) == 0, (place / "said").read_text()
            return True
        if time.monotonic() >= last:
            return False
        time.sleep(0.002)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def run_whole(place: Path, words: tuple[str, ...]) -> None:
    process = forked(place, words)
    if not ended(place, process, LONGEST_S):
        kill(process)
        pytest.fail(f"{words} did not end within {LONGEST_S} s")


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, tuple[dict, float]]:
    """By kind: what the command leaves when nothing happens to it, and how long it takes."""
    found = {}
    for name, words in KINDS.items():
        assert kinds_of_run.command(place, *words, "--out", f"{name}-warm") == (0, "")  # what it computes once, forks have
        began = time.monotonic()
        run_whole(place, (*words, "--out", f"{name}-whole"))
        found[name] = kinds_of_run.whole(place / f"{name}-whole"), time.monotonic() - began
    assert all("privacy.jsonl" in found[name][0] for name in ("example", "client"))
    return found


def where(out: Path) -> str:
    """What a command was at when it was killed, by what it left."""
    if not any(out.rglob("config.toml")):
        return "before it began"
    if not any(out.rglob("state.safetensors")):
        return "in its first round"
    if not any(out.rglob("adapter*")):
        return "between rounds"
    return "at its adapters" if not any(out.rglob("summary.json")) else "after its summary"


def check(place: Path, name: str, out: Path, expected: dict, story: str) -> None:
    """A command that came to its end left what it leaves undisturbed, and nothing else."""
    found = kinds_of_run.whole(out)
    assert found.keys() == expected.keys(), story
    assert [path for path in found if found[path] != expected[path]] == [], story
    assert (out / "report.html").exists() or name == "study", story
    assert not [*out.rglob("*.tmp"), *(place / "state").rglob("*.tmp")], story
    assert not [*(place / "state" / "anyrank" / "privacy").glob("*")], "keys of finished runs are deleted"


def test_random_kills_change_nothing(place: Path, undisturbed) -> None:
    """Each command is killed at a random moment, and continued, and killed again, until it ends before its moment comes."""
    chance, tally, processes = random.Random(SEED), Tally(), 0
    while sum(tally.kills.values()) < KILLS:
        name = list(KINDS)[tally.commands % len(KINDS)]
        words, (expected, lasts_s) = KINDS[name], undisturbed[name]
        out, story = place / f"{name}-{tally.commands}", f"seed {SEED}, {name}:"
        for attempt in range(MOST + 1):
            processes += 1
            given = (*words, "--out", out.name, *(RESUME[name] if attempt else ()))
            afresh = processes % FRESH == 0
            process = fresh(place, given) if afresh else forked(place, given)
            moment = chance.random() ** 1.5 * lasts_s * (6.0 if afresh else 1.1)  # the earlier half has more that can go wrong
            if ended(place, process, moment if attempt < MOST else LONGEST_S):
                break
            kill(process)
            hit = where(out)
            tally.kills[hit] += 1
            tally.again += attempt > 0
            story += f" killed after {moment:.3f} s, {hit};"
        else:
            pytest.fail(f"{story} did not end")
        check(place, name, out, expected, story)
        tally.commands += 1
    print(f"random kills, seed {SEED}: {tally.line()}; adapters, logs, ledgers, summaries and states the same bytes")


@pytest.mark.parametrize("name", KINDS)
def test_a_kill_at_any_write_event_changes_nothing(place: Path, undisturbed, name: str) -> None:
    """Just before each write, flush, replacement, removal and lock."""
    words, (expected, _) = KINDS[name], undisturbed[name]

    def forked_and_killed_at(event: int, out: str) -> bool:
        count = 0

        def reached(what: str, path: Path) -> None:
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

        process = forked(place, (*words, "--out", out), reached)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL

    counted = place / f"{name}-events"
    counted.write_text("")

    def count(what: str, path: Path) -> None:
        with open(counted, "a") as file:
            file.write(f"{what}\n")

    assert ended(place, forked(place, (*words, "--out", f"{name}-counted"), count), LONGEST_S)
    events = len(counted.read_text().splitlines())
    chosen = random.Random(f"{SEED} {name}").sample(range(1, events + 1), min(EVENTS, events))
    for event in sorted(chosen):
        out = place / f"{name}-at-{event}"
        assert forked_and_killed_at(event, out.name), f"event {event}: {(place / 'said').read_text()}"
        run_whole(place, (*words, "--out", out.name, *RESUME[name]))
        check(place, name, out, expected, f"{name}, killed at event {event}")
    print(f"{name}: killed at {len(chosen)} of {events} write events")
