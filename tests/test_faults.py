"""Whatever a disk refuses and whatever becomes of a run's files: one line and the right status, and what was whole stays whole.

A sample of all faults is tried here; `make faults` tries every one of them.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import kinds_of_run
from anyrank import files, report
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config
from anyrank.errors import RunError
from anyrank.federation import guard, loop
from anyrank.messages.records import ClientUpdate, Scaling, ServerState
from anyrank.privacy import noise
from anyrank.runs import identity
from anyrank.runs.checkpoint import load, save_state
from anyrank.runs.folder import RunDir
from anyrank.runs.removal import remove_run
from kinds_of_run import GRIDS, RUNS, adapters, command
from test_federation import Script, build, rows

WHOLE = os.environ.get("ANYRANK_FAULTS") == "all"
SAMPLE = 6  # faults of each kind and command where not all are tried
COMMANDS = {  # kinds of run that differ in what they keep
    **RUNS,
    "compare": (*GRIDS["compare"], "--jobs", "1"),
}
DAMAGED = ("raflora", "fedsa", "example", "compare")
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


def told_in_a_line(said: str) -> bool:
    return len([line for line in said.splitlines() if line.strip()]) == 1 and said.startswith("anyrank: ")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the configurations; keys and caches stay in it, and reports, which have tests of their own, are short."""
    folder = tmp_path_factory.mktemp("faults")
    kinds_of_run.make_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("ANYRANK_CACHE", str(folder / "cache"))
        patch.setenv(noise.SEED, "0123456789abcdef" * 2)
        patch.setattr(report, "build", lambda runs, page: files.write_whole_text(page, "a report") or page)
        patch.setattr(report, "figure", lambda runs, page: files.write_whole_text(page, "a figure") or page)
        for name in RUNS:  # what is cached, and the folder of keys, is made by the first run alone
            assert command(folder, *COMMANDS[name], "--out", f"{name}-warm") == (0, "")
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
    _, events = undisturbed(name)
    expected, chosen = kinds_of_run.whole(place / f"{name}-whole"), tried(list(range(1, events + 1)), f"{name} {kind}")
    for event in chosen:
        out = f"{name}-{kind}-{event}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "reached", Fault(event, kind))
            status, said = command(place, *COMMANDS[name], "--out", out)
        assert (status, told_in_a_line(said)) == (1, True), (out, status, said)
        assert "cannot be written (" in said, (out, said)
        assert "--resume" in said, (out, said)
        status, said = command(place, *COMMANDS[name], "--out", out, "--resume")
        assert (status, said) == (0, ""), (out, said)
        assert kinds_of_run.whole(place / out) == expected, out
        assert not [*(place / out).rglob("*.tmp"), *(place / "state").rglob("*.tmp")], out
        assert not [*(place / "state" / "anyrank" / "privacy").glob("*")], "keys of finished runs are deleted"
        shutil.rmtree(place / out)
    print(f"{name}: {kind} at {len(chosen)} of {events} write events, the same adapters, logs, ledger, summary and state")


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_whose_write_fails_leaves_nothing_and_can_be_repeated(
    place: Path, undisturbed, tmp_path: Path, kind: str
) -> None:
    undisturbed("raflora")
    merge = ("aggregate", *(str(place / "raflora-whole" / f"adapter-rank-{rank}") for rank in (1, 2)), "--method", "rbla")
    merge = (*merge, "--ranks", "1,2", "--out", "merged", "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "reached", counted := Fault())
        assert command(tmp_path, *merge) == (0, "")
    expected = merged(tmp_path / "merged")
    for event in tried(list(range(1, counted.count + 1)), f"merge {kind}"):
        shutil.rmtree(tmp_path / "merged")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "reached", Fault(event, kind))
            status, said = command(tmp_path, *merge)
        assert (status, told_in_a_line(said)) == (1, True), (event, status, said)
        assert "merged: cannot be written (" in said
        assert list(tmp_path.iterdir()) == [], event
        assert command(tmp_path, *merge) == (0, "")
        assert merged(tmp_path / "merged") == expected, event
    print(f"aggregate: {kind} at up to {counted.count} write events, the same bytes")


def merged(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_that_is_written_again_over_a_fault_stays_whole(place: Path, undisturbed, kind: str) -> None:
    expected, events = undisturbed("raflora")
    for event in tried(list(range(1, events + 1)), kind)[: None if WHOLE else 2]:
        shutil.copytree(place / "raflora-whole", place / "again")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "reached", fault := Fault(event, kind))
            status, said = command(place, *COMMANDS["raflora"], "--out", "again", "--resume")
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
@pytest.mark.parametrize("name", DAMAGED)
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


# --- the checkpoint and the logs, one by one --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two rounds, finished."""
    built, store = build(tmp_path, Script())
    with store:
        loop.run(built, store)
    return tmp_path / "run"


def resumed(tmp_path: Path, **run) -> dict:
    """The run in `tmp_path` goes on."""
    built, store = build(tmp_path, Script(), resume=True, **run)
    with store:
        return loop.run(built, store)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(folder: Path, tmp_path: Path, capsys) -> None:
    before = adapters(folder)
    path = folder / "checkpoint" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    resumed(tmp_path)
    said = capsys.readouterr().err
    assert "state.safetensors: not a readable checkpoint (ValueError: its digest does not fit)" in said
    assert "going on from the checkpoint before, of round 1" in said
    assert told_in_a_line(said)
    assert adapters(folder) == before
    assert [row["round"] for row in RunDir.read_metrics(folder)] == [1, 2]


def test_where_no_checkpoint_can_be_read_the_run_is_refused_and_nothing_is_touched(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "checkpoint").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="state.safetensors: not a readable checkpoint"):
        resumed(tmp_path)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_every_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    state = ServerState(3, 0, Adapter({"x": LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 2.0)}), Scaling(2.0))
    save_state(state, tmp_path / "state")
    data = (tmp_path / "state").read_bytes()
    for byte, bit in itertools.product(range(len(data)), range(8)):
        flipped = bytearray(data)
        flipped[byte] ^= 1 << bit
        (tmp_path / "flipped").write_bytes(flipped)
        with pytest.raises(RunError):
            load(tmp_path / "flipped")
    for length in range(len(data)):
        (tmp_path / "short").write_bytes(data[:length])
        with pytest.raises(RunError):
            load(tmp_path / "short")


def test_a_checkpoint_of_the_format_before_is_read_and_its_logs_are_counted(folder: Path, tmp_path: Path) -> None:
    before, path = adapters(folder), folder / "checkpoint" / "state.safetensors"
    as_before(path)
    assert load(path).marks is None
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "accu')
    resumed(tmp_path)
    assert adapters(folder) == before
    assert [row["round"] for row in RunDir.read_metrics(folder)] == [1, 2]
    (folder / "checkpoint" / "state-before.safetensors").unlink(missing_ok=True)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for left in (lines[:1], lines[1:], lines[::-1], []):
        (folder / "metrics.jsonl").write_bytes(b"".join(left))
        with pytest.raises(RunError, match="metrics.jsonl: expected lines of all rounds up to 2"):
            resumed(tmp_path)


def as_before(path: Path) -> None:
    """Write a checkpoint as version 1 had it: without a digest, and without marks of the logs."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["state"])
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
    header = {key: value for key, value in header.items() if key not in ("sha256", "logs")} | {"format": 1}
    save_file(tensors, path, metadata={"state": json.dumps(header)})


@pytest.mark.parametrize("name", ["metrics.jsonl", "clients.jsonl"])
def test_a_log_is_what_the_checkpoint_has_or_the_run_is_refused(folder: Path, tmp_path: Path, capsys, name: str) -> None:
    whole, expected = (folder / name).read_bytes(), adapters(folder)
    state = (folder / "checkpoint" / "state-before.safetensors").read_bytes()
    for damaged in (b"", whole[:10], b"{}" + whole[2:], whole.replace(b": 1", b": 2", 1)):
        (folder / name).write_bytes(damaged)
        with pytest.raises(RunError, match=f"{name}: .*restore the file, or start the run anew in another --out"):
            resumed(tmp_path)
        assert (folder / name).read_bytes() == damaged
    (folder / name).unlink()
    with pytest.raises(RunError, match=f"{name}: expected .* bytes or more, as the checkpoint has it, got 0"):
        resumed(tmp_path)
    assert (folder / "checkpoint" / "state-before.safetensors").read_bytes() == state
    (folder / name).write_bytes(whole[:-3])  # short in the last round alone: that round is run again
    capsys.readouterr()
    resumed(tmp_path)
    assert "going on from the checkpoint before, of round 1" in capsys.readouterr().err
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    assert [row["round"] for row in rows] == [json.loads(line)["round"] for line in whole.splitlines()]
    assert adapters(folder) == expected


class Loud(Script):
    """Every upload is of finite numbers, some of them large."""

    def __init__(self, A: float, B: float) -> None:
        super().__init__()
        self.values = A, B

    def train(self, jobs, plan, mechanism=None, deadline_s=None):
        for job in jobs:
            layer = job.download.adapter.layers["x"]
            if plan.round == 2 and job.client.name == "client-0":
                A, B = (torch.full_like(factor, value) for factor, value in zip((layer.A, layer.B), self.values, strict=True))
                layer = layer.with_factors(A, B)
            yield ClientUpdate(Adapter({"x": layer}), job.num_examples, job.client.name, {"loss": 1.0})


@pytest.mark.parametrize(("A", "B"), [(1.7e308, 1.7e308), (1e200, 1e200)])
@pytest.mark.parametrize("method", ["rbla", "flexlora", "lora_fair", "stayput", "flora", "hetlora"])
def test_numbers_too_large_cost_their_client(tmp_path: Path, method: str, A: float, B: float) -> None:
    """One client's numbers whose change is too large cost that client, and nothing of them is in the state."""
    built, store = build(tmp_path, Loud(A, B), method=method)
    with store:
        assert loop.run(built, store)["rounds"] == 2
    layer = load(tmp_path / "run" / "checkpoint" / "state.safetensors").state.adapter.layers["x"]
    assert torch.isfinite(layer.A).all()
    assert torch.isfinite(layer.B).all()
    assert max(layer.A.abs().max(), layer.B.abs().max()) < 1e6
    refused = [row for row in rows(tmp_path, "clients.jsonl") if row["status"] == "rejected"]
    assert [(row["round"], row["client"]) for row in refused] == [(2, "client-0")]
    assert "is too large for torch.float64" in refused[0]["reason"]


@pytest.mark.parametrize("method", ["rbla", "flexlora", "lora_fair", "stayput", "flora", "hetlora"])
def test_a_merge_that_is_not_finite_is_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """As if the guard had let it in: the state stays as it was, and the run goes on."""
    built, store = build(tmp_path, Loud(1e200, 1e200), method=method)
    built = replace(built, config=built.config.replace(guard={"norm": 0, "far": 0, "owner": 1}))
    monkeypatch.setattr(guard, "overflow", lambda layer: "")
    with store:
        assert loop.run(built, store)["idle_rounds"] == 1
    assert [row["idle"][:40] for row in rows(tmp_path, "metrics.jsonl")] == ["", "what finite uploads merge to is not fini"]
    layer = load(tmp_path / "run" / "checkpoint" / "state.safetensors").state.adapter.layers["x"]
    assert torch.isfinite(layer.A).all()
    assert torch.isfinite(layer.B).all()


# --- more rounds, other files -----------------------------------------------------------------------------------------


def test_a_finished_run_takes_more_rounds_and_ends_as_one_that_had_them_from_the_start(place: Path, undisturbed) -> None:
    undisturbed("raflora")
    longer = ("--set", "run.rounds=5")
    assert command(place, *COMMANDS["raflora"], "--out", "five", *longer) == (0, "")
    shutil.copytree(place / "raflora-whole", place / "grown")
    assert command(place, *COMMANDS["raflora"], "--out", "grown", "--resume", *longer) == (0, "")
    assert adapters(place / "grown") == adapters(place / "five")
    assert json.loads((place / "grown" / "summary.json").read_text())["rounds"] == 5
    status, said = command(place, *COMMANDS["raflora"], "--out", "grown", "--resume")
    assert (status, told_in_a_line(said), "run.rounds = 5, not 3" in said) == (2, True, True)


def test_a_run_that_grows_is_not_finished_until_it_is(place: Path, undisturbed) -> None:
    """The old summary goes before anything else changes: a comparison would take it for the new run's."""
    undisturbed("raflora")
    for event in range(1, 12):
        shutil.rmtree(place / "growing", ignore_errors=True)
        shutil.copytree(place / "raflora-whole", place / "growing")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "reached", Fault(event, "ENOSPC"))
            status, _ = command(place, *COMMANDS["raflora"], "--out", "growing", "--resume", "--set", "run.rounds=4")
        assert status == 1
        rounds = tomllib.loads((place / "growing" / "config.toml").read_text())["run"]["rounds"]
        assert rounds == 3 or not (place / "growing" / "summary.json").exists()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rounds_on_which_the_learning_rates_depend_are_refused(place: Path, schedule: str) -> None:
    settings = ("--set", f"train.schedule={schedule}")
    assert command(place, *COMMANDS["raflora"], "--out", schedule, *settings) == (0, "")
    before = (place / schedule / "config.toml").read_bytes()
    status, said = command(place, *COMMANDS["raflora"], "--out", schedule, *settings, "--resume", "--set", "run.rounds=5")
    assert (status, told_in_a_line(said)) == (2, True)
    assert f"its learning rates depend on run.rounds by train.schedule = '{schedule}'" in said
    assert (place / schedule / "config.toml").read_bytes() == before
    assert (place / schedule / "summary.json").exists()


def test_a_private_run_takes_no_more_rounds(place: Path, undisturbed) -> None:
    undisturbed("example")
    status, said = command(place, *COMMANDS["example"], "--out", "example-whole", "--resume", "--set", "run.rounds=5")
    assert (status, told_in_a_line(said), "its noise was computed for these rounds" in said) == (2, True, True)


def test_a_run_goes_on_with_the_files_that_it_began_with(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "data" / name).write_text(name)
    (tmp_path / "own.py").write_text("x = 1\n")
    named = Config().replace(data={"source": str(tmp_path / "data")}, method={"file": str(tmp_path / "own.py")})
    RunDir.open(tmp_path / "run", named).close()
    RunDir.open(tmp_path / "run", named, resume=True).close()
    (tmp_path / "data" / ".hidden").write_text("")
    os.mkfifo(tmp_path / "data" / "pipe")
    RunDir.open(tmp_path / "run", named, resume=True).close()
    changes = {
        "b.csv (data.source): has changed": lambda: (tmp_path / "data" / "b.csv").write_text("b!csv"),
        "a.csv (data.source): is gone": lambda: (tmp_path / "data" / "a.csv").unlink(),
        "c.csv (data.source): was not there": lambda: (tmp_path / "data" / "c.csv").write_text("c"),
        "own.py (method.file): has changed": lambda: (tmp_path / "own.py").write_text("x = 2\n"),
    }
    for words, change in changes.items():
        kept = {path: path.read_bytes() for path in tmp_path.glob("*/*.csv")} | {tmp_path / "own.py": b"x = 1\n"}
        change()
        with pytest.raises(RunError, match=re.escape(words)):
            RunDir.check(tmp_path / "run", named, resume=True)
        (tmp_path / "data" / "c.csv").unlink(missing_ok=True)
        for path, data in kept.items():
            path.write_bytes(data)
    RunDir.check(tmp_path / "run", named, resume=True)


def test_of_large_folders_the_edges_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_MOST", 100)
    monkeypatch.setattr(identity, "_PIECE", 10)
    (tmp_path / "weights").write_bytes(b"x" * 1000)
    named = Config().replace(model={"path": str(tmp_path / "weights"), "name": ""})
    found = identity.of(named)
    for place, told in ((3, True), (995, True)):
        with open(tmp_path / "weights", "r+b") as file:
            file.seek(place)
            file.write(b"y")
        os.utime(tmp_path / "weights", ns=(place, place))
        assert (identity.of(named) != found) == told
        found = identity.of(named)


def test_a_comparison_goes_on_with_its_own_configuration_alone(place: Path, undisturbed) -> None:
    expected, _ = undisturbed("compare")
    shutil.copytree(place / "compare-whole", place / "other")
    changed = ("--set", "train.learning_rate=0.5")
    status, said = command(place, *COMMANDS["compare"], "--out", "other", "--resume", *changed)
    assert (status, told_in_a_line(said), "train.learning_rate = 0.002, not 0.5" in said) == (2, True, True)
    assert adapters(place / "other") == expected
    assert command(place, *COMMANDS["compare"], "--out", "other", "--resume", "--set", "run.rounds=4") == (0, "")
    rounds = [json.loads(path.read_text())["rounds"] for path in (place / "other").rglob("summary.json")]
    assert rounds == [4, 4]


# --- the books of a private run ---------------------------------------------------------------------------------------


def test_charges_that_are_lost_stop_a_private_run(place: Path, undisturbed, stopped) -> None:
    """Ledger and logs cut to the same round, or emptied; the last charges lost; a count made smaller."""
    source = stopped("example")
    charges = (source / "privacy.jsonl").read_text().splitlines(keepends=True)
    assert len(charges) >= 4
    over = load(source / "checkpoint" / "state.safetensors").state.round
    first = [line for line in charges if json.loads(line)["round"] == 1]
    cut = {
        "emptied": [],
        "the last charges": [line for line in charges if json.loads(line)["round"] < over],
        "one charge": charges[1:],
        "another count": [line.replace('"num_examples": ', '"num_examples": 1') for line in charges],
        "no charge": ["[]\n", *charges],
        "another round": [first[0].replace('"round": 1', '"round": 9'), *charges[1:]],
    }
    for what, left in cut.items():
        shutil.rmtree(place / "cut", ignore_errors=True)
        shutil.copytree(source, place / "cut")
        (place / "cut" / "privacy.jsonl").write_text("".join(left))
        status, said = command(place, *COMMANDS["example"], "--out", "cut", "--resume")
        assert (status, told_in_a_line(said)) == (2, True), (what, said)
        as_before(place / "cut" / "checkpoint" / "state.safetensors")  # which has no marks: the cohorts tell it
        (place / "cut" / "checkpoint" / "state-before.safetensors").unlink(missing_ok=True)
        status, said = command(place, *COMMANDS["example"], "--out", "cut", "--resume")
        assert (status, told_in_a_line(said)) == (2, True), (what, said)


# --- what is deleted --------------------------------------------------------------------------------------------------


def test_nothing_is_deleted_that_a_comparison_did_not_write(place: Path, undisturbed, tmp_path: Path) -> None:
    undisturbed("compare")
    strangers: dict[str, Callable[[Path], object]] = {
        "notes.txt": lambda path: path.write_text(""),
        "rbla/notes.txt": lambda path: path.write_text(""),
        "rbla/seed-0/notes.txt": lambda path: path.write_text(""),
        "rbla/seed-0/adapter/notes.txt": lambda path: path.write_text(""),
        "rbla/seed-0/checkpoint/mine": lambda path: path.mkdir(),
        "rbla/seed-0/mine": lambda path: path.mkdir(),
        "rbla/seed-0/adapter/deep/er": lambda path: path.mkdir(parents=True),
        "photos": lambda path: path.mkdir(),
        "rbla/seed-1": lambda path: path.symlink_to(place / "compare-whole" / "rbla" / "seed-0"),
        "rbla/seed-0/report.html": lambda path: (path.unlink(missing_ok=True), path.symlink_to(place / "raflora.toml")),
        "linked": lambda path: path.symlink_to(place),
    }
    for number, (name, make) in enumerate(strangers.items()):
        out = tmp_path / str(number)
        shutil.copytree(place / "compare-whole", out)
        make(out / name)
        before = sorted(out.rglob("*"))
        with pytest.raises(RunError, match="which is not deleted"):
            remove_run(out)
        assert sorted(out.rglob("*")) == before
    shutil.copytree(place / "compare-whole", tmp_path / "ours")
    (tmp_path / "ours" / "rbla" / "seed-0" / "adapter" / ".adapter_config.json.1.tmp").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    with pytest.raises(RunError):
        remove_run(tmp_path / "link")
    remove_run(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert (place / "raflora.toml").read_text() == kinds_of_run.FILES["raflora.toml"]


def test_what_killed_commands_left_is_swept_and_locks_are_free(place: Path, undisturbed) -> None:
    undisturbed("compare")
    shutil.copytree(place / "compare-whole", place / "swept")
    gone = 2**22 + 1  # no process has this number
    for name in ("", "rbla/seed-0/", "rbla/seed-0/adapter/", "rbla/seed-0/checkpoint/"):
        (place / "swept" / f"{name}.some file.{gone}.tmp").write_text("half")
    (place / "swept" / "rbla" / "seed-0" / "summary.json").unlink()
    (place / "swept" / "rbla" / "seed-0" / ".mine.tmp").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "reached", Fault(9, "ENOSPC"))
        command(place, *COMMANDS["compare"], "--out", "swept", "--resume")
    assert command(place, *COMMANDS["compare"], "--out", "swept", "--resume") == (0, "")
    assert [path.name for path in (place / "swept").rglob("*.tmp")] == [".mine.tmp"]


def test_what_a_stopped_comparison_left_is_removed_wherever_it_was_stopped(place: Path, undisturbed) -> None:
    """The demo does it: also where the one before was killed before it wrote anything, or while it removed files."""
    _, events = undisturbed("compare")
    for event in sorted({1, 2, 3, *tried(list(range(1, events + 1)), "removed")}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "reached", Fault(event, "ENOSPC"))
            command(place, *COMMANDS["compare"], "--out", "removed")
        (place / "removed").mkdir(exist_ok=True)
        (place / "removed" / f".compare.json.{2**22 + 1}.tmp").write_text("half")
        half = sorted((place / "removed").rglob("*"), reverse=True)[: event % 3]  # as if the removal had been killed
        for entry in (entry for entry in half if entry.is_file() and entry.name != "compare.json"):
            entry.unlink()
        remove_run(place / "removed")
        assert not (place / "removed").exists(), event
