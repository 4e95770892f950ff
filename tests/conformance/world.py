"""Small federations in which properties are tested: two layers of unlike shapes, a head, clients of equal or unequal rank.

States are reached as a run reaches them: init, dispatch, move only what the download trains, aggregate. Properties are then
tested on the round after: arbitrary tensors make true properties look false, and a first round (B zero) hides false ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from anyrank import keys
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import Client, ClientUpdate, Download, Scaling, ServerState
from anyrank.methods import REGISTRY, Method, make

SEED = 7
COUNTS = (3, 1, 4, 2, 5)
CONV, FC = "body.conv", "body.fc"
SHAPES = {CONV: (9, 3 * 2 * 3), FC: (11, 9)}  # [out, in]; the convolution has 3 channels and a kernel of 2 x 3
HEAD = {"head.weight": (4, 11), "head.bias": (4,)}


@dataclass(frozen=True)
class World:
    """Clients of these `ranks` under a scaling `rule`; the last two have a lower rank in the convolution where ranks differ."""

    ranks: tuple[int, ...]
    rule: str = "standard"
    dtype: torch.dtype = torch.float64

    def clients(self) -> list[Client]:
        found = [Client(f"client-{i}", rank) for i, rank in enumerate(self.ranks)]
        if len(set(self.ranks)) > 1:
            found[-2:] = [replace(client, layer_ranks={CONV: client.rank - 1}) for client in found[-2:]]
        return found

    def scaling(self) -> Scaling:
        return Scaling(4.0, self.rule, {CONV: 3.0})

    def start(self) -> Adapter:
        """The server's adapter before round 1, at the largest rank of each layer: A random, B zero."""
        layers = {}
        for name, (out, width) in SHAPES.items():
            rank = max(client.rank_of(name) for client in self.clients())
            A = noise((rank, width), "start", name) / width**0.5
            scaling = self.scaling().of(name, rank)
            kind = {"kind": "conv2d", "kernel": (2, 3)} if name == CONV else {}
            layers[name] = LoraLayer(A.to(self.dtype), torch.zeros(out, rank, dtype=self.dtype), scaling, **kind)
        return Adapter(layers, {name: noise(shape, "start", name).to(self.dtype) for name, shape in HEAD.items()})


RULES = ("standard", "constant", "rslora")
EQUAL, MIXED = (4, 4, 4, 4), (2, 3, 5, 5, 8)
FULL = "all"
# Which clients are drawn: all of them, some, one small one, none of the largest rank, only the largest.
COHORTS = {
    EQUAL: {FULL: (0, 1, 2, 3), "two": (1, 3)},
    MIXED: {FULL: (0, 1, 2, 3, 4), "nobody of the top rank": (0, 1, 2), "one small": (0,), "only the top": (4,)},
}


@dataclass(frozen=True)
class Case:
    """A world, who of it is drawn for the round under test, and how many rounds of all its clients came before."""

    world: World
    cohort: str = FULL
    rounds: int = 1

    def drawn(self) -> list[Client]:
        clients = self.world.clients()
        return [clients[i] for i in COHORTS[self.world.ranks][self.cohort]]

    @property
    def reaches_every_slice(self) -> bool:
        """Whether each of the server's slices has an owner in the cohort."""
        return all(
            max(c.rank_of(name) for c in self.drawn()) == max(c.rank_of(name) for c in self.world.clients()) for name in SHAPES
        )

    def __str__(self) -> str:
        later = f", round {self.rounds + 1}" if self.rounds > 1 else ""
        return f"ranks {self.world.ranks}, scaling {self.world.rule}, cohort: {self.cohort}{later}"


def cases(ranks: tuple[int, ...], dtype: torch.dtype = torch.float64, rounds: Sequence[int] = (1,)) -> list[Case]:
    return [Case(World(ranks, rule, dtype), c, before) for rule in RULES for c in COHORTS[ranks] for before in rounds]


# Options under which a method shows in worlds this small what it does not claim: at its default of 0.99, FLoRIST would cut
# nothing off from four slices of like size. With tau = 0, staying put has one trait more (see tests/methods/test_stayput.py).
SHOWN_WITH = {"florist": {"energy": 0.8}, "stayput": {"tau": 0.5}}


def variants() -> list[Method]:
    """Every registered method under every combination of its options that name a choice."""
    found = []
    for name, kind in sorted(REGISTRY.items()):
        choices = {
            option: choice for option, hint in typing.get_type_hints(kind).items() if (choice := _choices(kind, option, hint))
        }
        chosen = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
        found += [make(name, SHOWN_WITH.get(name, {}) | options) for options in chosen]
    return found


def _choices(kind: type[Method], option: str, hint: typing.Any) -> tuple:
    if option not in {field.name for field in dataclasses.fields(kind)}:
        return ()
    return (True, False) if hint is bool else typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def label(method: Method) -> str:
    options = [str(getattr(method, field.name)) for field in dataclasses.fields(method)]
    return "-".join([method.name, *options])


VARIANTS = variants()
TAKE_MIXED = [method for method in VARIANTS if method.traits.mixed_ranks]


# --- rounds ----------------------------------------------------------------------------------------------------------


def noise(shape: Sequence[int], *names: str | int) -> Tensor:
    """Uniform in (-1, 1), float64, of a fixed key."""
    return torch.rand(*shape, generator=keys.generator(0, *names), dtype=torch.float64) * 2 - 1


def begin(method: Method, world: World) -> ServerState:
    return method.init(world.start(), world.scaling(), SEED)


def stay(download: Download, client: Client) -> ClientUpdate:
    """What a client returns that trained nothing."""
    return ClientUpdate(download.adapter, count(client), client.name)


def train(download: Download, client: Client, *names: str | int) -> ClientUpdate:
    """What a client returns that trained: only the factors that the download trains have moved, and the head."""
    layers = {}
    for name, layer in download.adapter.layers.items():
        factors = {"A": layer.A, "B": layer.B}
        for factor in sorted(download.train):
            moved = factors[factor] + 0.5 * noise(factors[factor].shape, factor, name, client.name, *names)
            factors[factor] = moved.to(layer.A.dtype)
        layers[name] = layer.with_factors(**factors)
    tensors = {
        name: (tensor + 0.5 * noise(tensor.shape, name, client.name, *names)).to(tensor.dtype)
        for name, tensor in download.adapter.tensors.items()
    }
    return ClientUpdate(replace(download.adapter, layers=layers, tensors=tensors), count(client), client.name)


def count(client: Client) -> int:
    return COUNTS[int(client.name.removeprefix("client-"))]


def updates_of(method: Method, state: ServerState, clients: Iterable[Client], *names: str | int) -> list[ClientUpdate]:
    return [train(method.dispatch(state, client), client, state.round, *names) for client in clients]


@functools.cache
def after_rounds(method: Method, world: World, rounds: int) -> ServerState:
    """The state after so many real rounds of all clients."""
    if rounds == 0:
        return begin(method, world)
    state = after_rounds(method, world, rounds - 1)
    return method.aggregate(state, updates_of(method, state, world.clients()))


def after_one_round(method: Method, world: World) -> ServerState:
    return after_rounds(method, world, 1)


def turns(method: Method) -> tuple[int, ...]:
    """After how many rounds to look at a method: after one, and after two if it then trains something else (RoLoRA)."""
    one, two = (method.dispatch(after_rounds(method, World(EQUAL), n), World(EQUAL).clients()[0]).train for n in (1, 2))
    return (1,) if one == two else (1, 2)


# --- what is looked at -----------------------------------------------------------------------------------------------


def change(layer: LoraLayer) -> np.ndarray:
    """`scaling * B @ A` in float64, written plainly."""
    return layer.scaling * (layer.B.double().numpy() @ layer.A.double().numpy())


def changes(adapter: Adapter, merged: Adapter | None = None) -> dict[str, np.ndarray]:
    """The change of each weight that a model with this adapter applies, on a base into which `merged` went."""
    found = {name: change(layer) for name, layer in adapter.layers.items()}
    for name, layer in merged.layers.items() if merged else ():
        found[name] = found[name] + change(layer)
    return found


def running(method: Method, state: ServerState, world: World) -> dict[str, Adapter]:
    """The adapters that the federation's users run: the global one, or each client's own where the method keeps those."""
    served = method.served(state)
    if "global" in served:
        return {"global": served["global"]}
    return {client.name: method.dispatch(state, client).adapter for client in world.clients()}


def applied(method: Method, state: ServerState, world: World) -> dict[str, np.ndarray]:
    """`{user/layer: change of the weight}` of everything that the federation's users run."""
    return {
        f"{user}/{name}": value
        for user, adapter in running(method, state, world).items()
        for name, value in changes(adapter, state.merged).items()
    }


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest deviation of any entry, relative to the largest entry expected."""
    assert found.keys() == expected.keys()
    size = max(np.abs(value).max() for value in expected.values()) or 1.0
    return max(np.abs(found[name] - expected[name]).max() for name in expected) / size


def contents(adapter: Adapter | None) -> list[tuple]:
    """All that an adapter holds, bit for bit."""
    if adapter is None:
        return []
    layers = [(n, raw(la.A), raw(la.B), la.scaling, la.kind, la.kernel) for n, la in sorted(adapter.layers.items())]
    return [*layers, *((name, raw(tensor)) for name, tensor in sorted(adapter.tensors.items()))]


def raw(tensor: Tensor) -> tuple:
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def everything(state: ServerState) -> list:
    """All that a state holds, bit for bit."""
    extra = [(name, contents(adapter)) for name, adapter in sorted(state.extra.items())]
    return [state.round, state.seed, contents(state.adapter), state.scaling, contents(state.merged), extra]
