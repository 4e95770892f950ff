"""Why a frozen A wins or loses: what noise costs, what becomes of it in the product, and what the rows of A reach.

A run of `experiments/ffa.py` is done twice at its own learning rate, with noise and (almost) without, on the same clients, the
same samples in every step and the same clipping. With `A' = A + E_A` and `B' = B + E_B`, the change of the weight differs by
`s (E_B A + B E_A + E_B E_A)`. E_A and E_B hold the noise and what it did to later gradients. The reach of A is the share of the
squared norm of the weight's gradient G, at the start, that lies in A's row space: `|G P|^2 / |G|^2`. No step of B alone can
change the weight outside of that space.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import quick
import results
import torch
from ffa import BATCH, DATA, SKEW, WAYS, Bench, Cell, Known, rounds, skewed
from ffa_tables import table

from anyrank import simulation
from anyrank.adapter.adapter import Adapter
from anyrank.messages.records import Scaling
from anyrank.privacy.noise import Mechanism
from anyrank.training.lora import LoraModel

KEPT, RAW = results.ROOT / "runs" / "ffa-why.jsonl", results.PICTURES / "ffa-why.jsonl"
COMPARED, NEXT_TO_NONE, MOST = ("LoRA", "FFA-LoRA"), 1e-6, 2000


def cells() -> Iterator[Cell]:
    for seed in range(3):
        for epsilon in (1.0, 6.0):
            for clients in BATCH:
                yield from (Cell(data, way, epsilon, 8, clients, "severe", seed) for data in DATA for way in COMPARED)


def gradients(model: LoraModel) -> dict[str, torch.Tensor]:
    """The gradient `[out, in]` of each target's weight over the first training examples, at the start (B is zero)."""
    start = model.start(1, Scaling(1.0, "constant"), 0)
    layers = {name: quick.stacked([layer], "AB") for name, layer in start.layers.items()}
    index = torch.arange(min(MOST, len(model.task.train)))
    inputs, outputs = quick.through(model, layers, index)
    return {name: g.detach().T @ x for name, x, (_, g) in zip(layers, inputs, outputs, strict=True)}


def reach(gradient: dict[str, torch.Tensor], adapter: Adapter) -> float:
    """The share of the gradients' squared norm in the row spaces of A."""
    inside = 0.0
    for name, G in gradient.items():
        basis = torch.linalg.qr(adapter.layers[name].A.double().T)[0]  # [in, rank], orthonormal
        inside += float((G.double() @ basis).square().sum())
    return inside / sum(float(G.double().square().sum()) for G in gradient.values())


def parts(noisy: Adapter, quiet: Adapter) -> dict[str, float]:
    """Squared Frobenius norms over all layers: of the change without noise, and of what noise adds, whole and in its terms."""
    squares = dict.fromkeys(("update", "difference", "E_B A", "B E_A", "E_B E_A"), 0.0)
    for name, layer in quiet.layers.items():
        A, B, s = layer.A.double(), layer.B.double(), layer.scaling
        E_A, E_B = noisy.layers[name].A.double() - A, noisy.layers[name].B.double() - B
        products = {"update": B @ A, "E_B A": E_B @ A, "B E_A": B @ E_A, "E_B E_A": E_B @ E_A}
        products["difference"] = products["E_B A"] + products["B E_A"] + products["E_B E_A"]
        for key, product in products.items():
            squares[key] += float(torch.sum((s * product) ** 2))
    return squares


def measure(bench: Bench, cell: Cell, rate: float) -> dict[str, Any]:
    config, task = bench.config(cell, rate), bench.task(cell.data, False)
    shards = skewed(task.train.labels.numpy(), cell.clients, SKEW[cell.skew], cell.seed)
    built = simulation.build(config, task=task, shards=shards)
    quiet = replace(built.privacy, noise=dict.fromkeys(built.privacy.noise, NEXT_TO_NONE))
    found, ends = {}, {}
    gradient = gradients(built.engine.model)
    for name, plan in (("noisy", built.privacy), ("quiet", quiet)):
        states = list(rounds(built, Mechanism(plan, f"ffa {cell.seed}".encode())))
        scores = [built.engine.evaluate(state.adapter, None).accuracy for state in states[-5:]]
        found[f"accuracy, {name}"], ends[name] = statistics.fmean(scores), states[-1].adapter
        found[f"reach, {name}"] = reach(gradient, states[-1].adapter)
    found["reach, start"] = reach(gradient, built.method.init(*_start(built)).adapter)
    built.close()
    return found | parts(ends["noisy"], ends["quiet"])


def _start(built):
    scaling, seed = Scaling(built.config.lora.alpha, built.config.lora.scaling), built.config.run.seed
    return built.engine.start(built.population.levels()[-1], scaling, seed), scaling, seed


def fill(known: Known, bench: Bench, seeds: int) -> None:
    """Measure what is missing, at the rates that are known."""
    if not KEPT.exists() and RAW.exists():
        shutil.copyfile(RAW, KEPT)
    done = {Cell(**line["cell"]) for line in lines()}
    rates = {cell: rate for cell, rate in known.found if cell.skew != "tuning"}
    for cell in cells():
        if cell not in done and cell.seed < seeds and cell in rates:
            line = {"cell": asdict(cell), "rate": rates[cell], **measure(bench, cell, rates[cell])}
            with KEPT.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(*asdict(cell).values(), line["accuracy, noisy"], line["accuracy, quiet"], flush=True)


def lines() -> list[dict[str, Any]]:
    path = KEPT if KEPT.exists() else RAW
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables() -> list[str]:
    """One row for each setting and way, means over the seeds that it has."""
    groups: dict[Cell, list[dict[str, Any]]] = {}
    for line in lines():
        groups.setdefault(replace(Cell(**line["cell"]), seed=0), []).append(line)
    rows = []
    for cell in sorted(
        groups, key=lambda cell: (DATA.index(cell.data), -cell.epsilon, cell.clients, list(WAYS).index(cell.way))
    ):
        mean = {key: statistics.fmean(line[key] for line in groups[cell]) for key in groups[cell][0] if key != "cell"}
        size = mean["update"] ** 0.5
        noise = [f"{(mean[key] ** 0.5) / size:.2f}" for key in ("difference", "E_B A", "B E_A", "E_B E_A")]
        accuracy = [f"{100 * mean[f'accuracy, {key}']:.1f}" for key in ("noisy", "quiet")]
        cost = f"{100 * (mean['accuracy, noisy'] - mean['accuracy, quiet']):+.1f}"
        reached = [f"{100 * mean[f'reach, {key}']:.1f}" for key in ("start", "noisy", "quiet")]
        own = [cell.data, f"{cell.epsilon:g}", cell.clients, cell.way, len(groups[cell]), f"{mean['rate']:g}"]
        rows.append([*own, *accuracy, cost, *noise, *reached])
    head = ["data", "ε", "clients", "way", "seeds", "rate", "with noise, %", "without, %", "noise costs", "noise / update"]
    head += ["E_B A", "B E_A", "E_B E_A", "reach at start, %", "at the end, %", "at the end without noise, %"]
    title = (
        "**What the noise does, rank 8, severe skew: the same run with and without noise, at the rate of the run with noise**"
    )
    return [title, table(head, rows, 1)]
