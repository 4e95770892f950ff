"""Flower's ServerApp and ClientApp processes, for apps without code alone: `python -m anyrank.engines.flower.guarded KIND ...`.

Flower runs the code of whatever app a SuperLink hands out, and has no list of what is allowed. SuperExec finds these processes
on its PATH, where ours come first (see `launch`): an app must be the one that `runs.app_of` writes, or the process ends before
the app is unpacked. Flower's function that unpacks is replaced by its name; where a version has none of that name, nothing is
run.
"""

from __future__ import annotations

import importlib
import io
import sys
import tomllib
import zipfile
from collections.abc import Callable
from typing import Any

from anyrank.engines.flower.runs import CLIENTAPP, NAME, SERVERAPP
from anyrank.errors import ConfigError, printable, shortened

KINDS = {"serverapp": ("superlink", "flwr_serverapp"), "clientapp": ("supernode", "flwr_clientapp")}
REFUSED = ("agentapp", "model", "connector", "simulation")  # Flower's other processes, which runs of ours have no use for
_FILES = {"pyproject.toml", ".info/CONTENT"}
_MOST_BYTES = 1 << 16  # of a file in an app


def check(app: Any) -> None:
    """Raise `ConfigError` for any app but one of a name and our two modules."""
    if not isinstance(app, bytes) or len(app) > 4 * _MOST_BYTES:
        raise ConfigError("app: expected a small bundle, got something else; it is not run")
    try:
        with zipfile.ZipFile(io.BytesIO(app)) as found:
            named = [each.filename for each in found.infolist()]
            if sorted(named) != sorted(_FILES) or any(each.file_size > _MOST_BYTES for each in found.infolist()):
                raise ConfigError(
                    f"app: expected a pyproject.toml alone, got {shortened(printable(repr(named)), 200)}; it is not run"
                )
            table = tomllib.loads(found.read("pyproject.toml").decode())
        parts, project = table["tool"]["flwr"]["app"], table["project"]
        right = parts["components"] == {"serverapp": SERVERAPP, "clientapp": CLIENTAPP} and set(parts["config"]) == {NAME}
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, RecursionError, NotImplementedError, RuntimeError):
        raise ConfigError("app: expected a run of anyrank, got something else; it is not run") from None
    if not right or project.get("dependencies"):
        raise ConfigError("app: expected the modules of anyrank, got others; it is not run")


def guard(module: Any) -> None:
    """Let a module of Flower's unpack an app only when it has been checked."""
    unpack: Callable[..., Any] = module.install_from_fab

    def checked(app: Any, *values: Any, **named: Any) -> Any:
        check(app)
        return unpack(app, *values, **named)

    module.install_from_fab = checked


def main(words: list[str]) -> int:
    kind, *rest = words
    if kind not in KINDS:
        print(f"flwr-{kind}: a server or site of anyrank does not run it", file=sys.stderr)
        return 2
    side, command = KINDS[kind]
    guard(importlib.import_module(f"flwr.{side}.runtime.run_{kind}"))
    sys.argv = [f"flwr-{kind}", *rest]
    getattr(importlib.import_module(f"flwr.{side}.cli.{command}"), command)()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
