"""A transformers classifier cut in two before one of its layers, so that the lower part has to run only once."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anyrank.errors import ModelError


@dataclass(frozen=True, eq=False)
class Cut:
    """The cut before layer `place` (`vit.layers.8`) of a model.

    `before`: the replacement of each layer below; `blank` `[1, channels, h, w]`: an all-zero picture for them.
    """

    place: str
    before: tuple[_Passed, ...]
    blank: Tensor


def find(model: nn.Module, targets: Sequence[str], pictures: Tensor) -> Cut | None:
    """The cut before the lowest layer that has a target, or before the last layer if there are no targets.

    `None` if there is nothing below it, if a target is outside of the model's outermost list of layers, or if the upper part
    alone does not give the whole model's logits for `pictures` `[2, channels, h, w]`.
    """
    place = _first_layer(model, targets)
    if not place:
        return None
    lengths: list[int | None] = []
    layers, number = _list(model, place)
    hooks = [layer.register_forward_hook(lambda *call: lengths.append(_length(call[2]))) for layer in layers[:number]]
    try:
        with torch.no_grad():
            whole = model(pixel_values=pictures).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(lengths) != number:
        return None
    cut = Cut(place, tuple(map(_Passed, lengths)), torch.zeros_like(pictures[:1]))
    return cut if _is_whole(model, cut, pictures, whole) else None


@torch.no_grad()
def _is_whole(model: nn.Module, cut: Cut, pictures: Tensor, logits: Tensor) -> bool:
    """Whether the upper part gives `logits`; the model is not changed."""
    layers, number = _list(model, cut.place)
    kept = list(layers[:number])
    try:
        hidden = inputs_of(model, cut.place, pictures)
        apart = SplitClassifier(model, cut)(hidden)
    except (AttributeError, IndexError, ModelError, RuntimeError, TypeError, ValueError):  # other arguments, other shapes
        return False
    finally:
        _put(layers, kept)
    return apart.shape == logits.shape and torch.allclose(apart, logits, atol=1e-4 * float(logits.abs().max()), rtol=0)


def _first_layer(model: nn.Module, targets: Sequence[str]) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            numbers = [re.match(rf"{re.escape(name)}\.(\d+)(\.|$)", target) for target in targets]
            if all(numbers):
                first = min((int(number[1]) for number in numbers), default=len(module) - 1)
                return f"{name}.{first}" if first else ""
    return ""


def _list(model: nn.Module, place: str) -> tuple[nn.ModuleList, int]:
    """The list of layers that `place` is in, and its number there."""
    name, _, number = place.rpartition(".")
    return model.get_submodule(name), int(number)


def _put(layers: nn.ModuleList, modules: Sequence[nn.Module]) -> None:
    """Replace the first layers by `modules`."""
    for number, module in enumerate(modules):
        layers[number] = module


def _length(output: object) -> int | None:
    return len(output) if isinstance(output, tuple) else None


class _Arrived(Exception):
    """Stops a forward pass at the wanted place."""


def inputs_of(model: nn.Module, place: str, pixels: Tensor) -> Tensor:
    """The input of the module `place` when the model runs on `pixels` `[b, channels, h, w]`; nothing after it is computed."""
    seen: list[Tensor] = []

    own = threading.get_ident()  # others may run the same model at the same time

    def stop(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == own:
            seen.extend(arguments[:1])
            raise _Arrived

    hook = model.get_submodule(place).register_forward_pre_hook(stop)
    try:
        model(pixel_values=pixels)
    except _Arrived:
        pass
    finally:
        hook.remove()
    if not seen:
        raise ModelError(f"model: {place} takes no tensor in the model's forward pass; choose other lora.target_modules")
    return seen[0]


class _Passed(nn.Module):
    """A layer that returns its first argument, in a tuple of `length` if the replaced layer returns a tuple."""

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self._length = length

    def forward(self, hidden: Tensor, *others: object, **named: object) -> Tensor | tuple[Tensor | None, ...]:
        return hidden if self._length is None else (hidden, *(None,) * (self._length - 1))


class SplitClassifier(nn.Module):
    """The model above a cut, from the hidden states `inputs` `[b, …]` that the layer `cut.place` takes, under its own names.

    The model's own forward pass runs on blank pictures. The layers below the cut are released and replaced by layers that pass
    their input through, and the layer at the cut gets `inputs` instead. Layers keep their numbers.
    """

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        super().__init__()
        layers, number = _list(model, cut.place)
        _put(layers, cut.before)
        self.register_buffer("_blank", cut.blank, persistent=False)
        self._model, self._layer = (model,), (layers[number],)  # in tuples: not registered under a second name
        for name, child in model.named_children():
            self.add_module(name, child)

    def forward(self, inputs: Tensor) -> Tensor:
        hook = self._layer[0].register_forward_pre_hook(lambda module, arguments: (inputs, *arguments[1:]))
        try:
            return self._model[0](pixel_values=self._blank.expand(len(inputs), -1, -1, -1)).logits
        finally:
            hook.remove()
