"""A frozen module with LoRA on its targets, between `Adapter` records and a forward pass.

While a `LoraModel` is open, the forward passes of its targets are those of `anyrank.training.forward`: the same as PEFT's,
tested against it, for Linear, Conv1D (GPT-2), Conv2d and Embedding modules. The base module is shared and never changed.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from anyrank import keys
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.errors import ModelError, in_a_line
from anyrank.messages.records import Download, Scaling
from anyrank.tasks.base import Task
from anyrank.training import forward, memory


@dataclass(frozen=True)
class Target:
    """A module that gets LoRA: its `kind` and, in LoRA's terms, the sizes `out` and `width` (in) of its weight."""

    module: nn.Module
    kind: str
    out: int
    width: int
    kernel: tuple[int, int] = (1, 1)


_used: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # every module that some `LoraModel` has open, with all its parts
_guard = threading.Lock()
_fast: list[bool] = []  # torch's switch as it was before the first of them was opened


def in_use(module: nn.Module) -> bool:
    """Whether a `LoraModel` has the module, or a part of it, open."""
    return any(part in _used for part in module.modules())


@contextlib.contextmanager
def _taken(module: nn.Module) -> Iterator[None]:
    """The module for one user alone, frozen and in evaluation mode; afterwards it is as it was, buffers and gradients too.

    torch's transformer layers have a fast path that reads their weights and never calls the modules that LoRA is on. It is
    switched off while any module is open.
    """
    with _guard:
        if in_use(module):
            raise ModelError(
                f"{type(module).__name__}: another federation in this process is using this module, or a part of it; give each "
                "its own: copy.deepcopy(module) before either runs"
            )
        if not _fast:
            _fast.append(torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
        _used.update(module.modules())
    kept = _Kept(module)
    try:
        try:
            module.requires_grad_(False).eval()
        except RuntimeError as error:
            raise ModelError(
                f"{type(module).__name__}: cannot be frozen ({in_a_line(error)}); hand in a plain module"
            ) from None
        yield
    finally:
        kept.put_back()
        with _guard:
            for part in module.modules():
                _used.discard(part)
            if not _used and _fast:
                torch.backends.mha.set_fastpath_enabled(_fast.pop())


class _Kept:
    """What of a module a federation changes: modes, what needs gradients, gradients, and numbers that forward passes write."""

    def __init__(self, module: nn.Module) -> None:
        for part in module.modules():
            if getattr(vars(part).get("forward"), forward.ADAPTED, False):  # a copy of a module that was open
                del part.forward
        self.modes = [(part, part.training) for part in module.modules()]
        self.parameters = [(each, each.requires_grad, each.grad) for each in module.parameters()]
        renormed = [part.weight for part in module.modules() if getattr(part, "max_norm", None) is not None]
        self.numbers = [(each, each.detach().clone()) for each in (*module.buffers(), *renormed)]

    def put_back(self) -> None:
        for part, training in self.modes:
            part.training = training
        for parameter, moving, gradient in self.parameters:
            parameter.requires_grad_(moving)
            parameter.grad = gradient
        with torch.no_grad():
            for each, value in self.numbers:
                each.copy_(value)


class LoraModel:
    """The module of a task with LoRA factors on its targets, set and read as `Adapter` records.

    Adapters are on the CPU, and on the module's device while they are in it. `checkpointing`: layers keep only their inputs
    and run again when a gradient needs their inner values.
    """

    def __init__(self, task: Task, checkpointing: bool = False) -> None:
        self.task, self.module = task, task.module
        self.probed: set[frozenset[str]] = set()  # factors that may be trained privately together: see `private_examples.check`
        self.people: np.ndarray | None = None  # whose each training example is, [n], where persons are protected
        self._open, self._closed = contextlib.ExitStack(), False
        self._open.enter_context(_taken(self.module))
        self.device = next(self.module.parameters()).device
        try:
            self._place(checkpointing)
        except BaseException:
            self._open.close()
            raise

    def _place(self, checkpointing: bool) -> None:
        """Replace the targets' forward passes by those with LoRA."""
        task = self.task
        if checkpointing:
            self._open.enter_context(memory.checkpointed(self.module, task.targets))
        modules = dict(self.module.named_modules())
        self.targets = {name: _target(name, modules[name]) for name in sorted(task.targets)}
        self.trained = {name: dict(self.module.named_parameters())[name] for name in sorted(task.trained)}
        self._start = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self._active: dict[str, list[forward.Term]] = {name: [] for name in self.targets}
        owners = {name.rpartition(".")[0] for name in self.trained}
        adapted = self.targets.keys() | {name for name in owners if isinstance(modules[name], nn.Linear)}
        # What is stacked takes the place of a head's numbers where its own module multiplies by them, and nowhere else.
        uses = Counter(id(each) for each in self._all_parameters())
        self._plain_heads = all(
            forward.is_linear(modules[name.rpartition(".")[0]]) and uses[id(parameter)] == 1
            for name, parameter in self.trained.items()
        )
        self._own: dict[str, dict[str, Tensor]] = {name: {} for name in sorted(adapted)}
        self._linear = {name for name in adapted if forward.is_linear(modules[name])}
        for name, own in self._own.items():
            kind = self.targets[name].kind if name in self.targets else "linear"
            instead = forward.adapted(modules[name], kind, self._active.get(name, ()), own)
            self._open.enter_context(forward.replaced(modules[name], instead))

    def close(self) -> None:
        """Put the module's own forward passes and plain parameters back: the module is as it was."""
        if not self._closed:
            self._closed = True
            for name, start in self._start.items():
                self.trained[name].data.copy_(start)
            self._open.close()

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
        """The current adapter in the module, in the form of `download`."""
        layers = {}
        for name, layer in download.adapter.layers.items():
            A, B = self.factors(name)
            layers[name] = layer.with_factors(A.detach().cpu(), B.detach().cpu())
        tensors = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.trained.items()}
        return Adapter(layers, tensors, download.adapter.config)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The current A and B of one target in the module; trained ones with their gradients."""
        A, B, _ = self._active[name][0]
        return A, B

    def apply(self, adapter: Adapter, merged: Adapter | None = None) -> None:
        """Put an adapter into the module for scoring, without training."""
        self.leave_stack()
        for name, layer in adapter.layers.items():
            self._active[name][:] = [(layer.A.to(self.device), layer.B.to(self.device), layer.scaling)]
        self._merge(merged)
        for name, parameter in self.trained.items():
            parameter.requires_grad_(False).data.copy_(adapter.tensors[name])

    def can_stack(self) -> bool:
        """Whether a cohort can be stacked: LoRA on linear maps and convolutions, other parameters in linear heads."""
        kinds = all(target.kind in ("linear", "conv2d") for target in self.targets.values())
        heads = {name.rpartition(".")[0] for name in self.trained}
        return kinds and self._plain_heads and heads <= self._own.keys() - self.targets.keys()

    def _all_parameters(self) -> list[nn.Parameter]:
        """Every parameter as often as a module holds it."""
        return [parameter for _, parameter in self.module.named_parameters(remove_duplicate=False)]

    def set_stack(self, name: str, terms: Sequence[forward.Term], in_base: Sequence[forward.Term] = ()) -> None:
        """Put a cohort's factors on a target: terms `(A, B, scaling)`, A `[clients, rank, in]`, B `[clients, out, rank]`, or
        `[rank, in]`, `[out, rank]` where all clients have the same.

        The module's batches are then the clients' batches one after another, of one length each. `in_base`: frozen terms, which
        are added to a separate weight for each client if it is small, until the next `leave_stack`.
        """
        weight = forward.written_out(self.targets[name].module, in_base) if in_base and name in self._linear else None
        if weight is not None:
            self._own[name]["weight"] = weight
        self._active[name][:] = [*terms, *(in_base if weight is None else ())]

    def terms(self, name: str) -> list[forward.Term]:
        """The current terms of a target: first the trained factors, then the round's terms in the base."""
        return list(self._active[name])

    def set_stacked_tensor(self, name: str, values: Tensor) -> None:
        """Replace the plain parameter `name` by a cohort's own values `[clients, ...]`, until the next `load`."""
        head, _, part = name.rpartition(".")
        self._own[head][part] = values

    def leave_stack(self) -> None:
        """Restore the module's own parameters."""
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
        """Raise `ModelError` for a rank that is too large for a target."""
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
