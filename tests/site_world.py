"""A federation of three sites for tests: files, a configuration as it runs in one process, its public form, and site workers
that are asked by frames, in this process or in one of their own."""

from __future__ import annotations

import copy
import csv
import dataclasses
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from anyrank.config.sections import Config
from anyrank.config.tables import from_table
from anyrank.messages import calls, wire
from anyrank.messages.frame import Frame, from_bytes, to_bytes
from anyrank.messages.plan import Plan
from anyrank.messages.records import Job
from anyrank.worker.site import SiteDesk
from anyrank.worker.sitefile import SiteFile, load
from tiny import WORDS, make_model

RANKS = {"county": 4, "lakeside": 2, "st-mary": 8}
ROWS = {"county": 60, "lakeside": 40, "st-mary": 50}
LABELS = ("arrival", "exchange", "top-up")
LIMIT = 1 << 30
RUN = "winter"


def write_rows(path: Path, number: int, labels: Iterable[str] = LABELS) -> Path:
    """A CSV of random texts; every label has its turn."""
    draw, labels = random.Random(path.stem), list(labels)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for place in range(number):
            writer.writerow([" ".join(draw.choices(WORDS, k=draw.randint(2, 9))), labels[place % len(labels)]])
    return path


def make_world(folder: Path) -> Path:
    """The files of all sites and the base model."""
    make_model(folder / "model")
    for name, number in ROWS.items():
        write_rows(folder / f"{name}.csv", number)
    return folder


def table(method: str, inside: bool = True, rank: int = 0, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """The public configuration: no path, no source. `inside`: LoRA in the encoder, else on a map above frozen embeddings.
    `rank`: of all sites, for methods that take one rank."""
    made: dict[str, Any] = {
        "run": {"name": RUN, "rounds": 3, "stacking": "never", "seed": 7},
        "model": {"task": "text-classification", "name": "a-public-name", "head": "trained", "dtype": "float32"},
        "data": {"label_names": list(LABELS)},
        "lora": {"alpha": 4.0, "target_modules": ["query", "value"] if inside else []},
        "train": {"local_steps": 2, "batch_size": 8},
        "method": {"name": method},
        "sites": [{"name": name, "rank": rank or own} for name, own in RANKS.items()],
    }
    for section, keys in sections.items():
        made[section] = {**made.get(section, {}), **keys}
    return made


def in_one_process(folder: Path, public: Mapping[str, Any]) -> Config:
    """The same federation as a rehearsal on one machine."""
    whole = copy.deepcopy(dict(public))
    whole["model"] |= {"path": str(folder / "model"), "name": ""}
    for site in whole["sites"]:
        site["source"] = str(folder / f"{site['name']}.csv")
    return from_table(whole)


def site_file(folder: Path, name: str, store: str = "", **sections: Mapping[str, Any]) -> Path:
    """The path of a site file; `sections` add to what it needs at least."""
    made: dict[str, Any] = {
        "name": name,
        "data": {"source": f"{name}.csv"},
        "model": {"folder": "model"},
        "device": {"kind": "cpu"},
        "privacy": {"level": "none"},
        "store": {"folder": store or f"store-{name}"},
    }
    for section, keys in sections.items():
        made[section] = {**made.get(section, {}), **keys}
    path = folder / f"{made['store']['folder']}.toml"
    path.write_bytes(tomli_w.dumps(made).encode())
    return path


class Asked:
    """A site worker in this process. Frames travel as bytes; what it sends is kept in `left`."""

    def __init__(self, site: SiteFile | Path) -> None:
        self.desk = SiteDesk(site if isinstance(site, SiteFile) else load(site))
        self.left: list[Frame] = []

    def ask(self, *frames: Frame) -> list[Frame]:
        """The replies to frames that are sent one after another."""
        waiting = [from_bytes(to_bytes(frame), LIMIT) for frame in frames]
        found: list[Frame] = []
        while waiting:
            found += self.desk.answer(waiting.pop(0), lambda: waiting.pop(0), lambda frame: None)
        self.left += [from_bytes(to_bytes(frame), LIMIT) for frame in found]
        return self.left[len(self.left) - len(found) :]

    def close(self) -> None:
        self.desk.close()


def setup(public: Mapping[str, Any], run: str = RUN, largest_rank: int = 0) -> Frame:
    return calls.setup_frame(public, largest_rank or max(site["rank"] for site in public["sites"]), run)


def request(job: Job, plan: Plan, run: str = RUN, num_examples: int = 0, **cohort: Any) -> tuple[Frame, Frame]:
    """What a server sends for one client's work in a round."""
    wanted = dataclasses.replace(calls.Cohort(1), **cohort)
    return calls.cohort_frame(wanted, run), wire.download_frame(
        job.download, plan, job.client, num_examples or job.num_examples, run
    )
