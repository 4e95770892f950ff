"""SGD and AdamW as torch computes them, without torch's optimizer classes.

`torch.optim` loads the compiler stack when its first optimizer is made, more than a second in every process, and a client's
optimizer lives for a few steps only. Its functional forms do the same arithmetic in one fused call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from anyrank.config.sections import TrainConfig
from anyrank.training.precondition import Inverse

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch's defaults


class Optimizer:
    """A fresh optimizer of `config.optimizer` over `parameters`, at a fixed learning rate.

    `inverses`: the preconditioners of the first parameters, in their order; the gradients of the others are taken as they are.
    """

    def __init__(
        self, parameters: Sequence[Tensor], config: TrainConfig, learning_rate: float, inverses: Sequence[Inverse] = ()
    ) -> None:
        self.inverses = inverses
        self.parameters, self.config, self.learning_rate = list(parameters), config, learning_rate
        self.fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
        self.steps = [torch.zeros((), device=parameter.device if self.fused else "cpu") for parameter in parameters]
        if config.optimizer == "adamw":
            self.memory = [[torch.zeros_like(parameter) for parameter in parameters] for _ in range(2)]
        else:
            self.memory = [[None] * len(self.parameters)]  # momentum starts as the first gradient

    @torch.no_grad()
    def step(self) -> None:
        """One update by the parameters' gradients, which are then cleared."""
        for parameter, inverse in zip(self.parameters, self.inverses, strict=False):
            parameter.grad = inverse(parameter.grad)
        gradients = [parameter.grad for parameter in self.parameters]
        common = {"lr": self.learning_rate, "weight_decay": self.config.weight_decay, "maximize": False, "fused": self.fused}
        if self.config.optimizer == "adamw":
            first, second = self.memory
            beta1, beta2 = _BETAS
            adamw(
                self.parameters, gradients, first, second, [], self.steps,
                amsgrad=False, beta1=beta1, beta2=beta2, eps=_EPS, **common,
            )  # fmt: skip
        else:
            sgd(self.parameters, gradients, *self.memory, momentum=self.config.momentum, dampening=0, nesterov=False, **common)
        for parameter in self.parameters:
            parameter.grad = None

    def select(self, parameters: Sequence[Tensor], index: Tensor) -> Optimizer:
        """The optimizer of `parameters`, the rows `index` of the old ones, with their moments."""
        inverses = [inverse.select(index) for inverse in self.inverses]
        chosen = Optimizer(parameters, self.config, self.learning_rate, inverses)
        chosen.steps = self.steps
        chosen.memory = [[None if kept is None else kept[index] for kept in memory] for memory in self.memory]
        return chosen
