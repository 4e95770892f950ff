"""The doors of the library, each as a function of bytes that a stranger chose.

`enter(data, root)` makes an input of the bytes in the empty folder `root`, hands it in, and judges what comes of it by
`tests/oracle.py`. It returns what came of it in a word, and raises `oracle.Broken` where the promise is broken. The first byte
says how the rest is read: as the bytes of a file, or as the draws of a source of chance that spoils a valid input. `seeds()`
are valid inputs. `tests/test_doors.py` draws the bytes with Hypothesis, `tests/fuzz.py` by coverage.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import math
import random
import shutil
import struct
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

import hostile
import hostile_frames
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.stored import open_adapter
from anyrank.aggregation.aggregates import aggregate_folders
from anyrank.aggregation.inspect import inspect_folders
from anyrank.config import Config, DataConfig, from_table, identity, load, to_table
from anyrank.data import images, instructions, texts
from anyrank.errors import printable
from anyrank.federation.intake import collect
from anyrank.messages import frame as framing
from anyrank.messages.records import Client, ClientUpdate, Download, Job
from anyrank.report import runs as reports
from anyrank.runs.finding import find_runs, is_done
from anyrank.runs.folder import RunDir
from anyrank.simulation import building
from oracle import Broken, contents, outcome, unchanged

METHODS = ("rbla", "raflora", "flexlora", "flora", "zeropad", "hetlora", "stayput", "florist", "lora_fair", "fedex", "fedavg")
BYTES, CHANCE = b"\0", b"\1"  # how the rest of an input is read


@dataclass(frozen=True)
class Door:
    """An entrance: `enter(data, root)`, and `seeds()`, valid inputs for it."""

    enter: Callable[[bytes, Path], str]
    seeds: Callable[[], list[bytes]]


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


def draws(count: int = 8, size: int = 24) -> list[bytes]:
    """Inputs for sources of chance, the same each time."""
    return [CHANCE + random.Random(number).randbytes(size) for number in range(count)]


# --- adapter folders -------------------------------------------------------------------------------------------------


def adapter(data: bytes, root: Path) -> str:
    """Read a folder in both ways, look into it, merge it with a good one: what is written is whole and finite."""
    chance, folder = hostile.Chance(data[1:]), root / "ada"
    if data[:1] == BYTES:
        size = int.from_bytes(data[1:5], "big")
        hostile.write_folder(folder, data[5 : 5 + size], data[5 + size :])
    else:
        hostile.spoiled_folder(folder, chance)
        if chance.random() < 0.3:
            hostile.spoiled_tree(folder, chance, most=1)
    good = hostile.write_folder(root / "good")
    loaded = outcome(lambda: Adapter.load(folder), whole=root)
    opened = outcome(lambda: _read_all(open_adapter(folder)), whole=root)
    expect(bool(loaded.refusal) == bool(opened.refusal), f"one way reads it, the other refuses: {loaded} {opened}")
    outcome(lambda: inspect_folders([folder]), whole=root)
    method, out = chance.choice(METHODS), root / "out"
    merged = outcome(lambda: aggregate_folders([folder, good], method, out, ranks=[1, 3]), root, lambda name: name[:3] == "out")
    expect(bool(merged.refusal) != out.exists(), f"half of a merge was left by {method}: {merged}")
    for part in () if merged.refusal else merged.value["folders"]:
        for layer in Adapter.load(out / part).layers.values():
            expect(math.isfinite(float(layer.delta().double().norm())), f"{method} wrote a change that is not finite")
    return "refused" if merged.refusal else "merged"


def _read_all(opened: Adapter) -> None:
    for part in (opened.layers, opened.tensors):
        for name in part:
            part[name]


def _adapter_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as place:
        folder = hostile.write_folder(Path(place))
        config, weights = ((folder / name).read_bytes() for name in (hostile.CONFIG, hostile.WEIGHTS))
        saved = Adapter.load(folder)
        saved.save(folder)
        whole = [(folder / name).read_bytes() for name in (hostile.CONFIG, hostile.WEIGHTS)]
    pairs = [(config, weights), tuple(whole)]
    return [BYTES + len(a).to_bytes(4, "big") + a + b for a, b in pairs] + draws()


# --- configurations --------------------------------------------------------------------------------------------------


def config(data: bytes, root: Path) -> str:
    """A configuration that is read is written and read back as the same; another one is refused."""
    path, chance = root / "run.toml", hostile.Chance(data[1:])
    if data[:1] == BYTES:
        path.write_bytes(data[1:])
        read = functools.partial(load, path)
    else:
        table = json.loads(json.dumps(to_table(Config())))
        for _ in range(chance.randint(1, 2)):
            table = hostile.spoiled_value(table, chance)
        read = functools.partial(from_table, table if isinstance(table, dict) else {"run": table})
    found = outcome(read, whole=root)
    if found.refusal:
        return "refused"
    again = outcome(lambda: from_table(to_table(found.value)))
    expect(again.value == found.value, f"not the same after it was written: {again}")
    identity(found.value)
    written = tomli_w.dumps(to_table(found.value)).encode().decode()
    expect(from_table(tomllib.loads(written)) == found.value, "not the same after it was written as TOML")
    return "read"


def _config_seeds() -> list[bytes]:
    whole = tomli_w.dumps(to_table(Config())).encode()
    short = b'[run]\nname = "a"\nrounds = 3\n[model]\nname = "digits-mlp"\n[clients]\nranks = [1, 2]\n[method]\nname = "rbla"\n'
    return [BYTES + whole, BYTES + short, *draws()]


# --- data ------------------------------------------------------------------------------------------------------------

Make = Callable[[Path], Path]  # fills a folder, and returns the source


@dataclass(frozen=True)
class Source:
    """A kind of data: the names and bytes of valid `files`, of which the first is spoiled; which of them is the `source`
    (empty: the folder), the keys of its configuration, and what reads it."""

    files: Mapping[str, bytes]
    source: str
    keys: Mapping[str, Any]
    read: Callable[[DataConfig], Any]


def _pixels(config: DataConfig) -> None:
    for part in images.load_split(config):
        part.stacked()


@functools.cache
def sources() -> dict[str, Source]:
    """All kinds, each with a valid input."""
    rows = [(f"text {i}", ("no", "yes")[i % 2], f"site {i % 3}") for i in range(12)]
    table = "text,label,site\n" + "".join(f'"{text}, ""it""",{label},{site}\n' for text, label, site in rows)
    objects = [dict(zip(("text", "label", "site"), row, strict=True)) for row in rows]
    asked = [{"prompt": f"{i}+1=", "completion": str(i + 1), "label": i % 2} for i in range(12)]
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{i}"}]} for i in range(12)]
    answers = {"input": "", "output": "it is true", "answer": "true"}
    common = [{"instruction": f"{i}?\n\nAnswer format: true/false"} | answers for i in range(12)]
    lines = [_lines(each) for each in (objects, asked, chats, common)]
    labels = struct.pack(">4BI", 0, 0, 8, 1, 12) + bytes([0, 1] * 6)
    pictures = struct.pack(">4B3I", 0, 0, 8, 3, 12, 4, 4) + bytes(range(192))
    arrays = io.BytesIO()
    pixels = np.arange(192, dtype=np.uint8).reshape(12, 4, 4)
    np.savez_compressed(arrays, image=pixels, label=np.arange(12) % 2, site=np.array(["a", "b"] * 6))
    folder = {f"{label}/{i}.png": _png(i) for i in range(6) for label in ("a", "b")}
    meta = "file_name,site\n" + "".join(f"{name},s\n" for name in folder)
    idx = {"train-images-idx3-ubyte": pictures, "train-labels-idx1-ubyte": labels}
    tabs = "".join("\t".join(row) + "\n" for row in rows)
    semicolons = table.replace(",", ";").encode("latin-1")
    splits = json.dumps({"train": objects, "test": objects[:3]}).encode()
    split, ask = texts.load_split, instructions.load_split
    return {
        "csv": Source({"a.csv": table.encode()}, "a.csv", {}, split),
        "tsv": Source({"a.tsv": tabs.encode()}, "a.tsv", {"text": 0, "label": 1, "header": False}, split),
        "latin": Source({"a.csv": semicolons}, "a.csv", {"delimiter": ";", "encoding": "latin-1"}, split),
        "utf16": Source({"a.csv": table.encode("utf-16")}, "a.csv", {"encoding": "utf-16"}, split),
        "jsonl": Source({"a.jsonl": lines[0]}, "a.jsonl", {}, split),
        "json": Source({"a.json": splits}, "a.json", {"test_split": "test"}, split),
        "parquet": Source({"a.parquet": _parquet(objects)}, "a.parquet", {}, split),
        "pairs": Source({"a.csv": table.encode()}, "a.csv", {"text": ("text", "site")}, split),
        "asked": Source({"a.jsonl": lines[1]}, "a.jsonl", {"options": tuple(map(str, range(1, 13)))}, ask),
        "chats": Source({"a.jsonl": lines[2]}, "a.jsonl", {"format": "messages"}, ask),
        "common": Source({"a.jsonl": lines[3]}, "a.jsonl", {"format": "commonsense"}, ask),
        "template": Source(
            {"a.csv": table.encode()}, "a.csv", {"template": "{text} is {label}", "prompt": "text", "completion": "label"}, ask
        ),
        "npz": Source({"a.npz": arrays.getvalue()}, "a.npz", {}, _pixels),
        "idx": Source(idx, "", {}, _pixels),
        "idx labels": Source(dict(reversed(idx.items())), "", {}, _pixels),
        "idx.gz": Source({name + ".gz": gzip.compress(data, mtime=0) for name, data in idx.items()}, "", {}, _pixels),
        "png": Source(folder, "", {}, _pixels),
        "metadata": Source({"metadata.csv": meta.encode()} | folder, "", {}, _pixels),
    }


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _png(shade: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (4, 4), shade).save(file, "PNG")
    return file.getvalue()


def _parquet(objects: list[dict[str, str]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(objects), file)
    return file.getvalue()


def data(data: bytes, root: Path) -> str:
    """A source is read to its last picture, or refused. The second byte says which kind it is."""
    kind = list(sources().values())[(data[1] if len(data) > 1 else 0) % len(sources())]
    for name, content in kind.files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    if data[:1] == BYTES:
        (root / next(iter(kind.files))).write_bytes(data[2:])
    else:
        hostile.spoiled_tree(root, hostile.Chance(data[2:]))
    config = DataConfig(source=str(root / kind.source), **kind.keys)
    return "refused" if outcome(lambda: kind.read(config), whole=root).refusal else "read"


def _data_seeds() -> list[bytes]:
    kinds = list(enumerate(sources().values()))
    plain = [BYTES + bytes([number]) + next(iter(kind.files.values())) for number, kind in kinds]
    return plain + [CHANCE + bytes([number]) + each[1:] for number, _ in kinds for each in draws(2)]


# --- run folders -----------------------------------------------------------------------------------------------------

ROUNDS = 3
SMALL = {
    "run": {"name": "doors", "rounds": ROUNDS},
    "model": {"name": "digits-mlp"},
    "train": {"local_steps": 1, "batch_size": 16},
    "clients": {"count": 4, "participation": 0.5, "ranks": [1, 2]},
}


class _Enough(Exception):
    """Ends a run after its second round."""


@functools.cache
def run_folders() -> tuple[Config, tuple[dict[str, bytes], ...]]:
    """The configuration of a small run, and the files of its folder when it is finished, and after two rounds."""
    config, found = from_table(SMALL), []
    with tempfile.TemporaryDirectory() as place:
        for last in (ROUNDS, 2):
            folder = Path(place) / str(last)
            with contextlib.suppress(_Enough):
                building.execute(config, folder, on_round=functools.partial(_stop, last))
            found.append({name: data for name, data in contents(folder).items() if isinstance(data, bytes) and name != ".lock"})
    return config, tuple(found)


def _stop(last: int, metrics: Mapping[str, Any]) -> None:
    if metrics["round"] == last < ROUNDS:
        raise _Enough


def run(data: bytes, root: Path) -> str:
    """A run folder is looked at, reported, and gone on with: refused with nothing changed, or from a whole round.

    The second byte says which folder and, with `BYTES`, which of its files has the rest as its bytes.
    """
    config, folders = run_folders()
    which = data[1] if len(data) > 1 else 0
    files, folder = folders[which % 2], root / "run"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if data[:1] == BYTES:
        (folder / sorted(files)[which // 2 % len(files)]).write_bytes(data[2:])
    else:
        hostile.spoiled_tree(folder, hostile.Chance(data[2:]))
    for look in (find_runs, lambda path: is_done(path, config), _reported):
        outcome(functools.partial(look, folder), whole=root)
    before = contents(root)
    with contextlib.redirect_stderr(io.StringIO()) as told:
        gone_on = outcome(lambda: _resumed(folder, config))
    expect(all(printable(line) == line for line in told.getvalue().splitlines()), f"said {told.getvalue()!a}")
    if gone_on.refusal:
        new = {"run/.lock", "run/identity.json"} - before.keys()  # what a run depends on is noted where nothing was noted
        unchanged(before, contents(root), lambda name: name in new)
        return "refused"
    unchanged(before, contents(root), lambda name: not name.startswith("run/adapter"))
    return f"round {gone_on.value}"


def _reported(folder: Path) -> None:
    read = reports.read(folder)
    for name in ("accuracy", "best_accuracy", "loss", "upload_bytes", "seconds"):
        read.final(name)
    expect(isinstance(read.ranks, dict) and isinstance(read.planned_ranks, list), "no ranks")


def _resumed(folder: Path, config: Config) -> int:
    """The round that a run is gone on from, to which its logs fit."""
    with RunDir.open(folder, config, resume=True) as store:
        state = store.restore()
        rounds = [row["round"] for row in store.metrics()]
        expect(rounds == list(range(1, (state.round if state else 0) + 1)), f"rounds {rounds} at round {state and state.round}")
        store.clients(), store.charges()
        return state.round if state else 0


def _run_seeds() -> list[bytes]:
    _, folders = run_folders()
    found = []
    for which, files in enumerate(folders):
        for number, name in enumerate(sorted(files)):
            if len(files[name]) < 20_000:
                found.append(BYTES + bytes([which + 2 * number]) + files[name])
        found += [CHANCE + bytes([which]) + each[1:] for each in draws(4)]
    return found


# --- replies ---------------------------------------------------------------------------------------------------------


def reply(data: bytes, root: Path) -> str:
    """One honest reply and hostile ones beside it: the honest one enters the round, the others are rows."""
    chance = hostile.Chance(data)
    layer = LoraLayer(torch.ones(2, 6), torch.zeros(5, 2), 1.0)
    jobs = [Job(Client(name, 2), 3, lambda: Download(Adapter({"x": layer}), {"x": (0, 1)})) for name in ("ada", "eve")]
    honest = ClientUpdate(Adapter({"x": layer.with_factors(layer.A, layer.B + 1)}), 3, "ada", {"loss": 1.0})
    others = [hostile.hostile_reply(jobs[1], chance) for _ in range(chance.randint(1, 3))]
    place = chance.randrange(len(others) + 1)
    collected = outcome(lambda: collect(iter([*others[:place], honest, *others[place:]]), jobs, [], 1))
    expect(not collected.refusal, f"the round was refused: {collected.refusal}")
    rows = collected.value.rows
    expect([update.client for update in collected.value.updates] == ["ada"], "a hostile reply entered the round")
    expect(len(rows) <= len(others) + 2, f"{len(rows)} rows of {len(others) + 1} replies")
    for row in rows:
        expect(printable(row["reason"]) == row["reason"], "a reason that is not printable")
        expect(len(json.dumps(row, allow_nan=False)) < 3000, "a row without end")
    return next(row["status"] for row in rows if row["client"] == "eve")


def frame(data: bytes, root: Path) -> str:
    """Read bytes as a frame and as each record; a header and arrays by themselves are given the digest that belongs to them."""
    del root
    if data[:1] == CHANCE:
        return hostile_frames.frames(hostile_frames.spoiled_frame(hostile.Chance(data[1:])))
    if data[1:2] == b"\0":
        return hostile_frames.frames(data[2:])
    text, _, numbers = data[2:].partition(b"\0")
    return hostile_frames.frames(hostile_frames.sealed(text, numbers))


def _frame_seeds() -> list[bytes]:
    whole = [framing.to_bytes(each) for each in hostile_frames.good_frames()]
    parts = [hostile_frames.unsealed(each) for each in whole]
    unsealed = [BYTES + b"\1" + json.dumps(header).encode() + b"\0" + numbers for header, numbers in parts]
    return [*(BYTES + b"\0" + each for each in whole), *unsealed, *draws(8)]


DOORS = {
    "adapter": Door(adapter, _adapter_seeds),
    "config": Door(config, _config_seeds),
    "data": Door(data, _data_seeds),
    "run": Door(run, _run_seeds),
    "reply": Door(reply, lambda: draws(16)),
    "frame": Door(frame, _frame_seeds),
}


def enter(door: str, data: bytes) -> str:
    """What comes of an input at a door, in an empty folder that is gone afterwards."""
    root = Path(tempfile.mkdtemp(prefix="anyrank-door-", dir=_place()))
    try:
        return DOORS[door].enter(data, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@functools.cache
def _place() -> str | None:
    """A folder in memory, where there is one: each input is written and removed again."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
