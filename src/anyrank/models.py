"""A frozen module with LoRA on its targets, between `Adapter` records and a forward pass.

The adapter is applied by forward hooks: `output + scaling * B(A(input))`, which is PEFT's own forward pass and is tested
against it, for Linear, Conv1D (GPT-2), Conv2d and Embedding modules. The base module is shared and never copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank import keys
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
    """The module of a task with LoRA factors on its targets, set and read as `Adapter` records."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.module = task.module.requires_grad_(False).eval()
        modules = dict(self.module.named_modules())
        self.targets = {name: _target(name, modules[name]) for name in sorted(task.targets)}
        self.trained = {name: dict(self.module.named_parameters())[name] for name in sorted(task.trained)}
        self._start = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self._active: dict[str, list[tuple[Tensor, Tensor, float]]] = {name: [] for name in self.targets}
        self._hooks = [
            target.module.register_forward_hook(_hook(target, self._active[name])) for name, target in self.targets.items()
        ]

    def close(self) -> None:
        """Take the hooks off and put the plain parameters back: the module is as it was."""
        for hook in self._hooks:
            hook.remove()
        for name, start in self._start.items():
            self.trained[name].data.copy_(start)

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        """The adapter that a run starts from: PEFT's init (A uniform, B zero; Embedding: A zero, B normal), head as loaded."""
        layers = {name: self._start_layer(name, rank, scaling.of(name, rank), seed) for name in self.targets}
        config = {"base_model_name_or_path": self.task.base_model or None}
        if any(type(target.module).__name__ == "Conv1D" for target in self.targets.values()):
            config["fan_in_fan_out"] = True
        return Adapter(layers, {name: start.clone() for name, start in self._start.items()}, config)

    def load(self, download: Download) -> list[nn.Parameter]:
        """Put a client's download into the module; what it trains comes back as parameters, sorted by name."""
        parameters = []
        for name, layer in download.adapter.layers.items():
            A = nn.Parameter(layer.A.clone(), requires_grad="A" in download.train)
            B = nn.Parameter(layer.B.clone(), requires_grad="B" in download.train)
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
            layers[name] = layer.with_factors(A.detach(), B.detach())
        tensors = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        return Adapter(layers, tensors, download.adapter.config)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of one target as they stand in the module, trained ones with their gradients."""
        A, B, _ = self._active[name][0]
        return A, B

    def apply(self, adapter: Adapter, merged: Adapter | None = None) -> None:
        """Put an adapter into the module for scoring; nothing of it is trained."""
        for name, layer in adapter.layers.items():
            self._active[name][:] = [(layer.A, layer.B, layer.scaling)]
        self._merge(merged)
        for name, parameter in self.trained.items():
            parameter.requires_grad_(False).data.copy_(adapter.tensors[name])

    def set_stack(self, name: str, A: Tensor, B: Tensor) -> None:
        """Put a cohort's factors on a linear target, A `[clients, rank, in]`, B `[clients, out, rank]` with its scaling in it.

        The module's batches are then the clients' batches one after another, of one length each.
        """
        self._active[name][:] = [(A, B, 1.0)]

    def _merge(self, merged: Adapter | None) -> None:
        for name, layer in merged.layers.items() if merged else ():
            self._active[name].append((layer.A, layer.B, layer.scaling))

    def _start_layer(self, name: str, rank: int, scaling: float, seed: int) -> LoraLayer:
        target, draw = self.targets[name], keys.generator(seed, "start", name)
        shape_a, shape_b = (rank, target.width), (target.out, rank)
        dtype = next(target.module.parameters()).dtype
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
    if A.ndim == 3:
        own = x.to(A.dtype).reshape(len(A), -1, A.shape[2])
        return torch.bmm(torch.bmm(own, A.mT), B.mT).view(*x.shape[:-1], B.shape[1])
    return F.linear(F.linear(x.to(A.dtype), A), B)


def _conv2d(module: nn.Conv2d, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    kernel = A.unflatten(1, (module.in_channels, *module.kernel_size))
    return F.conv2d(F.conv2d(x.to(A.dtype), kernel, None, module.stride, module.padding, module.dilation), B[:, :, None, None])


def _embedding(module: nn.Embedding, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    # The module's padding and frequency rules shape the gradient of A, as in PEFT.
    rows = F.embedding(x, A.T, padding_idx=module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)
    return F.linear(rows, B)
