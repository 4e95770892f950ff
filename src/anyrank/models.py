"""A frozen module with LoRA on its targets, between `Adapter` records and a forward pass.

The adapter is applied by forward hooks: `output + scaling * B(A(input))`, which is PEFT's own forward pass and is tested
against it, for Linear, Conv1D (GPT-2), Conv2d and Embedding modules. The base module is shared and never copied.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank import hardware, keys
from anyrank.adapter import Adapter, LoraLayer
from anyrank.errors import ModelError
from anyrank.records import Download, Scaling
from anyrank.tasks.base import Task


@dataclass(frozen=True)
class Target:
    """A module that gets LoRA: its `kind` and, in LoRA's terms, the sizes `out` and `width` (in) of its weight."""

    module: nn.Module
    kind: str
    out: int
    width: int
    kernel: tuple[int, int] = (1, 1)


class LoraModel:
    """The module of a task with LoRA factors on its targets, set and read as `Adapter` records.

    Adapters are on the CPU, and on the module's device while they are in it. `checkpointing`: layers keep their inputs alone,
    and are run again where a gradient needs what is inside them.
    """

    def __init__(self, task: Task, checkpointing: bool = False) -> None:
        self.task = task
        self.module = task.module.requires_grad_(False).eval()
        self.device = next(self.module.parameters()).device
        self._checkpointed = contextlib.ExitStack()
        if checkpointing:
            self._checkpointed.enter_context(hardware.checkpointed(self.module, task.targets))
        modules = dict(self.module.named_modules())
        self.targets = {name: _target(name, modules[name]) for name in sorted(task.targets)}
        self.trained = {name: dict(self.module.named_parameters())[name] for name in sorted(task.trained)}
        self._start = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self._active: dict[str, list[tuple[Tensor, Tensor, float]]] = {name: [] for name in self.targets}
        self._hooks = [
            target.module.register_forward_hook(_hook(target, self._active[name])) for name, target in self.targets.items()
        ]
        heads = {name.rpartition(".")[0] for name in self.trained}
        self._own: dict[str, dict[str, Tensor]] = {head: {} for head in heads if isinstance(modules[head], nn.Linear)}
        self._hooks += [modules[head].register_forward_hook(_own_hook(own)) for head, own in self._own.items()]

    def close(self) -> None:
        """Take the hooks off and put the plain parameters back: the module is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._checkpointed.close()
        for name, start in self._start.items():
            self.trained[name].data.copy_(start)

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        """The adapter that a run starts from: PEFT's init (A uniform, B zero; Embedding: A zero, B normal), head as loaded."""
        layers = {name: self._start_layer(name, rank, scaling.of(name, rank), seed) for name in self.targets}
        config = {"base_model_name_or_path": self.task.base_model or None, **self.task.peft}
        if any(type(target.module).__name__ == "Conv1D" for target in self.targets.values()):
            config["fan_in_fan_out"] = True
        return Adapter(layers, {name: start.to("cpu", copy=True) for name, start in self._start.items()}, config)

    def load(self, download: Download) -> list[nn.Parameter]:
        """Put a client's download into the module; what it trains comes back as parameters, sorted by name."""
        self.leave_stack()
        parameters = []
        for name, layer in download.adapter.layers.items():
            A = nn.Parameter(layer.A.to(self.device, copy=True), requires_grad="A" in download.train)
            B = nn.Parameter(layer.B.to(self.device, copy=True), requires_grad="B" in download.train)
            self._active[name][:] = [(A, B, layer.scaling)]
            parameters += [factor for factor in (A, B) if factor.requires_grad]
        self._merge(download.merged)
        for name, parameter in self.trained.items():
            parameter.data.copy_(download.adapter.tensors[name])
            parameters.append(parameter.requires_grad_(True))
        return parameters

    def read(self, download: Download) -> Adapter:
        """The adapter as it stands in the module, in the form of `download`."""
        layers = {}
        for name, layer in download.adapter.layers.items():
            A, B = self.factors(name)
            layers[name] = layer.with_factors(A.detach().cpu(), B.detach().cpu())
        tensors = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.trained.items()}
        return Adapter(layers, tensors, download.adapter.config)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of one target as they stand in the module, trained ones with their gradients."""
        A, B, _ = self._active[name][0]
        return A, B

    def apply(self, adapter: Adapter, merged: Adapter | None = None) -> None:
        """Put an adapter into the module for scoring; nothing of it is trained."""
        self.leave_stack()
        for name, layer in adapter.layers.items():
            self._active[name][:] = [(layer.A.to(self.device), layer.B.to(self.device), layer.scaling)]
        self._merge(merged)
        for name, parameter in self.trained.items():
            parameter.requires_grad_(False).data.copy_(adapter.tensors[name])

    def can_stack(self) -> bool:
        """Whether a cohort can train side by side: LoRA on linear maps and convolutions, other parameters in linear heads."""
        kinds = all(target.kind in ("linear", "conv2d") for target in self.targets.values())
        heads = {name.rpartition(".")[0] for name in self.trained}
        return kinds and heads == self._own.keys() and not heads & self.targets.keys()

    def set_stack(self, name: str, terms: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """Put a cohort's factors on a target: terms `(A, B, scaling)`, A `[clients, rank, in]`, B `[clients, out, rank]`, or
        `[rank, in]`, `[out, rank]` where all clients have the same.

        The module's batches are then the clients' batches one after another, of one length each.
        """
        self._active[name][:] = terms

    def terms(self, name: str) -> list[tuple[Tensor, Tensor, float]]:
        """What acts on a target as it stands: first the factors in training, then what is in the base for the round."""
        return list(self._active[name])

    def set_stacked_tensor(self, name: str, values: Tensor) -> None:
        """Put a cohort's own values `[clients, ...]` in the place of the plain parameter `name`, until the next `load`."""
        head, _, part = name.rpartition(".")
        self._own[head][part] = values

    def leave_stack(self) -> None:
        """Put the module's own plain parameters back in their place."""
        for own in self._own.values():
            own.clear()

    def _merge(self, merged: Adapter | None) -> None:
        for name, layer in merged.layers.items() if merged else ():
            self._active[name].append((layer.A.to(self.device), layer.B.to(self.device), layer.scaling))

    def _start_layer(self, name: str, rank: int, scaling: float, seed: int) -> LoraLayer:
        target, draw = self.targets[name], keys.generator(seed, "start", name)
        shape_a, shape_b = (rank, target.width), (target.out, rank)
        dtype = torch.promote_types(next(target.module.parameters()).dtype, torch.float32)  # a narrower one could not train
        if target.kind == "embedding":
            A, B = torch.zeros(shape_a), torch.randn(shape_b, generator=draw)
        else:
            A, B = (torch.rand(shape_a, generator=draw) * 2 - 1) / math.sqrt(target.width), torch.zeros(shape_b)
        return LoraLayer(A.to(dtype), B.to(dtype), scaling, target.kind, target.kernel)

    def check_rank(self, rank: int) -> None:
        """Raise `ModelError` for a rank that some target cannot carry."""
        for name, target in self.targets.items():
            if rank > min(target.out, target.width):
                raise ModelError(
                    f"rank {rank}: expected at most {min(target.out, target.width)}, the smaller side of layer {name} "
                    f"[{target.out}, {target.width}]; lower clients.ranks or choose other target_modules"
                )


def _target(name: str, module: nn.Module) -> Target:
    if isinstance(module, nn.Linear):
        return Target(module, "linear", module.out_features, module.in_features)
    if type(module).__name__ == "Conv1D":  # transformers' GPT-2 layer: a linear map with its weight as [in, out]
        return Target(module, "linear", module.weight.shape[1], module.weight.shape[0])
    if isinstance(module, nn.Embedding):
        return Target(module, "embedding", module.embedding_dim, module.num_embeddings)
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        height, width = module.kernel_size
        return Target(module, "conv2d", module.out_channels, module.in_channels * height * width, (height, width))
    raise ModelError(
        f"layer {name}: expected a Linear, Conv1D, Embedding or plain Conv2d module, got {module}; choose other target_modules"
    )


def _hook(target: Target, active: list[tuple[Tensor, Tensor, float]]):
    """A forward hook that adds what each active factor pair applies to the module's input."""
    change = {"linear": _linear, "conv2d": _conv2d, "embedding": _embedding}[target.kind]

    def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for A, B, scaling in active:
            output = output + scaling * change(module, arguments[0], A, B).to(output.dtype)
        return output

    return add


def _linear(module: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return _each(_each(x.to(A.dtype), A), B)


def _each(x: Tensor, weight: Tensor) -> Tensor:
    """`x` `[clients * b, ..., in]` through each client's own `weight` `[clients, out, in]`, or one for all `[out, in]`."""
    if weight.ndim == 2:
        return F.linear(x, weight)
    return torch.bmm(x.reshape(len(weight), -1, weight.shape[2]), weight.mT).view(*x.shape[:-1], weight.shape[1])


def _own_hook(own: dict[str, Tensor]):
    """A forward hook on a Linear module that puts the clients' own weights and biases (`own`) in the place of the module's."""

    def instead(module: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not own:
            return output
        clients = len(next(iter(own.values())))
        output = _each(arguments[0], own.get("weight", module.weight).expand(clients, -1, -1))
        if module.bias is None:
            return output
        bias = own.get("bias", module.bias).expand(clients, -1)
        return (output.view(clients, -1, bias.shape[1]) + bias[:, None]).view(output.shape)

    return instead


def _conv2d(module: nn.Conv2d, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    if A.ndim == 3:  # one group a client
        kernel, groups = A.unflatten(2, (module.in_channels, *module.kernel_size)).flatten(0, 1), len(A)
        side_by_side = x.to(A.dtype).unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)  # [b, clients * channels, h, w]
        low = F.conv2d(side_by_side, kernel, None, module.stride, module.padding, module.dilation, groups)
        high = F.conv2d(low, B.expand(groups, -1, -1).flatten(0, 1)[:, :, None, None], groups=groups)
        return high.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
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
    return torch.where(padding, rows.detach(), rows)  # what stands for padding is not trained
