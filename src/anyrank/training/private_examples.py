"""One client's private training in one round: DP-SGD over the trained factors and heads (Abadi et al., CCS 2016).

Each step draws every example of the client with the plan's sampling rate, clips each drawn example's gradient to the clip
norm, over all that is trained together, adds Gaussian noise to their sum and divides by the expected batch. A step without
drawn examples counts too, and consists of noise only.

Per-example gradients come from the model itself: the trained factors are repeated, one copy per example (as the stacked engine
does for clients), so that one ordinary backward pass leaves each example's gradient in its own copy. `check` finds, before
training, anything that would still mix examples or affect the loss without going through these copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyrank import keys
from anyrank.errors import ModelError, in_a_line
from anyrank.messages.plan import Plan
from anyrank.messages.records import BOTH, ClientUpdate, Download, Scaling
from anyrank.privacy.grid import Gaussian
from anyrank.privacy.noise import Draws, Mechanism
from anyrank.tasks.base import Examples
from anyrank.training import precondition, private_checks
from anyrank.training.lora import LoraModel
from anyrank.training.optimizers import Optimizer


def train(
    model: LoraModel, client: str, download: Download, declared: int, examples: np.ndarray, plan: Plan, mechanism: Mechanism
) -> ClientUpdate:
    """The client's update after training on `examples` (indices `[n]` of the task's training set), under `mechanism`.

    It reports no losses, and only the number of examples that the plan declares.
    """
    clip_norm, parts = mechanism.plan.clip_norm, plan.config.accumulation_steps

    def clipped(sums: PerExample, draws: Draws, rate: float, turn: np.ndarray) -> list[Tensor]:
        drawn = turn & (draws.random(len(examples)) < rate)
        return sums.clipped(torch.from_numpy(examples[drawn]), clip_norm, parts)

    return descend(model, client, download, declared, plan, mechanism, len(examples), clipped)


def descend(
    model: LoraModel,
    client: str,
    download: Download,
    declared: int,
    plan: Plan,
    mechanism: Mechanism,
    units: int,
    clipped: Clipped,
) -> ClientUpdate:
    """The client's update after the plan's steps. `units`: how many examples, or persons, the client has; `clipped`: a step's
    sum over those that it draws of those whose turn it is (bool `[units]`), `[...]` for each parameter, in which each unit has
    at most the clip norm."""
    if download.train not in model.probed:
        raise ModelError(f"private training of {' and '.join(sorted(download.train))}: the model was not checked for that")
    privacy, draws = mechanism.plan, mechanism.draws(plan.round, client)
    parameters = model.load(download)
    start = [parameter.detach().clone() for parameter in parameters]
    sums = PerExample(model, parameters)
    inverses = precondition.of_download(download, plan.config, model.device)
    optimizer = Optimizer(parameters, plan.config, plan.learning_rate, inverses)
    rate, numbers = privacy.sampling_rate(declared), sum(parameter.numel() for parameter in parameters)
    noise = Gaussian(privacy.multiplier(declared), privacy.clip_norm, numbers)
    for turn, source in mechanism.steps(plan.round, client, declared, units, numbers, draws):
        for parameter, then, total in zip(parameters, start, clipped(sums, draws, rate, turn), strict=True):
            noisy = noise.added(total.cpu().numpy(), source) / privacy.batch_size
            parameter.grad = torch.from_numpy(noisy).to(parameter.dtype).to(parameter.device)  # rounded once
            if plan.config.proximal_mu:  # FedProx's term depends only on the weights, which are not secret
                parameter.grad.add_(parameter.detach() - then, alpha=plan.config.proximal_mu)
        mechanism.observe(parameters)
        optimizer.step()
    return ClientUpdate(model.read(download), declared, client)


class PerExample:
    """Per-example gradients of the trained parameters of the loaded `model`: `parameters` in the order of `load`."""

    def __init__(self, model: LoraModel, parameters: Sequence[nn.Parameter]) -> None:
        self.model, self.parameters = model, list(parameters)
        self.terms = {name: model.terms(name) for name in model.targets}

    def clipped(self, index: Tensor, clip_norm: float, parts: int = 1) -> list[Tensor]:
        """The sum over the examples `index` `[b]` of their gradients, each scaled down to `clip_norm` over all tensors.

        In float64, so that rounding, which depends on the other examples, adds nothing to what one example changes.

        The examples go through the model in `parts` parts. A gradient that is not finite counts as zero, so that its example
        does not change the sum by more than any other.
        """
        totals = [wide(torch.zeros_like(parameter)) for parameter in self.parameters]
        for part in index.split(-(-len(index) // parts)) if len(index) else ():
            for total, own in zip(totals, clipped_sum(self.each(part), clip_norm), strict=True):
                total.add_(own)
        return totals

    def each(self, index: Tensor) -> list[Tensor]:
        """`gradients`, of an example that the module cannot take zero, so that neither the failure of a batch nor that of the
        client says that it is there: after a failed batch, each of its examples is tried alone."""
        try:
            return self.gradients(index)
        except Exception:
            if len(index) == 1:
                return [torch.zeros_like(parameter)[None] for parameter in self.parameters]
            alone = [self.each(one) for one in index.split(1)]
            return [torch.cat(found) for found in zip(*alone, strict=True)]

    def gradients(self, index: Tensor, examples: Examples | None = None) -> list[Tensor]:
        """The gradient of each example's own loss, `[b, ...]` for each parameter; `examples`: instead of the training set."""
        copies = {id(p): p.detach().expand(len(index), *p.shape).contiguous().requires_grad_() for p in self.parameters}
        for name, ((A, B, scaling), *rest) in self.terms.items():
            self.model.set_stack(name, [(copies.get(id(A), A), copies.get(id(B), B), scaling), *rest])
        for name, parameter in self.model.trained.items():
            self.model.set_stacked_tensor(name, copies[id(parameter)])
        try:
            losses = _losses(self.model, index, examples)
            return list(torch.autograd.grad(losses.sum(), list(copies.values()), materialize_grads=True))
        finally:
            for name, terms in self.terms.items():
                self.model.set_stack(name, terms)
            self.model.leave_stack()


Clipped = Callable[[PerExample, Draws, float, np.ndarray], list[Tensor]]


def clipped_sum(gradients: Sequence[Tensor], clip_norm: float) -> list[Tensor]:
    """The sum of gradients `[b, ...]`, each scaled down to `clip_norm` over all tensors, in float64."""
    squares = sum(torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64) ** 2 for gradient in gradients)
    finite = torch.isfinite(squares)
    if not finite.all():
        gradients = [torch.where(finite.view(-1, *(1,) * (g.ndim - 1)), g, 0.0) for g in gradients]
    scales = clip_norm / squares.sqrt().clamp_min(clip_norm)
    scales = torch.where(finite, scales, 0.0)
    return [_weighted_sum(scales, gradient) for gradient in gradients]


_NUMBERS = 1 << 18  # of gradients that are held in float64 at a time


def wide(tensor: Tensor) -> Tensor:
    """In float64, on a device that has it."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _weighted_sum(weights: Tensor, each: Tensor) -> Tensor:
    """`sum_i weights[i] each[i]` of `each` `[b, ...]`, computed in float64, a part of the numbers at a time."""
    columns, weights = each.flatten(1), wide(weights)
    parts = columns.split(max(1, _NUMBERS // max(1, len(columns))), dim=1)
    return torch.cat([weights @ wide(part) for part in parts]).view(each.shape[1:])


def _losses(model: LoraModel, index: Tensor, examples: Examples | None = None) -> Tensor:
    """The loss `[b]` of each of the examples `index`."""
    examples = examples or model.task.train
    return model.task.objective.losses(model.module(**examples.inputs.batch(index, equal_lengths=True)), examples.labels[index])


# --- nothing may bypass the clipping ----------------------------------------------------------------------------------

_PROBED, _PROBE_RANK = 3, 2  # examples, and the rank of a random adapter
_TOLERANCE = 1e-3  # share of an example's gradient: float32's rounding stays below it


def trained_by(method_trains: frozenset[str]) -> tuple[frozenset[str], ...]:
    """The sets of factors that a method trains, from what it says of itself: one that trains a single factor may take turns."""
    return (BOTH,) if method_trains == BOTH else (frozenset("A"), frozenset("B"))


def check(model: LoraModel, trains: Iterable[frozenset[str]]) -> None:
    """Raise `ModelError`, with the name of the layer, if the clipping of `model`'s per-example gradients could be bypassed.

    First the module's parts are checked. Then held-out examples, of different lengths where they have lengths, are passed
    through with random factors, once for each set of factors in `trains`: each example's gradient in a batch must equal its
    gradient alone, computed in the ordinary way, and nothing may be computed in narrow numbers or written by the forward pass.
    """
    _check_parts(model)
    private_checks.check_numbers(model.module)
    draw = keys.generator(0, "privacy probe")
    start = model.start(_PROBE_RANK, Scaling(1.0, "constant"), seed=0)
    layers = {
        name: layer.with_factors(
            *(torch.randn(f.shape, generator=draw).to(f) / math.sqrt(f.shape[1]) for f in (layer.A, layer.B))
        )
        for name, layer in start.layers.items()
    }
    slices = {name: tuple(range(_PROBE_RANK)) for name in layers}
    for train in trains:
        _probe(model, Download(replace(start, layers=layers), slices, train))
        model.probed.add(train)


def _probe(model: LoraModel, download: Download) -> None:
    """Compare gradients of examples in a batch with those of each example alone."""
    parameters, names = model.load(download), _names(model, download.train)
    index = _probed(model.task.test)
    try:
        with private_checks.watched(model.module):
            together = PerExample(model, parameters).gradients(index, model.task.test)
    except RuntimeError as error:  # shapes that only fit one example at a time
        trained = " and ".join(sorted(download.train))
        raise ModelError(
            f"{names[0]}: with {trained} trained, gradients of single examples cannot be computed ({in_a_line(error)}); choose "
            "other lora.target_modules, or another method"
        ) from None
    for place in range(len(index)):
        loss = _losses(model, index[place : place + 1], model.task.test).sum()
        alone = torch.autograd.grad(loss, parameters, materialize_grads=True)
        scale = max(float(gradient.norm()) for gradient in alone)
        for name, expected, found in zip(names, alone, together, strict=True):
            if not float((found[place] - expected).norm()) <= _TOLERANCE * scale:
                raise ModelError(
                    f"{name}: its gradient for one example depends on the batch, or it is used past its own module, so that "
                    "clipping would not bound what one example does; choose other lora.target_modules or model.head"
                )


def _probed(examples: Examples) -> Tensor:
    """Which examples are passed through, `[b]`: the first ones, and the longest and the shortest where they have lengths."""
    inputs: Any = examples.inputs
    while hasattr(inputs, "inputs"):  # of a part, or on a device
        inputs = inputs.inputs
    lengths = getattr(inputs, "lengths", None)
    first = list(range(min(_PROBED, len(examples))))
    if isinstance(lengths, Tensor) and len(lengths) == len(examples):
        first += [int(lengths.argmax()), int(lengths.argmin())]
    return torch.tensor(list(dict.fromkeys(first)))


def _names(model: LoraModel, train: frozenset[str]) -> list[str]:
    """The parameters that `model.load` trains, in its order."""
    factors = [f"layer {name}, {factor}" for name in model.targets for factor in "AB" if factor in train]
    return factors + [f"parameter {name}" for name in model.trained]


def _check_parts(model: LoraModel) -> None:
    for name, part in model.module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
            raise ModelError(
                f"layer {name}: {type(part).__name__} by the batch's own statistics mixes examples, so that clipping would not "
                "bound what one example does; choose a model with LayerNorm or GroupNorm"
            )
    uses: dict[int, list[str]] = {}
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    for name, parameter in model.trained.items():
        if len(uses[id(parameter)]) > 1:
            both = " and ".join(uses[id(parameter)])
            raise ModelError(f"parameter {name}: is tied ({both}), so that clipping would miss a part of it; freeze model.head")
        owner = name.rpartition(".")[0]
        kind = type(model.module.get_submodule(owner))
        if kind is not nn.Linear or owner in model.targets:
            raise ModelError(
                f"parameter {name}: private training covers plain parameters of Linear modules without LoRA, this one is of "
                f"{kind.__name__}; freeze model.head"
            )
    for name, target in model.targets.items():
        if target.kind == "embedding" and target.module.scale_grad_by_freq:
            raise ModelError(
                f"layer {name}: scale_grad_by_freq makes gradients depend on the batch; choose other target_modules"
            )
