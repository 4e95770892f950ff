"""What the checks cost: of a round at MiniLM's size, and of a merge of 20 adapter folders. `make bench` runs it.

    python benchmarks/defence.py [--clients 5,20] [--repeats 9] [--trainings 3] [--steps 10] [--layers 8]

A round: a BERT of MiniLM's size (22.7 million parameters, from a configuration, random weights) with LoRA on query and value of
its 6 layers, clients of ranks 8, 16 and 32 in turn, steps of 16 texts of 16 random tokens. The training is measured by itself;
then the server's part of the round, on the replies of that training, with no check, with the guard (admission, step lengths,
single owners, the new state), and with each rule of `[robust]` in addition. A merge: folders shaped like those of a 7B Llama,
as in `aggregate.py`, with and without looking at their numbers.

CPU seconds in one process with one thread; all ways take turns. The cost of checks is the median, over the turns, of the
difference between with and without. The floor is the time to
read what is checked once, at the speed of a sum of a large tensor.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import Tensor

METHODS, RULES = ("rbla", "raflora"), ("none", "geometric-median", "multi-krum", "trimmed-mean", "median")
RANKS, BATCH, TOKENS, CLASSES, EXAMPLES = (8, 16, 32), 16, 16, 10, 200
OFF = {"norm": 0, "owner": 1}


# --- a round ---------------------------------------------------------------------------------------------------------


def encoder() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=CLASSES
    )
    return BertForSequenceClassification(config)


def federation(clients: int, steps: int):
    """The federation, and the number of parameters of its model."""
    from anyrank import simulation
    from anyrank.config.sections import Config, PartitionConfig
    from anyrank.tasks.base import Examples, Task

    torch.manual_seed(0)
    module, count = encoder(), clients * EXAMPLES
    inputs, labels = torch.randint(5, 30522, (count, TOKENS)), torch.randint(0, CLASSES, (count,))
    examples, few = Examples({"input_ids": inputs}, labels), Examples({"input_ids": inputs[:32]}, labels[:32])
    targets, trained = ("attention.self.query", "attention.self.value"), ("classifier.weight", "classifier.bias")
    task = Task(module=module, targets=targets, train=examples, test=few, trained=trained)
    config = Config().replace(
        clients={"count": clients, "ranks": [RANKS[k % 3] for k in range(clients)], "participation": 1.0},
        train={"local_steps": steps, "batch_size": BATCH},
        method={"name": "rbla"},
        data={"partition": PartitionConfig(kind="iid")},
    )
    built = simulation.build(config, task=task)
    return built, sum(each.numel() for each in module.parameters())


def server(built, state, jobs, replies, method: str, guarded: bool, rule: str) -> Callable[[], Any]:
    """The server's part of a round, from replies to the state after it."""
    from anyrank import methods
    from anyrank.config.sections import Config
    from anyrank.federation import guard
    from anyrank.federation.checks import merge
    from anyrank.robust.rules import rule_of

    method, by_name = methods.make(method), {job.client.name: job for job in jobs}
    config = Config().replace(guard={} if guarded else OFF, robust={"rule": rule})
    rules = rule_of(config, method, None)

    def admitted() -> list:
        found = []
        for reply in replies:
            job = by_name[reply.client]
            found.append(guard.admit(reply, job.download, reply.client, job.num_examples))
            job.settle()
        return found

    if not guarded:
        return lambda: method.aggregate(state, replies)
    return lambda: merge(rules, method, state, rules.screen(state, jobs, admitted()).updates)


def one_round(clients: int, trainings: int, repeats: int, steps: int) -> None:
    from anyrank.federation import loop

    built, parameters = federation(clients, steps)
    state = loop.start(built)
    jobs, _ = loop.dispatch(built, state, 1)
    taken = []
    for _ in range(trainings + 1):  # the first one loads code
        began = time.process_time()
        replies = list(built.engine.train(jobs, built.plan(1)))
        taken.append(time.process_time() - began)
    training, spread = statistics.median(taken[1:]), f"{min(taken[1:]):.2f} to {max(taken[1:]):.2f}"
    ways = {}
    for method in METHODS:
        ways[method, "no check"] = server(built, state, jobs, replies, method, False, "none")
        for rule in RULES if method == "rbla" else RULES[:3]:
            name = "the guard" if rule == "none" else f"the guard, {rule}"
            ways[method, name] = server(built, state, jobs, replies, method, True, rule)
    times = measure(ways, repeats)
    size = sum(each.nbytes for reply in replies for each in numbers(reply.adapter))
    floor = 2 * size / speed()  # uploads, and downloads to compare them with
    title = (
        f"A round of {clients} clients, {parameters / 1e6:.1f} million parameters, {steps} steps of {BATCH} texts: training "
        f"{training:.2f} s ({spread}); uploads {size / 1e6:.1f} MB, floor {1e3 * floor:.1f} ms"
    )
    rows = []
    for (method, name), spent in times.items():
        without = times[method, "no check"]
        cost = statistics.median(with_ - none for with_, none in zip(spent, without, strict=True))
        share = 100 * cost / (training + statistics.median(without))
        figures = ["", "", ""] if name == "no check" else [f"{1e3 * cost:.0f}", f"{share:.2f} %", f"{cost / floor:.0f}"]
        rows.append([method, name, spread_of(spent), *figures])
    table(title, ["method", "checks", "server's part, CPU ms", "of it checks", "share of the round", "times the floor"], rows)
    built.close()


def numbers(adapter) -> list[Tensor]:
    return [*(each for layer in adapter.layers.values() for each in (layer.A, layer.B)), *adapter.tensors.values()]


# --- a merge ---------------------------------------------------------------------------------------------------------


LOOKS = (("adapter.stored", "finite"), ("aggregation.merge", "finite"), ("aggregation.merge", "overflow"),
         ("aggregation.aggregates", "overflow"))  # fmt: skip


def one_merge(root: Path, layers: int, repeats: int) -> None:
    """Without checks, a number of each page is read where a tensor would be checked: the first who reads a page of a file
    fetches it, and without checks that would be the method. The times inside differ by the checks alone, and with less noise
    than those of the whole merge."""
    from aggregate import QV, buffered_read, write_folders

    from anyrank.aggregation.aggregates import aggregate_folders

    folders = write_folders(root / "in", 20, QV, layers)
    size = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
    buffered_read(folders)  # so that all find the files in the disk cache
    inside: dict[Any, list[float]] = {}

    def run(method: str, checked: bool) -> Callable[[], Any]:
        spent = inside[method, checked] = []

        def merged() -> None:
            spent.append(0.0)
            with ExitStack() as stack:
                for module, name in LOOKS:
                    held = importlib.import_module(f"anyrank.{module}")
                    look = getattr(held, name) if checked else INSTEAD[name]
                    stack.enter_context(mock.patch.object(held, name, timed(look, spent)))
                aggregate_folders(folders, method, root / "out")

        return merged

    ways = {(method, checked): run(method, checked) for method in METHODS for checked in (False, True)}
    times = measure(ways, repeats, lambda: shutil.rmtree(root / "out"))
    floor, rows = size / speed(), []
    for method in METHODS:
        without, checked = times[method, False], times[method, True]
        pages, looks = inside[method, False][1:], inside[method, True][1:]
        cost = statistics.median(looks) - statistics.median(pages)
        share = f"{100 * cost / statistics.median(without):.1f} %"
        figures = [spread_of(without), spread_of(checked), spread_of(pages, 1), spread_of(looks, 1), f"{1e3 * cost:.1f}", share]
        rows.append([method, *figures, f"{1e3 * floor:.0f}"])
    title = f"A merge of 20 folders, {layers} layers of q and v, {size / 1e9:.2f} GB"
    heads = ["method", "without, CPU ms", "with", "fetching pages", "pages and checks", "checks", "share", "floor, ms"]
    table(title, heads, rows)


def touched(tensor: Tensor, *_: str) -> Tensor:
    """A number of each page of 4,096 bytes is read."""
    float(tensor.reshape(-1)[:: 4096 // tensor.itemsize].sum())
    return tensor


INSTEAD = {"finite": touched, "overflow": lambda layer: ""}


def timed(function: Callable, spent: list[float]) -> Callable:
    def call(*arguments):
        began = time.process_time()
        try:
            return function(*arguments)
        finally:
            spent[-1] += time.process_time() - began

    return call


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(ways: dict, repeats: int, clean: Callable[[], Any] = lambda: None) -> dict[Any, list[float]]:
    """CPU seconds of each way, turn by turn; all ways take turns. The first turn loads code and does not count."""
    taken: dict[Any, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            spent = time.process_time() - began
            clean()
            if turn:
                taken[name].append(spent)
    return taken


def spread_of(seconds: Sequence[float], digits: int = 0) -> str:
    middle, least, most = (1e3 * each for each in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def speed() -> float:
    """Bytes a second of a sum over 256 MB, the best of five."""
    large = torch.ones(1 << 26)
    taken = []
    for _ in range(5):
        began = time.process_time()
        large.sum()
        taken.append(time.process_time() - began)
    return large.nbytes / min(taken)


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n\n| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="5,20")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=8, help="of the merge; 0: no merge")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for clients in filter(None, asked.clients.split(",")):
        one_round(int(clients), asked.trainings, asked.repeats, asked.steps)
    if asked.layers:
        with tempfile.TemporaryDirectory(prefix="anyrank-bench-") as root:
            one_merge(Path(root), asked.layers, asked.repeats)


if __name__ == "__main__":
    main()
