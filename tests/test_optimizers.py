"""The optimizers are torch's, step by step."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from anyrank.config.sections import TrainConfig
from anyrank.training.optimizers import Optimizer

CASES = {
    "adamw": ({"optimizer": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    "sgd": ({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p, lr=0.01)),
    "momentum": (
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    ),
}


def parameters() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=draw).requires_grad_(), torch.randn(3, 2, 5, generator=draw).requires_grad_()]


def gradients(step: int, of: list[torch.Tensor]) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for parameter in of:
        parameter.grad = torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("case", CASES)
def test_five_steps_are_those_of_torch(case: str) -> None:
    options, make = CASES[case]
    ours, theirs = parameters(), parameters()
    optimizer, reference = Optimizer(ours, TrainConfig(**options), 0.01), make(theirs)
    for step in range(5):
        gradients(step, ours)
        gradients(step, theirs)
        optimizer.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert one.grad is None


@pytest.mark.parametrize("case", CASES)
def test_rows_that_are_selected_go_on_as_if_nothing_had_happened(case: str) -> None:
    options, _ = CASES[case]
    whole, cut = parameters(), parameters()
    one, other = (Optimizer(p, TrainConfig(**options), 0.01) for p in (whole, cut))
    keep = torch.tensor([0, 2])
    for step in range(4):
        gradients(step, whole)
        if step == 2:
            cut = [parameter.detach()[keep].requires_grad_() for parameter in cut]
            other = other.select(cut, keep)
        for parameter, full in zip(cut, whole, strict=True):
            parameter.grad = (full.grad[keep] if step >= 2 else full.grad).clone()
        one.step()
        other.step()
    for parameter, full in zip(cut, whole, strict=True):
        torch.testing.assert_close(parameter, full[keep], rtol=1e-6, atol=1e-7)


def test_no_compiler_is_loaded() -> None:
    program = (
        "import sys, torch; from anyrank.training.optimizers import Optimizer; from anyrank.config import TrainConfig\n"
        "p = torch.ones(2, requires_grad=True); p.grad = torch.ones(2); Optimizer([p], TrainConfig(), 0.1).step()\n"
        "assert float(p[0]) < 1; print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
