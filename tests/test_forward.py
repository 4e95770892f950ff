"""Forward passes with LoRA on them against plain maps whose weight is written out, client by client."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from anyrank.tasks.base import Examples, Task, TensorInputs
from anyrank.training import forward
from anyrank.training.lora import LoraModel

CLIENTS, EACH, TOKENS, WIDTH, OUT, RANK = 3, 2, 5, 6, 4, 2
MODULES = {
    "linear": lambda: nn.Linear(WIDTH, OUT),
    "linear without bias": lambda: nn.Linear(WIDTH, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, WIDTH),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frozen(module: nn.Module) -> nn.Module:
    return module.double().requires_grad_(False)


def term(own_a: bool = True, own_b: bool = True, rank: int = RANK, seed: int = 1) -> forward.Term:
    """Random factors, each client's own or all the same, with a scaling for each client."""
    A = random(*((CLIENTS,) if own_a else ()), rank, WIDTH, seed=seed)
    B = random(*((CLIENTS,) if own_b else ()), OUT, rank, seed=seed + 1)
    return A, B, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(-1, 1, 1) if own_b else 0.5


def one(factor: Tensor, client: int) -> Tensor:
    return factor[client] if factor.ndim == 3 else factor


def weight_of(module: nn.Module) -> Tensor:
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def by_definition(module: nn.Module, x: Tensor, terms: list[forward.Term]) -> Tensor:
    """Each client's batch through `W + sum of s B A`, written out."""
    found = []
    for client, part in enumerate(x.chunk(CLIENTS)):
        weight = weight_of(module)
        for A, B, scaling in terms:
            scaling = scaling[client] if isinstance(scaling, Tensor) else scaling
            weight = weight + scaling * (one(B, client) @ one(A, client))
        found.append(part @ weight.T + (0 if module.bias is None else module.bias))
    return torch.cat(found)


def gradients(output: Tensor, of: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((output**2).sum(), of))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("own_a", "own_b"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(CLIENTS * EACH, WIDTH), (CLIENTS * EACH, TOKENS, WIDTH)])
def test_each_client_goes_through_its_own_factors(kind: str, own_a: bool, own_b: bool, shape: tuple[int, ...]) -> None:
    module, x = frozen(MODULES[kind]()), random(*shape).requires_grad_()
    terms = [term(own_a, own_b), term(seed=7)]
    factors = [x, *(factor.requires_grad_() for A, B, _ in terms for factor in (A, B))]
    expected = by_definition(module, x, terms)
    with forward.replaced(module, forward.adapted(module, "linear", terms, {})):
        found = module(x)
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, factors), gradients(expected, factors), strict=True):
        torch.testing.assert_close(one, other)


CONVOLUTIONS = {
    "as it is": {},
    "strided, padded, dilated": {"stride": 2, "padding": 2, "dilation": 2},
    "without bias": {"bias": False, "padding": 1},
}


def convolution(channels: tuple[int, int] = (3, 4), **options) -> nn.Conv2d:
    return frozen(nn.Conv2d(*channels, kernel_size=(3, 2), **options))


def kernel_term(module: nn.Conv2d, own_a: bool, own_b: bool, rank: int = RANK, seed: int = 1) -> forward.Term:
    out, width = module.weight.flatten(1).shape
    A = random(*((CLIENTS,) if own_a else ()), rank, width, seed=seed)
    B = random(*((CLIENTS,) if own_b else ()), out, rank, seed=seed + 1)
    return A, B, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(-1, 1, 1) if own_b else 0.5


def convolved_by_definition(module: nn.Conv2d, x: Tensor, terms: list[forward.Term]) -> Tensor:
    """Each client's batch by the module's kernel, and by those of A and then B, one convolution after another."""
    found = []
    for client, part in enumerate(x.chunk(CLIENTS)):
        total = module._conv_forward(part, module.weight, module.bias)
        for A, B, scaling in terms:
            low = module._conv_forward(part, one(A, client).unflatten(1, module.weight.shape[1:]), None)
            scaling = scaling[client] if isinstance(scaling, Tensor) else scaling
            total = total + scaling * nn.functional.conv2d(low, one(B, client)[:, :, None, None])
        found.append(total)
    return torch.cat(found)


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize(("own_a", "own_b"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("side", [3, 9])  # a kernel with all in it has 72 numbers, and the least input 27 a client's example
def test_each_client_goes_through_its_own_kernels(options: dict, own_a: bool, own_b: bool, side: int) -> None:
    module = convolution(**options | ({"padding": 2} if side == 3 else {}))
    x = random(CLIENTS * EACH, 3, side, side).requires_grad_()
    terms = [kernel_term(module, own_a, own_b), kernel_term(module, own_a, own_b, seed=7)]
    factors = [x, *(factor.requires_grad_() for A, B, _ in terms for factor in (A, B))]
    expected = convolved_by_definition(module, x, terms)
    with forward.replaced(module, forward.adapted(module, "conv2d", terms, {})):
        found = module(x)
    torch.testing.assert_close(found, expected)
    for own, other in zip(gradients(found, factors), gradients(expected, factors), strict=True):
        torch.testing.assert_close(own, other)


def convolutions_run(module: nn.Conv2d, x: Tensor, terms: list[forward.Term]) -> int:
    """How often `aten::convolution` runs in a forward pass."""
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        forward.replaced(module, forward.adapted(module, "conv2d", terms, {})),
    ):
        module(x)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::convolution")


def test_factors_are_written_into_a_kernel_where_it_is_smaller_than_the_input() -> None:
    small, large = convolution(), convolution((64, 64))
    assert convolutions_run(small, random(EACH, 3, 9, 9), [kernel_term(small, False, False)]) == 1
    assert convolutions_run(large, random(EACH, 64, 4, 4), [kernel_term(large, False, False)]) == 3


def test_factors_are_not_rounded_to_a_narrower_kernel() -> None:
    """A thousandth of a kernel's numbers is below bfloat16's rounding of them; where they cancel, it is all there is."""
    module = nn.Conv2d(2, 1, 1, bias=False).bfloat16().requires_grad_(False)
    module.weight.fill_(1.0)
    x = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8).bfloat16()
    change = (torch.tensor([[1e-3, 0.0]]), torch.ones(1, 1), 1.0)
    with forward.replaced(module, forward.adapted(module, "conv2d", [change], {})):
        torch.testing.assert_close(module(x).float(), torch.full((1, 1, 8, 8), 1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("parts", [("weight", "bias"), ("weight",), ("bias",)])
def test_own_weights_and_biases_stand_in_the_place_of_the_modules(parts: tuple[str, ...]) -> None:
    module, x = frozen(nn.Linear(WIDTH, OUT)), random(CLIENTS * EACH, TOKENS, WIDTH)
    values = {"weight": random(CLIENTS, OUT, WIDTH, seed=3), "bias": random(CLIENTS, OUT, seed=4)}
    own = {part: values[part] for part in parts}
    found = forward.adapted(module, "linear", [term()], own)(x)
    for client, part in enumerate(x.chunk(CLIENTS)):
        alone = frozen(nn.Linear(WIDTH, OUT))
        for name in ("weight", "bias"):
            getattr(alone, name).copy_(own[name][client] if name in own else getattr(module, name))
        A, B, scaling = (value[client] for value in term())
        torch.testing.assert_close(found.chunk(CLIENTS)[client], alone(part) + part @ A.T @ B.T * scaling)


@pytest.mark.parametrize("kind", MODULES)
def test_terms_that_are_written_into_the_weight_act_as_they_did(kind: str) -> None:
    module, x = frozen(MODULES[kind]()), random(CLIENTS * EACH, WIDTH)
    trained, in_base = term(), [term(seed=7), term(False, False, seed=9)]
    weight = forward.written_out(module, in_base)
    assert weight.shape == (CLIENTS, OUT, WIDTH)
    found = forward.adapted(module, "linear", [trained], {"weight": weight})(x)
    torch.testing.assert_close(found, by_definition(module, x, [trained, *in_base]))


def test_only_sums_that_are_as_large_as_the_weight_are_written_out() -> None:
    """[40, 60] is 2,400 numbers; factors of rank r have 100 r for each client, and twice as many may be written."""
    module = frozen(nn.Linear(60, 40))

    def factors(rank: int, clients: int = 0) -> forward.Term:
        lead = (clients,) if clients else ()
        return random(*lead, rank, 60), random(*lead, 40, rank), 1.0

    assert forward.written_out(module, [factors(11)]) is None
    assert forward.written_out(module, [factors(12)]).shape == (40, 60)
    assert forward.written_out(module, [factors(11, clients=5)]) is None
    assert forward.written_out(module, [factors(12, clients=5)]).shape == (5, 40, 60)
    single = tuple(factor.float() for factor in factors(12)[:2])
    assert forward.written_out(module, [(*single, 1.0)]) is None  # the weight is of another dtype


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def lora_model(module: nn.Module) -> LoraModel:
    examples = Examples(TensorInputs(torch.zeros(1, WIDTH)), torch.zeros(1, dtype=torch.long))
    return LoraModel(Task(module=nn.Sequential(module), targets=("0",), train=examples, test=examples))


@pytest.mark.parametrize(("kind", "factor"), [(nn.Linear, 1), (Doubled, 2)])
def test_a_forward_of_somebody_elses_is_run_as_it_is(kind: type, factor: int) -> None:
    """`Doubled` is no plain map: what nobody trains cannot be written into its weight, and its own forward is called."""
    module, x = frozen(kind(WIDTH, OUT)), random(CLIENTS * EACH, WIDTH)
    plain, trained, in_base = nn.functional.linear(x, module.weight, module.bias), term(), term(seed=7)
    model = lora_model(module)
    model.set_stack("0", [trained], [in_base])
    zero = frozen(nn.Linear(WIDTH, OUT))
    zero.weight.zero_()
    zero.bias.zero_()
    torch.testing.assert_close(model.module(x), factor * plain + by_definition(zero, x, [trained, in_base]))
    assert len(model.terms("0")) == factor  # of the plain map, the trained factors alone
    model.close()
    torch.testing.assert_close(model.module(x), factor * plain)


def test_a_pass_costs_its_products_and_no_more() -> None:
    """n rows: 2 n out in for the map, 2 n r (out + in) for the factors, and nothing for what is in the base."""
    model, x = lora_model(frozen(nn.Linear(WIDTH, OUT))), random(CLIENTS * EACH, TOKENS, WIDTH)
    rows = CLIENTS * EACH * TOKENS
    for in_base in ([], [term(seed=7)]):
        model.leave_stack()
        model.set_stack("0", [term()], in_base)
        with FlopCounterMode(display=False) as counter:
            model.module(x)
        assert counter.get_total_flops() == 2 * rows * (WIDTH * OUT + RANK * (WIDTH + OUT))


def test_a_module_gets_its_own_forward_back() -> None:
    module = nn.Linear(2, 2)
    first, second = (lambda x: x + 1), (lambda x: x + 2)
    with forward.replaced(module, first):
        with forward.replaced(module, second):
            assert module(torch.zeros(1)) == 2
        assert module(torch.zeros(1)) == 1
    assert "forward" not in vars(module)
