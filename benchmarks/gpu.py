"""What a GPU gains: clients side by side against one by one, and merges batched over layers against the CPU.

    python benchmarks/gpu.py [--device cuda] [--small] [--repeats N]

Training: 32 clients of ranks 4 to 32, 4 steps of 8 texts of 64 tokens, LoRA on query and value of a classifier of BERT-base's
size (110 million parameters, random), the same downloads and batches both ways; updates must agree. Merging: adapters of a 7B
Llama's shape. `--small` is a model and adapters of toy size, to try the program on any device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent))

import aggregate as merging
import numpy as np
import torch
import transformers
from simulation import machine
from torch import nn

from anyrank import Adapter, ClientUpdate
from anyrank.aggregation.aggregates import aggregate
from anyrank.config.sections import ModelConfig, TrainConfig
from anyrank.engines.inprocess import InProcess
from anyrank.messages.plan import Plan
from anyrank.messages.records import Client, Download, Job, Scaling
from anyrank.tasks.base import Examples, Task, TensorInputs
from anyrank.tasks.place import place
from anyrank.training.lora import LoraModel

CLIENTS, RANKS, STEPS, BATCH, TOKENS, CLASSES = 32, (4, 8, 16, 32), 4, 8, 64, 16


class Logits(nn.Module):
    """A transformers classifier that takes and gives tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=inputs).logits


def task(device: str, dtype: str, small: bool) -> Task:
    """Random texts for a random classifier: times do not depend on what is learned."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128} if small else {}
    torch.manual_seed(0)
    settings = transformers.BertConfig(num_labels=CLASSES, use_cache=False, **sizes)
    model = Logits(transformers.BertForSequenceClassification(settings)).eval()
    targets = tuple(name for name, _ in model.named_modules() if name.endswith(("self.query", "self.value")))
    count = CLIENTS * STEPS * BATCH
    examples = Examples(
        TensorInputs(torch.randint(1000, settings.vocab_size, (count, TOKENS))), torch.randint(CLASSES, (count,))
    )
    made = Task(module=model, targets=targets, train=examples, test=examples)
    return place(made, ModelConfig(device=device, train_dtype=dtype))


def side_by_side(device: str, dtype: str, small: bool, repeats: int) -> None:
    model = LoraModel(task(device, dtype, small))
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    shards = np.split(np.arange(CLIENTS * STEPS * BATCH), CLIENTS)
    jobs = []
    for index, shard in enumerate(shards):
        client = Client(f"client-{index:02d}", RANKS[index % len(RANKS)])
        adapter = model.start(client.rank, Scaling(16.0), seed=index)
        slices = {name: tuple(range(layer.rank)) for name, layer in adapter.layers.items()}
        jobs.append(Job(client, len(shard), partial(Download, adapter, slices)))
    plan = Plan(TrainConfig(local_steps=STEPS, batch_size=BATCH), 1e-3, round=1, seed=0)
    engines = {how: InProcess(model, shards, stacking=how) for how in ("never", "always")}
    updates = {how: sorted(engine.train(jobs, plan), key=lambda update: update.client) for how, engine in engines.items()}
    apart = max(furthest(one, other) for one, other in zip(*updates.values(), strict=True))
    times = measure({how: lambda engine=engine: list(engine.train(jobs, plan)) for how, engine in engines.items()}, repeats)
    print(
        f"| {parameters / 1e6:.0f} M parameters, {dtype} | {CLIENTS} x {BATCH} x {TOKENS} tokens | {times['never']:.3f} "
        f"| {times['always']:.3f} | {times['never'] / times['always']:.1f} | {apart:.1e} |"
    )
    if dtype == "float32" and apart > 1e-3:
        raise SystemExit(f"the two ways parted by {apart:.1e}: not the same work")
    model.close()


def furthest(one: ClientUpdate, other: ClientUpdate) -> float:
    """The largest difference between two updates' factors."""
    pairs = [(one.adapter.layers[name], other.adapter.layers[name]) for name in one.adapter.layers]
    return max(float((a - b).abs().max()) for x, y in pairs for a, b in ((x.A, y.A), (x.B, y.B)))


def merges(device: str, layers: int, counts: tuple[int, ...], repeats: int) -> None:
    for count in counts:
        distinct = [merging.clients(count, seed) for seed in (0, 1)]
        names = [f"model.layers.{number}.self_attn.{part}" for number in range(layers) for part in merging.QV]
        updates = [
            ClientUpdate(Adapter({name: distinct[i % 2][client] for i, name in enumerate(names)}), 1, f"{client:03d}")
            for client in range(count)
        ]
        ways = {
            "cpu": lambda updates=updates: aggregate(updates, "raflora"),
            device: lambda updates=updates: aggregate(updates, "raflora", device=device),
        }
        times = measure(ways, repeats)
        print(f"| {count} | {len(names)} | {times['cpu']:.2f} | {times[device]:.2f} | {times['cpu'] / times[device]:.1f} |")


def measure(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median wall seconds of each way, by turns, after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            settle()
            began = time.perf_counter()
            way()
            settle()
            if repeat:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def settle() -> None:
    """Wait for what the device still does."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    there = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{machine()}, {there}, device {asked.device}\n")
    print("| model | a step | one by one, s a round | side by side, s a round | ratio | furthest apart |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for dtype in ("float32", "bfloat16"):
        side_by_side(asked.device, dtype, asked.small, asked.repeats)
    print(f"\n| clients | modules | cpu, s | {asked.device}, s | ratio |\n| ---: | ---: | ---: | ---: | ---: |")
    merges(asked.device, 2 if asked.small else merging.LAYERS, (10,) if asked.small else (10, 20), asked.repeats)


if __name__ == "__main__":
    main()
