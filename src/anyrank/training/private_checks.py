"""What of a module would let one example change the gradients of others: numbers too narrow, and what forward passes write.

A gradient in float32 depends on the other examples of its batch by about one part in a million: kernels and padding round
differently in batches of other shapes. In bfloat16 and float16 the same rounding is one part in a hundred, so that an example
that is removed moves the clipped gradients of all others together by a share of the clip norm for which there is no noise. A
buffer that a forward pass changes carries something of one batch into the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anyrank.errors import ModelError

_LEAST_BYTES = 4  # of a floating-point number


def narrow(tensor: Any) -> bool:
    """Whether a value is a tensor of floating-point numbers narrower than float32."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype.itemsize < _LEAST_BYTES


def check_numbers(module: nn.Module) -> None:
    """Raise `ModelError`, with the name, for parameters and buffers that are narrower than float32."""
    for kind, named in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in named:
            if narrow(tensor):
                raise _too_narrow(f"{kind} {name}: is {_short(tensor.dtype)}")


@contextlib.contextmanager
def watched(module: nn.Module) -> Iterator[None]:
    """Raise `ModelError`, with the name of the layer, if a forward pass within the `with` block computes in numbers narrower
    than float32, or changes a buffer or a parameter of `module`."""
    before = {name: tensor.detach().clone() for name, tensor in module.named_buffers()}
    versions = {name: _version(tensor) for name, tensor in module.named_parameters()}
    with _entered(module) as layer, _Watch(layer):
        yield
    for name, tensor in module.named_buffers():
        if name not in before or not _equal(tensor, before[name]):
            raise _changed("buffer", name)
    for name, tensor in module.named_parameters():
        if _version(tensor) != versions[name]:
            raise _changed("parameter", name)


class _Watch(TorchFunctionMode):
    """Looks at what each of torch's functions returns; `layer()` is the name of the layer that calls it."""

    def __init__(self, layer: Callable[[], str]) -> None:
        super().__init__()
        self._layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if narrow(each):
                raise _too_narrow(f"{self._layer()}: computes in {_short(each.dtype)}")
        return found


@contextlib.contextmanager
def _entered(module: nn.Module) -> Iterator[Callable[[], str]]:
    """A function that names the part of `module` whose forward pass was entered last."""
    last = [""]
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: last.__setitem__(0, name)) for name, part in module.named_modules()
    ]
    try:
        yield lambda: f"layer {last[0]}" if last[0] else type(module).__name__
    finally:
        for hook in hooks:
            hook.remove()


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to, as far as torch counts it."""
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return 0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _too_narrow(what: str) -> ModelError:
    return ModelError(
        f"{what}, in which an example's gradient depends on the others of its batch by rounding, more than the noise covers; "
        "expected float32: module.float(), or model.train_dtype = 'float32'"
    )


def _changed(kind: str, name: str) -> ModelError:
    return ModelError(
        f"{kind} {name}: a forward pass changes it, so that an example would affect the gradients of others; freeze it, or "
        "choose a model without such a layer"
    )
