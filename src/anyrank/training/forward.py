"""Forward passes of single modules with LoRA on them: `output + B(A(input)) * scaling`, for one client or for many at once.

Factors are `A` `[rank, in]` and `B` `[out, rank]`, or `[clients, rank, in]` and `[clients, out, rank]`: the input is then the
clients' batches one after another, of one length each, and each goes through its own client's factors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A and B, and what their product is multiplied by: one number, or one for each client, `[clients, 1, 1]`.
ADAPTED = "anyrank_adapted"  # marks a forward that `adapted` made
Term = tuple[Tensor, Tensor, "float | Tensor"]


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the module's own forward by `forward` within a `with` block."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def adapted(module: nn.Module, kind: str, terms: Sequence[Term], own: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """A forward of `module` (of `Target.kind`) with all `terms` added; they and `own` may change from call to call.

    `own`: replacements for a linear module's `weight` `[out, in]` and `bias` `[out]`, or one for each client,
    `[clients, out, in]` and `[clients, out]`.
    """
    plain, add = module.forward, _ADD[kind]
    at_once = _AT_ONCE.get(kind) if type(module).forward is nn.Conv2d.forward and "forward" not in vars(module) else None

    def forward(input: Tensor) -> Tensor:
        if at_once and (output := at_once(module, input, terms)) is not None:
            return output
        output = _map(input, *_parameters(module, own)) if own else plain(input)
        for A, B, scaling in terms:
            output = add(output, module, input, A, B * scaling)
        return output

    setattr(forward, ADAPTED, True)
    return forward


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes `x W^T + b` and nothing else, by its class's original forward."""
    known = type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"
    return known and "forward" not in vars(module)


def written_out(module: nn.Module, terms: Sequence[Term]) -> Tensor | None:
    """The weight of a linear `module` and `terms` in one, `[out, in]` or `[clients, out, in]`.

    `None` if it would have more than twice as many numbers as the factors: then it is faster to use the factors.
    """
    weight, _ = _parameters(module, {})
    clients = max((len(A) for A, _, _ in terms if A.ndim == 3), default=1)
    factors = sum(A.numel() + B.numel() for A, B, _ in terms)
    if clients * weight.numel() > 2 * factors or any(A.dtype != weight.dtype for A, _, _ in terms):
        return None
    for A, B, scaling in terms:
        weight = weight + B * scaling @ A
    return weight


# --- linear maps -----------------------------------------------------------------------------------------------------


def _parameters(module: nn.Module, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Weight `[..., out, in]` and bias `[..., out]` of a linear module, or their replacements in `own`."""
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T  # Conv1D holds it as [in, out]
    return own.get("weight", weight), own.get("bias", module.bias)


def _map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`, by each client's own where there is one."""
    if weight.ndim == 2 and (bias is None or bias.ndim == 1):
        return F.linear(x, weight, bias)
    clients = len(weight) if weight.ndim == 3 else len(bias)
    weight = weight.expand(clients, -1, -1)
    if bias is None:
        return _each(x, weight)
    rows = x.reshape(clients, -1, weight.shape[2])
    return torch.baddbmm(bias.expand(clients, -1)[:, None], rows, weight.mT).view(*x.shape[:-1], -1)


def _add_linear(output: Tensor, module: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    x = x.to(A.dtype)
    if B.ndim == 2 or A.dtype != output.dtype:
        return output + _each(_each(x, A), B).to(output.dtype)
    clients, out, rank = B.shape  # the last product is added to the output in place
    low = F.linear(x, A).reshape(clients, -1, rank) if A.ndim == 2 else _apart(x, A)
    return torch.baddbmm(output.reshape(clients, -1, out), low, B.mT).view(output.shape)


def _each(x: Tensor, weight: Tensor) -> Tensor:
    """`x` `[clients * b, ..., in]` through each client's own `weight` `[clients, out, in]`, or one for all `[out, in]`."""
    return F.linear(x, weight) if weight.ndim == 2 else _apart(x, weight).view(*x.shape[:-1], weight.shape[1])


def _apart(x: Tensor, weight: Tensor) -> Tensor:
    """The same as `[clients, rows, out]`."""
    return torch.bmm(x.reshape(len(weight), -1, weight.shape[2]), weight.mT)


# --- other modules ---------------------------------------------------------------------------------------------------


def _added(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def add(output: Tensor, module: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return output + change(module, x, A, B).to(output.dtype)

    return add


def _in_one_kernel(module: nn.Conv2d, x: Tensor, terms: Sequence[Term]) -> Tensor | None:
    """The module with all terms as one convolution; `None` if several convolutions are faster."""
    kernels = _kernels(module, x, terms)
    return None if kernels is None else _convolved(module, x, kernels)


def _kernels(module: nn.Conv2d, x: Tensor, terms: Sequence[Term]) -> Tensor | None:
    """The kernel with all terms in it, `[out, in, h, w]` or `[clients, out, in, h, w]`: one convolution instead of three.

    `None` if there are no terms, if another number type would round them away, or if kernels would have more numbers than the
    input: with so many channels, separate convolutions are faster.
    """
    clients = max((len(each) for A, B, _ in terms for each in (A, B) if each.ndim == 3), default=1)
    alike = all(A.dtype == B.dtype == module.weight.dtype for A, B, _ in terms)
    if not terms or not alike or clients * module.weight.numel() > x.numel():
        return None
    kernels = module.weight.flatten(1)
    for A, B, scaling in terms:
        kernels = kernels + B * scaling @ A
    return kernels.unflatten(-1, module.weight.shape[1:])


def _convolved(module: nn.Conv2d, x: Tensor, kernels: Tensor) -> Tensor:
    """`x` `[b, in, h, w]` by one kernel, or `[clients * b, in, h, w]` by each client's own."""
    if kernels.ndim == 4:
        return F.conv2d(x, kernels, module.bias, module.stride, module.padding, module.dilation)
    groups = len(kernels)
    bias = None if module.bias is None else module.bias.repeat(groups)
    found = F.conv2d(
        _side_by_side(x, groups), kernels.flatten(0, 1), bias, module.stride, module.padding, module.dilation, groups
    )
    return _one_after_another(found, groups)


def _side_by_side(x: Tensor, clients: int) -> Tensor:
    """`[clients * b, channels, h, w]` as `[b, clients * channels, h, w]`: one group of channels a client."""
    return x.unflatten(0, (clients, -1)).transpose(0, 1).flatten(1, 2)


def _one_after_another(x: Tensor, clients: int) -> Tensor:
    """The way back."""
    return x.unflatten(1, (clients, -1)).transpose(0, 1).flatten(0, 1)


def _conv2d(module: nn.Conv2d, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    if A.ndim == 3:
        kernel, groups = A.unflatten(2, (module.in_channels, *module.kernel_size)).flatten(0, 1), len(A)
        low = F.conv2d(
            _side_by_side(x.to(A.dtype), groups), kernel, None, module.stride, module.padding, module.dilation, groups
        )
        high = F.conv2d(low, B.expand(groups, -1, -1).flatten(0, 1)[:, :, None, None], groups=groups)
        return _one_after_another(high, groups)
    kernel = A.unflatten(1, (module.in_channels, *module.kernel_size))
    low = F.conv2d(x.to(A.dtype), kernel, None, module.stride, module.padding, module.dilation)
    if B.ndim == 3:
        return _each(low.flatten(2).mT, B).mT.unflatten(2, low.shape[2:])
    return F.conv2d(low, B[:, :, None, None])


def _embedding(module: nn.Embedding, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    if A.ndim == 3:
        return _each(_rows(module, x, A), B)
    # The module's padding and frequency rules shape the gradient of A, as in PEFT.
    rows = F.embedding(x, A.T, padding_idx=module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)
    return _each(rows, B)


def _rows(module: nn.Embedding, x: Tensor, A: Tensor) -> Tensor:
    """Columns `x` `[clients, ...]` of each client's own A `[clients, rank, count]`, as `[clients, ..., rank]`."""
    clients, _, count = A.shape
    own = x + count * torch.arange(clients, device=x.device).view(-1, *(1,) * (x.ndim - 1))
    rows = F.embedding(own, A.mT.flatten(0, 1))
    padding = (x == module.padding_idx).unsqueeze(-1) if module.padding_idx is not None else x.new_zeros((), dtype=torch.bool)
    return torch.where(padding, rows.detach(), rows)  # the padding entry is not trained


_ADD = {"linear": _add_linear, "conv2d": _added(_conv2d), "embedding": _added(_embedding)}
_AT_ONCE = {"conv2d": _in_one_kernel}
