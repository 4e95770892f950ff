"""Which learning rate suits which method under which privacy budget: `python experiments/private_rates.py`.

The rates in `configs/papers/6*.toml` come from here. Each is climbed to by factors of 2 from the one that suited the next
larger budget, on examples that are held out of the training data and on run seeds of its own, so that neither the test
examples nor the seeds of the studies have a part in it. What they do on a fixed grid of rates goes into `docs/results.md`.
Results are kept in `runs/private-rates.json`; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import results

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "runs" / "private-rates.json"
FASHION = "/usr/share/datasets/fashion-mnist"
BUDGETS, STRONG, ONE = ("none", "6", "3", "1"), ("1", "0.5"), ("3",)
# Where the climb begins, for the first budget.
FIRST = {"fedavg@8": 0.125, "ffa_lora@8": 0.5, "rolora@8": 0.0625, "fedsvd@8": 0.25}
NOISY = {"fedavg@8": 1.0, "ffa_lora@8": 4.0, "rolora@8": 1.0, "fedsvd@8": 4.0}
MIXED = {"ffa_lora": 8.0, "ffa_lora@8": 8.0, "ffa_lora@32": 8.0, "fedavg@8": 2.0, "rbla": 2.0, "raflora": 2.0, "fedavg@32": 2.0}
PRIVATE = 8  # times as much from no budget to one: clipped gradients are small
BROKEN = -1.0  # the accuracy that stands for a run that diverged
SEEDS = (100, 101, 102)

COMMON = (
    *("clients.count=3", "clients.participation=1.0", "data.partition.min_examples=600"),
    *("run.rounds=10", "train.optimizer=sgd", "train.batch_size=128", "train.local_steps=10"),
)
NAME, GRID = "6e-rates", (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
GRID_EPSILON, GRID_METHODS = "3", ("fedavg@8", "ffa_lora@8")
FIVE = ("clients.count=5", "data.partition.min_examples=300")


@dataclass(frozen=True)
class Setting:
    """One federation, with examples held out of its training data in place of its test set, and what to find rates for."""

    name: str
    path: Path
    overrides: tuple[str, ...]
    first: Mapping[str, float]
    budgets: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS[:1]


def settings(folder: Path) -> Iterator[Setting]:
    fashion, bank = ROOT / "configs" / "fashion-mlp.toml", ROOT / "configs" / "banking77.toml"
    images = (*COMMON, *pictures(fashion, folder), "data.partition.alpha=0.3")
    texts = (*COMMON, *sentences(bank, folder))
    clothes = (*images, "data.train_examples=6000")
    yield Setting("Fashion-MNIST", fashion, clothes, FIRST, BUDGETS[:3])
    yield Setting("Fashion-MNIST", fashion, clothes, NOISY, STRONG, SEEDS)  # noise makes one seed a poor judge
    yield Setting("Banking77", bank, texts, FIRST, BUDGETS)
    yield Setting("Fashion-MNIST, five", fashion, (*images, "data.train_examples=10000", *FIVE), MIXED, ONE)
    yield Setting("Banking77, five", bank, (*texts, *FIVE), MIXED, ONE)


def pictures(config: Path, folder: Path) -> tuple[str, ...]:
    """The training images of Fashion-MNIST in a file of its own, a tenth of them as its test images: a private run scores no
    rows that it holds out of its own source."""
    from anyrank import config as configs
    from anyrank.data import images

    for name in os.listdir(FASHION):
        if name.startswith("train"):
            (folder / name).symlink_to(f"{FASHION}/{name}")
    parts = images.load_split(configs.load(config, (f"data.source={folder}", "data.test_fraction=0.1")).data)
    arrays = {f"{what}_{name}": value for name, part in zip(("train", "test"), parts, strict=True)
              for what, value in (("x", np.stack(list(part))), ("y", part.labels))}  # fmt: skip
    np.savez(folder / "fashion.npz", **arrays)
    return (f"data.source={folder / 'fashion.npz'}", "data.image=x_train", "data.label=y_train")


def sentences(config: Path, folder: Path) -> tuple[str, ...]:
    """The training texts of Banking77 in two files, a fifth of them as held-out ones."""
    from anyrank import config as configs
    from anyrank.data import texts

    data = configs.load(config, ("data.test_source=",)).data
    for name, part in zip(("train", "test"), texts.load_split(data), strict=True):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow((data.text, data.label))
            rows.writerows((text, part.label_names[label]) for text, label in zip(part.texts, part.labels, strict=True))
    return (f"data.source={folder / 'train.csv'}", f"data.test_source={folder / 'test.csv'}")


def budget(epsilon: str) -> tuple[str, ...]:
    return () if epsilon == "none" else ("privacy.level=example", f"privacy.epsilon={epsilon}", "privacy.delta=1e-5")


class Rates:
    """Accuracies on held-out examples by `set/method/epsilon/rate`, each computed once."""

    def __init__(self) -> None:
        self.known = json.loads(KEPT.read_text()) if KEPT.exists() else {}

    def accuracy(self, setting: Setting, label: str, epsilon: str, rate: float) -> float:
        """Mean over the setting's seeds; `BROKEN` where any run diverged."""
        found = [self._one(setting, label, epsilon, rate, seed) for seed in setting.seeds]
        return BROKEN if BROKEN in found else statistics.fmean(found)

    def _one(self, setting: Setting, label: str, epsilon: str, rate: float, seed: int) -> float:
        key = f"{setting.name}/{label}/{epsilon}/{rate:g}/{seed}"
        if key not in self.known:
            asked = (*setting.overrides, *budget(epsilon), f"train.learning_rate={rate:g}", f"run.seed={seed}")
            self.known[key] = score(setting.path, asked, label)
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(self.known, indent=1) + "\n")
            print(key, round(self.known[key], 4), flush=True)
        return self.known[key]

    def best(self, setting: Setting, label: str, epsilon: str, start: float) -> float:
        """The rate, by factors of 2 from `start`, whose two neighbours are no better."""
        rate, before = start, 0.0
        while rate != before:
            before = rate
            rate = max((before, 2 * before, before / 2), key=lambda each: self.accuracy(setting, label, epsilon, each))
        return rate


def score(path: Path, overrides: tuple[str, ...], label: str) -> float:
    """Mean accuracy of a run's last five rounds, `BROKEN` where it diverged."""
    from anyrank import config as configs
    from anyrank import simulation
    from anyrank.errors import RunFailed
    from anyrank.studies import comparison

    chosen = comparison.variant(configs.load(path, (*overrides, *results.UNGUARDED)), label)
    with tempfile.TemporaryDirectory() as out:
        try:
            return simulation.execute(chosen, Path(out) / "run")["last_accuracy"]
        except RunFailed:
            return BROKEN


def main() -> None:
    began, rates, lines = time.monotonic(), Rates(), []
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings(Path(folder)):
            for label, rate in setting.first.items():
                for epsilon in setting.budgets:
                    rate = rates.best(setting, label, epsilon, rate)
                    print(f"{setting.name}, {label}, epsilon {epsilon}: learning rate {rate:g}", flush=True)
                    rate *= PRIVATE if epsilon == "none" else 1
            if setting.first is FIRST:
                lines += [row(rates, setting, label) for label in GRID_METHODS]
    write(lines, time.monotonic() - began)


def row(rates: Rates, setting: Setting, label: str) -> str:
    """A line of the grid: accuracies in percent, the best in bold."""
    found = [rates.accuracy(setting, label, GRID_EPSILON, rate) for rate in GRID]
    cells = [f"**{100 * value:.1f}**" if value == max(found) else f"{100 * value:.1f}" for value in found]
    return f"| {setting.name} | `{label}` | {' | '.join(cells)} |"


def write(lines: Sequence[str], wall_s: float) -> None:
    head = ["data", "method", *(f"{rate:g}" for rate in GRID)]
    table = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * len(GRID)}", *lines]
    claim = f"*Epsilon {GRID_EPSILON}: accuracy in % of the last five rounds by learning rate, on held-out training examples.*"
    day = datetime.date.today().isoformat()
    told = f"`python experiments/private_rates.py` · seed {SEEDS[0]} · {results.circumstances(wall_s, day)}"
    results.put(NAME, "Learning rates that private training tolerates", [claim, told, "\n".join(table)])


if __name__ == "__main__":
    main()
