"""Golden bytes: what a dozen small runs left before files were moved, they leave still, also when stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import golden_runs as runs

KNOWN = json.loads(runs.RECORD.read_text())


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("ANYRANK_PRIVACY_SEED", runs.SECRET)
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    differing = {key: value for key, value in runs.machine().items() if KNOWN["machine"].get(key) != value}
    if differing:
        pytest.skip(f"the bytes were recorded on another machine: {differing} here")


@pytest.mark.parametrize("name", runs.RUNS)
def test_the_bytes_are_the_same(name: str, tmp_path: Path) -> None:
    assert runs.digest(name, tmp_path) == KNOWN["digests"][name]


@pytest.mark.parametrize("name", ["stayput, every option", "fedsa", "hetlora", "flora", "private examples"])
def test_the_bytes_are_the_same_after_a_stop(name: str, tmp_path: Path) -> None:
    assert runs.digest(name, tmp_path, stop_after=2) == KNOWN["digests"][name]
