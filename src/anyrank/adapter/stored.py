"""PEFT folders that are larger than memory: read one layer at a time, written one layer at a time.

A file is mapped anew for each layer, and let go with it: nothing is copied, and no more than one layer's pages count as the
process's own memory. As with every mapped file (safetensors maps its files, too), whoever cuts it short in that moment ends
the process; a file that is shorter than it was is an error like any other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyrank import files
from anyrank.adapter.adapter import Adapter, from_plain_state
from anyrank.adapter.header import DTYPES, read_header
from anyrank.adapter.layer import LoraLayer, finite
from anyrank.adapter.lazy import Lazy, outlined
from anyrank.adapter.names import FACTOR, PREFIX, plain_names
from anyrank.adapter.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    find_weights,
    layer_tensors,
    peft_config,
    read_config,
    unreadable,
)

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# --- reading ---------------------------------------------------------------------------------------------------------


class _Weights:
    """A safetensors file whose tensors are read when they are asked for. Nothing of it stays open."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """`entries` by their plain names, without PEFT's prefix or a wrapper's."""
        self.path, self._name = path, str(path)
        found, self._start = read_header(path)
        names = plain_names(sorted(found), config, str(path.parent))
        self.entries = {names[key]: found[key] for key in names}
        self._size = self._start + max((entry["data_offsets"][1] for entry in self.entries.values()), default=0)

    def outline(self, key: str) -> Tensor:
        """Shape and dtype of a tensor, without its numbers."""
        return torch.empty(self.entries[key]["shape"], dtype=DTYPES[self.entries[key]["dtype"]], device="meta")

    def read(self, *keys: str) -> dict[str, Tensor]:
        """The tensors of `keys`: the file's own pages, held for as long as one of the tensors is. Writing to them changes
        no file.
        """
        try:
            pages = torch.from_file(self._name, shared=False, size=self._size, dtype=torch.uint8)
        except RuntimeError as error:
            shrunk = self.path.is_file() and self.path.stat().st_size < self._size
            raise unreadable(self.path, "it has shrunk since it was opened" if shrunk else error) from None
        return {key: self._view(pages, self.entries[key]) for key in keys}

    def _view(self, pages: Tensor, entry: Mapping[str, Any]) -> Tensor:
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        numbers = pages[self._start + begin : self._start + end]
        aligned = numbers if (self._start + begin) % dtype.itemsize == 0 else numbers.clone()
        return aligned.view(dtype).reshape(entry["shape"])


class _StoredLayers(Lazy[LoraLayer]):
    def __init__(self, weights: _Weights, where: str, outline: Mapping[str, LoraLayer]) -> None:
        super().__init__(outline, self._checked)
        self._weights, self._where = weights, where
        self._keys: dict[str, dict[str, str]] = {}
        for key in weights.entries:
            if match := FACTOR.fullmatch(key):
                self._keys.setdefault(match[1], {})[match[3]] = key

    def _checked(self, name: str) -> LoraLayer:
        layer = self.unchecked(name)
        finite(layer.A, self._where, name)
        finite(layer.B, self._where, name)
        return layer

    def unchecked(self, name: str) -> LoraLayer:
        layer, keys = self.outline[name], self._keys[name]  # what can be told without numbers was checked with the outline
        read = self._weights.read(*keys.values())
        A, B = (read[keys[factor]].flatten(1) for factor in "AB")
        return LoraLayer(A, B, layer.scaling, layer.kind, layer.kernel)


def open_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """A PEFT LoRA folder as an `Adapter` that holds nothing: each layer and tensor is read when it is asked for, each time.

    All that `Adapter.load` checks is checked here, but for the numbers, which are checked as they are read.
    """
    folder = Path(folder)
    config = read_config(folder)
    weights = _Weights(find_weights(folder), config)
    known = from_plain_state({key: weights.outline(key) for key in weights.entries}, config, str(folder))
    layers = _StoredLayers(weights, str(folder), known.layers)
    tensors = Lazy(known.tensors, lambda name: finite(weights.read(name)[name], str(folder), name))
    return Adapter(layers, tensors, known.config)


def outline(adapter: Adapter) -> Adapter:
    """`adapter` for asking names, shapes, ranks and scalings: of a stored one, no number is read."""
    return Adapter(outlined(adapter.layers), outlined(adapter.tensors), adapter.config)


def unchecked(adapter: Adapter, name: str) -> LoraLayer:
    """A layer as it is stored: the caller sees to it that its numbers are finite."""
    return adapter.layers.unchecked(name) if isinstance(adapter.layers, _StoredLayers) else adapter.layers[name]


def is_stored(adapter: Adapter) -> bool:
    return isinstance(adapter.layers, Lazy)


# --- writing ---------------------------------------------------------------------------------------------------------


class FolderWriter:
    """A PEFT folder that is written as its layers come, of any rank each: `add` them, then `finish`.

    The header of a safetensors file stands before the tensors. Room for it is kept, enough for all names that may come, and
    what is left of it is spaces, as the format allows. Tensors must come in falling width of their numbers, so that all of
    them are aligned. What is not finished is no adapter: write into a folder that is renamed at the end. What the system
    refuses is raised as `OSError`.
    """

    def __init__(self, folder: Path, names: Mapping[str, LoraLayer], tensors: Mapping[str, Tensor]) -> None:
        files.reached("folder", folder)
        folder.mkdir(parents=True)
        keys = [key for name, layer in names.items() for key in layer_tensors(name, layer)]
        keys += [PREFIX + name for name in tensors]
        # An entry beside its key: a dtype, up to four sizes and two offsets, each of at most twenty digits.
        self._room = -(-(64 + sum(len(json.dumps(key)) + 200 for key in keys)) // 8) * 8
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._names, self._tensors = names, tensors
        # Numbers, not tensors: a small tensor that stays, between the large ones that come and go, would fragment the memory.
        self._layers: dict[str, tuple[int, float]] = {}
        self._folder, self._offset = folder, 0
        files.reached("write", folder / WEIGHTS_FILE)
        self._file = open(folder / WEIGHTS_FILE, "wb")  # noqa: SIM115 - closed by finish or close
        self._file.seek(8 + self._room)

    def add_layer(self, name: str, layer: LoraLayer) -> None:
        for key, tensor in layer_tensors(name, layer).items():
            self._write(key, tensor)
        self._layers[name] = layer.rank, layer.scaling

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        self._write(PREFIX + name, tensor)

    def _write(self, key: str, tensor: Tensor) -> None:
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        end = self._offset + len(numbers)
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self._offset, end]}
        self._entries[key], self._offset = entry, end
        files.reached("write", self._folder / WEIGHTS_FILE)
        self._file.write(memoryview(numbers))

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the header and `adapter_config.json`, and flush both files and the folder to disk."""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.flush()
        files.reached("flush", self._folder / WEIGHTS_FILE)
        os.fsync(self._file.fileno())
        self._file.close()
        layers = {name: self._outline(name, *told) for name, told in self._layers.items()}
        text = json.dumps(peft_config(layers, self._tensors, config), indent=2, sort_keys=True) + "\n"
        files.reached("write", self._folder / CONFIG_FILE)
        with open(self._folder / CONFIG_FILE, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            files.reached("flush", self._folder / CONFIG_FILE)
            os.fsync(file.fileno())
        files.flush_folder(self._folder)

    def _outline(self, name: str, rank: int, scaling: float) -> LoraLayer:
        layer = self._names[name]
        (out, width), like = layer.shape, torch.empty(0, dtype=layer.A.dtype, device="meta")
        return LoraLayer(like.new_empty(rank, width), like.new_empty(out, rank), scaling, layer.kind, layer.kernel)

    def close(self) -> None:
        self._file.close()
