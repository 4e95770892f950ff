"""A run killed at any moment and resumed gives the same bytes as one that was not. The processes here are really killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyrank.config.sections import Config, PartitionConfig
from anyrank.errors import RunError
from anyrank.runs.folder import RunDir

ROUNDS = 5
CONFIG = f"""
[run]
name = "resume"
rounds = {ROUNDS}
[model]
name = "digits-mlp"
[clients]
count = 8
participation = 0.5
ranks = [1, 2, 8]
[train]
local_steps = 3
schedule = "cosine"
[method]
name = "METHOD"
"""

# Each moment is a patch that runs in the child before the command; `die` is what kill -9 is from inside.
PRELUDE = """
import itertools, os, signal, sys
import anyrank.adapter.adapter as adapter, anyrank.training.optimizers as optimizers
import anyrank.runs.checkpoint as checkpoint, anyrank.runs.folder as rundir
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
calls = itertools.count(1)
"""
MOMENTS = {
    "while the clients of round 3 train": """
step = optimizers.Optimizer.step
def patched(self):
    if next(calls) == 8: die()  # three steps a round
    step(self)
optimizers.Optimizer.step = patched
""",
    "half way through a line of metrics.jsonl": """
append = rundir.RunDir._append
def patched(self, name, rows):
    if name == rundir.METRICS and next(calls) == 3:
        with open(self.path / name, "ab") as file: file.write(b'{"round": 3, "accu'); file.flush(); os.fsync(file.fileno())
        die()
    append(self, name, rows)
rundir.RunDir._append = patched
""",
    "after the logs, before the checkpoint": """
save = checkpoint.save_state
def patched(*a):
    if next(calls) == 3: die()
    save(*a)
checkpoint.save_state = patched
""",
    "while the checkpoint is being written": """
save = checkpoint.save_file
def patched(tensors, path, metadata=None):
    save(tensors, path, metadata=metadata)
    if next(calls) == 3:
        os.truncate(path, os.path.getsize(path) // 2); die()
checkpoint.save_file = patched
""",
    "right after the checkpoint": """
save = checkpoint.save_state
def patched(*a):
    save(*a)
    if next(calls) == 3: die()
checkpoint.save_state = patched
""",
    "while the final adapters are being written": """
save = adapter.save_file
def patched(tensors, path, metadata=None):
    save(tensors, path, metadata=metadata)
    if next(calls) == 2: die()
adapter.save_file = patched
""",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def command(
    workplace: Path, out: str, *arguments: str, method: str = "raflora", prelude: str = ""
) -> subprocess.CompletedProcess:
    config = workplace / f"{method}.toml"
    config.write_text(CONFIG.replace("METHOD", method))
    arguments = ["run", str(config), "--out", out, *arguments]
    program = f"{prelude}\nimport sys\nfrom anyrank.cli import main\nsys.argv[1:] = {arguments!r}\nmain()"
    environment = os.environ | {"ANYRANK_CACHE": str(workplace / "cache")}
    return subprocess.run([sys.executable, "-c", program], cwd=workplace, env=environment, capture_output=True, text=True)


def files(folder: Path) -> dict[str, bytes]:
    """Everything that the contract promises to be the same: adapters, and metrics but for their clock."""
    adapters = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("adapter*/*"))}
    logs = {}
    for name in ("metrics.jsonl", "clients.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        logs[name] = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()
    return adapters | logs


@pytest.fixture(scope="module")
def whole(workplace: Path) -> dict[str, bytes]:
    """The files of a run that nobody disturbed."""
    done = command(workplace, "whole")
    assert done.returncode == 0, done.stderr
    return files(workplace / "whole")


def test_the_same_config_gives_the_same_bytes(workplace: Path, whole: dict[str, bytes]) -> None:
    assert command(workplace, "again").returncode == 0
    assert files(workplace / "again") == whole
    assert {"adapter/adapter_model.safetensors", "adapter-rank-1/adapter_model.safetensors"} <= whole.keys()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_bytes(workplace: Path, whole: dict[str, bytes], moment: str) -> None:
    out = moment.replace(" ", "-")
    killed = command(workplace, out, prelude=PRELUDE + MOMENTS[moment])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (workplace / out / "summary.json").exists()
    resumed = command(workplace, out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert files(workplace / out) == whole
    assert not list((workplace / out).rglob("*.tmp")), "temporary files of the killed process are swept away"


def test_a_run_killed_again_and_again_at_moments_of_its_own_still_ends_the_same(
    workplace: Path, whole: dict[str, bytes]
) -> None:
    config = workplace / "raflora.toml"
    environment = os.environ | {"ANYRANK_CACHE": str(workplace / "cache")}
    arguments = [sys.executable, "-m", "anyrank", "run", str(config), "--out", "restless", "--resume"]
    checkpoint = workplace / "restless" / "checkpoint" / "state.safetensors"
    for _ in range(ROUNDS):  # killed a moment after each new checkpoint appears
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        child = subprocess.Popen(
            arguments, cwd=workplace, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                child.kill()
                break
            time.sleep(0.001)
        child.wait()
    assert subprocess.run(arguments, cwd=workplace, env=environment, capture_output=True).returncode == 0
    assert files(workplace / "restless") == whole


def test_state_of_single_clients_survives_resume(workplace: Path) -> None:
    """`local-only` keeps an adapter for each client on the server: nothing of it may be lost."""
    assert command(workplace, "local", method="local-only").returncode == 0
    killed = command(workplace, "local-killed", method="local-only", prelude=PRELUDE + MOMENTS["right after the checkpoint"])
    assert killed.returncode == -signal.SIGKILL
    assert command(workplace, "local-killed", "--resume", method="local-only").returncode == 0
    assert files(workplace / "local-killed") == files(workplace / "local")


def test_a_finished_run_resumed_changes_nothing(workplace: Path, whole: dict[str, bytes]) -> None:
    assert command(workplace, "whole", "--resume").returncode == 0
    assert files(workplace / "whole") == whole


def test_resume_with_another_configuration_is_refused_by_name(workplace: Path, whole: dict[str, bytes]) -> None:
    other = command(workplace, "whole", "--resume", "--set", "train.learning_rate=0.5")
    assert other.returncode == 2
    assert "train.learning_rate = 0.002, not 0.5" in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1


def test_a_run_is_never_overwritten(workplace: Path, whole: dict[str, bytes]) -> None:
    again = command(workplace, "whole")
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert files(workplace / "whole") == whole


NAMED = {
    "model.path": "base",
    "model.file": "task.py",
    "data.test_source": "test.csv",
    "data.partition.file": "split.py",
    "eval.file": "metric.py",
}


@pytest.mark.parametrize("key", NAMED)
def test_a_base_model_or_code_file_that_changed_since_is_named(key: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    for name in ("task.py", "test.csv", "metric.py", "split.py"):
        (tmp_path / name).write_text("one")
    path = tmp_path / NAMED[key]
    section, _, field = key.rpartition(".")
    keys = {field: str(path)} if section != "data.partition" else {"partition": PartitionConfig(kind="own", file=str(path))}
    config = Config().replace(**{section.split(".")[0]: keys})
    RunDir.open(tmp_path / "run", config).close()
    RunDir.check(tmp_path / "run", config, resume=True)
    changed = path / "model.safetensors" if path.is_dir() else path
    changed.write_bytes(b"other")
    with pytest.raises(RunError, match=re.escape(f"{changed} ({key}): has changed since the run in")):
        RunDir.check(tmp_path / "run", config, resume=True)
