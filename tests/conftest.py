"""What all tests share: one torch thread, repeatable Hypothesis examples, and the folder of real data where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from anyrank import methods
from anyrank.tasks import metrics

torch.set_num_threads(1)
SMALL = '[run]\nname = "small"\nrounds = 2\n[model]\nname = "digits-mlp"\n[train]\nlocal_steps = 2\n'

settings.register_profile("anyrank", deadline=None, derandomize=True, database=None)
settings.load_profile("anyrank")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets: `$ANYRANK_DATA`, or `../shared/data` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ANYRANK_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no datasets in {folder}; point ANYRANK_DATA at them")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of base models and features for all commands that tests call."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's state folder during tests: private runs leave noise keys and ledgers there, which are not the user's own."""
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("state")
        patched.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """A method or metric that a test registers, also through a user's file, is not there for the tests after it."""
    tables = (methods.REGISTRY, metrics.REGISTRY)
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)


@pytest.fixture
def anyrank(tmp_path: Path, cache: Path):
    """Runs the command in an empty folder with `digits.toml` in it."""
    (tmp_path / "digits.toml").write_text(SMALL)

    def call(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"ANYRANK_CACHE": str(cache), "COLUMNS": "140"}
        command = [sys.executable, "-m", "anyrank", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return call
