"""Whatever a disk refuses and whatever becomes of a run's files: one line and the right status, and what was whole stays whole.

A sample of all faults is tried here; `make faults` tries every one of them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from anyrank import files, methods, report
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.cli import main
from anyrank.errors import RunError, RunFailed
from anyrank.federation import loop
from anyrank.messages.records import ClientUpdate, Scaling, ServerState
from anyrank.privacy import noise
from anyrank.runs.checkpoint import load, save_state
from anyrank.runs.folder import RunDir, remove_run
from test_federation import Script, build

WHOLE = os.environ.get("ANYRANK_FAULTS") == "all"
SAMPLE = 6  # faults of each kind and command where not all are tried
COMMON = """
[run]
name = "faults"
rounds = 3
[model]
name = "digits-mlp"
[clients]
count = 4
participation = 0.5
ranks = [1, 2]
[train]
local_steps = 1
batch_size = 16
"""
PRIVATE = '[data.partition]\nkind = "iid"\n[method]\nname = "ffa_lora"\n[privacy]\nlevel = "example"\nepsilon = 3.0\ndelta = 1e-5\n'
CONFIGS = {"open.toml": COMMON, "private.toml": COMMON + PRIVATE}
COMMANDS = {
    "run": ("run", "open.toml", "--json"),
    "private": ("run", "private.toml", "--json"),
    "compare": ("compare", "open.toml", "--methods", "rbla,raflora", "--jobs", "1", "--json"),
}
KINDS = ("ENOSPC", "EIO", "EACCES", "short")


@dataclass
class Fault:
    """Makes write event `at` fail: `ENOSPC` and all after it, another error once, `short` when half of it was written."""

    at: int = 0
    kind: str = ""
    count: int = 0

    def __post_init__(self) -> None:
        self.sizes: dict[Path, int] = {}

    def __call__(self, what: str, path: Path) -> None:
        self.count += 1
        if what == "write":
            self.sizes[path] = path.stat().st_size if path.exists() else 0
        if self.count == self.at or (self.kind == "ENOSPC" and 0 < self.at < self.count):
            if self.kind == "short" and what == "flush" and path in self.sizes:
                os.truncate(path, (self.sizes[path] + path.stat().st_size) // 2)
            raise OSError(getattr(errno, self.kind, errno.ENOSPC), "as the test wants it", str(path))


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    """A command in this process: its status, and what it said on stderr. Whatever it raises else would be a traceback."""
    said, before = io.StringIO(), (sys.argv, Path.cwd())
    sys.argv = ["anyrank", *arguments]
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as done:
        return done.code or 0, said.getvalue()
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    return 0, said.getvalue()


def adapters(folder: Path) -> dict[str, bytes]:
    """All adapters at or below a run folder, or a folder of runs."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("adapter*/*"))}


def told_in_a_line(said: str) -> bool:
    return len([line for line in said.splitlines() if line.strip()]) == 1 and said.startswith("anyrank: ")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the configurations; noise keys and caches stay in it, and reports, which have tests of their own, are short."""
    folder = tmp_path_factory.mktemp("faults")
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("ANYRANK_CACHE", str(folder / "cache"))
        patch.setenv(noise.SEED, "0123456789abcdef" * 2)
        patch.setattr(report, "build", lambda runs, page: files.write_whole_text(page, "a report") or page)
        patch.setattr(report, "figure", lambda runs, page: files.write_whole_text(page, "a figure") or page)
        assert command(folder, *COMMANDS["run"], "--out", "warm")[0] == 0  # what is cached is written by the first run alone
        yield folder


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Callable[[str], tuple[dict[str, bytes], int]]:
    """What a command leaves that nobody disturbs, and how many write events it has."""
    made: dict[str, tuple[dict[str, bytes], int]] = {}

    def make(name: str) -> tuple[dict[str, bytes], int]:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files, "reached", counted := Fault())
                status, said = command(place, *COMMANDS[name], "--out", f"{name}-whole")
            assert (status, said) == (0, "")
            made[name] = adapters(place / f"{name}-whole"), counted.count
        return made[name]

    return make


def tried(cases: list, seed: str) -> list:
    """All cases, or a sample of them: the same ones in every run of the tests."""
    return cases if WHOLE else random.Random(seed).sample(cases, min(len(cases), SAMPLE))


# --- what the system refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_write_that_fails_is_one_line_and_the_run_goes_on_to_the_same_bytes(
    place: Path, undisturbed, name: str, kind: str
) -> None:
    expected, events = undisturbed(name)
    for event in tried(list(range(1, events + 1)), f"{name} {kind}"):
        out = f"{name}-{kind}-{event}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "reached", Fault(event, kind))
            status, said = command(place, *COMMANDS[name], "--out", out)
        assert (status, told_in_a_line(said)) == (1, True), (out, status, said)
        assert "cannot be written (" in said, (out, said)
        assert "--resume" in said, (out, said)
        status, said = command(place, *COMMANDS[name], "--out", out, "--resume")
        assert (status, said) == (0, ""), (out, said)
        assert adapters(place / out) == expected, out
        assert not [*(place / out).rglob("*.tmp"), *(place / "state").rglob("*.tmp")], out
        assert not [path for path in (place / "state").rglob("*") if path.is_file()], "keys of finished runs are deleted"
        shutil.rmtree(place / out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_that_is_written_again_over_a_fault_stays_whole(place: Path, undisturbed, kind: str) -> None:
    expected, events = undisturbed("run")
    for event in tried(list(range(1, events + 1)), kind)[: None if WHOLE else 2]:
        shutil.copytree(place / "run-whole", place / "again")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "reached", fault := Fault(event, kind))
            status, said = command(place, *COMMANDS["run"], "--out", "again", "--resume")
        assert (status, said) == (0, "") if fault.count < event else (status, told_in_a_line(said)) == (1, True), said
        assert adapters(place / "again") == expected
        shutil.rmtree(place / "again")


# --- what becomes of files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(place: Path, undisturbed) -> Callable[[str], Path]:
    """A folder in which the command stopped in the middle."""

    def make(name: str) -> Path:
        out = place / f"{name}-stopped"
        if not out.exists():
            _, events = undisturbed(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files, "reached", Fault(int(0.45 * events), "ENOSPC"))
                assert command(place, *COMMANDS[name], "--out", out.name)[0] == 1
        return out

    return make


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def shorten(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size + 1))


def lose(path: Path, chance: random.Random) -> None:
    path.unlink()


def empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def no_file(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("end", ["finished", "stopped"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_damaged_file_is_one_line_or_the_same_bytes(place: Path, undisturbed, stopped, name: str, end: str) -> None:
    """Any bit of any file flipped, any length cut off, any file gone: never a traceback, and never other bytes."""
    expected, _ = undisturbed(name)
    source = place / f"{name}-whole" if end == "finished" else stopped(name)
    damages = [flip] * (40 if WHOLE else 2) + [shorten] * (20 if WHOLE else 1) + [lose, empty, no_file]
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file() and path.name != ".lock")
    cases = list(itertools.product(names, enumerate(damages)))
    for file, (number, damage) in cases if WHOLE else random.Random(f"{name} {end}").sample(cases, min(len(cases), 4 * SAMPLE)):
        shutil.rmtree(place / "damaged", ignore_errors=True)
        shutil.copytree(source, place / "damaged")
        damage(place / "damaged" / file, random.Random(f"{file} {number}"))
        keys = {path: path.read_bytes() for path in (place / "state").rglob("*") if path.is_file()}
        status, said = command(place, *COMMANDS[name], "--out", "damaged", "--resume")
        case = (file, damage.__name__, number, status, said)
        if status == 0:
            assert adapters(place / "damaged") == expected, case
            assert not said or "going on from the checkpoint before" in said, case
        else:
            assert status in (1, 2), case
            assert said.count("\n") <= 2, case
            assert said.splitlines()[-1].startswith("anyrank: "), case
        for path, text in keys.items():  # a private run that came to its end took its key with it
            path.write_bytes(text)
            path.chmod(0o600)
