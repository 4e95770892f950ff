"""How much of a private update is noise: `python experiments/noise.py` writes a table into `docs/results.md`.

A federation is run twice, with noise and (almost) without, on the same clients, the same samples in every step and the same
clipping. What differs is the noise alone, and what it makes of the product: `|dW_private - dW|_F` over all layers. With
`B' = B + E_B` and `A' = A + E_A` that difference is `s (E_B A + B E_A + E_B E_A)`; the last part is noise times noise. E_A and
E_B hold the noise and what it did to later gradients. All of it follows the learning rate, the same for both methods.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import results
import torch

from anyrank import config as configs
from anyrank import simulation
from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config
from anyrank.federation import asking, loop
from anyrank.federation.federation import Federation
from anyrank.messages.plan import plan_round
from anyrank.privacy.noise import Mechanism
from anyrank.studies import comparison

NAME, SEEDS = "6d-noise", range(3)
METHODS, RANKS, STEPS = ("fedavg", "ffa_lora"), (2, 8, 32), (1, 5, 20)
NOISE, NEXT_TO_NONE = 1.0, 1e-6  # multiples of the clip norm
OVERRIDES = (
    *("clients.count=3", "clients.participation=1.0", "data.partition.alpha=0.3", "data.partition.min_examples=600"),
    *("data.train_examples=6000", "data.test_examples=2000", "train.optimizer=sgd", "train.batch_size=128"),
    *("privacy.level=example", "privacy.delta=1e-5", f"privacy.noise_multiplier={NOISE}"),
)


def after(config: Config) -> tuple[Adapter, Adapter]:
    """The global adapter after the run's rounds, with the noise that `config` asks for and without."""
    built = simulation.build(config)
    quiet = replace(built.privacy, noise=dict.fromkeys(built.privacy.noise, NEXT_TO_NONE))
    key = f"noise {config.run.seed}".encode()  # it draws the same samples for both
    return _run(built, Mechanism(built.privacy, key)), _run(built, Mechanism(quiet, key))


def _run(built: Federation, privacy: Mechanism) -> Adapter:
    state, run = loop.start(built), built.config.run
    while state.round < run.rounds:
        jobs, _ = asking.dispatch(built, state, state.round + 1)
        plan = plan_round(built.config.train, state.round + 1, run.rounds, run.seed)
        state = built.method.aggregate(state, list(built.engine.train(jobs, plan, privacy)))
    return state.adapter


def parts(noisy: Adapter, quiet: Adapter) -> dict[str, float]:
    """Frobenius norms over all layers: of the product without noise, of the difference, and of its three parts."""
    squares = dict.fromkeys(("update", "difference", "E_B A", "B E_A", "E_B E_A"), 0.0)
    for name, layer in quiet.layers.items():
        A, B, s = layer.A.double(), layer.B.double(), layer.scaling
        E_A, E_B = noisy.layers[name].A.double() - A, noisy.layers[name].B.double() - B
        products = {"update": B @ A, "E_B A": E_B @ A, "B E_A": B @ E_A, "E_B E_A": E_B @ E_A}
        products["difference"] = products["E_B A"] + products["B E_A"] + products["E_B E_A"]
        for key, product in products.items():
            squares[key] += float(torch.sum((s * product) ** 2))
    return {key: square**0.5 for key, square in squares.items()}


def row(method: str, rank: int, steps: int, rounds: int, rate: float) -> str:
    """One line of the table: means over seeds."""
    asked = (f"train.local_steps={steps}", f"run.rounds={rounds}", f"train.learning_rate={rate:g}")
    asked = (*OVERRIDES, *results.UNGUARDED, *asked)
    base = comparison.variant(configs.load(results.ROOT / "configs" / "fashion-mlp.toml", asked), f"{method}@{rank}")
    found = [parts(*after(base.replace(run={"seed": seed}))) for seed in SEEDS]
    mean = {key: statistics.fmean(each[key] for each in found) for key in found[0]}
    spread = statistics.stdev(each["difference"] for each in found)
    cells = [f"`{method}@{rank}`", rounds, steps, f"{rate:g}", f"{mean['update']:.2f}"]
    cells += [f"{mean['difference']:.2f} ± {spread:.2f}", f"{mean['difference'] / mean['update']:.2f}"]
    cells += [f"{mean[key]:.2f}" for key in ("E_B A", "B E_A", "E_B E_A")]
    line = f"| {' | '.join(map(str, cells))} |"
    print(line, flush=True)
    return line


def grid() -> Sequence[tuple[str, int, int, int, float]]:
    """Method, rank, local steps, rounds and learning rate of every line."""
    ranks = [(method, rank, steps, 1, 2.0) for steps in STEPS for rank in RANKS for method in METHODS]
    rates = [(method, 8, 5, 1, rate) for rate in (0.5, 8.0) for method in METHODS]
    return [*ranks, *rates, *((method, 8, 5, 10, 2.0) for method in METHODS)]


def main() -> None:
    began = time.monotonic()
    head = ["method", "rounds", "local steps", "rate", "update, no noise", "difference", "difference / update"]
    head += ["E_B A", "B E_A", "E_B E_A"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(row(*cell) for cell in grid())]
    claim = "*FFA-LoRA, section 3: noise on A and B is amplified in the product; with A frozen it stays linear.*"
    seeds, today = ", ".join(map(str, SEEDS)), datetime.date.today().isoformat()
    told = f"`python experiments/noise.py` · seeds {seeds} · {results.circumstances(time.monotonic() - began, today)}"
    results.put(NAME, "The noise in the product", [claim, told, "\n".join(lines)])


if __name__ == "__main__":
    main()
