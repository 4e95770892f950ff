"""Test the promised epsilon by a membership-inference audit in one run, with canaries that are guessed from uploads.

Some training examples become canaries: they get a wrong label, so that only their own presence moves the model towards it, and
a fair coin decides for each whether it is trained on. The guesser sees every upload and knows all examples, but not the coins,
and guesses the coins. Under (epsilon, delta) differential privacy, a bound limits how often any guesser can be right; more
correct guesses refute the epsilon.

With SGD, an upload is `y = sum_i N_i c_i + noise`: c_i is the clipped gradient of example i, and N_i the number of times it was
drawn. If everything were Gaussian, the mean of N_i given y would be one linear solve. The canaries whose N_i exceeds its
expectation most are guessed as included, and those with the lowest values as left out.

The bound is theorem 5.2 of Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023. An audit
can refute a promise but never prove it: a lower bound far below epsilon is the common case, and no evidence.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyrank import devices, keys, simulation, stopping
from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config
from anyrank.errors import ConfigError
from anyrank.federation import loop
from anyrank.federation.federation import Federation
from anyrank.messages.plan import Plan
from anyrank.messages.records import ClientUpdate, Download, Failure, Job, Profile, Scaling, Scores
from anyrank.privacy.noise import Mechanism
from anyrank.privacy.plan import PrivacyPlan
from anyrank.runs.folder import RunDir
from anyrank.simulation import Setting
from anyrank.tasks.base import Classification, Examples
from anyrank.training.lora import LoraModel
from anyrank.training.private_examples import PerExample

_AT_ONCE = 256  # number of examples whose gradients are computed together
# The share of canaries that are guessed: those with the most extreme scores. Fixed before any audit; choosing it afterwards
# would be cheating.
_GUESSED = 0.5


@dataclass(frozen=True, eq=False)
class Canaries:
    """Examples with wrong labels: `index` `[m]` of the training set, `labels` `[m]`, `included` `[m]` bool by fair coins."""

    index: np.ndarray
    labels: np.ndarray
    included: np.ndarray

    @classmethod
    def draw(cls, labels: np.ndarray, candidates: np.ndarray, number: int, seed: int) -> Canaries:
        """`number` of the `candidates` (indices), each with a wrong label."""
        rng, classes = keys.rng(seed, "audit"), int(labels.max()) + 1
        index = np.sort(rng.choice(candidates, number, replace=False))
        wrong = (labels[index] + rng.integers(1, classes, number)) % classes
        return cls(index, wrong, rng.random(number) < 0.5)


def audit(config: Config, canaries: int, noise_factor: float = 1.0, confidence: float = 0.95, on_round=None) -> dict[str, Any]:
    """Train `config`'s federation with canaries, and compute a lower bound on its epsilon from the correct guesses.

    `noise_factor` multiplies the actual noise but not the planned noise, to test whether the audit notices. Returns the
    `claimed` epsilon, its `lower_bound` at `confidence`, how many canaries were `guessed` and how many of them `right`. Raises
    `ConfigError` if there is no example-level plan to audit, or no canary can be made.
    """
    _check(config)
    watches: list[_Watch] = []

    def watching(setting: Setting) -> _Watch:
        watches.append(_Watch(setting, _canaries(setting, canaries)))
        return watches[0]

    with devices.threads(config.run.threads):
        built = simulation.build(config, engine=watching)
        (watch,) = watches
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                stopping.unfinished(Path(folder)),
                RunDir.open(Path(folder) / "run", config) as store,
            ):
                uncharged = dataclasses.replace(_with(built, noise_factor), sources=tuple)  # no model of it is kept
                loop.run(uncharged, store, on_round)
                claimed = _claimed(built.privacy, store.charges())
        finally:
            built.close()
    return _verdict(watch.canaries, watch.scores, claimed, built.privacy.delta, confidence)


def _check(config: Config) -> None:
    """Raise `ConfigError` for a run that cannot be audited."""
    if config.privacy.level != "example":
        raise ConfigError(
            "[privacy]: expected level = 'example', which protects single examples; otherwise there is nothing to audit"
        )
    if config.privacy.noise != "independent":
        raise ConfigError(
            f"privacy.noise: an audit reads steps whose noise is independent, got {config.privacy.noise!r}; audit the "
            "configuration with 'independent'"
        )
    train = config.train
    if train.optimizer != "sgd" or train.momentum or train.weight_decay or train.proximal_mu or train.precondition:
        raise ConfigError(
            "train: an audit reads uploads as sums of gradients; expected optimizer = 'sgd' without momentum, "
            "weight_decay, proximal_mu and precondition"
        )


def _canaries(setting: Setting, number: int) -> Canaries:
    task, shards = setting.task, setting.shards.shards
    if not isinstance(task.objective, Classification):
        raise ConfigError(f"model.task: an audit gives canaries wrong labels, but {task.name} has no labels")
    held = np.concatenate([shards[client] for client in range(len(shards))])
    if not 1 <= number <= len(held) // 2:
        raise ConfigError(
            f"--canaries: expected 1 to {len(held) // 2}, half of the {len(held)} training examples, got {number}"
        )
    return Canaries.draw(task.train.labels.cpu().numpy(), held, number, setting.config.run.seed)


def _with(built: Federation, noise_factor: float) -> Federation:
    """The federation with its noise multiplied; its plan and the numbers of examples stay the same."""
    if noise_factor == 1.0:
        return built
    noise = {count: noise_factor * value for count, value in built.privacy.noise.items()}
    return dataclasses.replace(built, privacy=dataclasses.replace(built.privacy, noise=noise))


def _claimed(plan: PrivacyPlan, charges: Sequence[Mapping[str, Any]]) -> float:
    """The largest epsilon over clients that the untouched plan reports for the rounds that were charged."""
    counts = {row["client"]: row["num_examples"] for row in charges}
    rounds = {name: sum(row["client"] == name for row in charges) for name in counts}
    return max(plan.epsilon_after(count, rounds[name]) for name, count in counts.items())


def _verdict(
    canaries: Canaries, scores: Mapping[int, float], claimed: float, delta: float, confidence: float
) -> dict[str, Any]:
    """Guess "in" for the highest scores and "out" for the lowest, and count. Canaries of clients that never trained are out."""
    coins = zip(canaries.index.tolist(), canaries.included.tolist(), strict=True)
    ordered = [inside for _, inside in sorted((scores[index], inside) for index, inside in coins if index in scores)]
    half = int(len(ordered) * _GUESSED) // 2
    right = sum(not inside for inside in ordered[:half]) + sum(ordered[len(ordered) - half :])
    bound = lower_bound(len(ordered), 2 * half, right, delta, confidence)
    figures = {"canaries": len(ordered), "guessed": 2 * half, "right": right, "confidence": confidence}
    return {"claimed": claimed, "lower_bound": bound, "delta": delta, **figures, "refuted": bound > claimed}


class _Watch:
    """The in-process engine, with canaries among its examples; it reads the uploads.

    `scores` `{example: evidence that it was included}`.
    """

    def __init__(self, setting: Setting, canaries: Canaries) -> None:
        self.canaries, self.scores, self.shards = canaries, {}, setting.shards
        labels = setting.task.train.labels.clone()
        labels[torch.from_numpy(canaries.index)] = torch.from_numpy(canaries.labels).to(labels)
        task = dataclasses.replace(setting.task, train=Examples(setting.task.train.inputs, labels))
        held = _Without(setting.shards, canaries.index[~canaries.included])
        self._engine = simulation.in_process(dataclasses.replace(setting, task=task, shards=held))

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        return self._engine.start(rank, scaling, seed)

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        return self._engine.evaluate(adapter, merged)

    def profile(self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None) -> Profile:
        return self._engine.profile(jobs, plan, mechanism)

    def close(self) -> None:
        self._engine.close()

    def train(
        self, jobs: Sequence[Job], plan: Plan, mechanism: Mechanism | None = None, deadline_s: float | None = None
    ) -> Iterator[ClientUpdate | Failure]:
        by_name = {job.client.name: job for job in jobs}
        for reply in self._engine.train(jobs, plan, mechanism, deadline_s):
            if isinstance(reply, ClientUpdate):
                self._read(by_name[reply.client], reply, plan, mechanism.plan)
            yield reply

    def _read(self, job: Job, update: ClientUpdate, plan: Plan, privacy: PrivacyPlan) -> None:
        """Add to the score of each of the client's canaries its estimated number of draws minus the expected number."""
        model, examples = self._engine.model, np.array(self.shards[job.client.name])  # a copy: shards may be read-only
        canary = np.isin(examples, self.canaries.index)
        parameters = model.load(job.download)
        parts = [PerExample(model, parameters).gradients(part) for part in torch.from_numpy(examples).split(_AT_ONCE)]
        gradients = torch.cat([torch.cat([g.flatten(1) for g in part], dim=1) for part in parts]).double()
        gradients *= (privacy.clip_norm / torch.linalg.vector_norm(gradients, dim=1, keepdim=True)).clamp_max(1.0)
        moved = torch.cat([step.flatten() for step in _steps(model, job.download, update)]).double()
        sums = moved * privacy.batch_size / plan.learning_rate
        draws, steps = privacy.sampling_rate(job.num_examples), privacy.local_steps
        mean = torch.from_numpy(np.where(canary, 0.5, 1.0) * draws * steps)
        spread = torch.from_numpy(np.where(canary, (draws * steps) ** 2 / 4, 0.0) + mean.numpy() * (1 - draws))
        noise = steps * (privacy.noise[job.num_examples] * privacy.clip_norm) ** 2
        excess = _posterior(gradients, sums, mean, spread, noise)
        for example, score in zip(examples[canary].tolist(), excess[torch.from_numpy(canary)].tolist(), strict=True):
            self.scores[example] = self.scores.get(example, 0.0) + score


def _posterior(gradients: Tensor, sums: Tensor, mean: Tensor, spread: Tensor, noise: float) -> Tensor:
    """`E[N | y] - E[N]` `[n]` for `y = G' N + e`: `gradients` G `[n, P]`, `sums` y `[P]`, N of `mean` and variance `spread`
    `[n]`, e of variance `noise`. It is `D (G G' D + noise)^-1 G (y - G' mean)`, n x n whatever P is.
    """
    gram = gradients @ gradients.T
    floor = 1e-3 * float(gram.diagonal().mean())  # gradients change during the local steps, so they are not known exactly
    system = gram * spread + (noise + floor) * torch.eye(len(mean), dtype=gram.dtype)
    return spread * torch.linalg.solve(system, gradients @ (sums - gradients.T @ mean))


def _steps(model: LoraModel, download: Download, update: ClientUpdate) -> list[Tensor]:
    """The download minus the upload of each trained tensor, in the order of `model.load`."""
    steps = []
    for name, sent in download.adapter.layers.items():
        got = update.adapter.layers[name]
        steps += [getattr(sent, factor) - getattr(got, factor) for factor in ("A", "B") if factor in download.train]
    return steps + [download.adapter.tensors[name] - update.adapter.tensors[name] for name in model.trained]


@dataclass(frozen=True, eq=False)
class _Without:
    """Shards by name without some examples; the plan still counts these, because counts must not reveal which are missing."""

    shards: Any
    missing: np.ndarray

    def __getitem__(self, client: str) -> np.ndarray:
        return np.setdiff1d(self.shards[client], self.missing)


# --- what the correct guesses refute -----------------------------------------------------------------------------------


def lower_bound(canaries: int, guessed: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that `right` of `guessed` coins among `canaries` refute at `confidence`; 0 for none.

    >>> round(lower_bound(100, 100, 100, 0.0), 2), lower_bound(100, 100, 55, 0.0)
    (3.49, 0.0)
    """
    low, high = 0.0, 20.0
    if p_value(canaries, guessed, right, low, delta) > 1 - confidence:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        refuted = p_value(canaries, guessed, right, middle, delta) <= 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def p_value(canaries: int, guessed: int, right: int, epsilon: float, delta: float) -> float:
    """The largest probability of `right` or more correct guesses of `guessed` coins under (epsilon, delta) differential
    privacy.

    `P[X >= v] + 2 m delta max_i (P[v > X >= v - i] / i)`, X binomial of `guessed` coins with `e^epsilon / (1 + e^epsilon)`
    (theorem 5.2 of the paper, for m canaries and v right guesses).
    """
    from scipy.stats import binom

    share = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guessed, share))
    if not delta or not right:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guessed, share))  # P[v > X >= v - i], i = 1 ... v
    return min(1.0, tail + 2 * canaries * delta * float((below / np.arange(1, right + 1)).max()))
