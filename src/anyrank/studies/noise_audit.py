"""Test the promised epsilon with all that the auditor can know: the noise of every release, and what one example adds to it.

The auditor trains in this process. Each release is made a second time from the same samples without noise, and, at the example
level, a third time without one of the examples. The optimizer of each twin is given the noisy gradients of the first, so that
all three take the same way, with any optimizer; their own gradients are only read. The difference of the first two is the exact
noise, that of the last two the exact contribution of the example. At the client level, an upload and its silent twin are
compared in the coordinates in which it was clipped; with noise at the server, the state after a round and its silent twin.

What is tested (see `anyrank.studies.tally`): whether each tensor, client and step has the noise that the plan promises; whether
the noise repeats in steps, rounds, clients or tensors; whether one example or client changes more than the clip; and whether
anything leaves that is not a function of the noisy numbers. The bound on epsilon is the accountant's figure for the noise that
was found: as in Nasr et al. (2023), single steps are audited, and the accountant composes them.

An audit uses the clients' data, and everything that it has trained is discarded. What it reports is computed from the noise, and
of contributions only whether they keep to the clip, so that its figures reveal nothing about the data of a run that is honest.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyrank import devices, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config
from anyrank.errors import ConfigError, RunFailed
from anyrank.federation import asking, loop
from anyrank.federation.federation import Federation
from anyrank.messages import change
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Download, Job, ServerState
from anyrank.privacy.accountants import Spending, epsilon
from anyrank.privacy.noise import Draws, Mechanism
from anyrank.privacy.plan import PrivacyPlan
from anyrank.robust import central_noise
from anyrank.robust.central_noise import CentralNoise
from anyrank.simulation import Setting
from anyrank.studies.tally import Tally
from anyrank.training import private_upload, trainer

ROUNDS = 3  # are audited by default: each has many releases, and one in a later round is made by the same code
_ROOM = 8  # units in the last place of the largest number: what rounding may add to a contribution


def audit(
    config: Config,
    rounds: int = 0,
    noise_factor: float = 1.0,
    confidence: float = 0.95,
    on_round: Callable[[Mapping[str, Any]], None] | None = None,
    key: bytes | None = None,
) -> dict[str, Any]:
    """Audit `rounds` rounds of `config`'s federation (0: at most `ROUNDS`), and compare their noise with the plan's.

    `noise_factor` multiplies the actual noise but not the planned noise, to test whether the audit notices; `key`: of the
    noise, instead of a fresh one. Returns the `claimed` epsilon of the whole run, its `lower_bound` at `confidence`, `rows`
    with the noise of each group, what `repeats`, whether contributions are `clipped` and uploads `covered`, and whether the
    claim is `refuted`. Raises `ConfigError` if there is no plan to audit, and `RunFailed` if a client's training fails.
    """
    if config.privacy.level == "none":
        raise ConfigError("[privacy]: expected level = 'example' or 'client'; otherwise there is nothing to audit")
    settings: list[Setting] = []
    with devices.threads(config.run.threads), torch.enable_grad():
        built = simulation.build(config, engine=lambda setting: settings.append(setting) or simulation.in_process(setting))
        try:
            audited = _Audit(built, settings[0], noise_factor, key or secrets.token_bytes(32))
            state = loop.start(built)
            for round in range(1, min(rounds or ROUNDS, config.run.rounds) + 1):
                state = audited.round(state, round)
                if on_round:
                    on_round({"round": round})
        finally:
            built.close()
    return audited.verdict(confidence)


@dataclass(frozen=True)
class _Loud(Mechanism):
    """The mechanism as it is; it notes the uniform numbers of each step, and the noisy gradients."""

    uniform: list[np.ndarray] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)

    def draws(self, round: int, client: str) -> Draws:
        return _Noted(super().draws(round, client), self.uniform)

    def observe(self, parameters: Sequence[Tensor]) -> None:
        self.gradients.append([parameter.grad.detach().clone() for parameter in parameters])


@dataclass(frozen=True)
class _Quiet(Mechanism):
    """The twin of a release: its samples, no noise, and its gradients for the optimizer. `without`: the place of an example
    that is left out."""

    loud: _Loud | None = None
    without: int | None = None
    gradients: list[list[Tensor]] = field(default_factory=list)

    def draws(self, round: int, client: str) -> Draws:
        return _Again(list(self.loud.uniform), self.without)

    def observe(self, parameters: Sequence[Tensor]) -> None:
        noisy = self.loud.gradients[len(self.gradients)]
        self.gradients.append([parameter.grad.detach().clone() for parameter in parameters])
        for parameter, gradient in zip(parameters, noisy, strict=True):
            parameter.grad = gradient.clone()


@dataclass(frozen=True)
class _Noted:
    """Draws whose uniform numbers are noted."""

    source: Draws
    uniform: list[np.ndarray]

    def random(self, size: int) -> np.ndarray:
        self.uniform.append(self.source.random(size))
        return self.uniform[-1]

    def standard_normal(self, size: int) -> np.ndarray:
        return self.source.standard_normal(size)


@dataclass(frozen=True)
class _Again:
    """The same uniform numbers, without the example that is left out, and normal numbers of zero."""

    uniform: list[np.ndarray]
    without: int | None

    def random(self, size: int) -> np.ndarray:
        noted = self.uniform.pop(0)
        return noted if self.without is None or size == len(noted) else np.delete(noted, self.without)

    def standard_normal(self, size: int) -> np.ndarray:
        return np.zeros(size)


class _Audit:
    """An audit in progress: what was found of each release."""

    def __init__(self, built: Federation, setting: Setting, noise_factor: float, key: bytes) -> None:
        self.built, self.shards, self.model = built, setting.shards, built.engine.model
        self.promised: PrivacyPlan = built.privacy
        noise = {count: noise_factor * value for count, value in self.promised.noise.items()}
        self.plan = dataclasses.replace(self.promised, noise=noise)
        self.key = None if self.plan.secure else key
        self.tally, self.covered, self.clipped, self.checked, self.releases = Tally(), True, True, 0, 0
        self._last: dict[str, list[dict[str, np.ndarray]]] = {}  # the signs of the last release of each client

    def round(self, state: ServerState, round: int) -> ServerState:
        """Train the round's cohort, and read its releases; returns the state after it."""
        jobs, _ = asking.dispatch(self.built, state, round)
        plan, method = self.built.plan(round), self.built.method
        updates = [_LEVELS[self.plan.level](self, job, plan) for job in jobs]
        if self.plan.central and jobs:
            return self._mean(state, jobs, updates)
        return method.aggregate(state, updates) if updates else dataclasses.replace(state, round=round)

    # --- one example ---

    def example(self, job: Job, plan: Plan) -> ClientUpdate:
        """An upload at the example level, and its two twins."""
        name, own = job.client.name, np.array(self.shards[job.client.name])
        loud = _Loud(self.plan, self.key)
        update = self._trained(job, own, plan, loud)
        quiet = _Quiet(self.plan, self.key, loud)
        self._same(update, self._trained(job, own, plan, quiet))
        if loud.gradients and len(loud.gradients) == len(quiet.gradients):
            unit = self.promised.noise[job.num_examples] * self.promised.clip_norm / self.promised.batch_size
            self._read(name, plan.round, [self._noise(job, *pair, unit) for pair in self._steps(loud, quiet)])
        canary = _most_drawn(loud.uniform, len(own), self.promised.sampling_rate(job.num_examples))
        if canary is not None:
            other = _Quiet(self.plan, self.key, loud, canary)
            self._same(update, self._trained(job, np.delete(own, canary), plan, other))
            for with_it, without in self._steps(quiet, other):
                self._check_change(_flat(with_it) * self.promised.batch_size, _flat(without) * self.promised.batch_size)
        return update

    @staticmethod
    def _steps(one: _Loud | _Quiet, other: _Quiet) -> list[tuple[list[Tensor], list[Tensor]]]:
        return list(zip(one.gradients, other.gradients, strict=True))

    def _noise(self, job: Job, loud: list[Tensor], quiet: list[Tensor], unit: float) -> dict[str, np.ndarray]:
        targets, train = self.model.targets, sorted(job.download.train)
        names = [f"layer {name}, {factor}" for name in targets for factor in train] + [
            f"parameter {n}" for n in self.model.trained
        ]
        return {
            name: ((one.double() - other.double()) / unit).flatten().cpu().numpy()
            for name, one, other in zip(names, loud, quiet, strict=True)
        }

    # --- one client ---

    def client(self, job: Job, plan: Plan) -> ClientUpdate:
        """An upload at the client level, and its silent twin; with noise at the server, it is the release as it is."""
        own, name = np.array(self.shards[job.client.name]), job.client.name
        update = self._trained(job, own, plan, Mechanism(self.plan, self.key))
        if self.plan.central:
            self.checked += 1
            self.clipped &= change.norm(job.download, update.adapter) <= self.promised.clip_norm
            return update
        quiet = self._trained(job, own, plan, _Quiet(self.plan, self.key, _Loud(self.plan, self.key)))
        unit = self.promised.noise[job.num_examples] * self.promised.clip_norm
        noise = private_upload.coordinates(job.download, update.adapter, quiet.adapter)
        self._read(name, plan.round, [{key: part.flatten().numpy() / unit for key, part in noise.items()}])
        moved = private_upload.coordinates(job.download, quiet.adapter, job.download.adapter)
        still = private_upload.coordinates(job.download, job.download.adapter, job.download.adapter)
        self._check_change(_flat(moved.values()), _flat(still.values()), float(_numbers(quiet.adapter).norm()))
        return update

    def _mean(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> ServerState:
        """The state after a round with noise at the server; its silent twin; and the twin of a client that changed nothing."""
        method, rule = self.built.method, CentralNoise(Mechanism(self.plan, self.key))
        silent = CentralNoise(_Quiet(self.plan, self.key, _Loud(self.plan, self.key)))
        after, quiet = (each.aggregate(method, state, updates) for each in (rule, silent))
        far = central_noise.reach(method, quiet.adapter, updates, jobs[0].download)
        unit = max(self.promised.noise.values()) * self.promised.clip_norm
        noise = _reached(after.adapter, quiet.adapter, far)
        self._read("server", after.round, [{key: part.flatten().numpy() / unit for key, part in noise.items()}])
        same = [dataclasses.replace(updates[0], adapter=jobs[0].download.adapter), *updates[1:]]
        other = silent.aggregate(method, state, same)
        moved = _flat(_reached(quiet.adapter, other.adapter, far).values())
        size = _flat(_reached(quiet.adapter, None, far).values()).norm()
        self._check_change(moved, torch.zeros_like(moved), float(size))
        return after

    # --- what is found ---

    def _trained(self, job: Job, own: np.ndarray, plan: Plan, mechanism: Mechanism) -> ClientUpdate:
        reply = trainer.train(self.model, job, own, plan, mechanism)
        if not isinstance(reply, ClientUpdate):
            raise RunFailed(f"audit: the training of {job.client.name} in round {plan.round} failed; try anyrank run first")
        return reply

    def _same(self, update: ClientUpdate, twin: ClientUpdate) -> None:
        """Twins that were given the same noisy gradients upload the same."""
        self.covered &= torch.equal(_numbers(update.adapter), _numbers(twin.adapter))

    def _read(self, client: str, round: int, steps: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Tally the noise of a release, `{tensor: z}` for each step, and compare its signs with those of other releases."""
        self.releases += 1
        signs = [{name: z > 0 for name, z in step.items()} for step in steps]
        for number, step in enumerate(steps, 1):
            for name, z in step.items():
                groups = [f"tensor {name}", f"client {client}", f"round {round}"]
                self.tally.noise(z, groups + ([f"step {number}"] if len(steps) > 1 else []))
            tensors = list(signs[number - 1].items())
            for (name, one), (_, other) in zip(tensors, tensors[1:], strict=False):
                self.tally.pair(f"{name} and the next tensor", one, other)
        for earlier, later in zip(signs, signs[1:], strict=False):
            self._pairs("two steps", earlier, later)
        others = {
            "two rounds of one client": self._last.pop(client, None),
            "two clients": next(reversed(self._last.values()), None),
        }
        for name, release in others.items():
            for earlier, later in zip(release or [], signs, strict=False):
                self._pairs(name, earlier, later)
        self._last[client] = signs

    def _pairs(self, what: str, earlier: Mapping[str, np.ndarray], later: Mapping[str, np.ndarray]) -> None:
        for name in earlier.keys() & later.keys():
            self.tally.pair(f"{name} in {what}", earlier[name], later[name])

    def _check_change(self, one: Tensor, other: Tensor, size: float = 0.0) -> None:
        """Whether two neighbours' sums are within the clip of each other; `size`: of the numbers that were rounded."""
        self.checked += 1
        rounding = _ROOM * torch.finfo(self._dtype()).eps * max(size, float(one.norm()), float(other.norm()))
        self.clipped &= float((one - other).norm()) <= self.promised.clip_norm * (1 + 1e-6) + rounding

    def _dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.model.module.parameters() if parameter.is_floating_point())

    def verdict(self, confidence: float) -> dict[str, Any]:
        """What was found, and whether it refutes the plan."""
        alpha = self.tally.alpha(confidence)
        rows, repeats = self.tally.rows(alpha), self.tally.repeats(alpha)
        for row in rows:
            row["epsilon"] = self._epsilon(row["hides"])
        bound, claimed = max((row["epsilon"] for row in rows), default=0.0), self._epsilon(1.0)
        short = [row["what"] for row in rows if row["high"] < 1 or row["hides"] < 1]
        return {
            **{"kind": "known noise", "level": self.plan.level, "noise_at": self.plan.noise_at},
            **{"claimed": claimed, "lower_bound": bound, "delta": self.plan.delta, "confidence": confidence},
            **{"releases": self.releases, "rows": rows, "short": short, "repeats": repeats},
            **{"clipped": bool(self.clipped), "changes": self.checked, "covered": bool(self.covered)},
            "refuted": bool(short or repeats or not self.clipped or not self.covered),
        }

    def _epsilon(self, ratio: float) -> float:
        """The plan's epsilon over the whole run, if all noise were `ratio` times what it promises; 0 for an infinite one."""
        if math.isinf(ratio):
            return 0.0
        found = []
        for count in self.promised.noise:
            whole = self.promised.spending(count, self.promised.max_rounds)
            noise = Spending(whole.sampling_rate, ratio * whole.noise_multiplier, whole.steps)
            found.append(epsilon(self.promised.accountant, noise, self.promised.delta))
        return max(found)


_LEVELS: Mapping[str, Callable[[_Audit, Job, Plan], ClientUpdate]] = {"example": _Audit.example, "client": _Audit.client}


def _most_drawn(uniform: Sequence[np.ndarray], examples: int, rate: float) -> int | None:
    """The place of the example that was drawn in most steps; `None` if none was."""
    drawn = sum((numbers < rate).astype(int) for numbers in uniform if len(numbers) == examples)
    return int(np.argmax(drawn)) if np.any(drawn) else None


def _reached(one: Adapter, other: Adapter | None, far: central_noise.Reach) -> dict[str, Tensor]:
    """`{tensor: one - other}` over what a change of norm 1 moves each number; numbers that nothing moves are left out."""
    found = {}
    for name, reach in far.factors.items():
        for factor, most in reach.items():
            start = getattr(other.layers[name], factor).double() if other else 0.0
            moved = getattr(one.layers[name], factor).double() - start
            most = most.to(moved).expand_as(moved)
            found[f"layer {name}, {factor}"] = moved[most > 0] / most[most > 0]
    for name, tensor in one.tensors.items():
        found[f"parameter {name}"] = (tensor.double() - (other.tensors[name].double() if other else 0.0)) / far.tensors
    return found


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().double().flatten().cpu() for tensor in tensors])


def _numbers(adapter: Adapter) -> Tensor:
    return _flat([f for layer in adapter.layers.values() for f in (layer.A, layer.B)] + list(adapter.tensors.values()))
