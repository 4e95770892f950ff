"""Which modules are read for the examples in their docstrings: not those of an engine that is not installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parent
# Flower pins what other extras need in other versions, so it has an environment of its own (`make flower`).
OF_FLOWER = ("src/anyrank/engines/flower/*.py", "tests/flower_*.py")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """True: the module is not imported. None: another rule decides."""
    if find_spec("flwr") is not None:
        return None
    return any(collection_path.match(str(FOLDER / pattern)) for pattern in OF_FLOWER) or None
