"""Load users' Python files: methods, tasks, partitions and metrics that a configuration names by a file."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from anyrank.errors import AnyRankError, in_a_line

_PREFIX = "anyrank_own_"


def load(path: str | Path, asked: str, kind: type[AnyRankError]) -> ModuleType:
    """Execute a Python file as a separate module, and return it. `asked`: the key of the configuration that names the file.

    Raises an error of `kind`, in one line, if the file is missing, is not valid Python, or raises an exception.
    """
    path = Path(path)
    if not path.is_file():
        raise kind(f"{asked}: no such file {path}; expected a Python file")
    name = name_of(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise kind(f"{asked}: {path}: expected a Python file, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up there
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # for what lies beside it, as when it is run
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file does
        sys.modules.pop(name, None)
        raise kind(f"{asked}: {path}{_where(error, path)}: {in_a_line(error)}; correct the file") from None
    finally:
        sys.path.remove(folder)
    return module


def name_of(path: Path) -> str:
    """A module name that is different for every file, in whatever folder."""
    return _PREFIX + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]


def is_own(module: str) -> bool:
    """Whether a module of this name came from a user's file."""
    return module.startswith(_PREFIX)


def registered(path: str | Path, asked: str, kind: type[AnyRankError], table: dict[str, Any], what: str) -> dict[str, Any]:
    """The entries that a file adds to `table` when it is executed; earlier entries of the table stay.

    `what`: the kind of entry, in words. Raises an error of `kind` like `load`, and also if the file adds nothing.
    """
    before = dict(table)
    table.clear()
    try:
        load(path, asked, kind)
        made = dict(table)
    finally:
        table.clear()
        table.update(before)
    if not made:
        raise kind(f"{asked}: {path} registers no {what}")
    return made


def _where(error: BaseException, path: Path) -> str:
    """The last line of `path` that the error went through."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""
