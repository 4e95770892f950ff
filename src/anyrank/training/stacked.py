"""Many clients at once: their factors stacked `[clients, rank, in]`, one forward pass of the shared base over all batches.

The base is frozen and is the only part that clients share, so the gradient of the summed losses gives each client its own
gradient. Factors are padded with zeros to the stack's largest rank; the gradients of these zeros are zero, so SGD and Adam
leave them at zero. The sums that clients add to the base for the round form a second, frozen stack (no stack if all clients
have the same sum); if a weight is not much larger than its factors, the sum is added to the weight. Plain tensors (heads) are
stacked `[clients, ...]`. Results equal one-by-one training up to float rounding. Stacking removes the overhead of many small
steps, not arithmetic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Code, Failure, Job
from anyrank.training import local, precondition
from anyrank.training.forward import Term
from anyrank.training.lora import LoraModel
from anyrank.training.optimizers import Optimizer

MOST_EXAMPLES = 2048  # in one stacked batch: memory grows with it, and more than this is not faster


def train(
    model: LoraModel, jobs: Sequence[Job], examples: Sequence[np.ndarray], plan: Plan
) -> Iterator[ClientUpdate | Failure]:
    """Train the jobs' clients together, in stacks of at most `MOST_EXAMPLES`; `examples[i]` are job i's indices."""
    size = max(1, MOST_EXAMPLES // plan.config.batch_size)
    for start in range(0, len(jobs), size):
        yield from _Stack(model, jobs[start : start + size], examples[start : start + size], plan).train()


class _Stack:
    """One stack of clients while it trains. Clients leave it with their results when they have done their steps."""

    def __init__(self, model: LoraModel, jobs: Sequence[Job], examples: Sequence[np.ndarray], plan: Plan) -> None:
        self.model, self.jobs, self.examples, self.plan = model, jobs, examples, plan
        self.batches = [local.batches(len(own), plan, job.client.name) for job, own in zip(jobs, examples, strict=True)]
        self.active = list(range(len(jobs)))
        started = [_on(model.device, job.download.adapter) for job in jobs]
        self.layers = {name: _stacked([adapter.layers[name] for adapter in started]) for name in sorted(started[0].layers)}
        self.tensors = {name: torch.stack([adapter.tensors[name] for adapter in started]) for name in model.trained}
        self.common, self.frozen = _into_base(_merged(model.device, jobs))
        self.trained = self._trained()
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        pulled = self.trained if plan.config.proximal_mu else {}
        self.start = {key: parameter.detach().clone() for key, parameter in pulled.items()}
        self.optimizer = Optimizer(list(self.trained.values()), plan.config, plan.learning_rate, self._inverses())
        self.losses: list[list[float]] = [[] for _ in jobs]
        self.seconds = [0.0] * len(jobs)

    def _trained(self) -> dict[tuple[str, ...], Tensor]:
        kinds = sorted(self.jobs[0].download.train)
        factors = {(name, kind): layer[kind] for name, layer in self.layers.items() for kind in kinds}
        return factors | {(name,): values for name, values in self.tensors.items()}

    def _inverses(self) -> list[precondition.Inverse]:
        """The preconditioners of the layers, in the order of `_trained`, if the plan asks for them."""
        layers, train = self.layers.values(), self.jobs[0].download.train
        wanted = self.plan.config.precondition
        return [precondition.inverse(layer["A"], layer["B"], layer["s"], train) for layer in layers] if wanted else []

    def train(self) -> Iterator[ClientUpdate | Failure]:
        step = 0
        while self.active:
            self._place()
            step, left = self._advance(step)
            yield from (self._reply(client, place) for place, client in enumerate(self.active) if place not in left)
            self._keep(left)

    def _place(self) -> None:
        """Put the stack into the module. Steps then change it in place."""
        self.model.leave_stack()
        for name, layer in self.layers.items():
            self.model.set_stack(name, [_term(layer)], self._in_base(name))
        for name, values in self.tensors.items():
            self.model.set_stacked_tensor(name, values)

    def _advance(self, step: int) -> tuple[int, list[int]]:
        """Train from `step` on until a client is done; returns the number of steps and the places of the remaining clients."""
        left = list(range(len(self.active)))
        while len(left) == len(self.active):
            began = time.perf_counter()
            losses = self._step(step)
            step += 1
            share = (time.perf_counter() - began) / len(self.active)  # each client gets an equal part of a step's time
            for client, loss in zip(self.active, losses, strict=True):
                self.losses[client].append(loss)
                self.seconds[client] += share
            left = [place for place, client in enumerate(self.active) if not self._ends(client, step)]
        return step, left

    def _step(self, step: int) -> list[float]:
        """One local step of every active client; returns their losses."""
        (index, weights), task = self._batch(step), self.model.task
        logits = self.model.module(**task.train.inputs.batch(index, equal_lengths=True))
        losses = (task.objective.losses(logits, task.train.labels[index]).view(weights.shape) * weights).sum(dim=1)
        losses.sum().backward()
        for key, start in self.start.items():  # FedProx: the gradient of mu / 2 * |w - w_global|^2
            parameter = self.trained[key]
            parameter.grad.add_(parameter.detach() - start, alpha=self.plan.config.proximal_mu)
        self.optimizer.step()
        return losses.tolist()

    def _in_base(self, name: str) -> list[Term]:
        """The clients' terms in the base of a layer: one per client, or the same for all."""
        own = [_term(self.frozen[name])] if name in self.frozen else []
        same = [self.common.layers[name]] if self.common and name in self.common.layers else []
        return own + [(layer.A, layer.B, layer.scaling) for layer in same]

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Indices of the examples `[clients * b]` and their weights in their client's mean loss `[clients, b]`.

        A shorter batch is padded with its own examples at weight zero.
        """
        chosen = [self.examples[client][self.batches[client][step]] for client in self.active]
        longest = max(len(own) for own in chosen)
        index = np.concatenate([_repeated(own, longest) for own in chosen])
        lengths = torch.tensor([[len(own)] for own in chosen])
        weights = (torch.arange(longest) < lengths) / lengths
        return torch.from_numpy(index), weights.to(self.model.device)

    def _ends(self, client: int, step: int) -> bool:
        return step == len(self.batches[client]) or not math.isfinite(self.losses[client][-1])

    @torch.no_grad()
    def _reply(self, client: int, place: int) -> ClientUpdate | Failure:
        job, losses = self.jobs[client], self.losses[client]
        if not math.isfinite(losses[-1]):
            return Failure(job.client.name, Code.DIVERGED, local.diverged(losses[-1], len(losses)))
        layers = {}
        for name, layer in job.download.adapter.layers.items():
            A, B = self.layers[name]["A"][place, : layer.rank], self.layers[name]["B"][place, :, : layer.rank]
            layers[name] = layer.with_factors(A.to("cpu", copy=True), B.to("cpu", copy=True))
        tensors = {name: values[place].to("cpu", copy=True) for name, values in self.tensors.items()}
        metrics = {"loss": sum(losses) / len(losses), "steps": len(losses), "seconds": self.seconds[client]}
        adapter = Adapter(layers, tensors, job.download.adapter.config)
        return ClientUpdate(adapter, len(self.examples[client]), job.client.name, metrics)

    def _keep(self, places: list[int]) -> None:
        """Continue with only the clients at `places`, and their optimizer state."""
        self.active = [self.active[place] for place in places]
        if not places:
            return
        index = torch.tensor(places)
        for stack in (*self.layers.values(), *self.frozen.values(), self.tensors):
            stack |= {name: _select(values, index) for name, values in stack.items()}
        self.trained = self._trained()
        self.start = {key: start[index] for key, start in self.start.items()}
        self.optimizer = self.optimizer.select(list(self.trained.values()), index)


def _repeated(batch: np.ndarray, length: int) -> np.ndarray:
    """A batch repeated up to `length`."""
    return batch if len(batch) == length else np.resize(batch, length)


def _select(factor: Tensor, index: Tensor) -> Tensor:
    """The rows `index` of what is stacked, as a leaf of its own."""
    return factor.detach()[index].requires_grad_(factor.requires_grad)


def _on(device: torch.device, adapter: Adapter) -> Adapter:
    """The adapter on `device`; the same object if it is there already."""
    if device.type == "cpu":
        return adapter
    layers = {name: layer.with_factors(layer.A.to(device), layer.B.to(device)) for name, layer in adapter.layers.items()}
    return replace(adapter, layers=layers, tensors={name: value.to(device) for name, value in adapter.tensors.items()})


def _merged(device: torch.device, jobs: Sequence[Job]) -> list[Adapter | None]:
    """The sums that the jobs' clients add to the base; a sum that all clients share stays one object."""
    sums = [job.download.merged for job in jobs]
    moved = {id(each): _on(device, each) for each in sums if each}
    return [moved[id(each)] if each else None for each in sums]


def _stacked(layers: Sequence[LoraLayer | None]) -> dict[str, Tensor]:
    """A layer's factors, padded with zeros: A `[clients, R, in]`, B `[clients, out, R]`; scalings `s` `[clients, 1, 1]`.

    All zeros for a client that has none.
    """
    held = {place: layer for place, layer in enumerate(layers) if layer}
    rank, like = max(layer.rank for layer in held.values()), next(iter(held.values()))
    A = like.A.new_zeros(len(layers), rank, like.A.shape[1])
    B = like.B.new_zeros(len(layers), like.B.shape[0], rank)
    scalings = like.A.new_ones(len(layers), 1, 1)
    for place, layer in held.items():
        A[place, : layer.rank], B[place, :, : layer.rank], scalings[place] = layer.A, layer.B, layer.scaling
    return {"A": A, "B": B, "s": scalings}


def _term(stack: dict[str, Tensor]) -> Term:
    return stack["A"], stack["B"], stack["s"]


def _into_base(sums: Sequence[Adapter | None]) -> tuple[Adapter | None, dict[str, dict[str, Tensor]]]:
    """The clients' sums in the base model: one sum for all (FLoRA's download, one object), or one per client, stacked."""
    if all(each is sums[0] for each in sums):
        return sums[0], {}
    names = {name for each in sums if each for name in each.layers}
    return None, {name: _stacked([each.layers.get(name) if each else None for each in sums]) for name in sorted(names)}


# Parameters of the frozen part that is run at every step. Measured on one CPU core, stacked against one by one: 2.7 to 5.3
# times faster at 9 thousand (digits MLP, 5 to 20 clients), 2.4 to 2.8 at 40 thousand (digits transformer, 10 to 20), 2.0 to
# 2.3 at 180 thousand (a map above embeddings, 5 to 20), 0.7 at 1.8 million (one MiniLM layer, 5): there the arithmetic is all
# that counts, and padding adds to it. With trained heads or sums in the base: 1.9 to 4.7 times on the digits MLP, 1.5 to
# 2.5 on the map.
STACK_BELOW = 500_000


def worthwhile(model: LoraModel) -> bool:
    """Whether stacking makes a round faster: by the model's size only, so that a run's bytes do not depend on timing."""
    parameters = list(model.module.parameters())
    return parameters[0].device.type != "cpu" or sum(parameter.numel() for parameter in parameters) < STACK_BELOW


def possible(model: LoraModel, jobs: Sequence[Job]) -> bool:
    """Whether the jobs can be stacked: the model allows it, all downloads train the same parts, and there is no pruning."""
    alike = len({job.download.train for job in jobs}) == 1 and all(job.download.pruning is None for job in jobs)
    return model.can_stack() and alike and len(jobs) > 1
