"""What hostile clients send: attacks as pure functions of a round and of the client that sends.

A hostile client knows what the attacks of the literature know: its own download, and the honest replies of its round. It does
not know who checks them, or how. `attacks_run.py` puts the attacks into a run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from anyrank import keys
from anyrank.adapter.layer import LoraLayer
from anyrank.messages.records import ClientUpdate, Code, Failure, Job
from attacks_data import Data, backdoored, flipped


@dataclass(frozen=True, eq=False)
class Scene:
    """One round as a hostile client sees it: `jobs` and what each client would honestly reply, by name."""

    round: int
    seed: int
    jobs: Mapping[str, Job]
    replies: Mapping[str, ClientUpdate]
    hostile: frozenset[str]

    @property
    def honest(self) -> list[str]:
        """The clients of the round that are not hostile; all of them, where each is."""
        return [name for name in self.replies if name not in self.hostile] or list(self.replies)

    def before(self, name: str, layer: str) -> LoraLayer:
        return self.jobs[name].download.adapter.layers[layer]

    def after(self, name: str, layer: str) -> LoraLayer:
        return self.replies[name].adapter.layers[layer]

    def slices(self, name: str, layer: str) -> tuple[int, ...]:
        return self.jobs[name].download.slices[layer]

    def change(self, name: str, layer: str, factor: str) -> Tensor:
        return getattr(self.after(name, layer), factor) - getattr(self.before(name, layer), factor)

    def mean_step(self, layer: str) -> Tensor:
        """The mean of the honest clients' steps, the changes of `scaling * B @ A`, `[out, in]` in float64."""
        found = [_delta(self.after(name, layer)) - _delta(self.before(name, layer)) for name in self.honest]
        return torch.stack(found).mean(dim=0)


Reply = Callable[[Scene, str], ClientUpdate | Failure]


@dataclass(frozen=True)
class Attack:
    """`reply(scene, client)`: what a hostile client sends; `data(inputs [n, 64], labels [n], draw)`: what it trains on in the
    place of its own examples; `inflates`: it registers the largest rank."""

    reply: Reply
    data: Data | None = None
    inflates: bool = False


# --- replies ---------------------------------------------------------------------------------------------------------


def honest(scene: Scene, name: str) -> ClientUpdate:
    """What the client learned, from whatever data."""
    return scene.replies[name]


def silent(scene: Scene, name: str) -> Failure:
    """Nothing. It is no attack, but what the loss of this client costs: an attack that is stopped costs as much."""
    return Failure(name, Code.CRASHED, "sends nothing")


def scaled(times: float) -> Reply:
    """The change of each factor, `times` as large; -1 is the sign flip (Li et al., arXiv 1811.03761, and many before)."""

    def reply(scene: Scene, name: str) -> ClientUpdate:
        return _rewritten(scene, name, lambda layer, factor: times * scene.change(name, layer, factor))

    return reply


def noise(times: float) -> Reply:
    """Gaussian noise in the place of each factor's change, of `times` its norm."""

    def reply(scene: Scene, name: str) -> ClientUpdate:
        def change(layer: str, factor: str) -> Tensor:
            own = scene.change(name, layer, factor)
            draw = keys.generator(scene.seed, "noise", scene.round, name, layer, factor)
            return times * float(own.norm()) / math.sqrt(own.numel()) * torch.randn(own.shape, generator=draw)

        return _rewritten(scene, name, change)

    return reply


def nan(scene: Scene, name: str) -> ClientUpdate:
    """Not a number, in one entry of each factor."""

    def change(layer: str, factor: str) -> Tensor:
        own = scene.change(name, layer, factor)
        own[0, 0] = math.nan
        return own

    return _rewritten(scene, name, change)


def gauge(spread: float) -> Reply:
    """The honest product, written as `(B G, G^-1 A)`: G a rotation, then factors from `spread` down to `1 / spread`."""

    def reply(scene: Scene, name: str) -> ClientUpdate:
        layers = {}
        for layer, after in scene.replies[name].adapter.layers.items():
            draw = keys.generator(scene.seed, "gauge", scene.round, name, layer)
            turn = torch.linalg.qr(torch.randn(after.rank, after.rank, generator=draw, dtype=torch.float64))[0]
            stretch = torch.logspace(math.log10(spread), -math.log10(spread), after.rank, dtype=torch.float64)
            A, B = (turn.T @ after.A.double()) / stretch[:, None], (after.B.double() @ turn) * stretch
            layers[layer] = after.with_factors(A, B)
        return _with_layers(scene, name, layers)

    return reply


def inflation(times: float) -> Reply:
    """The opposite of the cohort's mean step, `times` as large, in those slices that the fewest others of the round have.

    A mean over the owners of a slice has only this client there (rank inflation). Its other slices stay as it got them.
    """

    def reply(scene: Scene, name: str) -> ClientUpdate:
        layers = {}
        for layer in scene.replies[name].adapter.layers:
            before, own = scene.before(name, layer), lonely(scene, name, layer)
            held = before.with_factors(before.A[own], before.B[:, own])
            left, S, right = torch.linalg.svd(_delta(held) - times * scene.mean_step(layer), full_matrices=False)
            root, A, B = (S[: len(own)] / before.scaling).sqrt(), before.A.clone(), before.B.clone()
            A[own], B[:, own] = (root[:, None] * right[: len(own)]).to(A.dtype), (left[:, : len(own)] * root).to(B.dtype)
            layers[layer] = before.with_factors(A, B)
        return _with_layers(scene, name, layers)

    return reply


def lonely(scene: Scene, name: str, layer: str) -> list[int]:
    """The places of the client's slices that the fewest others of the round were sent."""
    others = Counter(j for other in scene.jobs if other != name for j in scene.slices(other, layer))
    places = range(scene.before(name, layer).rank)
    counts = [others[scene.slices(name, layer)[place]] for place in places]
    return [place for place in places if counts[place] == min(counts)]


def assembled(times: float = 1.0, turns: int = 5) -> Reply:
    """Factors that look benign apart while their product is not.

    The idea is that of gradient assembly poisoning (arXiv 2601.00566): who checks A and B one by one does not see what they
    make together. The construction is ours. The change of each factor has `times` the cohort's median norm of that factor, and
    the two are turned, one after the other, to where the change of the product goes farthest against the cohort's mean step:
    `dB ~ -M A'^T`, then `dA ~ -B'^T M`. All hostile clients go for the same M, so that their products add up.
    """

    def reply(scene: Scene, name: str) -> ClientUpdate:
        layers = {}
        for layer, after in scene.replies[name].adapter.layers.items():
            before, against = scene.before(name, layer), -scene.mean_step(layer)
            limit = {factor: times * _median_norm(scene, layer, factor) for factor in "AB"}
            A, B = before.A.double(), before.B.double()
            dA, dB = torch.zeros_like(A), torch.zeros_like(B)
            for _ in range(turns):
                dB = _long(against @ (A + dA).T, limit["B"])
                dA = _long((B + dB).T @ against, limit["A"])
            layers[layer] = after.with_factors(A + dA, B + dB)
        return _with_layers(scene, name, layers)

    return reply


def collusion(times: float) -> Reply:
    """All hostile clients send the same: on each slice, the opposite of the honest clients' mean change.

    It is made as long as `times` the median of the honest clients' changes. Whoever knows the limits of the guard stays just
    below the one from which an update is rejected.
    """

    def reply(scene: Scene, name: str) -> ClientUpdate:
        layers = scene.replies[name].adapter.layers
        mean = {(layer, factor): _spread(scene, name, layer, factor)[0] for layer in layers for factor in "AB"}
        length = times * median(_length(scene.change(other, *key) for key in mean) for other in scene.honest)
        longer = length / (_length(mean.values()) or 1.0)
        return _rewritten(scene, name, lambda layer, factor: -longer * mean[layer, factor])

    return reply


def little(deviations: float) -> Reply:
    """ "A little is enough" (Baruch et al., NeurIPS 2019, arXiv 1902.06156): on each slice and in each number, the honest
    clients' mean less so many of their standard deviations. All hostile clients send the same."""

    def reply(scene: Scene, name: str) -> ClientUpdate:
        def change(layer: str, factor: str) -> Tensor:
            mean, deviation = _spread(scene, name, layer, factor)
            return mean - deviations * deviation

        return _rewritten(scene, name, change)

    return reply


# --- all of them ------------------------------------------------------------------------------------------------------

ATTACKS: Mapping[str, Attack] = {
    "silence": Attack(silent),
    "sign flip": Attack(scaled(-1)),
    "sign flip x10": Attack(scaled(-10)),
    "scaling x10": Attack(scaled(10)),
    "scaling x1000": Attack(scaled(1000)),
    "noise": Attack(noise(100)),
    "NaN": Attack(nan),
    "gauge": Attack(gauge(1e4)),
    "rank inflation": Attack(inflation(10), inflates=True),
    "assembled factors": Attack(assembled()),
    "collusion": Attack(collusion(3.9)),
    "little is enough": Attack(little(1.5)),
    "label flip": Attack(honest, flipped),
    "backdoor": Attack(honest, backdoored),
    "backdoor x10": Attack(scaled(10), backdoored),
}


# --- parts -----------------------------------------------------------------------------------------------------------


def _delta(layer: LoraLayer) -> Tensor:
    return layer.scaling * (layer.B.double() @ layer.A.double())


def _with_layers(scene: Scene, name: str, layers: Mapping[str, LoraLayer]) -> ClientUpdate:
    reply = scene.replies[name]
    return replace(reply, adapter=replace(reply.adapter, layers=layers))


def _rewritten(scene: Scene, name: str, change: Callable[[str, str], Tensor]) -> ClientUpdate:
    """The client's download with `change(layer, factor)` added to each factor."""
    layers = {}
    for layer in scene.replies[name].adapter.layers:
        before = scene.before(name, layer)
        layers[layer] = before.with_factors(before.A + change(layer, "A"), before.B + change(layer, "B"))
    return _with_layers(scene, name, layers)


def _long(direction: Tensor, length: float) -> Tensor:
    norm = float(direction.norm())
    return direction * (length / norm) if norm else direction


def _length(parts: Iterable[Tensor]) -> float:
    return math.hypot(*(float(part.norm()) for part in parts))


def _median_norm(scene: Scene, layer: str, factor: str) -> float:
    return median(float(scene.change(name, layer, factor).norm()) for name in scene.honest)


def _spread(scene: Scene, name: str, layer: str, factor: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the honest changes, slice by slice in the client's order; its own change where nobody
    else has a slice. (Clients have one scaling here, so that factors compare as they are.)"""
    along = 0 if factor == "A" else 1
    known: dict[int, list[Tensor]] = {}
    for other in scene.honest:
        for row, j in zip(scene.change(other, layer, factor).unbind(along), scene.slices(other, layer), strict=True):
            known.setdefault(j, []).append(row)
    own = scene.change(name, layer, factor).unbind(along)
    rows = [torch.stack(known.get(j, [mine])) for mine, j in zip(own, scene.slices(name, layer), strict=True)]
    mean = torch.stack([found.mean(dim=0) for found in rows], dim=along)
    return mean, torch.stack([found.std(dim=0, correction=0) for found in rows], dim=along)
