"""Many clients, many rounds, flat memory: 10,000 registered, 100 a round, 1,000 rounds of the digits.

    python benchmarks/scale.py [--rounds N] [--method NAME]

Tells wall and CPU seconds, and the resident memory and the time of a round as the rounds go by.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE"}

import argparse
import tempfile
import time
from pathlib import Path

from stopwatch import memory

from anyrank import config as configs
from anyrank import simulation

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "scale.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--method", default="raflora")
    asked = parser.parse_args()
    rounds = asked.rounds
    began = time.perf_counter()
    marks = {100, rounds // 2, rounds} | {1, 10}

    def tell(metrics: dict) -> None:
        if metrics["round"] in marks:
            print(
                f"round {metrics['round']:5d}: {memory('VmRSS'):.0f} MB resident, {time.process_time():.1f} CPU s, "
                f"{time.perf_counter() - began:.1f} wall s",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder:
        config = configs.load(CONFIG, [f"run.rounds={rounds}", f"method.name={asked.method}"])
        summary = simulation.execute(config, Path(folder) / "run", on_round=tell)
    print(f"end: {memory('VmRSS'):.0f} MB, {time.process_time():.1f} CPU s, accuracy {summary['accuracy']:.3f}")


if __name__ == "__main__":
    main()
