"""What the studies of `configs/papers` cost: `anyrank`'s engine against a plain loop over PEFT models, in CPU seconds.

    python benchmarks/studies.py [--only STUDY] [--rounds N] [--repeats N] [--json FILE]

Of each setting of each study a part is run by both, the federation as the study configures it, under one method (`stayput`
where the study has it, else `raflora`, else its first) and one seed: anyrank for as many rounds as take two CPU seconds, 20 at
most; the loop for as many clients as take them, one after another, of the first round and the next ones, and a round's cost is
its cohort's. Both score the model that all start from. All is scaled to the study's rounds, scorings, methods and seeds:

* the loop: (start + rounds x a round + scorings x a scoring) x methods x seeds. A run of it is a program of its own.
* anyrank: the same, but a run starts with the federation alone, since a study's runs share their process and task; the whole
  start counts once a setting, and computing the frozen features of a text task once a study.

Every figure comes from a process of its own with one thread, the two take turns, and of the repeats the least is told. Features
are computed in float32, so that losses can be compared: those of round 1, client by client, and the one at the start agree to
1e-3, or the program stops. A scoring of the loop is measured once for all settings of the same model and examples. Base models
that are made on the spot are there for both. Settings with privacy are left out. Data sets are looked for in `$ANYRANK_DATA`.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAPERS = HERE.parent / "configs" / "papers"
sys.path.insert(0, str(HERE))

from simulation import LOOP, OURS, child, machine  # noqa: E402

TOLERANCE = 1e-3  # of a loss, relative
SECONDS, MOST_ROUNDS = 2.0, 20
ABOVE, INSIDE = "LoRA above a frozen encoder", "LoRA inside the model"
PREFERRED = ("stayput", "raflora")
SAMPLES = (100, 1100)  # texts whose features are computed: the difference in time is what the difference in number costs


@dataclass(frozen=True)
class Cost:
    """A setting's CPU seconds: what each part takes, how often a study has it, and all of it."""

    study: str
    setting: str
    kind: str
    method: str
    runs: int
    rounds: int
    ours: Mapping[str, Any]
    loop: Mapping[str, Any]
    ours_s: float
    loop_s: float


# --- one measured process ----------------------------------------------------------------------------------------------


class Enough(Exception):
    """The part of a run that is measured is over."""


def part_of(study: str, number: int):
    """The measured federation of a study's setting, and the setting."""
    from anyrank.studies import comparison
    from anyrank.studies import study as studies

    setting = studies.load(PAPERS / f"{study}.toml").settings[number]
    method = next((name for name in PREFERRED if name in setting.methods), setting.methods[0])
    config = comparison.variant(setting.config, method)
    return config.replace(eval={"every": 10**9}, model={"dtype": "float32"}), setting


def measure(competitor: str, study: str, number: int, rounds: int, scoring: bool) -> dict[str, Any]:
    """What a start, a round and a scoring of a setting cost in this process."""
    import torch

    from anyrank import simulation
    from anyrank.federation import loop
    from anyrank.federation.figures import score

    torch.set_num_threads(1)
    config, _ = part_of(study, number)
    began = time.process_time()
    built = simulation.build(config)
    figures: dict[str, Any] = {"start_s": time.process_time()}
    if competitor == OURS:
        began = time.process_time()
        simulation.build(config).close()  # a second run in the same process: the task is there
        figures["again_s"] = time.process_time() - began
        built.close()
        built = simulation.build(config)
    else:
        spent = time.process_time() - began  # the loop has no use for what this computes
        built = replace(built, engine=OneByOne(_loop(built), math.inf if rounds else SECONDS))
        figures["start_s"] = time.process_time() - spent
    figures |= _rounds(built, rounds)
    if scoring:
        began = time.process_time()
        standing = score(built, loop.start(built)).figures()
        figures |= {"score_s": time.process_time() - began, "start_loss": standing["loss"]}
    return figures


def _loop(built):
    import baselines

    return baselines.baseline(baselines.PeftLoop, built)


class OneByOne:
    """An engine whose clients train one after another until `seconds` of CPU time are over; the others send nothing."""

    def __init__(self, engine: Any, seconds: float) -> None:
        self.engine, self.seconds = engine, seconds
        self.start, self.evaluate, self.close = engine.start, engine.evaluate, getattr(engine, "close", lambda: None)
        self.cohort, self.trained, self.spent = 0, 0, 0.0

    def train(self, jobs, plan, mechanism=None, deadline_s=None):
        self.cohort = len(jobs)
        for job in jobs:
            if self.trained and self.spent > self.seconds:
                return
            began = time.process_time()
            replies = list(self.engine.train([job], plan, mechanism))
            self.spent += time.process_time() - began
            self.trained += 1
            yield from replies


def _rounds(built, rounds: int) -> dict[str, Any]:
    """CPU seconds of a round of a federation, without scoring, and the clients' training losses in the first of those that were
    run.
    """
    from anyrank.federation import loop
    from anyrank.runs.folder import RunDir

    done, began = [], time.process_time()

    def on_round(metrics: Mapping[str, Any]) -> None:
        done.append(metrics["round"])
        if len(done) == (rounds or MOST_ROUNDS) or (not rounds and time.process_time() - began > SECONDS):
            raise Enough

    with tempfile.TemporaryDirectory() as folder, RunDir.open(Path(folder) / "run", built.config) as store:
        with contextlib.suppress(Enough):
            loop.run(built, store, on_round)
        spent = time.process_time() - began
        losses = {row["client"]: row["loss"] for row in store.clients() if row["round"] == 1 and row["status"] == "ok"}
    engine = built.engine
    if isinstance(engine, OneByOne):
        spent += engine.spent * (len(done) * engine.cohort / engine.trained - 1)
    return {"round_s": spent / len(done), "losses": losses}


def fill(study: str, number: int) -> dict[str, float]:
    """CPU seconds that the frozen features of all texts of a setting take, by those of some of them; leaves all of them in the
    cache.
    """
    import numpy as np

    from anyrank.tasks.load import _cached_task, load_task
    from anyrank.tasks.text import task as text

    config, _ = part_of(study, number)
    split, spent = text.sources.load_split, []
    texts = sum(map(len, split(config.data)))
    for number_of_texts in SAMPLES:

        def some(data, wanted=number_of_texts):
            train, test = split(data)
            return train.take(np.linspace(0, len(train) - 1, wanted).astype(int)), test.take(np.arange(1))

        text.sources.load_split = some
        with tempfile.TemporaryDirectory() as folder:
            cache = os.environ.get("ANYRANK_CACHE")
            os.environ["ANYRANK_CACHE"] = folder
            began = time.process_time()
            _cached_task.cache_clear()
            load_task(config)
            spent.append(time.process_time() - began)
            os.environ.pop("ANYRANK_CACHE") if cache is None else os.environ.update(ANYRANK_CACHE=cache)
    text.sources.load_split = split
    _cached_task.cache_clear()
    load_task(config)
    return {"fill_s": texts * (spent[1] - spent[0]) / (SAMPLES[1] - SAMPLES[0])}


# --- scaling -----------------------------------------------------------------------------------------------------------


def scorings(config: Any) -> int:
    """How often a run scores its model after a round."""
    rounds, every = config.run.rounds, config.eval.every
    return rounds // every + bool(rounds % every)


def scaled(study: str, setting: Any, method: str, ours: Mapping[str, Any], loop: Mapping[str, Any]) -> Cost:
    """All of a setting from its measured parts. The start is scored too."""
    config = setting.config
    runs, rounds, scored = len(setting.methods) * setting.seeds, config.run.rounds, scorings(config)
    ours_s = ours["start_s"] + runs * (ours["again_s"] + rounds * ours["round_s"] + (scored + 1) * ours["score_s"])
    loop_s = runs * (loop["start_s"] + rounds * loop["round_s"] + (scored + 1) * loop["score_s"])
    kind = ABOVE if config.lora.target_modules == ("map",) else INSIDE
    return Cost(study, setting.name, kind, method, runs, rounds, ours, loop, ours_s, loop_s)


class Bench:
    """Measures setting by setting, and remembers what settings have in common."""

    def __init__(self, rounds: int, repeats: int) -> None:
        self.rounds, self.repeats = rounds, repeats
        self.scores: dict[Any, float] = {}
        self.fills: dict[Any, float] = {}

    def setting(self, study: str, number: int) -> Cost:
        """A setting's cost, by turns."""
        config, setting = part_of(study, number)
        asked = ["--only", study, "--setting", str(number), "--rounds", str(self.rounds)]
        key = (config.model.name, config.data.source, config.data.test_examples, config.data.rotate)
        runs: dict[str, list[dict[str, Any]]] = {OURS: [], LOOP: []}
        for repeat in range(self.repeats):
            for name, found in runs.items():
                scoring = [] if name == LOOP and (repeat or key in self.scores) else ["--scoring"]
                found.append(child(["--child", name, *asked, *scoring], program=__file__))
        best = {name: _least(found) for name, found in runs.items()}
        self.scores.setdefault(key, best[LOOP].get("score_s"))
        best[LOOP]["score_s"] = self.scores[key]
        _agree(f"{study}, {setting.name}", best[OURS], best[LOOP])
        return scaled(study, setting, config.method.name, best[OURS], best[LOOP])

    def features(self, study: str, number: int) -> tuple[Any, float]:
        """Which frozen features a setting needs, and the CPU seconds that computing them takes; none for other than texts."""
        config, _ = part_of(study, number)
        if config.model.task != "text-classification":
            return None, 0.0
        key = (config.model.name, config.data.source, config.lora.target_modules)
        if key not in self.fills:
            asked = ["--child", "fill", "--only", study, "--setting", str(number)]
            self.fills[key] = child(asked, program=__file__)["fill_s"]
        return key, self.fills[key]


def _least(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of each figure over the repeats; losses are the same in all."""
    seconds = {key for run in runs for key in run if key.endswith("_s")}
    return runs[0] | {key: min(run[key] for run in runs if key in run) for key in seconds}


def _agree(where: str, ours: Mapping[str, Any], loop: Mapping[str, Any]) -> None:
    """Stop where the two did not do the same work."""
    pairs = {f"training loss of {client}": (ours["losses"][client], loss) for client, loss in loop["losses"].items()}
    if "start_loss" in loop:
        pairs["loss at the start"] = (ours["start_loss"], loop["start_loss"])
    for what, (mine, other) in pairs.items():
        if not math.isclose(mine, other, rel_tol=TOLERANCE):
            raise SystemExit(f"{where}: {what} is {mine} by anyrank and {other} by the loop: not the same work")


# --- the table ---------------------------------------------------------------------------------------------------------


def run_study(bench: Bench, study: str) -> tuple[list[Cost], float, list[str]]:
    """Costs of the study's settings, CPU seconds of its frozen features, and the settings that are left out."""
    from anyrank.studies import study as studies

    costs, features, left_out = [], {}, []
    for number, setting in enumerate(studies.load(PAPERS / f"{study}.toml").settings):
        if setting.config.privacy.level != "none":
            left_out.append(setting.name)
            continue
        key, seconds = bench.features(study, number)
        features[key] = seconds
        costs.append(bench.setting(study, number))
        print(line(costs[-1]), flush=True)
    return costs, sum(features.values()), left_out


def line(cost: Cost) -> str:
    parts = " | ".join(f"{each['round_s']:.3g} / {each['score_s']:.3g}" for each in (cost.ours, cost.loop))
    return (
        f"| {cost.study} | {cost.setting} | `{cost.method}` | {cost.runs} x {cost.rounds} | {parts} "
        f"| {cost.ours_s:.0f} | {cost.loop_s:.0f} | {cost.loop_s / cost.ours_s:.1f} |"
    )


def total(study: str, ours_s: float, loop_s: float, note: str = "") -> str:
    return f"| **{study}** | all{note} | | | | | **{ours_s:.0f}** | **{loop_s:.0f}** | **{loop_s / ours_s:.1f}** |"


def main() -> None:
    names = sorted(path.stem for path in PAPERS.glob("*.toml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=names)
    parser.add_argument("--rounds", type=int, default=0, help="of each part; whole ones; default: what takes two CPU seconds")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--scoring", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child == "fill":
        return print(json.dumps(fill(asked.only, asked.setting)))
    if asked.child:
        return print(json.dumps(measure(asked.child, asked.only, asked.setting, asked.rounds, asked.scoring)))
    bench, results, left_out = Bench(asked.rounds, asked.repeats), [], []
    print(machine())
    print("| study | setting | under | runs x rounds | anyrank: round / scoring, s | loop | anyrank, CPU s | loop | times |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for study in [asked.only] if asked.only else names:
        costs, features_s, without = run_study(bench, study)
        left_out += [f"{study}: {name}" for name in without]
        if costs:
            ours_s, loop_s = sum(cost.ours_s for cost in costs) + features_s, sum(cost.loop_s for cost in costs)
            results.append({"study": study, "features_s": features_s, "ours_s": ours_s, "loop_s": loop_s})
            results[-1]["settings"] = [asdict(cost) for cost in costs]
            print(total(study, ours_s, loop_s, f", features {features_s:.0f} s" if features_s else ""), flush=True)
    for kind in (ABOVE, INSIDE):
        chosen = [cost for each in results for cost in each["settings"] if cost["kind"] == kind]
        if chosen:
            print(total(f"{kind}, without features", *(sum(cost[key] for cost in chosen) for key in ("ours_s", "loop_s"))))
    print(total("all studies", *(sum(each[key] for each in results) for key in ("ours_s", "loop_s"))))
    print(f"left out, private: {'; '.join(left_out) or 'none'}")
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(), "studies": results, "left_out": left_out}, indent=2) + "\n")


if __name__ == "__main__":
    main()
