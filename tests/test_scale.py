"""Many registered clients and many rounds in flat memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyrank import config as configs
from anyrank import simulation

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "scale.toml"


def resident() -> float:
    """Resident memory of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the resident memory")
def test_memory_does_not_grow_with_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 clients, 100 a round: what 15 further rounds add is less than one round's adapters (5 MB) and a margin."""
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path / "cache"))
    seen: dict[int, float] = {}

    def tell(metrics: dict) -> None:
        seen[metrics["round"]] = resident()

    config = configs.load(CONFIG, ["run.rounds=20", "train.local_steps=2"])
    summary = simulation.execute(config, tmp_path / "run", on_round=tell)
    assert (summary["clients"], summary["cohort"]) == (10_000, 100)
    assert seen[20] - seen[5] < 10
    assert summary["rejected"] == 0
