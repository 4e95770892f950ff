"""Does alpha matter, with and without clipping: `python experiments/alpha.py` writes a table into `docs/results.md`.

The update is `s B A`. Under SGD without clipping a gradient by B grows with s, and so does what a step of B does to the
product: `s` in place of `s0` is the learning rate times `(s / s0)^2`, exactly where A is frozen. Where every example's
gradient is clipped its size no longer counts, and `s / s0` is left. So each alpha is run at the tuned rate for alpha = 2, at
that rate times `(s0 / s)^2`, and times `s0 / s`.
"""

from __future__ import annotations

import datetime
import statistics
import time

import private_rates
import results

NAME, SEEDS, USUAL = "6c-alpha", range(3), 2.0
# Learning rates by method and budget, as `private_rates` found them for alpha = 2.
RATES = {("fedavg@8", "none"): 0.125, ("ffa_lora@8", "none"): 2.0, ("fedavg@8", "3"): 2.0, ("ffa_lora@8", "3"): 8.0}
ALPHAS, POWERS = (0.5, 8.0), (0, 2, 1)
OVERRIDES = (*private_rates.COMMON, "data.train_examples=6000", "data.partition.alpha=0.3")


def cell(label: str, epsilon: str, alpha: float, power: int) -> str:
    """Last-five accuracy over seeds in percent, at the rate for alpha = 2 times `(2 / alpha) ** power`."""
    rate = RATES[label, epsilon] * (USUAL / alpha) ** power
    asked = (*OVERRIDES, *private_rates.budget(epsilon), f"lora.alpha={alpha}", f"train.learning_rate={rate:g}")
    path = results.ROOT / "configs" / "fashion-mlp.toml"
    found = [private_rates.score(path, (*asked, f"run.seed={seed}"), label) for seed in SEEDS]
    known = [100 * value for value in found if value != private_rates.BROKEN]
    if len(known) < len(found):
        return f"diverges on {len(found) - len(known)} of {len(found)} ({rate:g})"
    return f"{statistics.fmean(known):.1f} ± {statistics.stdev(known):.1f} ({rate:g})"


def row(label: str, epsilon: str) -> str:
    cells = [cell(label, epsilon, USUAL, 0), *(cell(label, epsilon, alpha, power) for power in POWERS for alpha in ALPHAS)]
    line = f"| `{label}` | {epsilon} | {' | '.join(cells)} |"
    print(line, flush=True)
    return line


def main() -> None:
    began, told = time.monotonic(), {0: "same rate", 2: "rate x (2/alpha)²", 1: "rate x 2/alpha"}
    head = ["method", "ε", "alpha 2", *(f"alpha {alpha:g}, {told[power]}" for power in POWERS for alpha in ALPHAS)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(row(*key) for key in RATES)]
    claim = (
        "*FFA-LoRA, theorem 1: with A frozen, another alpha is another learning rate. Accuracy in %, last five rounds (rate).*"
    )
    seeds, day = ", ".join(map(str, SEEDS)), datetime.date.today().isoformat()
    said = f"`python experiments/alpha.py` · seeds {seeds} · {results.circumstances(time.monotonic() - began, day)}"
    results.put(NAME, "Alpha with and without clipping", [claim, said, "\n".join(lines)])


if __name__ == "__main__":
    main()
