"""Small runs whose adapters must not change by a byte while code is moved: `python tests/golden_runs.py` records them anew.

Floating-point sums depend on the processor and on the versions of torch and NumPy, so a record says what it was made on, and
the test compares on such a machine alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("golden.json")
SECRET = "golden bytes need a secret that everybody knows"
COMMON = """
[run]
name = "golden"
rounds = 3
[clients]
count = 6
participation = 0.5
ranks = [1, 2, 8]
[train]
local_steps = 3
[guard]
norm = 0
far = 0
owner = 1
"""
TEXTS = ["where is my card", "what is the exchange rate", "top up failed again", "please help me", "pay the bill now"]


def digits(method: str, *settings: str, model: str = "digits-mlp") -> Callable[[Path], list[str]]:
    """A run on the digits, with further `section.key=value` settings."""
    return lambda folder: [f"method.name={method}", f"model.name={model}", *settings]


def texts(*settings: str) -> Callable[[Path], list[str]]:
    """A run on texts with a small random encoder."""

    def build(folder: Path) -> list[str]:
        import tiny

        tiny.make_model(folder / "encoder")
        rows = [f"{text} {word},{number % 3}" for number, text in enumerate(TEXTS) for word in tiny.WORDS]
        (folder / "texts.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
        named = [f"model.path={folder / 'encoder'}", f"data.source={folder / 'texts.csv'}", "method.name=raflora"]
        return [*named, "model.task=text-classification", *settings]

    return build


def instructions(*settings: str) -> Callable[[Path], list[str]]:
    """A run on prompts and completions with a small random decoder."""

    def build(folder: Path) -> list[str]:
        import torch
        import transformers

        import tiny

        settings_of = tiny.settings_of(folder / "decoder", "llama")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "decoder")
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(folder / "decoder")
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(settings_of).save_pretrained(folder / "decoder")
        rows = [{"prompt": f"{text} {word}", "completion": f" {tiny.WORDS[n % 7]}"}
                for n, text in enumerate(TEXTS) for word in tiny.WORDS]  # fmt: skip
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        named = [f"model.path={folder / 'decoder'}", f"data.source={folder / 'rows.jsonl'}", "method.name=raflora"]
        return [*named, "model.task=causal-lm", "data.partition.kind=iid", *settings]

    return build


GUARDED = ("guard.norm=1.5", "guard.far=4", "guard.owner=0.5")
PRIVATE = ("privacy.delta=1e-4", "train.optimizer=sgd", "train.learning_rate=0.05")
RUNS: Mapping[str, Callable[[Path], list[str]]] = {
    "raflora": digits("raflora"),
    "raflora one by one": digits("raflora", "run.stacking=never", "train.proximal_mu=0.1"),
    "rbla with a trained head": digits("rbla", "model.head=trained", "train.schedule=cosine"),
    "ffa_lora on a transformer": digits("ffa_lora", model="digits-transformer"),
    "stayput, every option": digits(
        "stayput", "method.true_point=true", "method.rotate=true", "method.momentum=0.5", "method.server_rank=12"
    ),
    "flexlora, sgd": digits("flexlora", "train.optimizer=sgd", "train.momentum=0.9", "train.learning_rate=0.01"),
    "flora": digits("flora"),
    "fedsa": digits("fedsa"),
    "hetlora": digits("hetlora"),
    "rolora": digits("rolora"),
    "fedsvd": digits("fedsvd"),
    "fedex": digits("fedex", "clients.ranks=[4]"),
    "centralized": digits("centralized", "clients.ranks=[4]"),
    "private examples": digits("raflora", "privacy.level=example", "privacy.epsilon=8", *PRIVATE),
    "private clients": digits("ffa_lora", "privacy.level=client", "privacy.noise_multiplier=0.5", *PRIVATE),
    "private clients, noise at the server": digits(
        "rbla", "privacy.level=client", "privacy.noise_multiplier=0.5", "privacy.noise_at=server", *PRIVATE
    ),
    "a map above an encoder": texts(),
    "inside an encoder": texts('lora.target_modules=["query","value"]', "model.head=trained"),
    "a decoder": instructions(),
    "raflora, guarded": digits("raflora", *GUARDED),
    "rbla, guarded, geometric median": digits("rbla", *GUARDED, "robust.rule=geometric-median"),
    "stayput, guarded, with dropout": digits("stayput", *GUARDED, "clients.dropout=0.3"),
}


def digest(name: str, folder: Path, stop_after: int = 0) -> str:
    """The SHA-256 of all adapters that the run leaves; `stop_after`: rounds after which it is stopped once and resumed."""
    from anyrank import config as configs
    from anyrank import simulation

    (folder / "config.toml").write_text(COMMON)
    chosen = configs.load(folder / "config.toml", RUNS[name](folder))

    def stop(metrics: Mapping[str, Any]) -> None:
        if metrics["round"] == stop_after:
            raise KeyboardInterrupt

    try:
        simulation.execute(chosen, folder / "run", on_round=stop)
    except KeyboardInterrupt:
        simulation.execute(chosen, folder / "run", resume=True)
    total = hashlib.sha256()
    for path in sorted((folder / "run").glob("*/adapter_*")):
        text = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        total.update(f"{path.relative_to(folder)}\0{len(text)}\0".encode() + text)
    return total.hexdigest()


def machine() -> dict[str, str]:
    """What decides how floating-point numbers are rounded."""
    import numpy
    import torch

    flags = ""
    if Path("/proc/cpuinfo").is_file():
        text = Path("/proc/cpuinfo").read_text()
        flags = " ".join(re.findall(r"model name\s*:\s*(.+)", text)[:1]) + " " + torch.backends.cpu.get_cpu_capability()
    versions = {"torch": torch.__version__, "numpy": numpy.__version__, "blas": os.environ.get("OPENBLAS_CORETYPE", "")}
    return {"processor": flags or platform.processor(), **versions}


def record() -> None:
    os.environ["ANYRANK_PRIVACY_SEED"] = SECRET
    digests = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            digests[name] = digest(name, Path(folder))
            print(f"{name}: {digests[name][:16]}", file=sys.stderr)
    RECORD.write_text(json.dumps({"machine": machine(), "digests": digests}, indent=2) + "\n")


if __name__ == "__main__":
    record()
