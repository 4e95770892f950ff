"""What hostile clients do to a run, and what defences do about it: `python experiments/attacks.py` writes tables and a figure.

The attacks are those of `tests/attacks.py`. Each cell is a whole run of the embedded digits task, by the round loop that every
run has. Runs are kept in `runs/attacks.json`, a second call goes on where the first one stopped; delete the file, or its runs
with a guard, after a change of the guard. `--write` writes what is known without a run.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import heat
import results

sys.path.insert(0, str(results.ROOT / "tests"))  # its attacks.py, not this file

from anyrank.config.sections import Config
from anyrank.errors import ConfigError
from attacks import ATTACKS, Attack, honest
from attacks_run import CHANCE, run

NAME, SEEDS, ROUNDS, CLIENTS = "8-attacks", (0, 1, 2), 40, 20
KEPT, RAW, FIGURE = results.ROOT / "runs" / "attacks.json", results.PICTURES / "attacks.json", results.PICTURES / "attacks.png"
METHODS = ("raflora", "rbla", "flexlora", "stayput")
OFF = {"norm": 0.0, "far": 0.0, "owner": 1.0, "rollback": False, "offences": 0}
DEFENCES: Mapping[str, dict[str, dict[str, Any]]] = {
    "none": {"guard": OFF},
    "guard": {},
    "geometric-median": {"robust": {"rule": "geometric-median"}},
    "multi-krum": {"robust": {"rule": "multi-krum"}},
    "trimmed-mean": {"robust": {"rule": "trimmed-mean", "trim": 0.2}},  # of five clients, one at each end
    "median": {"robust": {"rule": "median"}},
}
RULES = tuple(DEFENCES)[2:]
UNKNOWN, NEAR_CHANCE = "–", 20
LENGTHS = "lengths alone"  # the guard without its limit on single owners
HOSTILE, WITH_RULES = (1, 2, 4, 8), (1, 4)  # hostile clients of 20; for the rules, fewer of them
NOBODY = "none hostile"
HONEST_SEEDS = range(5)
# For the rules: what the guard does not reject, and one that it does.
PASSING = ("scaling x1000", "sign flip", "assembled factors", "collusion", "little is enough", "label flip", "backdoor")
BACKDOORS = ("backdoor", "backdoor x10")


@dataclass(frozen=True)
class Cell:
    """One run."""

    method: str
    defence: str
    attack: str
    hostile: int
    seed: int

    @property
    def key(self) -> str:
        return "/".join(map(str, (self.method, self.defence, self.attack, self.hostile, self.seed)))


def cells() -> list[Cell]:
    """All runs, the most telling ones first."""
    pair, first, others = ("none", "guard"), SEEDS[:1], SEEDS[1:]
    blocks = [
        (pair, (1,), SEEDS[:2]),
        (pair, (4,), first),
        (RULES, (4,), first),
        (pair, (8,), first),
        (pair, HOSTILE, SEEDS),
        (RULES, WITH_RULES, first),
        (RULES, WITH_RULES, others),
    ]
    found = dict.fromkeys(Cell(method, defence, NOBODY, 0, seed)
                          for seed in HONEST_SEEDS for defence in ("none", LENGTHS, "guard") for method in METHODS)  # fmt: skip
    for defences, counts, seeds in blocks:
        for seed, defence, method in itertools.product(seeds, defences, METHODS):
            found[Cell(method, defence, NOBODY, 0, seed)] = None
            attacks = PASSING if defence in RULES else ATTACKS
            found |= {Cell(method, defence, attack, count, seed): None for count in counts for attack in attacks}
    return list(found)


def configured(cell: Cell) -> Config:
    return Config().replace(
        run={"seed": cell.seed, "rounds": ROUNDS}, model={"name": "digits-mlp"}, method={"name": cell.method},
        clients={"count": CLIENTS, "participation": 0.25}, **(DEFENCES | {LENGTHS: {"guard": {"owner": 1.0}}})[cell.defence],
    )  # fmt: skip


def outcome(cell: Cell) -> dict[str, Any]:
    """The figures of one run; of a rule that the method cannot have, the reason."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return asdict(run(configured(cell), ATTACKS.get(cell.attack, Attack(honest)), cell.hostile, Path(folder) / "run"))
        except ConfigError as error:
            return {"refused": str(error)}


class Known:
    """Figures by cell."""

    def __init__(self) -> None:
        self.by_key: dict[str, dict[str, Any]] = json.loads(KEPT.read_text()) if KEPT.exists() else {}

    def fill(self, wanted: Sequence[Cell], until: float) -> None:
        """Run what is missing, as long as the time lasts."""
        KEPT.parent.mkdir(exist_ok=True)
        missing = [cell for cell in wanted if cell.key not in self.by_key]
        for done, cell in enumerate(missing):
            if time.monotonic() > until:
                sys.stderr.write(f"{len(missing) - done} runs are left for another call\n")
                return
            self.by_key[cell.key] = outcome(cell)
            if done % 10 == 0 or done == len(missing) - 1:
                KEPT.write_text(json.dumps(self.by_key, indent=0) + "\n")
                sys.stderr.write(f"{done + 1} of {len(missing)}: {cell.key} {self.by_key[cell.key].get('last', 0):.3f}\n")

    def figures(
        self, method: str, defence: str, attack: str, hostile: int, what: str = "last", seeds: Sequence[int] = SEEDS
    ) -> list[float]:
        """In percent, over the seeds that are known."""
        found = [self.by_key.get(Cell(method, defence, attack, hostile, seed).key, {}) for seed in seeds]
        return [100 * each[what] for each in found if what in each]


def spread(found: Sequence[float], planned: int = len(SEEDS)) -> str:
    """Mean and standard deviation; with the number of seeds in brackets, where it is not the planned one."""
    if not found:
        return UNKNOWN
    fewer = "" if len(found) == planned else f" ({len(found)})"
    return (f"{statistics.fmean(found):.1f} ± {statistics.stdev(found):.1f}" if len(found) > 1 else f"{found[0]:.1f}") + fewer


def mean(found: Sequence[float]) -> str:
    return f"{statistics.fmean(found):.0f}" if found else UNKNOWN


# --- tables ----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Without the rows and columns of which nothing is known yet."""
    rows = [row for row in rows if set(row[1:]) != {UNKNOWN}]
    kept = [k for k in range(len(head)) if k == 0 or any(row[k] != UNKNOWN for row in rows)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line[k] for k in kept)} |" for line in lines) if rows else ""


def titled(column: tuple[str, str]) -> str:
    method, defence = column
    return f"{method}, {'no guard' if defence == 'none' else defence}"


def without_attacks(known: Known) -> str:
    """What the guard costs when nobody is hostile, seed by seed; and how many honest uploads it touches."""
    rows = []
    for method in METHODS:
        off, lengths, guard = (known.figures(method, one, NOBODY, 0, seeds=HONEST_SEEDS) for one in ("none", LENGTHS, "guard"))
        uploads = [known.by_key.get(Cell(method, "guard", NOBODY, 0, seed).key, {}) for seed in HONEST_SEEDS]
        counts = [
            sum(each["rows"]["honest"].get(what, 0) for each in uploads if each) for what in ("ok", "shortened", "rejected")
        ]
        cells = [gained(lengths, off), gained(guard, off), f"{counts[1]} of {sum(counts)}", f"{counts[2]}"]
        rows.append([f"`{method}`", spread(off, len(HONEST_SEEDS)), spread(guard, len(HONEST_SEEDS)), *cells])
    head = ["method", "no guard", "guard", "lengths alone, difference", "guard, difference", "shortened", "rejected"]
    return table(head, rows)


def gained(one: Sequence[float], other: Sequence[float]) -> str:
    """The difference, seed by seed."""
    found = [a - b for a, b in zip(one, other, strict=False)]
    return f"{statistics.fmean(found):+.1f} ± {statistics.stdev(found):.1f}" if len(found) > 1 else UNKNOWN


def one_of_twenty(known: Known) -> str:
    """Every attack by one client, with and without the guard."""
    columns = [(method, defence) for method in METHODS for defence in ("none", "guard")]
    rows = [[NOBODY, *(spread(known.figures(*column, NOBODY, 0)) for column in columns)]]
    rows += [[attack, *(spread(known.figures(*column, attack, 1)) for column in columns)] for attack in ATTACKS]
    return table(["attack", *map(titled, columns)], rows)


def kept_promise(known: Known) -> str:
    """The largest loss under the guard where one client, without it, brings the model to chance."""
    lost = {}
    for method, attack in itertools.product(METHODS, ATTACKS):
        bare, guarded = (known.figures(method, defence, attack, 1) for defence in ("none", "guard"))
        if bare and guarded and statistics.fmean(bare) <= NEAR_CHANCE:
            pairs = zip(known.figures(method, "guard", NOBODY, 0), guarded, strict=False)
            lost[f"{method}, {attack}"] = statistics.fmean(a - b for a, b in pairs)
    if not lost:
        return ""
    worst = max(lost, key=lost.__getitem__)
    return (
        f"{len(lost)} pairs of a method and an attack end at {NEAR_CHANCE} % or less without the guard (chance is 10 %). "
        f"With it, the largest of their mean losses, seed by seed, is {lost[worst]:.1f} points ({worst})."
    )


def by_share(known: Known) -> str:
    """Means over seeds, without and with the guard, by the share of hostile clients."""
    shares = HOSTILE[1:]
    rows = []
    for attack in ATTACKS:
        pairs = [[mean(known.figures(method, defence, attack, count)) for defence in ("none", "guard")]
                 for method in METHODS for count in shares]  # fmt: skip
        rows.append([attack, *(UNKNOWN if set(pair) == {UNKNOWN} else " → ".join(pair) for pair in pairs)])
    head = [f"{method}, {100 * count // CLIENTS} %" for method in METHODS for count in shares]
    return table(["attack", *head], rows)


def with_rules(known: Known, count: int) -> str:
    """The guard alone, and with each rule beside it."""
    rows = []
    for method in METHODS:
        for attack, hostile in ((NOBODY, 0), *((attack, count) for attack in PASSING)):
            cells = [spread(known.figures(method, rule, attack, hostile)) for rule in RULES]
            if set(cells) != {UNKNOWN}:
                rows.append([f"`{method}`, {attack}", spread(known.figures(method, "guard", attack, hostile)), *cells])
    attacked = any(NOBODY not in row[0] for row in rows)
    return table(["method, attack", "guard alone", *RULES], rows) if attacked else ""


def backdoors(known: Known) -> str:
    """How often the trigger works, of held-out examples of other labels."""
    columns = [(method, defence) for method in METHODS for defence in ("none", "guard")]
    rows = [["nobody", *(spread(known.figures(*column, NOBODY, 0, "success")) for column in columns)]]
    for attack in BACKDOORS:
        for count in HOSTILE:
            found = [spread(known.figures(*column, attack, count, "success")) for column in columns]
            rows.append([f"{attack}, {count} of {CLIENTS}", *found])
    return table(["attack", *map(titled, columns)], rows)


def draw(known: Known) -> None:
    """A heat table of accuracies: rows are attacks by share, columns are defences by method."""
    columns = list(itertools.product(METHODS, DEFENCES))
    rows = [(NOBODY, 0), *itertools.product(ATTACKS, HOSTILE)]
    rows = [row for row in rows if any(known.figures(*column, *row) for column in columns)]
    means = [[statistics.fmean(known.figures(*column, *row) or [math.nan]) for column in columns] for row in rows]
    names = [f"{attack}, {count} of {CLIENTS}" if count else attack for attack, count in rows]
    heat.draw(
        FIGURE, means, names, {method: list(DEFENCES) for method in METHODS}, 100 * CHANCE, "accuracy, last five rounds, %"
    )


def write(known: Known, wall_s: float) -> None:
    raw = [asdict(cell) | known.by_key[cell.key] for cell in cells() if cell.key in known.by_key]
    RAW.write_text("[\n" + ",\n".join(json.dumps(each) for each in raw) + "\n]\n")
    draw(known)
    claim = "*Under the default guard, one hostile client of 20 costs at most five points where it brings the model to chance.*"
    seeds, day = ", ".join(map(str, SEEDS)), datetime.date.today().isoformat()
    runs = sum("last" in each for each in raw)
    told = f"`python experiments/attacks.py` · seeds {seeds} · {runs} runs · {results.circumstances(wall_s, day)}"
    parts = {
        f"Nobody is hostile: accuracy in %, last five rounds, {len(HONEST_SEEDS)} seeds": without_attacks(known),
        "One hostile client of 20: accuracy in %, last five rounds": one_of_twenty(known),
        "More of them: accuracy in %, no guard → guard, means over seeds": by_share(known),
        "A rule beside the guard, one hostile client of 20": with_rules(known, 1),
        "A rule beside the guard, 20 % hostile": with_rules(known, 4),
        "Backdoors: how many triggered examples of other labels are taken for the target, %": backdoors(known),
    }
    blocks = [part for title, rows in parts.items() if rows for part in (f"**{title}**", rows)]
    lines = [claim, told, kept_promise(known), *blocks, "![Accuracy under attacks](results/attacks.png)"]
    results.put(NAME, "Attacks", [line for line in lines if line])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write what is known, run nothing")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--defence", nargs="*", default=[*DEFENCES, LENGTHS], help="only runs with these defences")
    asked, began, known = parser.parse_args(), time.monotonic(), Known()
    if not asked.write:
        known.fill([cell for cell in cells() if cell.defence in asked.defence], began + 60 * asked.minutes)
    write(known, time.monotonic() - began)


if __name__ == "__main__":
    main()
