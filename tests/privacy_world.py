"""What leaves a private client or server, minus the same with the noise source silenced: the noise, in units of the noise that
was promised; and the statistics of it that must hold whatever the mechanism is made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config
from anyrank.messages.plan import Plan, plan_round
from anyrank.messages.records import Client, ClientUpdate, Job, Scaling, ServerState
from anyrank.methods import make
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import PrivacyPlan
from anyrank.robust.rules import rule_of
from anyrank.tasks.base import Examples, Task
from anyrank.training import private_examples, trainer
from anyrank.training.lora import LoraModel
from anyrank.training.optimizers import Optimizer

WIDTH, CLASSES, BATCH, CLIP = 48, 3, 16, 0.5
RANKS = {"ada": 2, "bob": 4, "eve": 4}
COUNTS = {"ada": 64, "bob": 128, "eve": 256}  # exact and declared: each is a power of two
SIGMAS = {64: 3.0, 128: 1.5, 256: 0.8}  # each count has its own
KEY = bytes(range(32))


# --- a small model in float64, in which noise is seen at full resolution ------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(WIDTH, 40), nn.Linear(40, 40), nn.Linear(40, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


@dataclass(frozen=True)
class Watched:
    """Inputs that remember which examples were looked at."""

    values: Tensor
    seen: list[np.ndarray] = field(default_factory=list)
    on_disk: bool = False

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def batch(self, index: Tensor, equal_lengths: bool = False) -> dict[str, Tensor]:
        self.seen.append(index.numpy().copy())
        return {"inputs": self.values[index]}


@functools.cache
def world(dtype: torch.dtype = torch.float64, size: float = 1.0) -> LoraModel:
    """The model, checked for private training; `size` of its inputs, and so of its gradients."""
    torch.manual_seed(4)
    values = size * torch.randn(sum(COUNTS.values()), WIDTH, generator=torch.Generator().manual_seed(6))
    examples = Examples(Watched(values.to(dtype)), torch.arange(len(values)) % CLASSES)
    test = Examples(Watched(values[:8].to(dtype)), torch.arange(8) % CLASSES)
    module = Net().to(dtype)
    model = LoraModel(Task(module=module, targets=("first", "second"), train=examples, test=test,
                           trained=("head.weight", "head.bias")))  # fmt: skip
    if dtype != torch.bfloat16:  # of which the check says no
        private_examples.check(model, [frozenset("AB"), frozenset("A"), frozenset("B")])
    model.probed |= {frozenset("AB"), frozenset("A"), frozenset("B")}
    return model


def shards() -> dict[str, np.ndarray]:
    edges = np.cumsum([0, *COUNTS.values()])
    return {name: np.arange(edges[i], edges[i + 1]) for i, name in enumerate(COUNTS)}


def state_of(model: LoraModel, method: str, round: int, seed: int = 0) -> ServerState:
    """A state after `round` rounds, no factor of which is zero."""
    rule, scaling = make(method), Scaling(8.0, "standard")  # 2 for rank 4
    state = rule.init(model.start(max(RANKS.values()), scaling, seed), scaling, seed)
    draw = torch.Generator().manual_seed(seed)
    layers = {
        name: layer.with_factors(*(torch.randn(f.shape, generator=draw).to(f) / 4 for f in (layer.A, layer.B)))
        for name, layer in state.adapter.layers.items()
    }
    return replace(state, round=round, adapter=replace(state.adapter, layers=layers))


def jobs_of(model: LoraModel, method: str, round: int, clients: Iterable[str] = COUNTS) -> list[Job]:
    rule, state = make(method), state_of(model, method, round - 1)
    made = [Client(name, RANKS[name] if make_takes_ranks(method) else 4) for name in clients]
    return [Job(client, COUNTS[client.name], partial(rule.dispatch, state, client)) for client in made]


def make_takes_ranks(method: str) -> bool:
    return make(method).traits.mixed_ranks


def plan_of(level: str = "example", steps: int = 1, clip: float = CLIP, noise_at: str = "client", **other: Any) -> PrivacyPlan:
    noise = dict(SIGMAS) if level == "example" else dict.fromkeys(SIGMAS, 1.3)
    made = PrivacyPlan(level, 0.0, 1e-5, clip, "rdp", False, "exact", BATCH, steps, 9, 9, 1.0, noise, noise_at)
    return replace(made, **other)


def how(round: int = 1, steps: int = 1, rate: float = 1.0, **train: Any) -> Plan:
    """How clients train. With a rate of 1e-200 no weight moves, so that later steps have the gradients of the first."""
    keys = {"optimizer": "sgd", "learning_rate": 1.0, "batch_size": BATCH, "local_steps": steps} | train
    return replace(plan_round(Config().replace(train=keys).train, round, 9, 0), learning_rate=rate)


# --- silence ----------------------------------------------------------------------------------------------------------


class Quiet:
    """Draws with the same samples whose normal numbers are all drawn, and all zero."""

    def __init__(self, draws: Any) -> None:
        self._draws = draws

    def random(self, *size: Any) -> np.ndarray:
        return self._draws.random(*size)

    def standard_normal(self, *size: Any) -> np.ndarray:
        return 0.0 * self._draws.standard_normal(*size)


class Muted(Mechanism):
    """The mechanism, sampling as ever, without any noise."""

    def draws(self, round: int, client: str) -> Any:
        return Quiet(super().draws(round, client))


def muted(mechanism: Mechanism) -> Mechanism:
    return Muted(mechanism.plan, mechanism.key)


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise of one tensor of one release over the standard deviation that the plan promises; and where it was."""

    where: tuple[Any, ...]  # client, round, step, tensor
    z: np.ndarray


def numbers(adapter: Adapter, train: frozenset[str]) -> dict[str, np.ndarray]:
    """`{tensor: numbers}` of what an upload carries, in float64."""
    factors = {f"{name}.{f}": getattr(layer, f) for name, layer in adapter.layers.items() for f in sorted(train)}
    return {name: tensor.detach().double().numpy() for name, tensor in (factors | dict(adapter.tensors)).items()}


def trained(
    model: LoraModel, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism, held: Mapping[str, np.ndarray] | None = None
) -> dict[str, ClientUpdate]:
    """Each client's upload; `held`: its examples, if other than `shards()`."""
    replies = list(trainer.train_cohort(model, jobs, held or shards(), plan, mechanism, "auto"))
    assert all(isinstance(reply, ClientUpdate) for reply in replies), replies
    return {reply.client: reply for reply in replies}


def uploads(method: str, round: int, mechanism: Mechanism, model: LoraModel, clients: Iterable[str] = COUNTS) -> list[Noise]:
    """The noise in uploads of one step of SGD with rate 1, in units of sigma C / batch of each client."""
    jobs, privacy, found = jobs_of(model, method, round, clients), mechanism.plan, []
    loud, silent = (trained(model, jobs, how(round), each) for each in (mechanism, muted(mechanism)))
    for job in jobs:
        name, train = job.client.name, job.download.train
        one, other = (numbers(each[name].adapter, train) for each in (loud, silent))
        unit = SIGMAS[COUNTS[name]] * privacy.clip_norm / BATCH
        found += [Noise((name, round, 0, key), -(one[key] - other[key]).ravel() / unit) for key in one]
    return found


@contextmanager
def gradients(into: list[list[np.ndarray]]) -> Iterator[None]:
    """What optimizers are given, step by step."""
    step = Optimizer.step

    def watching(self: Optimizer) -> None:
        into.append([parameter.grad.double().numpy().copy() for parameter in self.parameters])
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", watching)
        yield


def steps(
    method: str, round: int, mechanism: Mechanism, model: LoraModel, held: Mapping[str, np.ndarray] | None = None, **train: Any
) -> list[Noise]:
    """The noise that the optimizer is given in each step, in units of sigma C / batch."""
    privacy, found = mechanism.plan, []
    for job in jobs_of(model, method, round):
        seen: list[list[list[np.ndarray]]] = [[], []]
        for into, each in zip(seen, (mechanism, muted(mechanism)), strict=True):
            with gradients(into):
                trained(model, [job], how(round, privacy.local_steps, 1e-200, **train), each, held)
        assert [len(each) for each in seen] == [privacy.local_steps] * 2, "each planned step is taken, whatever was drawn"
        unit = SIGMAS[job.num_examples] * privacy.clip_norm / BATCH
        for step, (loud, silent) in enumerate(zip(*seen, strict=True)):
            for place, (one, other) in enumerate(zip(loud, silent, strict=True)):
                found.append(Noise((job.client.name, round, step, place), (one - other).ravel() / unit))
    return found


def whole_uploads(method: str, round: int, mechanism: Mechanism, model: LoraModel) -> list[Noise]:
    """The noise in uploads that protect a whole client: in the coordinates in which a product's change has its own norm."""
    jobs, privacy, found = jobs_of(model, method, round), mechanism.plan, []
    loud, silent = (trained(model, jobs, how(round, 2, 0.1), each) for each in (mechanism, muted(mechanism)))
    for job in jobs:
        name, (factor,) = job.client.name, job.download.train
        one, other = (numbers(each[name].adapter, job.download.train) for each in (loud, silent))
        unit = privacy.noise[job.num_examples] * privacy.clip_norm
        for key in one:
            noise, layer = one[key] - other[key], job.download.adapter.layers.get(key.rpartition(".")[0])
            if layer is not None:  # of `s dB A`, the norm is `|dB (s^2 A A')^(1/2)|`
                fixed = (layer.A if factor == "B" else layer.B.T).double().numpy()
                values, vectors = np.linalg.eigh(layer.scaling**2 * fixed @ fixed.T)
                root = (vectors * np.sqrt(values)) @ vectors.T
                noise = noise @ root if factor == "B" else root @ noise
            found.append(Noise((name, round, 0, key), noise.ravel() / unit))
    return found


# The largest weight of a client on a slice: of 64, 128 and 256 examples, the two larger ones have all four slices.
_OF_ALL, _OF_TWO = 256 / 448, 256 / 384
LARGEST = {
    "rbla": (_OF_ALL, _OF_ALL, _OF_TWO, _OF_TWO),
    "ffa_lora": (_OF_ALL, _OF_ALL, _OF_TWO, _OF_TWO),
    "rolora": (_OF_ALL, _OF_ALL, _OF_TWO, _OF_TWO),
    "zeropad": (_OF_ALL,) * 4,
    "fedavg": (_OF_ALL,) * 4,
}


def means(method: str, round: int, mechanism: Mechanism, model: LoraModel) -> list[Noise]:
    """The noise in the server's state after a round, in units of what a client of the clip norm moves, times sigma."""
    rule, state, jobs = make(method), state_of(model, method, round - 1), jobs_of(model, method, round)
    privacy, train = mechanism.plan, jobs[0].download.train
    updates = list(trained(model, jobs, how(round, 2, 0.1), mechanism).values())
    after = []
    for each in (mechanism, muted(mechanism)):
        noise = rule_of(Config(), rule, each)
        after.append(numbers(noise.aggregate(rule, state, noise.screen(state, jobs, updates).updates).adapter, train))
    unit, found = max(privacy.noise.values()) * privacy.clip_norm, []
    both = jobs[0].download.rescale == "both"
    for key, loud in after[0].items():
        name, _, factor = key.rpartition(".")
        noise, far = loud - after[1][key], np.asarray(_OF_ALL)
        if name in state.adapter.layers:
            scaling = state.adapter.layers[name].scaling
            far = np.array(LARGEST[method]) / (math.sqrt(scaling) if both else {"A": 1.0, "B": scaling}[factor])
            far = far[:, None] if factor == "A" else far[None, :]
        found.append(Noise(("server", round, 0, key), (noise / far).ravel() / unit))
    return found


# --- statistics: each bound fails honest noise less than once in a million runs -----------------------------------------

RARE = 1e-7
_CLOSE = 2.0**-22  # between two numbers of a standard deviation of 1: drawn twice, they are this close once in four million


def check(found: Sequence[Noise], resolution: bool = True) -> None:
    """Each tensor of each release has normal noise of the promised size and of its own; `resolution`: seen in float64."""
    assert found
    assert len({noise.where for noise in found}) == len(found)
    check_sizes(found)
    check_shape(np.concatenate([noise.z for noise in found]))
    check_independent(found)
    if resolution:
        check_no_number_twice(found)


def check_sizes(found: Sequence[Noise]) -> None:
    """The mean is 0 and the variance 1, of each vector, of each tensor, and of each client: exact chi-square bounds."""
    groups: dict[Any, list[np.ndarray]] = {}
    for noise in found:
        client, round, step, tensor = noise.where
        for group in (noise.where, ("client", client), ("tensor", tensor), ("step", step), ("round", round), "all"):
            groups.setdefault(group, []).append(noise.z)
    level = RARE / len(groups)
    for group, members in groups.items():
        z = np.concatenate(members)
        low, high = stats.chi2.ppf([level / 4, 1 - level / 4], len(z))
        square = float((z**2).sum())
        assert low <= square <= high, f"{group}: standard deviation {math.sqrt(square / len(z)):.4f} of the promised one"
        assert abs(z.sum()) <= stats.norm.isf(level / 4) * math.sqrt(len(z)), f"{group}: mean {z.mean():.4f}"


def check_shape(z: np.ndarray) -> None:
    """Normal in all its shape: distribution, skew, kurtosis, tails."""
    n = len(z)
    assert stats.kstest(z, "norm").pvalue > RARE
    sd = stats.norm.isf(RARE / 2)
    assert abs((z**3).mean()) <= sd * math.sqrt(15 / n) * 1.2
    assert abs((z**4).mean() - 3) <= sd * math.sqrt(96 / n) * 1.5  # a little more: its own distribution has a long tail
    for bound in (1e-3, 1e-2, 1.0, 2.0, 3.0):
        share = 2 * stats.norm.sf(bound)
        low, high = stats.binom.ppf([RARE, 1 - RARE], n, share)
        assert low <= (abs(z) > bound).sum() <= high, f"beyond {bound}"
    assert abs(z).max() < stats.norm.isf(RARE / n)


# A vector as it is, and whether each number is large; with the standard errors that two of them stay within. Products of
# normal numbers have longer tails than normal ones.
_SEEN = ((lambda z: z, 9.0), (lambda z: np.where(abs(z) > stats.norm.isf(0.25), 1.0, -1.0), 7.0))


def check_independent(found: Sequence[Noise], lags: int = 3) -> None:
    """No two vectors go together, in their numbers or in their sizes: from the start, from the end, reversed, or shifted by up
    to `lags`; nor does a vector with itself, shifted."""
    known = [noise for noise in found if len(noise.z) >= 64]
    for seen, bound in _SEEN:
        for length in sorted({len(noise.z) for noise in known}):
            own = [noise for noise in known if len(noise.z) >= length]
            heads = np.stack([seen(noise.z)[:length] for noise in own])
            tails = np.stack([seen(noise.z)[-length:] for noise in own])
            self = np.eye(len(own))
            for lag in range(lags + 1):
                for other, but in ((heads, self if lag == 0 else 0), (tails, self), (heads[:, ::-1], self)):
                    sums = abs(heads[:, lag:] @ other[:, : length - lag].T) / math.sqrt(length - lag) * (1 - but)
                    i, j = np.unravel_index(sums.argmax(), sums.shape)
                    assert sums[i, j] < bound, (
                        f"{own[i].where} and {own[j].where} go together: {sums[i, j]:.1f} standard errors"
                    )


def check_no_number_twice(found: Sequence[Noise]) -> None:
    """No stretch of numbers is drawn twice: neither in another tensor, nor with the other sign, nor in another order."""
    z = np.concatenate([abs(noise.z) for noise in found])
    owner = np.concatenate([np.full(len(noise.z), i) for i, noise in enumerate(found)])
    order = np.argsort(z)
    close = np.diff(z[order]) < _CLOSE
    pairs = np.stack([owner[order][:-1][close], owner[order][1:][close]])
    counted: dict[tuple[int, int], int] = {}
    for one, other in pairs.T.tolist():
        pair = (min(one, other), max(one, other))
        counted[pair] = counted.get(pair, 0) + 1
    sizes = [len(noise.z) for noise in found]
    for (one, other), count in counted.items():
        expected = sizes[one] * sizes[other] * _CLOSE  # more than there are: half the density is below 0.4
        assert count <= 5 + 10 * expected, f"{found[one].where} and {found[other].where} share {count} numbers"
