"""The parts of a frame's body: tables with known keys, tensors as arrays, and adapters as a table with arrays."""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.lazy import Lazy, latest, outlined
from anyrank.errors import AnyRankError, FrameError, in_a_line, shortened
from anyrank.messages import reduction
from anyrank.messages.frame import Frame, Header, Later
from anyrank.messages.spool import Place, Spooled

_KINDS = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64", "bfloat16")
TYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in _KINDS}
NAMES = {dtype: name for name, dtype in TYPES.items()}
_SIDES = {"A": lambda rank, out, width: (rank, width), "B": lambda rank, out, width: (out, rank)}
_R = TypeVar("_R")


def expect(frame: Frame, *kinds: str, run: str | None = None, round: int | None = None, client: str | None = None) -> None:
    """Raise `FrameError` unless the frame is of one of `kinds` and, if given, of this run, round and client."""
    header = frame.header
    if header.kind not in kinds:
        raise FrameError(f"frame: expected one of kind {' or '.join(kinds)}, got {header.kind or 'none'}")
    for what, expected in (("run", run), ("round", round), ("client", client)):
        got = getattr(header, what)
        if expected is not None and got != expected:
            raise FrameError(f"{header.kind}: expected {what} {expected}, got {got}")


# --- tables ----------------------------------------------------------------------------------------------------------


def fields(where: str, table: Any, **kinds: type | tuple[type, ...]) -> list[Any]:
    """The values of a table that has exactly the keys of `kinds`, each of that type; bool is not a number here."""
    if not isinstance(table, dict) or table.keys() != kinds.keys():
        got = ", ".join(map(str, table)) if isinstance(table, dict) else type(table).__name__
        raise FrameError(f"{where}: expected the keys {', '.join(kinds) or 'none'}, got {shortened(got, 200) or 'none'}")
    for key, kind in kinds.items():
        check_type(f"{where}, {key}", table[key], kind)
    return [table[key] for key in kinds]


def check_type(where: str, value: Any, kind: type | tuple[type, ...]) -> None:
    allowed = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in allowed:
        raise FrameError(f"{where}: expected {' or '.join(each.__name__ for each in allowed)}, got {type(value).__name__}")


def check_least(where: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise FrameError(f"{where}: expected a whole number of at least {least}, got {shortened(repr(value), 100)}")


def record(where: str, kind: type[_R], table: Any, **known: Any) -> _R:
    """A dataclass of plain values from its table (`dataclasses.asdict`); fields that are `known` do not stand in it."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in known]
    values = fields(where, table, **{name: (int, float) if hints[name] is float else hints[name] for name in names})
    return made(where, kind, **dict(zip(names, values, strict=True)), **known)


def made(where: str, kind: Any, *values: Any, **named: Any) -> Any:
    """`kind(...)`, with its refusal as a `FrameError`."""
    try:
        return kind(*values, **named)
    except AnyRankError as error:
        raise FrameError(f"{where}: {in_a_line(error)}") from None


# --- tensors ---------------------------------------------------------------------------------------------------------


class Packing:
    """The arrays of a frame that is being written. Tensors on the CPU share their memory with it; layers that are read when
    they are asked for are read when the frame is written."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray | Later] = {}
        self.bfloat16: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in NAMES or tensor.layout is not torch.strided or tensor.device.type == "meta":
            raise FrameError(f"{name}: expected numbers of {', '.join(_KINDS)}, got {tensor.dtype} ({tensor.layout})")
        if tensor.dtype == torch.bfloat16:
            self.bfloat16.add(name)
        self.arrays[name] = numbers(tensor)

    def add_later(self, name: str, outline: Tensor, make: Callable[[], Tensor]) -> None:
        """A tensor with the type and shape of `outline` that is made when the frame is written."""
        if outline.dtype not in NAMES:
            raise FrameError(f"{name}: expected numbers of {', '.join(_KINDS)}, got {outline.dtype}")
        self.arrays[name] = Later(NAMES[outline.dtype], tuple(outline.shape), lambda: numbers(make()))

    def frame(self, header: Header) -> Frame:
        return Frame(header, self.arrays, frozenset(self.bfloat16))


class Parts:
    """The arrays of a frame that was received. Each is taken once, in the form that is expected, and none may be left."""

    def __init__(self, frame: Frame | Spooled) -> None:
        self.frame, self.left = frame, dict(frame.arrays)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def array(self, name: str) -> np.ndarray:
        if name not in self.left:
            raise FrameError(f"{self.frame.header.kind}, {name}: expected an array of that name, got none")
        return self.left.pop(name)

    def tensor(self, name: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensor:
        """The array as a tensor of that type and of one of `shapes`; it shares the array's memory, where torch can use that.
        Of one that lies in a spool, shape and type without numbers (on the device "meta").
        """
        array, kind = self.array(name), self.frame.dtype(name)
        if TYPES.get(kind) != dtype or array.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            got = f"{kind} of shape {list(array.shape)}"
            raise FrameError(f"{self.frame.header.kind}, {name}: expected {NAMES[dtype]} of shape {expected}, got {got}")
        return torch.empty(array.shape, dtype=dtype, device="meta") if isinstance(array, Place) else tensor_of(array, dtype)

    def finish(self) -> None:
        for name, array in self.left.items():
            got = f"{self.frame.dtype(name)} of shape {list(array.shape)}"
            raise FrameError(f"{self.frame.header.kind}, {name}: expected no array of that name, got {got}")


def tensor_of(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """An array of a frame as a tensor of `dtype`, which is the array's own type, or bfloat16 for `uint16`."""
    if not (array.flags.carray and array.dtype.isnative and min(array.strides, default=0) >= 0):
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def numbers(tensor: Tensor) -> np.ndarray:
    """A tensor as an array, bfloat16 as `uint16` with the same bits; of a tensor on the CPU, its own memory."""
    plain = tensor.detach().cpu()
    return plain.view(torch.int16).numpy().view(np.uint16) if plain.dtype == torch.bfloat16 else plain.numpy()


# --- adapters --------------------------------------------------------------------------------------------------------


def describe(adapter: Adapter) -> dict[str, Any]:
    """What of an adapter is not in its arrays: shapes, types, scalings, kinds, and the names in their order."""
    layers = {name: [layer.rank, *layer.shape, _name(layer.A), layer.scaling, layer.kind, list(layer.kernel)]
              for name, layer in outlined(adapter.layers).items()}  # fmt: skip
    tensors = {name: [_name(tensor), list(tensor.shape)] for name, tensor in outlined(adapter.tensors).items()}
    return {"layers": layers, "tensors": tensors, "config": dict(adapter.config)}


def pack(packing: Packing, prefix: str, adapter: Adapter, parts: Iterable[str], reduced: str = "") -> None:
    """Add those of `A`, `B` and `tensors` that `parts` names."""
    layer_of = latest(adapter.layers) if isinstance(adapter.layers, Lazy) else None
    for name, layer in outlined(adapter.layers).items():
        for factor in sorted(set(parts) - {"tensors"}):
            if layer_of:
                read = partial(_part, layer_of, name, factor)
                _pack_later(packing, f"{prefix}{factor}", name, getattr(layer, factor), read, factor, reduced)
            else:
                _pack_factor(packing, f"{prefix}{factor}", name, getattr(layer, factor), factor, reduced)
    for name, outline in outlined(adapter.tensors).items() if "tensors" in parts else ():
        if isinstance(adapter.tensors, Lazy):
            packing.add_later(f"{prefix}tensor/{name}", outline, partial(adapter.tensors.__getitem__, name))
        else:
            packing.add(f"{prefix}tensor/{name}", outline)


def _pack_factor(packing: Packing, place: str, name: str, tensor: Tensor, factor: str, reduced: str) -> None:
    if reduced == "int8":
        tensor, step = reduction.steps(factor, tensor)
        packing.add(f"{place}-steps/{name}", step)
    packing.add(f"{place}/{name}", reduction.rounded(tensor) if reduced == "bfloat16" else tensor)


def _part(layer_of: Callable[[str], LoraLayer], name: str, factor: str) -> Tensor:
    return getattr(layer_of(name), factor)


def _pack_later(
    packing: Packing, place: str, name: str, outline: Tensor, read: Callable[[], Tensor], factor: str, reduced: str
) -> None:
    """As `_pack_factor`, of a factor that is read when the frame is written. `outline`: it, without its numbers."""

    def steps() -> tuple[Tensor, Tensor]:
        return reduction.steps(factor, read())

    if reduced == "int8":
        rank = outline.shape[0 if factor == "A" else 1]
        packing.add_later(f"{place}-steps/{name}", outline.new_empty(rank, dtype=torch.float64), lambda: steps()[1])
        packing.add_later(f"{place}/{name}", outline.to(torch.int8), lambda: steps()[0])
    elif reduced == "bfloat16":
        narrow = outline if outline.itemsize <= 2 else outline.to(torch.bfloat16)
        packing.add_later(f"{place}/{name}", narrow, lambda: reduction.rounded(read()))
    else:
        packing.add_later(f"{place}/{name}", outline, read)


def unpack(parts: Parts, prefix: str, table: Any, absent: frozenset[str], own: Adapter | None, reduced: str = "") -> Adapter:
    """The adapter of a table; what `absent` names is taken from the site's `own`."""
    layers, tensors, config = fields(f"{prefix}adapter", table, layers=dict, tensors=dict, config=dict)
    if absent and own is None:
        raise FrameError(f"download: {', '.join(sorted(absent))} are not sent; expected the site's own adapter, got none")
    found = {name: _unpack_layer(parts, prefix, name, entry, absent, own, reduced) for name, entry in layers.items()}
    plain = {name: _unpack_tensor(parts, f"{prefix}tensor/{name}", name, entry, own if "tensors" in absent else None)
             for name, entry in tensors.items()}  # fmt: skip
    return Adapter(found, plain, config)


def _unpack_layer(
    parts: Parts, prefix: str, name: str, entry: Any, absent: frozenset[str], own: Adapter | None, reduced: str
) -> LoraLayer:
    where = f"{prefix}layer {name}"
    if not isinstance(entry, list) or len(entry) != 7:
        raise FrameError(f"{where}: expected [rank, out, in, dtype, scaling, kind, kernel], got {shortened(repr(entry), 100)}")
    rank, out, width, kind, scaling, layer_kind, kernel = entry
    for side in (rank, out, width, *(kernel if isinstance(kernel, list) else ())):
        check_least(where, side, 1)
    check_type(f"{where}, scaling", scaling, (float, int))
    if _type(where, kind) not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise FrameError(f"{where}: expected floating numbers, got {kind}")
    if not isinstance(layer_kind, str) or not isinstance(kernel, list) or len(kernel) != 2:
        raise FrameError(f"{where}: expected a kind and a kernel of two sides, got {shortened(repr(entry[5:]), 100)}")
    factors = {}
    for factor, sides in _SIDES.items():
        shape = sides(rank, out, width)
        if factor in absent:
            factors[factor] = own_part(f"{where}, {factor}", _factor(own, name, factor), TYPES[kind], shape)
        else:
            factors[factor] = _unpack_factor(parts, f"{prefix}{factor}", name, factor, TYPES[kind], shape, reduced)
    return made(where, LoraLayer, factors["A"], factors["B"], scaling, layer_kind, tuple(kernel))


def _unpack_factor(
    parts: Parts, place: str, name: str, factor: str, dtype: torch.dtype, shape: tuple[int, int], reduced: str
) -> Tensor:
    if reduced == "int8":
        step = parts.tensor(f"{place}-steps/{name}", torch.float64, (shape[0 if factor == "A" else 1],))
        return reduction.from_steps(factor, parts.tensor(f"{place}/{name}", torch.int8, shape), step, dtype)
    sent = torch.bfloat16 if reduced == "bfloat16" and dtype.itemsize > 2 else dtype
    return parts.tensor(f"{place}/{name}", sent, shape).to(dtype)


def _unpack_tensor(parts: Parts, place: str, name: str, entry: Any, own: Adapter | None) -> Tensor:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
        raise FrameError(f"{place}: expected [dtype, shape], got {shortened(repr(entry), 100)}")
    dtype, shape = _type(place, entry[0]), tuple(entry[1])
    for side in shape:
        check_least(place, side, 0)
    return parts.tensor(place, dtype, shape) if own is None else own_part(place, own.tensors.get(name), dtype, shape)


def own_part(where: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the site's own, if it is of the expected form."""
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        got = "none" if tensor is None else f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise FrameError(f"{where}: expected the site's own {dtype} of shape {list(shape)}, got {got}")
    return tensor


def digest(adapter: Adapter, factors: Iterable[str]) -> str:
    """SHA-256 of the named factors, layer by layer in the order of their names; empty without factors."""
    total, names = hashlib.sha256(), sorted(factors)
    for layer in sorted(adapter.layers) if names else ():
        for factor in names:
            array = np.ascontiguousarray(numbers(getattr(adapter.layers[layer], factor)))
            total.update(f"{layer}\0{factor}\0{array.dtype.name}\0{array.shape}\0".encode())
            total.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return total.hexdigest() if names else ""


def _factor(own: Adapter | None, name: str, factor: str) -> Tensor | None:
    layer = own.layers.get(name) if own else None
    return getattr(layer, factor) if layer else None


def _type(where: str, name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in TYPES:
        raise FrameError(f"{where}: expected one of {', '.join(_KINDS)}, got {shortened(repr(name), 100)}")
    return TYPES[name]


def _name(tensor: Tensor) -> str:
    if tensor.dtype not in NAMES:
        raise FrameError(f"adapter: expected numbers of {', '.join(_KINDS)}, got {tensor.dtype}")
    return NAMES[tensor.dtype]
