"""Load what a site needs for a run: its data, its base model, its method, and its own privacy plan."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anyrank import methods
from anyrank.config.sections import Config
from anyrank.data import images, texts
from anyrank.data.partition import ByName
from anyrank.errors import AnyRankError
from anyrank.messages import calls
from anyrank.messages.records import Scaling, ServerState
from anyrank.messages.roster import Names, Roster
from anyrank.methods import Method
from anyrank.privacy.plan import PrivacyPlan, plan_privacy
from anyrank.progress import Progress
from anyrank.tasks import people
from anyrank.tasks.dealing import dealt
from anyrank.tasks.load import load_task
from anyrank.tasks.pretrained import sha256, weight_files
from anyrank.training.digest import base_digest
from anyrank.training.lora import LoraModel
from anyrank.training.opening import open_model
from anyrank.training.scoring import Scorer
from anyrank.worker import sitechecks
from anyrank.worker.sitechecks import Refused, expect
from anyrank.worker.sitefile import SiteFile

_LATER = ("rounds",)  # keys of [run] that may grow when a run is resumed
_CLOSED = {"text-classification": texts, "image-classification": images}  # readers of tasks whose labels are classes


@dataclass(frozen=True, eq=False)
class Held:
    """What a site has loaded for a run: `key` is the folder of its own parts, `rank` its rank as the configuration has it (0:
    the downloads say it), `declared` its number of examples (of persons, where these are protected) as it may be known,
    `privacy` its own plan, `scorer` what scores its held-out examples, if it reports scores."""

    name: str
    run: str
    key: str
    config: Config
    largest_rank: int
    base_model: str
    method: Method
    rank: int
    model: LoraModel
    examples: np.ndarray
    declared: int
    privacy: PrivacyPlan | None
    scorer: Scorer | None

    @functools.cached_property
    def start(self) -> ServerState:
        """The state before round 1: the seed and the base model determine it."""
        lora, seed = self.config.lora, self.config.run.seed
        scaling = Scaling(lora.alpha, lora.scaling)
        return self.method.init(self.model.start(self.largest_rank, scaling, seed), scaling, seed)


def load(site: SiteFile, run: str, table: Mapping[str, Any], config: Config, largest_rank: int, progress: Progress) -> Held:
    """Load a site's data and base model for a run: `table` is the public configuration, `config` the one that the site runs.

    Raises `Refused` for what does not fit now that the examples are known, and the errors of a configuration's task.
    """
    torch.set_num_threads(config.run.threads)
    _check_base_model(site)
    method = methods.make(config.method.name, config.method.options)
    _check_labels(config)
    task = load_task(config, progress)
    shards, _ = dealt(config, task)
    examples = ByName(shards, Names(1, (site.name,)).index)[site.name]
    expect(len(examples) >= 1, "data", "at least one training example", len(examples))
    sitechecks.check_steps(site, config, len(examples))
    persons = people.counted(config, task, shards)
    count = len(examples) if persons is None else int(persons[0])
    privacy = _plan(site, config, method, count)
    model, _ = open_model(task, config, largest_rank, method.train)
    declared = privacy.declared(count) if privacy else count
    return Held(
        name=site.name,
        run=run,
        key=_key(table, run),
        config=config,
        largest_rank=largest_rank,
        base_model=str(table.get("model", {}).get("name") or ""),
        method=method,
        rank=config.clients.ranks[0] if "sites" in table else 0,
        model=model,
        examples=examples,
        declared=declared,
        privacy=privacy,
        scorer=_scorer(site, config, model),
    )


def _scorer(site: SiteFile, config: Config, model: LoraModel) -> Scorer | None:
    """What scores the held-out examples, where the site reports scores, the run wants them, and it is not private."""
    if not site.accept.scores or config.eval.where != "sites" or config.privacy.level != "none":
        return None
    held_out = {site.name: np.arange(len(model.task.test))}
    return Scorer(model, held_out, config.eval.batch_size, site.accept.by_label and config.eval.by_label)


def _plan(site: SiteFile, config: Config, method: Method, count: int) -> PrivacyPlan | None:
    """The site's own privacy plan: from the configuration and its own number of examples, or of persons."""
    try:
        plan = plan_privacy(config, [count])
    except AnyRankError as error:
        raise Refused(sitechecks.key_of(error), str(error)) from None
    if plan is None:
        return None
    one_factor = plan.level != "client" or len(method.train) == 1
    expect(one_factor and not method.private and not method.prunes, "method.name", "a method for private runs", method.name)
    largest = plan.level == "client" or site.privacy.delta < 1 / plan.declared(count)
    expect(largest, "privacy.delta", "less than 1 over the number of examples, or of persons", site.privacy.delta)
    sitechecks.check_noise(site, plan.noise[plan.declared(count)])
    return plan


def _check_base_model(site: SiteFile) -> None:
    expected, folder = site.accept.base_model, site.model.folder
    if expected:
        expect(bool(folder), "accept.base_model", "a folder of the base model", site.model.name)
        got = digest_of_model(Path(folder))
        expect(got == expected, "accept.base_model", expected, got)


def ready(held: Held) -> calls.Ready:
    """What the site says of itself: its name, its declared number of examples, and what its base model is."""
    held_out = len(held.model.task.test) if held.scorer else 0
    facts = dataclasses.replace(
        held.model.task.facts(bare=True),
        base_model=held.base_model,
        train_examples=held.declared,
        test_examples=held_out,
    )
    sizes, counted = np.array([held.declared], np.int64), np.array([held_out], np.int64)
    known = Roster((held.name,), sizes, 0, facts, in_order=True, held_out=counted if held.scorer else None)
    return calls.Ready(known, base_digest=base_digest(held.model))


def digest_of_model(folder: Path) -> str:
    """SHA-256 over the weight files of a model folder, by name: what `accept.base_model` names. Raises `ModelError`."""
    files = [f"{path.name} {sha256(path)}" for path in weight_files(folder, str(folder))]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def _check_labels(config: Config) -> None:
    """Refuse labels that the configuration does not number: alone, the site would number them differently than other sites."""
    reader, (own,) = _CLOSED.get(config.model.task), config.sites
    if reader is None:
        return
    known = config.data.label_names
    expect(bool(known), "data.label_names", "the labels of all sites, in their order", "none")
    found = reader.training(dataclasses.replace(config.data, source=own.source, test_source="", label_names=())).label_names
    lacking = sorted(set(found) - set(known))
    expect(not lacking, "data.label_names", f"all labels of this site among {list(known)}", lacking)


def _key(table: Mapping[str, Any], run: str) -> str:
    """The name of a run of a federation in the store: a digest of the public configuration and of the run's name."""
    plain = {**table, "run": {key: value for key, value in table.get("run", {}).items() if key not in _LATER}}
    return hashlib.sha256(json.dumps([plain, run], sort_keys=True).encode()).hexdigest()[:32]
