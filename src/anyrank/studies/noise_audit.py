"""Test the promised epsilon with all that an auditor can know: the noise of every release, and what one example adds to it.

The auditor trains in this process. Each release is made a second time from the same samples without noise, and, at the
example level, a third time without one of the examples (`anyrank.studies.twins`). The difference of the first two is the
exact noise, that of the last two the exact contribution of the example, with any optimizer. At the client level, an upload
and its silent twin are compared in the coordinates in which it was clipped; with noise at the server, the state after a round
and its silent twin.

What is tested (`anyrank.studies.tally`): whether each tensor, client, round and step has the noise that the plan promises;
whether noise repeats in steps, rounds, clients or tensors; whether an example or a client changes more than the clip, or
anything in a step in which it was not drawn; whether more steps are taken than planned; and whether anything leaves that is
not a function of the noisy numbers. The bound on epsilon is the accountant's figure for the noise that was found: as in Nasr
et al. (2023), single steps are audited, and the accountant composes them.

An audit uses the clients' data, and discards everything that it has trained. Its figures are computed from the noise; of the
contributions it reports only whether they keep to the clip. They reveal nothing about the data of an honest run.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from anyrank.messages.records import ClientUpdate, Job, ServerState
from anyrank.privacy.accountants import Spending, epsilon
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import PrivacyPlan
from anyrank.robust import central_noise
from anyrank.robust.central_noise import CentralNoise
from anyrank.simulation import Setting
from anyrank.studies.tally import Tally
from anyrank.studies.twins import Loud, Quiet, most_drawn
from anyrank.training import private_upload, trainer

ROUNDS = 3  # that are audited by default: later rounds are made by the same code
_ROOM = 8  # units in the last place of the largest norm, by which rounding may move a contribution
_SIGNS = 4096  # numbers of a tensor whose signs are kept, to compare them with those of other releases


def audit(
    config: Config,
    rounds: int = 0,
    noise_factor: float = 1.0,
    confidence: float = 0.99,
    on_round: Callable[[int, int], None] | None = None,
    key: bytes | None = None,
) -> dict[str, Any]:
    """Audit `rounds` rounds of `config`'s federation (0: at most `ROUNDS`), and compare their noise with the plan's.

    `noise_factor` multiplies the actual noise but not the planned noise, to test whether the audit notices; `on_round` gets
    the number of each round that is done, and of all; `key`: of the noise, instead of a fresh one.

    Returns the `claimed` epsilon of the whole run, its `lower_bound` at `confidence`, `rows` with the noise of each group,
    which of them are `short` of noise, what `repeats`, other `faults`, and whether the claim is `refuted`. Raises
    `ConfigError` if there is no plan to audit, and `RunFailed` if a client's training fails.
    """
    if config.privacy.level == "none":
        raise ConfigError("[privacy]: expected level = 'example' or 'client'; otherwise there is nothing to audit")
    if config.privacy.level not in _LEVELS:
        raise ConfigError(
            f"privacy.level: an audit reads the noise of level 'example' or 'client', got {config.privacy.level!r}; audit the "
            "same configuration with level = 'example'"
        )
    if config.privacy.noise != "independent":
        raise ConfigError(
            f"privacy.noise: an audit reads steps whose noise is independent, got {config.privacy.noise!r}; audit the same "
            "configuration with noise = 'independent'"
        )
    settings: list[Setting] = []
    wanted = min(rounds or ROUNDS, config.run.rounds)

    def in_process(setting: Setting) -> Any:
        settings.append(setting)
        return simulation.in_process(setting)

    with devices.threads(config.run.threads), torch.enable_grad():
        built = simulation.build(config, engine=in_process)
        try:
            audited = _Audit(built, settings[0], noise_factor, key or secrets.token_bytes(32))
            state = loop.start(built)
            for round in range(1, wanted + 1):
                state = audited.round(state, round)
                if on_round:
                    on_round(round, wanted)
            return audited.verdict(confidence)
        finally:
            built.close()


class _Audit:
    """An audit in progress: what was found in each release."""

    def __init__(self, built: Federation, setting: Setting, noise_factor: float, key: bytes) -> None:
        self.built, self.shards, self.model = built, setting.shards, built.engine.model
        self.promised: PrivacyPlan = built.privacy
        noise = {count: noise_factor * value for count, value in self.promised.noise.items()}
        self.plan = dataclasses.replace(self.promised, noise=noise)
        self.key = None if self.plan.secure else key
        self.tally, self.releases, self.faults = Tally(), 0, dict.fromkeys(_FAULTS, 0)
        self._last: dict[str, list[dict[str, np.ndarray]]] = {}  # signs of the noise in the last release of each client

    def round(self, state: ServerState, round: int) -> ServerState:
        """Train the round's cohort, and read its releases; returns the state after it."""
        jobs, _ = asking.dispatch(self.built, state, round)
        updates = [_LEVELS[self.plan.level](self, job, self.built.plan(round)) for job in jobs]
        if self.plan.central and jobs:
            return self._mean(state, jobs, updates)
        return self.built.method.aggregate(state, updates) if updates else dataclasses.replace(state, round=round)

    def example(self, job: Job, plan: Plan) -> ClientUpdate:
        """An upload at the example level, and its twins."""
        own, promised = np.array(self.shards[job.client.name]), self.promised
        loud = Loud(self.plan, self.key)
        update = self._trained(job, own, plan, loud)
        quiet = Quiet(self.plan, self.key, loud=loud)
        self._same(update, self._trained(job, own, plan, quiet))
        self.faults["steps"] += len(loud.gradients) != promised.local_steps or len(quiet.gradients) != len(loud.gradients)
        unit = promised.noise[job.num_examples] * promised.clip_norm / promised.batch_size
        names = self._names(job.download.train)
        noise = [
            {name: ((a.double() - b.double()) / unit).flatten().cpu().numpy() for name, a, b in zip(names, *pair, strict=True)}
            for pair in zip(loud.gradients, quiet.gradients, strict=False)
        ]
        self._read(job.client.name, plan.round, noise)
        if found := most_drawn(loud.uniform, len(own), promised.sampling_rate(job.num_examples)):
            place, drawn = found
            other = Quiet(self.plan, self.key, loud=loud, without=place)
            self._same(update, self._trained(job, np.delete(own, place), plan, other))
            for z, one, two, taken in zip(noise, quiet.gradients, other.gradients, drawn, strict=False):
                sums = [_flat(each) * promised.batch_size for each in (one, two)]
                self._contribution(z, sums[0] - sums[1], max(map(_norm, sums)), promised.clip_norm if taken else 0.0)
        return update

    def client(self, job: Job, plan: Plan) -> ClientUpdate:
        """An upload at the client level, and its silent twin; with noise at the server, it is the release as it is."""
        own, clip, sent = np.array(self.shards[job.client.name]), self.promised.clip_norm, job.download
        update = self._trained(job, own, plan, Mechanism(self.plan, self.key))
        if self.plan.central:
            self.faults["clip"] += not change.norm(sent, update.adapter) <= clip
            return update
        quiet = self._trained(job, own, plan, Quiet(self.plan, self.key))
        unit = self.promised.noise[job.num_examples] * clip
        noise = private_upload.coordinates(sent, update.adapter, quiet.adapter)
        noise = {name: part.flatten().cpu().numpy() / unit for name, part in noise.items()}
        self._read(job.client.name, plan.round, [noise])
        moved = _flat(private_upload.coordinates(sent, quiet.adapter, sent.adapter).values())
        self._contribution(noise, moved, _norm(_numbers(quiet.adapter)), clip)
        return update

    def _mean(self, state: ServerState, jobs: Sequence[Job], updates: Sequence[ClientUpdate]) -> ServerState:
        """The state after a round with noise at the server; its silent twin; and the twin in which a client changed nothing."""
        method, silent = self.built.method, CentralNoise(Quiet(self.plan, self.key))
        after = CentralNoise(Mechanism(self.plan, self.key)).aggregate(method, state, updates)
        quiet = silent.aggregate(method, state, updates)
        far = central_noise.reach(method, quiet.adapter, updates, jobs[0].download)
        unit = max(self.promised.noise.values()) * self.promised.clip_norm
        noise = _reached(after.adapter, quiet.adapter, far)
        noise = {name: part.flatten().cpu().numpy() / unit for name, part in noise.items()}
        self._read("the server", after.round, [noise])
        still = dataclasses.replace(updates[0], adapter=jobs[0].download.adapter)
        other = silent.aggregate(method, state, [still, *updates[1:]])
        moved, size = (_flat(_reached(quiet.adapter, each, far).values()) for each in (other.adapter, None))
        self._contribution(noise, moved, _norm(size), self.promised.clip_norm)
        return after

    # --- what is found ---

    def _trained(self, job: Job, own: np.ndarray, plan: Plan, mechanism: Mechanism) -> ClientUpdate:
        reply = trainer.train(self.model, job, own, plan, mechanism)
        if not isinstance(reply, ClientUpdate):
            raise RunFailed(f"audit: {job.client.name} in round {plan.round}: its training failed; try anyrank run first")
        return reply

    def _names(self, train: Iterable[str]) -> list[str]:
        """The parameters that are trained, in the order of `model.load`."""
        factors = [f"layer {name}, {factor}" for name in self.model.targets for factor in sorted(train)]
        return factors + [f"parameter {name}" for name in self.model.trained]

    def _same(self, update: ClientUpdate, twin: ClientUpdate) -> None:
        """Twins whose optimizers were given the same noisy gradients upload the same bytes."""
        self.faults["uploads"] += not torch.equal(_numbers(update.adapter), _numbers(twin.adapter))

    def _contribution(self, noise: Mapping[str, np.ndarray], moved: Tensor, size: float, clip: float) -> None:
        """Check what one example or client changed, `moved`, and tally the noise along it; `size`: the norm of what was
        rounded."""
        eps = max((torch.finfo(p.dtype).eps for p in self.model.module.parameters() if p.is_floating_point()), default=0.0)
        rounding, norm = _ROOM * eps * size, _norm(moved)
        self.faults["clip"] += not norm <= clip * (1 + 1e-6) + rounding
        if norm > 100 * rounding:
            along = np.concatenate([z for z in noise.values()]) @ moved.numpy() / norm
            self.tally.noise(np.array([along]), ["along one contribution"])

    def _read(self, client: str, round: int, steps: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Tally the noise of a release, `{tensor: z}` for each step, and compare its signs with those of other releases."""
        self.releases += 1
        for number, step in enumerate(steps, 1):
            for name, z in step.items():
                self.tally.noise(z, [name, client, f"round {round}", *([f"step {number}"] if len(steps) > 1 else [])])
        signs = [{name: z[:_SIGNS] > 0 for name, z in step.items()} for step in steps]
        for step in signs:
            for (name, one), (other, two) in itertools.pairwise(step.items()):
                self.tally.pair(f"{name} and {other}", one, two)
        before = {"two rounds": self._last.pop(client, None), "two clients": next(reversed(self._last.values()), None)}
        pairs = [("two steps", pair) for pair in itertools.pairwise(signs)]
        pairs += [(what, pair) for what, release in before.items() for pair in zip(release or [], signs, strict=False)]
        for what, (earlier, later) in pairs:
            for name in earlier.keys() & later.keys():
                self.tally.pair(f"{name}, in {what}", earlier[name], later[name])
        self._last[client] = signs

    def verdict(self, confidence: float) -> dict[str, Any]:
        """What was found, and whether it refutes the plan."""
        alpha = self.tally.alpha(confidence)
        rows, repeats = self.tally.rows(alpha), self.tally.repeats(alpha)
        short = [row["what"] for row in rows if row["high"] < 1 or row["most"] < 1]
        rows = [row | {"most": row["most"] if math.isfinite(row["most"]) else None} for row in rows]
        bound = self._epsilon(min((row["most"] for row in rows if row["most"] is not None), default=math.inf))
        faults = [_FAULTS[name] for name, count in self.faults.items() if count]
        return {
            **{"kind": "known noise", "level": self.plan.level, "noise_at": self.plan.noise_at, "releases": self.releases},
            **{"claimed": self._epsilon(1.0), "lower_bound": bound, "delta": self.plan.delta, "confidence": confidence},
            **{"rows": rows, "short": short, "repeats": repeats, "faults": faults},
            "refuted": bool(short or repeats or faults),
        }

    def _epsilon(self, ratio: float) -> float:
        """The plan's epsilon over the whole run if all noise were `ratio` times what it promises; 0 for an infinite one."""
        if math.isinf(ratio):
            return 0.0
        wholes = [self.promised.spending(count, self.promised.max_rounds) for count in self.promised.noise]
        found = {Spending(each.sampling_rate, ratio * each.noise_multiplier, each.steps) for each in wholes}
        return max(epsilon(self.promised.accountant, each, self.promised.delta) for each in found)


_LEVELS: Mapping[str, Callable[[_Audit, Job, Plan], ClientUpdate]] = {"example": _Audit.example, "client": _Audit.client}
_FAULTS = {
    "clip": "one example or client changes more than it may",
    "steps": "not the planned number of private steps is taken",
    "uploads": "uploads are not functions of the noisy gradients alone",
}


def _reached(one: Adapter, other: Adapter | None, far: central_noise.Reach) -> dict[str, Tensor]:
    """`{tensor: one - other}` over the most that a change of norm 1 moves each number; without numbers that nothing moves."""
    found = {}
    for name, reach in far.factors.items():
        for factor, most in reach.items():
            moved = getattr(one.layers[name], factor).double() - (
                getattr(other.layers[name], factor).double() if other else 0.0
            )
            most = most.to(moved).expand_as(moved)
            found[f"layer {name}, {factor}"] = moved[most > 0] / most[most > 0]
    for name, tensor in one.tensors.items():
        found[f"parameter {name}"] = (tensor.double() - (other.tensors[name].double() if other else 0.0)) / far.tensors
    return found


def _norm(numbers: Tensor) -> float:
    return float(numbers.norm())


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten().cpu() for tensor in tensors])


def _numbers(adapter: Adapter) -> Tensor:
    return _flat([f for layer in adapter.layers.values() for f in (layer.A, layer.B)] + list(adapter.tensors.values()))
