"""What somebody does to a run folder by hand: it ends in the same bytes, or one line says what is wrong and nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anyrank import files
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.aggregation.aggregates import aggregate_folders
from anyrank.config.sections import Config
from anyrank.errors import ConfigError, RunError
from anyrank.federation import loop
from anyrank.runs import identity, lock, seal
from anyrank.runs.finding import is_done
from anyrank.runs.folder import RunDir
from anyrank.runs.names import BEFORE, CHECKPOINT, IDENTITY, SEAL, STATE
from anyrank.runs.removal import remove_run, remove_start
from anyrank.simulation import building
from anyrank.studies import comparison, variants
from kinds_of_run import whole
from test_federation import Script, build

ROUNDS = 4


def run(parent: Path, rounds: int = ROUNDS, resume: bool = False, **keys) -> Path:
    """A run of so many rounds in `parent`/run."""
    parent.mkdir(exist_ok=True)
    built, store = build(parent, Script(), resume=resume, rounds=rounds, **keys)
    with store:
        loop.run(built, store)
    return parent / "run"


def on(folder: Path, rounds: int = ROUNDS, **keys) -> Path:
    """The run in `folder` continues."""
    return run(folder.parent, rounds, resume=True, **keys)


@pytest.fixture
def expected(tmp_path: Path) -> dict:
    return whole(run(tmp_path / "undisturbed"))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was killed after round 3 of 4."""
    folder = run(tmp_path / "stopped")
    shutil.rmtree(folder)
    built, store = build(tmp_path / "stopped", Script(), rounds=ROUNDS)

    class Stop(BaseException):
        pass

    def stop(metrics) -> None:
        if metrics["round"] == 3:
            raise Stop

    with store, pytest.raises(Stop):
        loop.run(built, store, stop)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != lock.LOCK}


def refused(folder: Path, words: str, **keys) -> None:
    """The run is refused in a line with these words, and all its files are what they were."""
    before = contents(folder)
    with pytest.raises(RunError, match=words) as error:
        on(folder, **keys)
    assert "\n" not in str(error.value)
    assert contents(folder) == before


# --- checkpoints, logs and what they are of ---------------------------------------------------------------------------


def test_generations_that_were_swapped_cost_a_round(stopped: Path, expected: dict) -> None:
    state, before = stopped / CHECKPOINT / STATE, stopped / CHECKPOINT / BEFORE
    state.rename(stopped / "third")
    before.rename(state)
    (stopped / "third").rename(before)
    assert whole(on(stopped)) == expected


def test_an_old_checkpoint_with_new_logs_repeats_the_rounds(tmp_path: Path, expected: dict) -> None:
    old, new = run(tmp_path / "old", rounds=1), run(tmp_path / "new", rounds=3)
    for name in (IDENTITY, "config.toml"):
        shutil.copy(new / name, old / name)
    shutil.rmtree(new / CHECKPOINT)
    shutil.copytree(old / CHECKPOINT, new / CHECKPOINT)
    refused(new, "is of another run than", rounds=ROUNDS)  # of fewer rounds, so of another note
    whole_one = run(tmp_path / "grown", rounds=1)
    saved = contents(whole_one / CHECKPOINT)
    on(whole_one, rounds=3)
    for path in (whole_one / CHECKPOINT).iterdir():
        path.unlink()
    for path, data in saved.items():
        path.write_bytes(data)
    assert whole(on(whole_one)) == expected


def test_a_new_checkpoint_with_old_logs_is_refused(stopped: Path) -> None:
    for name in ("metrics.jsonl", "clients.jsonl"):
        lines = (stopped / name).read_text().splitlines(keepends=True)
        (stopped / name).write_text("".join(line for line in lines if json.loads(line)["round"] == 1))
    refused(stopped, "metrics.jsonl: expected .* bytes or more, as the checkpoint has it|clients.jsonl: expected")


@pytest.mark.parametrize("keys", [{"seed": 1}, {"label": "another"}], ids=str)
@pytest.mark.parametrize("with_logs", [True, False])
def test_a_checkpoint_of_another_run_of_the_same_shape_is_refused(
    tmp_path: Path, stopped: Path, keys: dict, with_logs: bool
) -> None:
    other = run(tmp_path / "other", rounds=ROUNDS, **keys)
    shutil.rmtree(stopped / CHECKPOINT)
    shutil.copytree(other / CHECKPOINT, stopped / CHECKPOINT)
    for name in ("metrics.jsonl", "clients.jsonl") if with_logs else ():
        shutil.copy(other / name, stopped / name)
    refused(stopped, f"{STATE}: is of another run than .*{IDENTITY}")


def test_of_two_checkpoints_the_one_of_this_run_is_used(tmp_path: Path, stopped: Path, expected: dict, capsys) -> None:
    other = run(tmp_path / "other", rounds=ROUNDS, seed=1)
    shutil.copy(other / CHECKPOINT / STATE, stopped / CHECKPOINT / STATE)
    assert whole(on(stopped)) == expected
    said = capsys.readouterr().err
    assert "is of another run" in said
    assert "going on from the checkpoint before, of round 2" in said
    assert said.count("\n") == 1


def test_a_note_that_is_gone_or_edited_is_missed(stopped: Path) -> None:
    note = stopped / IDENTITY
    text = note.read_text()
    note.unlink()
    refused(stopped, f"{IDENTITY}: is missing; restore the file")
    note.write_text(text.replace('"rounds": 4', '"rounds": 3'))
    refused(stopped, "is of another run than")
    note.write_text(text)
    on(stopped)


def test_without_a_checkpoint_the_note_is_needed_too(tmp_path: Path) -> None:
    """Else a first round could be repeated on other data: with privacy, under the same noise."""
    _, store = build(tmp_path, Script())
    store.close()
    (tmp_path / "run" / IDENTITY).unlink()
    with pytest.raises(RunError, match=f"{IDENTITY}: is missing"):
        run(tmp_path, 2, resume=True)


def test_checkpoints_that_are_gone_are_missed(stopped: Path) -> None:
    shutil.rmtree(stopped / CHECKPOINT)
    refused(stopped, f"{STATE}: is missing, and metrics.jsonl has rounds that led to it; restore it, or start the run anew")


def test_a_first_round_that_was_logged_and_not_committed_is_run_again(tmp_path: Path, expected: dict) -> None:
    folder = run(tmp_path / "first", rounds=ROUNDS)
    shutil.rmtree(folder / CHECKPOINT)
    for name in ("metrics.jsonl", "clients.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(line for line in lines if json.loads(line)["round"] == 1))
    assert whole(on(folder)) == expected


@pytest.mark.parametrize(
    ("key", "old", "new"), [("run.seed", "seed = 0", "seed = 7"), ("run.label", 'label = ""', 'label = "x"')]
)
def test_a_configuration_that_was_edited_is_refused_when_the_edited_one_is_asked_for(
    stopped: Path, key: str, old: str, new: str
) -> None:
    path = stopped / "config.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    name = key.split(".")[1]
    refused(stopped, f"config.toml: was edited: the run began with {key} = ", **{name: 7 if name == "seed" else "x"})


def test_fewer_rounds_than_there_are_is_refused(stopped: Path) -> None:
    path = stopped / "config.toml"
    path.write_text(path.read_text().replace("rounds = 4", "rounds = 2"))
    refused(stopped, "expected at most run.rounds = 2 rounds in it, got 3", rounds=2)


def test_a_run_that_grew_goes_on_and_may_grow_again(tmp_path: Path, expected: dict) -> None:
    folder = run(tmp_path / "grows", rounds=2)
    on(folder, rounds=3)
    found = whole(on(folder, rounds=ROUNDS))
    for name in expected:
        if name != "summary.json":
            assert found[name] == expected[name], name


def test_rounds_may_not_grow_by_an_edit_either(tmp_path: Path) -> None:
    """Learning rates that depend on run.rounds: an edit of config.toml would hide that the first rounds had others."""
    config = Config().replace(train={"schedule": "cosine"}, run={"rounds": 3})
    RunDir.open(tmp_path / "run", config).close()
    longer = config.replace(run={"rounds": 5})
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 5"))
    with pytest.raises(RunError, match="was started with run.rounds = 3, not 5, and its learning rates depend on run.rounds"):
        RunDir.check(tmp_path / "run", longer, resume=True)


# --- the folder as a whole --------------------------------------------------------------------------------------------


def linked(folder: Path) -> Path:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    return folder


def moved(folder: Path) -> Path:
    new = folder.parent.with_name("moved")
    new.mkdir()
    shutil.move(folder, new / "run")
    return new / "run"


def copied(folder: Path) -> Path:
    new = folder.parent.with_name("copied")
    shutil.copytree(folder, new / "run")
    return new / "run"


def from_another_time(folder: Path) -> Path:
    """As after a clock that was wrong, or a copy that kept no times."""
    for number, path in enumerate(folder.rglob("*")):
        os.utime(path, (4e9, 4e9) if number % 2 else (0, 0))
    return folder


@pytest.mark.parametrize("deed", [linked, moved, copied, from_another_time])
def test_a_folder_may_be_linked_moved_copied_and_of_another_time(stopped: Path, expected: dict, deed: Callable) -> None:
    assert whole(on(deed(stopped))) == expected


@pytest.mark.parametrize("name", ["checkpoint", "metrics.jsonl", "clients.jsonl"])
def test_a_part_of_another_run_is_not_written_through_a_link(stopped: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    other = (stopped / name).rename(tmp_path / "other" / name)
    before = contents(tmp_path / "other")
    (stopped / name).symlink_to(other)
    with pytest.raises(RunError, match=f"{name}: expected a part of this run, got a link"):
        on(stopped)
    assert contents(tmp_path / "other") == before


def test_a_clock_that_goes_back_changes_nothing(stopped: Path, expected: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert whole(on(stopped)) == expected


@pytest.mark.parametrize("gone", [(SEAL,), (SEAL, IDENTITY)], ids=str)
def test_a_finished_run_without_its_seal_is_not_taken_for_finished(tmp_path: Path, gone: tuple[str, ...]) -> None:
    folder = run(tmp_path)
    config = build_config(folder)
    assert is_done(folder, config)
    for name in gone:
        (folder / name).unlink()
    (folder / "summary.json").write_text('{"accuracy": 1.0}')
    assert not is_done(folder, config)


def build_config(folder: Path) -> Config:
    from anyrank.runs.matching import stored_config

    return stored_config(folder)


def test_the_seal_covers_all_that_a_comparison_reads(tmp_path: Path) -> None:
    folder = run(tmp_path)
    assert seal.fits(folder)
    for path in [path for path in folder.rglob("*") if path.is_file() and path.name not in (SEAL, lock.LOCK)]:
        if CHECKPOINT in path.parts:
            continue
        text = path.read_bytes()
        path.write_bytes(text + b" ")
        assert not seal.fits(folder), path
        path.write_bytes(text)
    assert seal.fits(folder)


# --- two commands in one folder ---------------------------------------------------------------------------------------

CELL = Config().replace(run={"rounds": 1}, model={"name": "digits-mlp"}, train={"local_steps": 1})


def test_a_second_comparison_in_a_folder_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    cells = variants.make_cells(CELL, ["rbla"], 1, tmp_path / "grid")
    (tmp_path / "grid").mkdir()
    with lock.holding(tmp_path / "grid", "this comparison"):
        (tmp_path / "grid" / "compare.json").write_text("kept")
        with pytest.raises(RunError, match="grid: another process is writing this comparison; wait for it, or choose another"):
            comparison.execute(cells, tmp_path / "grid", 1)
    assert (tmp_path / "grid" / "compare.json").read_text() == "kept"


@pytest.mark.parametrize("held", ["", "rbla/seed-0"])
def test_the_demo_deletes_no_runs_that_another_command_writes(tmp_path: Path, held: str) -> None:
    out = tmp_path / "grid"
    comparison.execute(variants.make_cells(CELL, ["rbla"], 1, out), out, 1)
    before = contents(out)
    with lock.holding(out / held, "these runs"), pytest.raises(RunError, match="another process is writing"):
        remove_run(out)
    assert contents(out) == before
    remove_run(out)
    assert not out.exists()


def test_a_command_that_comes_second_does_not_delete_the_run_of_the_first(tmp_path: Path, monkeypatch) -> None:
    """Both saw no folder; the other one made it while this one prepared."""
    kept = []

    def prepare(config, progress=None, **instead):
        kept.append(RunDir.open(tmp_path / "run", config))
        return build_nothing()

    monkeypatch.setattr(building, "build", prepare)
    with pytest.raises(RunError, match="contains a run already|another process is writing"):
        building.execute(CELL, tmp_path / "run")
    assert (tmp_path / "run" / "config.toml").exists()
    kept[0].close()


def build_nothing():
    class Nothing:
        privacy, sources = None, tuple

        def close(self) -> None:
            pass

    return Nothing()


def test_of_a_start_that_was_wrong_only_its_own_files_go(tmp_path: Path) -> None:
    RunDir.open(tmp_path / "run", CELL).close()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    remove_start(tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    (tmp_path / "run" / "notes.txt").unlink()
    remove_start(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    remove_start(tmp_path / "absent")
    assert not list(tmp_path.iterdir())


def test_labels_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stayput:tau=1e-3 and stayput:tau=1E-3 differ in case alone"):
        variants.make_cells(CELL, ["stayput:tau=1e-3", "stayput:tau=1E-3"], 1, tmp_path)


# --- what is deleted --------------------------------------------------------------------------------------------------


def dead() -> int:
    """The number of a process that has ended."""
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    return process.pid


def test_temporary_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    alive, gone = os.getppid(), dead()
    ours = [f".summary.json.{gone}.tmp", f".summary.json.{os.getpid()}.tmp"]
    theirs = [f".summary.json.{alive}.tmp", ".summary.json.tmp", f"summary.json.{gone}.tmp", f".summary.json.{gone}.tmp.bak"]
    for name in [*ours, *theirs]:
        (tmp_path / name).write_text("half")
    (tmp_path / f".link.{gone}.tmp").symlink_to(tmp_path / theirs[0])
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, f".link.{gone}.tmp"])


def test_a_write_removes_what_a_killed_one_of_the_same_file_left(tmp_path: Path) -> None:
    """So every command that writes sweeps: a report, a page elsewhere, a table, a cache."""
    gone = dead()
    for name in ("report.html", "other.html"):
        (tmp_path / f".{name}.{gone}.tmp").write_text("half")
    files.write_whole_text(tmp_path / "report.html", "page")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".other.html.{gone}.tmp", "report.html"]


def test_where_the_system_cannot_be_asked_for_processes_only_old_files_go(tmp_path: Path, monkeypatch) -> None:
    old, new = (tmp_path / f".{name}.{dead()}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 2 * files._LONG,) * 2)
    monkeypatch.setattr(files.os, "name", "nt")
    left = [files._is_left(path) for path in (old, new)]
    monkeypatch.undo()
    assert left == [True, False]


def test_a_killed_merge_is_swept_by_the_next_one_unless_somebody_put_a_file_there(tmp_path: Path) -> None:
    layer = LoraLayer(torch.ones(2, 3), torch.ones(3, 2), 1.0)
    for name in ("one", "two"):
        Adapter({"x": layer}).save(tmp_path / name)
    for number, stranger in enumerate((False, True)):
        left = tmp_path / f".merged-{number}.{dead()}.tmp"
        shutil.copytree(tmp_path / "one", left / "global")
        if stranger:
            (left / "global" / "notes.txt").write_text("mine")
        aggregate_folders([tmp_path / "one", tmp_path / "two"], "rbla", tmp_path / f"merged-{number}")
        assert left.exists() == stranger
    assert (left / "global" / "notes.txt").read_text() == "mine"


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="which file is flushed is looked up in /proc")
def test_names_are_on_the_disk_before_anything_that_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a file has its name its folder is flushed, and before that its own bytes; also of logs and folders that are new."""
    done: list[tuple[str, str]] = []
    fsync, replace, mkdir = os.fsync, os.replace, os.mkdir

    def flushing(descriptor: int) -> None:
        done.append(("flush", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replacing(source, target) -> None:
        done.append(("name", os.path.realpath(target)))
        assert ("flush", os.path.realpath(source)) in done or ("name", os.path.realpath(source)) in done, source
        replace(source, target)

    def making(path, *mode) -> None:
        mkdir(path, *mode)
        done.append(("name", os.path.realpath(path)))

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "mkdir", making)
    folder = run(tmp_path / "deep")
    names = {folder / name for name in ("metrics.jsonl", "clients.jsonl", "summary.json", "config.toml", SEAL, CHECKPOINT)}
    for path in [*names, folder / CHECKPOINT / STATE, folder / "adapter" / "adapter_model.safetensors", folder]:
        later = [what for what in done[first_of(done, path) :] if what == ("flush", str(path.parent))]
        assert later, f"{path} has a name in a folder that was not flushed"
    for name in ("metrics.jsonl", "clients.jsonl"):  # before the checkpoint that counts on them
        assert done[first_of(done, folder / name) + 1] == ("flush", str(folder)), name
    state = [place for place, what in enumerate(done) if what == ("name", str(folder / CHECKPOINT / STATE))]
    assert len(state) == ROUNDS
    for place in state:
        assert done[place + 1] == ("flush", str(folder / CHECKPOINT))


def first_of(done: list[tuple[str, str]], path: Path) -> int:
    return next(place for place, (_, name) in enumerate(done) if name == str(path))


def test_a_new_folder_is_flushed_in_each_folder_above_it_that_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(files, "flush_folder", flushed.append)
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert set(flushed) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_one_line(stopped: Path) -> None:
    stopped.chmod(0o500)
    with pytest.raises(Exception, match="cannot be written"):
        on(stopped)
    stopped.chmod(0o700)


def test_what_a_run_began_with_is_noted_in_a_table_that_later_versions_read(tmp_path: Path) -> None:
    """A key that a later version has and this run has not noted, at its default, is no difference."""
    identity.note(tmp_path, Config())
    noted = json.loads((tmp_path / IDENTITY).read_text())
    assert noted["config"]["run"]["seed"] == 0
    identity.check(tmp_path, Config())
    with pytest.raises(RunError, match="was edited: the run began with run.seed = 0, not 1"):
        identity.check(tmp_path, Config().replace(run={"seed": 1}))
