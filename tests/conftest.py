"""What all tests share: one torch thread, repeatable Hypothesis examples, and the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
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
