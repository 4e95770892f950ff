"""What a site keeps of a federation that ended: the model that it was handed, as a folder that `anyrank evaluate` reads.

    results/RUN-KEY/config.toml      the configuration as the site ran it, with its own paths
                    identity.json    digests of the site's files
                    result.json      which run this is of, and of which round
                    sites/NAME/      adapter, base-update if there is one, labels.json, scores.json if the site has scores
                    summary.json, seal.json

The folder is a run folder without rounds. Its summary and its seal are removed first and written last, so that what a kill left
half-written is not taken for a result.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tomli_w

from anyrank import files
from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config
from anyrank.config.tables import from_table, to_table
from anyrank.errors import RunFailed
from anyrank.messages.records import Counts, Download
from anyrank.runs import identity, seal, sites
from anyrank.runs.names import ADAPTER, BASE_UPDATE, CONFIG, RESULT, SEAL, SITES, SUMMARY
from anyrank.worker.siteload import Held
from anyrank.worker.store import Store

RESULTS = "results"
_ODD = re.compile(r"[^\w.-]+")
_LONGEST = 80  # characters of a run's name in a folder's name
_MORE_BYTES = 1 << 20  # of the small files beside the adapter


def keep(store: Store, held: Held, round: int, rank: int, download: Download, counts: Counts | None) -> Path:
    """Keep the model of a closing download, and its scores on the site's held-out examples; returns its folder.

    `rank`: the site's own, as the server has it; its adapter may have less, by a method that prunes.
    Raises `RunFailed` if the store has no room for it, or cannot be written.
    """
    folder = store.folder / RESULTS / _name(held)
    others = [path for path in files.contents(folder.parent) if path != folder]
    if len(others) >= store.most_runs:
        raise RunFailed(f"{folder.parent}: has {len(others)} results, the most that store.runs allows; remove old ones")
    store.check_room(download.upload_bytes() + download.download_bytes() + _MORE_BYTES)
    files.make_folder(folder)
    for name in (SEAL, SUMMARY):
        files.remove(folder / name)
    about = {"run": held.run, "key": held.key, "method": held.method.name, "round": round}
    files.write_whole_text(folder / RESULT, json.dumps(about, indent=2) + "\n")
    config = _with_rank(held.config, rank)
    files.write_whole_text(folder / CONFIG, tomli_w.dumps(to_table(config)))
    identity.note(folder, config)
    own = folder / SITES / held.name
    parts = {ADAPTER: download.adapter, **({BASE_UPDATE: download.merged} if download.merged else {})}
    for part, adapter in parts.items():  # with the site's own description, of which a server has no part
        Adapter(adapter.layers, adapter.tensors, held.start.adapter.config).save(own / part)
    if not download.merged:
        for path in files.contents(own / BASE_UPDATE):
            files.remove(path)
    summary = _summary(held, round, rank, counts)
    sites.write(folder, summary)
    files.write_whole_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    seal.write(folder)
    return folder


def _name(held: Held) -> str:
    """A folder's name that says the run's, whatever a server calls it."""
    return f"{_ODD.sub('_', held.run)[:_LONGEST].strip('.') or 'run'}-{held.key[:8]}"


def _with_rank(config: Config, rank: int) -> Config:
    """The configuration with the site's rank: the public one says none, and the site ran it with the largest that it allows."""
    table = to_table(config)
    table["sites"][0]["rank"] = rank
    return from_table(table)


def _summary(held: Held, round: int, rank: int, counts: Counts | None) -> dict[str, Any]:
    row: dict[str, Any] = {"rank": rank, "train_examples": len(held.examples)}
    row |= {"accuracy": None, "loss": None, "test_examples": None}
    if counts:
        right = None if counts.correct is None else counts.correct / counts.examples
        mean = None if counts.losses is None else counts.losses / counts.examples
        row |= {"accuracy": right, "loss": mean, "test_examples": counts.examples}
    return {
        "name": held.config.run.name,
        "method": held.method.name,
        "rounds": round,
        "sites": {held.name: row},
        "label_names": list(held.model.task.facts().label_names),
        "sites_scored": "own",
    }
