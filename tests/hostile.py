"""What a stranger may hand to the library: adapter folders, words of a command, and replies, from a seeded source of chance.

`tests/test_hostile.py` tries some of each kind, `tests/fuzz.py` as many as there is time for.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.messages.records import ClientUpdate, Code, Failure, Job

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
NAMES = (
    "q",
    "layers.0.q",
    "[/x]",
    "\x1b[31mred",
    "a\nb",
    "\u202eevil",
    "<b>&",
    "é" * 300,
    "x" * 100_000,
    "..",
    "",
    "\0",
    "a/b",
)
NUMBERS = (0, 1, -1, 2, 2.0, 0.5, True, None, "8", [8], {}, 10**12, 10**400, 1e29, 1e-320, 1e308, -0.0, math.nan, math.inf)
PATTERNS = (
    "(a+)+$", "(a)" * 2000, "(" * 3000 + ")" * 3000, "q{1,99999999999}", "q{1,4294967294}", "((q{1,999}){1,999}){1,999}",
    "(q|q)*" * 30 + "x", "a" * 1_000_000, "[", "(?i)q", r"(q)\1", "(?<=q)", "q)|(v", "^layers\\.0\\.q", ".*", "", "(?>q+)q",
)  # fmt: skip
DTYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "U16", "U32", "U64"),
    *("C64", "F4", "X"),
)
SIZES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


# --- adapter folders -------------------------------------------------------------------------------------------------

GOOD_CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": ["q", "v"],
    "use_rslora": False, "base_model_name_or_path": "base", "modules_to_save": ["score"],
}  # fmt: skip
GOOD_WEIGHTS = {
    "layers.0.q.lora_A.weight": ("F32", (2, 6)),
    "layers.0.q.lora_B.weight": ("F32", (5, 2)),
    "layers.1.v.lora_A.weight": ("F32", (2, 5)),
    "layers.1.v.lora_B.weight": ("F32", (6, 2)),
    "score.weight": ("F32", (3, 5)),
}


def safetensors(tensors: Mapping[str, tuple[str, tuple[int, ...]]], fill: bytes = b"\0\0\x80\x3f") -> bytes:
    """A file of the format, whatever `{key: (dtype, shape)}` says; its numbers are `fill` again and again."""
    header, place = {}, 0
    for key, (dtype, shape) in tensors.items():
        size = math.prod(shape) * SIZES.get(dtype, 1)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (fill * (place // len(fill) + 1))[:place]


def write_folder(folder: Path, config: Any = GOOD_CONFIG, weights: bytes | None = None) -> Path:
    """A PEFT folder with this configuration (a value, or bytes as they are) and these weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    good = {PREFIX + key: entry for key, entry in GOOD_WEIGHTS.items()}
    (folder / WEIGHTS).write_bytes(safetensors(good) if weights is None else weights)
    return folder


def spoiled_folder(folder: Path, chance: random.Random) -> Path:
    """A folder with one to three things in it that are not as they should be."""
    config, tensors, fill = dict(GOOD_CONFIG), {PREFIX + key: entry for key, entry in GOOD_WEIGHTS.items()}, b"\0\0\x80\x3f"
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        deed = chance.randrange(7)
        if deed == 0:
            config[chance.choice([*config, "lora_bias", "x"])] = chance.choice(NUMBERS)
        elif deed == 1:
            key = chance.choice(("rank_pattern", "alpha_pattern"))
            config[key] = {chance.choice(PATTERNS): chance.choice(NUMBERS) for _ in range(chance.randint(1, 3))}
        elif deed == 2:
            key = chance.choice(list(tensors))
            tensors[key] = chance.choice(DTYPES), tensors[key][1]
        elif deed == 3:
            key = chance.choice(list(tensors))
            shape = [chance.choice((0, 1, 2, 3, 5, 6)) for _ in range(chance.randint(0, 5))]
            tensors[key] = tensors[key][0], tuple(shape)
        elif deed == 4:
            tensors = {_other_key(key, chance): entry for key, entry in tensors.items()}
        elif deed == 5:
            fill = chance.choice((b"\xff\xff\x7f\x7f", b"\0\0\x80\x7f", b"\x99\x76\x96\x7e", b"\x01", bytes(range(256))))
        else:
            tensors.pop(chance.choice(list(tensors)), None)
            tensors = tensors or {"x": ("F32", ())}
    weights, text = safetensors(tensors, fill), json.dumps(config).encode()
    if chance.random() < 0.15:
        weights = spoiled_bytes(weights, chance)
    if chance.random() < 0.1:
        text = spoiled_bytes(text, chance)
    return write_folder(folder, text, weights)


def _other_key(key: str, chance: random.Random) -> str:
    wraps = (
        lambda k: "module." + k,
        lambda k: PREFIX + k,
        lambda k: k.replace(PREFIX, PREFIX + "module."),
        lambda k: k.replace("layers.", "layers._fsdp_wrapped_module."),
        lambda k: k.replace(".weight", ".default.weight"),
        lambda k: k.replace("layers.0.q", chance.choice(NAMES)),
        lambda k: k.replace(PREFIX, ""),
        lambda k: k.replace("lora_A", "lora_embedding_A"),
    )
    return chance.choice(wraps)(key) if chance.random() < 0.8 else key


def spoiled_bytes(data: bytes, chance: random.Random) -> bytes:
    """`data` with some bytes changed, taken out, put in, said again, or cut off."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        place, length = chance.randrange(len(found) + 1), chance.choice((1, 1, 2, 8, 64))
        deed = chance.randrange(5)
        if deed == 0 and found:
            found[min(place, len(found) - 1)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif deed == 1:
            del found[place : place + length]
        elif deed == 2:
            found[place:place] = chance.randbytes(length)
        elif deed == 3:
            found[place:place] = found[place : place + length]
        elif chance.random() < 0.2:
            del found[place:]
    return bytes(found)


# --- values, files and folders ---------------------------------------------------------------------------------------


class Chance(random.Random):
    """Draws from given bytes, and zeros after them: what a fuzzer changes in the bytes is a change of the draws."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._left = data

    def getrandbits(self, bits: int) -> int:
        size = (bits + 7) // 8
        taken, self._left = self._left[:size].ljust(size, b"\0"), self._left[size:]
        return int.from_bytes(taken, "little") & ((1 << bits) - 1)

    def random(self) -> float:
        return self.getrandbits(32) / 2**32


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


VALUES = (
    None, True, -1, 0, 1, 2**63, 10**18, 10**400, 0.5, 1e308, -1e-320, math.nan, math.inf, "", "x" * 10_000, "\x1b[31m\n",
    "\ud800", "\u202e", "\0", "..", "/", [], {}, [[]], ["x"], [1] * 1000, {"a": None}, nested(40), nested(200), "client-0", "1",
)  # fmt: skip


def spoiled_value(value: Any, chance: random.Random) -> Any:
    """A value of lists and tables with one part of it replaced, taken out, or put in a second time."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        deed = chance.randrange(6)
        if deed == 0:
            return {name: inner for name, inner in value.items() if name != key}
        if deed == 1:
            return value | {chance.choice(("x", key + " ", key.upper(), "", "\x1b[1m", "y" * 1000)): chance.choice(VALUES)}
        return value | {key: spoiled_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        deed = chance.randrange(4)
        if deed == 0:
            return value[:at] + value[at + 1 :]
        if deed == 1:
            return value + value[at:]
        return [*value[:at], spoiled_value(value[at], chance), *value[at + 1 :]]
    return chance.choice(VALUES)


def spoiled_json(data: bytes, chance: random.Random) -> bytes:
    """A JSON text, or JSON lines, with a part of a value that is not as it should be; other bytes are spoiled as bytes."""
    lines = data.splitlines() if len(data.splitlines()) > 1 and not data.lstrip().startswith((b"{\n", b"[\n")) else [data]
    at = chance.randrange(len(lines)) if lines else 0
    try:
        lines[at] = json.dumps(spoiled_value(json.loads(lines[at]), chance)).encode()
    except (ValueError, IndexError, RecursionError):
        return spoiled_bytes(data, chance)
    return b"\n".join(lines) + b"\n"


def spoiled_tree(folder: Path, chance: random.Random, most: int = 2) -> list[str]:
    """Spoil one to `most` of the files at or below a folder; returns what was done, in words."""
    told = []
    for _ in range(chance.randint(1, most)):
        files = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
        if not files:
            break
        path, other = chance.choice(files), chance.choice(files)
        name = chance.choice(list(_DEEDS))
        _DEEDS[name](path, other, chance)
        told.append(f"{path.relative_to(folder)}: {name}")
    return told


def _rewrite(change: Any) -> Any:
    def deed(path: Path, other: Path, chance: random.Random) -> None:
        if path.is_file() and not path.is_symlink():
            path.write_bytes(change(path.read_bytes(), chance))

    return deed


def _put(make: Any) -> Any:
    def deed(path: Path, other: Path, chance: random.Random) -> None:
        path.unlink()
        make(path, other)

    return deed


def _swap(path: Path, other: Path, chance: random.Random) -> None:
    between = path.with_name("between")
    path.rename(between)
    if other != path:
        other.rename(path)
    between.rename(other)


_DEEDS = {
    "bytes": _rewrite(spoiled_bytes),
    "value": _rewrite(spoiled_json),
    "cut": _rewrite(lambda data, chance: data[: chance.randrange(len(data) + 1)]),
    "bit": _rewrite(lambda data, chance: _flipped(data, chance)),
    "again": _rewrite(lambda data, chance: data * 2),
    "swap": _swap,
    "gone": _put(lambda path, other: None),
    "empty": _put(lambda path, other: path.touch()),
    "folder": _put(lambda path, other: path.mkdir()),
    "pipe": _put(lambda path, other: os.mkfifo(path)),
    "zeros": _put(lambda path, other: path.symlink_to("/dev/zero")),
    "itself": _put(lambda path, other: path.symlink_to(path)),
    "link": _put(lambda path, other: path.symlink_to(other)),
    "deep": _put(lambda path, other: path.write_bytes(b'{"a":' * 100_000)),
    "no text": _put(lambda path, other: path.write_bytes(b"\xff\xfe\0")),
}


def _flipped(data: bytes, chance: random.Random) -> bytes:
    found = bytearray(data)
    if found:
        found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    return bytes(found)


# --- words of a command ----------------------------------------------------------------------------------------------

PIECES = (
    "a",
    "b",
    "=",
    ",",
    "1",
    "0",
    "-",
    ".",
    "e",
    "9" * 400,
    "nan",
    "inf",
    "0.25",
    "1e99",
    "\0",
    "\n",
    "\x1b[31m",
    "/",
    "..",
    "٣",
)


def words(chance: random.Random) -> str:
    return "".join(chance.choice(PIECES) for _ in range(chance.randint(0, 8)))


# --- replies ---------------------------------------------------------------------------------------------------------


class Breaks(Mapping):
    """A mapping that fails, or never ends, when it is looked at."""

    def __init__(self, endless: bool = False) -> None:
        self._endless = endless

    def __getitem__(self, name: str) -> Any:
        raise KeyError("no such\nluck\x1b")

    def __iter__(self) -> Iterator[str]:
        if not self._endless:
            raise RuntimeError("a mapping that breaks")
        while True:
            yield "x" * 10

    def __len__(self) -> int:
        return 1


class Liar:
    """Nothing of it can be read without an error."""

    def __getattribute__(self, name: str) -> Any:
        raise ZeroDivisionError(name)


class Odd(torch.Tensor):
    """A tensor that fails in every operation."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError("later")


def odd_tensors(like: Tensor) -> dict[str, Any]:
    """Things in the place of a tensor, which can stand there and shall not get into the round, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds will not be in torch for ever
        return _odd_tensors(like)


def _odd_tensors(like: Tensor) -> dict[str, Any]:
    wide = like.double()
    return {
        "none": None,
        "list": like.tolist(),
        "array": like.numpy().copy(),
        "meta": torch.empty_like(like, device="meta"),
        "sparse": like.to_sparse(),
        "complex": like.to(torch.complex128),
        "quantised": torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8),
        "float8": like.to(torch.float8_e4m3fn),
        "lazy": like.clone().as_subclass(Odd),
        "nested": torch.nested.nested_tensor([like]),
        "nan": wide.clone().fill_(math.nan).to(like.dtype),
        "huge": torch.full_like(like, 1e200 if like.dtype == torch.float64 else 1e30),
        "scalar": like.sum(),
        "empty": like[:0],
        "deep": like[None, None, None],
        "integers": like.long(),
    }


ODD_VALUES = (
    None, True, 1.0, "1", b"1", [], {}, 10**400, -1, 0, math.nan, math.inf, "x" * 1_000_000, "\x1b[31m\n", 1 + 2j,
    np.float32(1), np.int64(3), np.array([1]), object(), Liar(), Breaks(), Breaks(endless=True), int, {1: 2}, {"loss": None},
    {"loss": 10**400}, {"loss": "low"}, {"loss": 1e308}, {None: 1.0}, {"x" * 1_000_000: "y" * 1_000_000},
    {str(i): 1.0 for i in range(1000)},
)  # fmt: skip


def forced(record: Any, **fields: Any) -> Any:
    """A frozen record with other fields than its checks would have let pass."""
    made = object.__new__(type(record))
    for name, value in (vars(record) | fields).items():
        object.__setattr__(made, name, value)
    return made


def hostile_reply(job: Job, chance: random.Random) -> Any:
    """Something in the place of an update. Where it names a client, it is the job's own, or nobody."""
    name, adapter = job.client.name, job.download.adapter
    layer_name, layer = next(iter(adapter.layers.items()))
    moved = {"A": layer.A, "B": layer.B + 1}
    honest = ClientUpdate(Adapter({layer_name: forced(layer, **moved)}), job.num_examples, name, {"loss": 1.0})
    odd = chance.choice(ODD_VALUES)
    deed = chance.randrange(8)
    if deed == 0:
        return odd
    if deed == 1:
        return SimpleNamespace(
            client=name, num_examples=chance.choice((True, 1.0, job.num_examples)), adapter=adapter, metrics={}
        )
    if deed == 2:
        return forced(honest, num_examples=chance.choice((True, float(job.num_examples), np.int64(1), None, odd)))
    if deed == 3:
        return forced(honest, metrics=chance.choice((None, {"loss": odd if not _is_number(odd) else None}, {"loss": 10**400})))
    if deed == 4:
        wrong = chance.choice(
            (None, {}, Breaks(), Breaks(endless=True), {layer_name: None}, {layer_name: Liar()}, {odd_name(chance): layer})
        )
        return forced(honest, adapter=forced(honest.adapter, layers=wrong))
    if deed == 5:
        odd_ones = odd_tensors(moved["B"])
        factor = chance.choice("AB")
        what = odd_tensors(moved[factor])[chance.choice([key for key in odd_ones if key != "huge"])]
        return forced(honest, adapter=forced(honest.adapter, layers={layer_name: forced(layer, **moved | {factor: what})}))
    if deed == 6:
        large = {factor: odd_tensors(value)["huge"] for factor, value in moved.items()}
        return forced(honest, adapter=forced(honest.adapter, layers={layer_name: forced(layer, **large)}))
    return chance.choice(
        (Failure(name, Code.CRASHED, "x" * 100_000 + "\n"), forced(Failure(name, Code.CRASHED), reason=Liar(), code=3))
    )


def _is_number(value: Any) -> bool:
    return type(value) in (float, int, np.float32, np.int64) and abs(value) < 10**100


def odd_name(chance: random.Random) -> str:
    return chance.choice(NAMES)
