"""Kinds of command that differ in what they keep between rounds, and what has to be the same whatever happened to them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from anyrank.cli import main

ROUNDS = 3
COMMON = f"""
[run]
name = "faults"
rounds = {ROUNDS}
[clients]
count = 4
participation = 0.5
ranks = [1, 2]
"""
QUICK = '[train]\nlocal_steps = 1\nbatch_size = 16\n[model]\nname = "digits-mlp"\n'
FILES = {  # the files in the folder where commands are given
    # Nothing but the global adapter, cut to each rank.
    "raflora.toml": COMMON + QUICK,
    # A global update of before, slices in an order that is drawn, a head that is trained along.
    "stayput.toml": COMMON
    + """
[method]
name = "stayput"
momentum = 0.5
[model]
name = "digits-mlp"
head = "trained"
[train]
optimizer = "sgd"
momentum = 0.9
local_steps = 2
batch_size = 16
""",
    # Each client's own B and head.
    "fedsa.toml": COMMON + QUICK + '[method]\nname = "fedsa"\n',
    # Replies that arrive one round late, clients that drop out and that rest, rounds in which nothing happens.
    "carried.toml": COMMON.replace("participation = 0.5", "participation = 1.0\ndropout = 0.3\nlate = 0.4")
    + QUICK
    + '[method]\nname = "flexlora"\n[rounds]\nleast = 2\nlate = "carry"\n[guard]\nnorm = 1.0\noffences = 1\nrest = 1\n',
    # A plan, a ledger, and a key outside of the folder; noise in every step of every client.
    "example.toml": COMMON
    + QUICK
    + """
[data.partition]
kind = "iid"
[method]
name = "ffa_lora"
[privacy]
level = "example"
epsilon = 3.0
delta = 1e-5
""",
    # The same, with noise that the server adds to the mean.
    "client.toml": COMMON
    + QUICK
    + """
[method]
name = "ffa_lora"
[privacy]
level = "client"
noise_at = "server"
epsilon = 8.0
delta = 1e-3
""",
    "study.toml": """
title = "t"
claim = "c"
minutes = 1
seeds = 1
methods = ["rbla", "hetlora"]
columns = ["accuracy"]
figure = "none"
[[setting]]
name = "one"
config = "raflora.toml"
""",
}
KINDS = ("raflora", "stayput", "fedsa", "carried", "example", "client")
RUNS = {name: ("run", f"{name}.toml", "--json") for name in KINDS}
GRIDS = {
    "compare": ("compare", "raflora.toml", "--methods", "rbla,raflora", "--json"),
    "study": ("study", "study.toml", "--json"),
}
RESUME = {**{name: ("--resume",) for name in (*RUNS, "compare")}, "study": ()}  # a study continues by itself
LOGS = ("metrics.jsonl", "clients.jsonl", "privacy.jsonl")


def make_folder(folder: Path) -> Path:
    """The folder in which the commands can be given."""
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    """A command in this process: its status, and its stderr. Any exception but an exit would be a traceback: it is raised."""
    said, before = io.StringIO(), (sys.argv, Path.cwd())
    sys.argv = ["anyrank", *arguments]
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as done:
        return done.code or 0, said.getvalue()
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    return 0, said.getvalue()


def adapters(folder: Path) -> dict[str, bytes]:
    """All adapters at or below a run folder, or a folder of runs."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("adapter*/*"))}


def whole(folder: Path) -> dict[str, Any]:
    """What is a function of the configuration: adapters, logs, ledger and summary, all but for the clock; the state."""
    found: dict[str, Any] = adapters(folder)
    for path in sorted(path for name in LOGS for path in folder.rglob(name)):
        found[str(path.relative_to(folder))] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    for path in sorted(folder.rglob("summary.json")):
        found[str(path.relative_to(folder))] = timeless(json.loads(path.read_text()))
    for path in sorted(folder.rglob("checkpoint/state.safetensors")):
        found[str(path.relative_to(folder))] = state_of(path)
    return found


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


def state_of(path: Path) -> dict[str, bytes]:
    """A checkpoint's tensors; its header has the digests of logs, in which there are clocks."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in sorted(file.keys())}
