"""Small private federations whose data can be changed by one example or by one client, and the comparison of what leaves them.

Two clients, `north` and `south`, are divided by a column, so that a row more changes one client alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiny import WORDS, make_model, settings_of

LABELS = ("arrival", "exchange", "top-up")
NORTH, SOUTH = 20, 24  # rows; 20 and 24 are also what 21 and 25 rows are declared as
BATCH = 8
Row = dict[str, Any]

COMMON = """
[run]
name = "neighbours"
rounds = 2
[data]
source = "{source}"
test_source = "{test}"
[data.partition]
kind = "column"
column = "site"
[clients]
count = 2
participation = 1.0
ranks = [2, 4]
[train]
local_steps = 2
batch_size = 8
optimizer = "sgd"
learning_rate = 0.1
[method]
name = "ffa_lora"
[privacy]
noise_multiplier = 1.0
delta = 1e-3
accountant = "rdp"
"""
LEVELS = {
    "example": 'level = "example"\n',
    "client": 'level = "client"\n',
    "server": 'level = "client"\nnoise_at = "server"\n',
}


@dataclass(frozen=True)
class Kind:
    """A task for these tests: its `[model]` section, the names of its training and held-out files, how rows are written, how
    row `i` is made, and what makes one longer or another."""

    model: str
    source: str
    test: str
    write: Callable[[Path, list[Row]], None]
    row: Callable[[int], Row]
    altered: Callable[[Row], Row]
    longer: Callable[[Row], Row] | None = None
    make: Callable[[Path], None] = field(default=lambda folder: None)


def rows_of(kind: Kind) -> list[Row]:
    """The training rows, with a client for each."""
    return [kind.row(i) | {"site": "north" if i < NORTH else "south"} for i in range(NORTH + SOUTH)]


def neighbours(kind: Kind) -> dict[str, list[Row]]:
    """The data sets that differ in one example of north."""
    rows = rows_of(kind)
    label = next(name for name in rows[3] if name in ("label", "completion"))
    others = {row[label] for row in rows} - {rows[3][label]}
    found = {
        "one more": [*rows[:NORTH], kind.row(1000) | {"site": "north"}, *rows[NORTH:]],
        "changed": [*rows[:3], kind.altered(rows[3]), *rows[4:]],
        "another label": [*rows[:3], rows[3] | {label: sorted(others)[0]}, *rows[4:]],
    }
    return found | ({"longer": [*rows[:3], kind.longer(rows[3]), *rows[4:]]} if kind.longer else {})


def another_client(kind: Kind) -> list[Row]:
    """All rows of north are others, and there are two more."""
    return [*(kind.row(2000 + i) | {"site": "north"} for i in range(NORTH + 2)), *rows_of(kind)[NORTH:]]


def write(folder: Path, kind: Kind, rows: list[Row]) -> None:
    kind.write(folder / kind.source, rows)


def make(folder: Path, kind: Kind, level: str, more: str = "") -> Path:
    """The files of a federation in `folder`; returns its configuration."""
    folder.mkdir(exist_ok=True)
    kind.make(folder)
    write(folder, kind, rows_of(kind))
    kind.write(folder / kind.test, [kind.row(5000 + i) | {"site": ("north", "south")[i % 2]} for i in range(9)])
    (folder / "c.toml").write_text(COMMON.format(source=kind.source, test=kind.test) + LEVELS[level] + kind.model + more)
    return folder / "c.toml"


# --- the tasks ---------------------------------------------------------------------------------------------------------


def _csv(path: Path, rows: list[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def _npz(path: Path, rows: list[Row]) -> None:
    images = np.stack([row["image"] for row in rows])
    np.savez(path, image=images, label=np.array([r["label"] for r in rows]), site=np.array([r["site"] for r in rows]))


def _words(i: int, number: int = 5) -> str:
    draw = np.random.default_rng(i)
    return " ".join(draw.choice(WORDS, number))


def _text(i: int) -> Row:
    return {"text": _words(i), "label": LABELS[i % 3]}


def _instruction(i: int) -> Row:
    return {"prompt": _words(i), "completion": " " + WORDS[i % 7]}


def _picture(i: int) -> Row:
    return {"image": np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8), "label": i % 3}


def _numbers(i: int) -> Row:
    return {"x": [round(float(v), 3) for v in np.random.default_rng(i).normal(size=4)], "label": i % 3}


def _decoder(folder: Path) -> None:
    import transformers

    settings = settings_of(folder / "model", "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder / "model")


OWN = """
import json
from pathlib import Path

import torch

import anyrank
from helper import FOLDER, read


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        if bool((x == 777).any()):
            raise RuntimeError("an example that the module cannot take")
        return self.second(torch.relu(self.first(x)))


@anyrank.tasks.register("own")
def own(wanted):
    torch.manual_seed(0)
    (x, y, sites), (tx, ty, owners) = read("rows.jsonl"), read("held.jsonl")
    return anyrank.Task(module=Net(), targets=("first",), train=(x, y), test=(tx, ty), columns={"site": sites})
"""
HELPER = """
import json
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def read(name):
    rows = [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]
    return torch.tensor([r["x"] for r in rows]), torch.tensor([r["label"] for r in rows]), [r["site"] for r in rows]
"""


def _own(folder: Path) -> None:
    (folder / "helper.py").write_text(HELPER)
    (folder / "own.py").write_text(OWN.replace("from helper import FOLDER, read", HELPER))


KINDS = {
    "text": Kind(
        '[model]\ntask = "text-classification"\npath = "model"\nhead = "trained"\ndtype = "float32"\n'
        '[lora]\ntarget_modules = ["query"]\n',
        *("train.csv", "test.csv", _csv, _text),
        altered=lambda row: row | {"text": "please help me with it"},
        longer=lambda row: row | {"text": row["text"] + " " + _words(7, 40)},
        make=lambda folder: make_model(folder / "model"),
    ),
    "causal": Kind(
        '[model]\ntask = "causal-lm"\npath = "model"\nmax_length = 12\ndtype = "float32"\n',
        *("train.jsonl", "test.jsonl", _jsonl, _instruction),
        altered=lambda row: row | {"prompt": "please help me"},
        longer=lambda row: row | {"completion": " " + _words(7, 30)},  # it is cut
        make=_decoder,
    ),
    "images": Kind(
        '[model]\nname = "fashion-mlp"\npretrained = false\nhead = "trained"\n',
        *("train.npz", "test.npz", _npz, _picture),
        altered=lambda row: row | {"image": 255 - row["image"]},
    ),
    "own": Kind(
        '[model]\nfile = "own.py"\ntask = "own"\n',
        *("rows.jsonl", "held.jsonl", _jsonl, _numbers),
        altered=lambda row: row | {"x": [9.0, -9.0, 9.0, -9.0]},
        make=_own,
    ),
}


# --- comparing ---------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def different(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> set[str]:
    """Where two run folders differ: names of files; in JSON, the path of the value, without numbers of lines."""
    found = {name for name in one.keys() ^ other.keys()}
    for name in one.keys() & other.keys():
        if one[name] != other[name]:
            found |= {f"{name}{where}" for where in _within(name, one[name], other[name])}
    return found


def _within(name: str, one: bytes, other: bytes) -> Iterator[str]:
    if name.endswith(".jsonl"):
        lines, others = (list(map(json.loads, text.splitlines())) for text in (one, other))
        yield from [""] if len(lines) != len(others) else ()
        yield from (f":{where}" for pair in zip(lines, others, strict=False) for where in _leaves(*pair))
    elif name.endswith(".json"):
        yield from (f":{where}" for where in _leaves(json.loads(one), json.loads(other)))
    else:
        yield ""


def _leaves(one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if one.get(key, "absent") != other.get(key, "absent"):
                inner = list(_leaves(one.get(key, "absent"), other.get(key, "absent")))
                yield from (f"{key}.{name}" if name else str(key) for name in inner)
    elif one != other:
        yield ""
