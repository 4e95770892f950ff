"""Whether what a server asks fits what a site allows. What does not is refused with a reason for the site's own log.

Nothing that a server sends is taken on trust: a job is compared with what the site's own method object would send to this site
in this round, and its plan with the plan of the configuration that the site has agreed to.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config import explain
from anyrank.config.sections import TASKS, Config
from anyrank.config.tables import from_table
from anyrank.errors import AnyRankError, ConfigError, shortened
from anyrank.messages.plan import Plan, local_steps, plan_round
from anyrank.messages.records import Client, Download, ServerState
from anyrank.methods import Method
from anyrank.methods.registry import registered
from anyrank.worker.sitefile import SiteFile

# Keys that name code, data or models: a server never says these.
FORBIDDEN = (
    *("model.path", "model.file", "model.handed_in", "method.file", "method.handed_in", "eval.file"),
    *("data.source", "data.test_source", "data.partition.file", "data.partition.handed_in"),
)
KNOWN = frozenset(explain.sections()).union(key.path for key in explain.keys())  # noqa: SIM118 - no mapping
_OF_SITES = ("source", "test_source")
_USUAL = {"data.source": "digits"}  # what stands for nothing
_KEY = re.compile(r"[a-z_]+(\.[a-z_]+){0,2}")
_LARGEST_SCORED = 1024  # examples that are scored at a time, whatever the server says


class Refused(Exception):
    """What the site does not do. `key`: what of the configuration or of the job does not fit, which may be sent; the text is
    for the site's own log."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key


def expect(holds: bool, key: str, expected: Any, got: Any) -> None:
    if not holds:
        raise Refused(key, f"expected {expected}, got {shortened(str(got), 200)}")


# --- the configuration -----------------------------------------------------------------------------------------------


def fitted(site: SiteFile, table: Mapping[str, Any], largest_rank: int) -> Config:
    """The configuration that the site runs: the server's public one, with the site as its only client and with the site's own
    data, model and device. Raises `Refused`."""
    _check_forbidden(table)
    merged = copy.deepcopy(dict(table))
    own = _entry(site, merged, min(site.limits.rank, largest_rank))
    for section in ("data", "model", "run"):
        expect(isinstance(merged.setdefault(section, {}), dict), section, "a table", merged[section])
    merged["data"] |= {key: list(value) if isinstance(value, tuple) else value for key, value in vars(site.data).items()}
    for name in _OF_SITES:
        own[name] = merged["data"].pop(name)
    merged["sites"] = [own]
    merged["model"] |= {"path": site.model.folder, "name": site.model.name, "device": site.device.kind}
    merged["run"] |= {"threads": site.device.threads, "stacking": "never", "engine": "process", "workers": 0}
    try:
        config = from_table(merged)
    except AnyRankError as error:
        raise Refused(key_of(error), str(error)) from None
    if config.eval.batch_size > _LARGEST_SCORED:
        config = config.replace(eval={"batch_size": _LARGEST_SCORED})
    _check_limits(site, config, largest_rank)
    _check_accepted(site, config)
    _check_privacy(site, config)
    return config


def key_of(error: AnyRankError) -> str:
    """The key that an error of a configuration names, and nothing else of it."""
    found = _KEY.match(str(error))
    known = found and (found[0] in KNOWN or found[0] in FORBIDDEN)
    return found[0] if known else "configuration"


def _check_forbidden(table: Mapping[str, Any]) -> None:
    for key in FORBIDDEN:
        value: Any = table
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        expect(not value or value == _USUAL.get(key), key, "nothing from a server", value)
    sites = table.get("sites")
    for each in sites if isinstance(sites, list) else ():
        for name in _OF_SITES:
            expect(not (isinstance(each, Mapping) and each.get(name)), f"sites.{name}", "nothing from a server", each)


def _entry(site: SiteFile, table: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The site's own table in `[[sites]]`; with the largest `rank` that it may have, if the server does not name sites."""
    if "sites" not in table:
        return {"name": site.name, "rank": rank}
    sites = table["sites"]
    expect(isinstance(sites, list), "sites", "a list of sites", sites)
    own = [each for each in sites if isinstance(each, Mapping) and each.get("name") == site.name]
    expect(len(own) == 1, "sites", f"one site of the name {site.name}", len(own))
    return dict(own[0])


def _check_limits(site: SiteFile, config: Config, largest_rank: int) -> None:
    limits, (rank,) = site.limits, config.clients.ranks
    expect(rank <= limits.rank, "sites.rank", f"at most {limits.rank}", rank)
    expect(rank <= largest_rank <= limits.largest_rank, "largest_rank", f"{rank} to {limits.largest_rank}", largest_rank)
    expect(config.run.rounds <= limits.rounds, "run.rounds", f"at most {limits.rounds}", config.run.rounds)
    expect(
        config.train.batch_size <= limits.batch_size,
        "train.batch_size",
        f"at most {limits.batch_size}",
        config.train.batch_size,
    )
    expect(config.train.local_steps <= limits.steps, "train.local_steps", f"at most {limits.steps}", config.train.local_steps)
    expect(
        config.train.local_epochs <= limits.steps, "train.local_epochs", f"at most {limits.steps}", config.train.local_epochs
    )
    expect(
        config.model.max_length <= limits.max_length,
        "model.max_length",
        f"at most {limits.max_length}",
        config.model.max_length,
    )


def _check_accepted(site: SiteFile, config: Config) -> None:
    accept, name = site.accept, config.method.name
    own = {key for key, kind in registered().items() if kind.__module__.startswith("anyrank.methods.") and not kind.pools_data}
    expect(
        name in own and name in (accept.methods or own), "method.name", ", ".join(accept.methods) or "a federating method", name
    )
    expect(config.model.task in (accept.tasks or TASKS), "model.task", ", ".join(accept.tasks or TASKS), config.model.task)


def _check_privacy(site: SiteFile, config: Config) -> None:
    asked, own = config.privacy, site.privacy
    expect(not asked.secure_sum, "privacy.secure_sum", "false: this version hides no upload from the server", True)
    if own.level != "none":
        expect(asked.level == own.level, "privacy.level", own.level, asked.level)
    if asked.level == "none":
        return
    expect(asked.noise_at == "client", "privacy.noise_at", "client", asked.noise_at)
    expect(asked.noise == "independent", "privacy.noise", "independent: a site keeps no key to draw noise again", asked.noise)
    expect(own.exact_counts or asked.counts == "rounded", "privacy.counts", "rounded", asked.counts)
    expect(not own.clip or asked.clip <= own.clip, "privacy.clip", f"at most {own.clip}", asked.clip)


def check_noise(site: SiteFile, noise: float) -> None:
    """Refuse noise that is weaker than the site allows."""
    least = site.privacy.noise_multiplier
    expect(noise >= least, "privacy.noise_multiplier", f"at least {least}", noise)


def check_steps(site: SiteFile, config: Config, num_examples: int) -> None:
    """Refuse more local steps than the site allows, counted with its own number of examples."""
    steps = local_steps(config.train, num_examples)
    expect(steps <= site.limits.steps, "train.local_epochs", f"at most {site.limits.steps} local steps", steps)


def check_client(site: SiteFile, rank: int, largest_rank: int, client: Client) -> None:
    """Refuse a job for another client, or of a rank that the site does not have (`rank`: the agreed one, 0 if none is)."""
    expect(client.name == site.name and not client.layer_ranks, "client", site.name, client)
    expect(client.rank == (rank or client.rank), "client.rank", rank, client.rank)
    most = min(site.limits.rank, largest_rank)
    expect(1 <= client.rank <= most, "client.rank", f"1 to {most}", client.rank)


# --- a job -----------------------------------------------------------------------------------------------------------


def check_plan(config: Config, plan: Plan, train: bool) -> None:
    """Refuse a plan that is not the configuration's for that round. After the last one, a state may be scored (not `train`)."""
    rounds = config.run.rounds
    expect(1 <= plan.round <= rounds + (not train), "plan.round", f"1 to {rounds}", plan.round)
    expect(plan.step_factor == 1, "plan.step_factor", 1, plan.step_factor)
    expected = plan_round(config.train, min(plan.round, rounds), rounds, config.run.seed)
    for key in ("config", "learning_rate", "seed"):
        expect(getattr(plan, key) == getattr(expected, key), f"plan.{key}", getattr(expected, key), getattr(plan, key))


def expected_download(method: Method, start: ServerState, client: Client, round: int, download: Adapter) -> Download:
    """What the site's own method object would send to it in `round`, from the state before round 1: the numbers may differ, the
    form may not. A method whose clients prune may send lower ranks."""
    if method.prunes:
        for name, layer in download.layers.items():
            expect(layer.rank <= client.rank, f"rank of {name}", f"at most {client.rank}", layer.rank)
        client = Client(client.name, client.rank, download.ranks)
    state = ServerState(round - 1, start.seed, start.adapter, start.scaling, start.merged, start.extra)
    return method.dispatch(state, client)


def check_download(download: Download, expected: Download) -> None:
    """Refuse a download that is not of the form of `expected`, or whose numbers are not finite."""
    for key in ("train", "send", "private", "rescale", "pruning", "slices"):
        expect(
            getattr(download, key) == getattr(expected, key), f"download.{key}", getattr(expected, key), getattr(download, key)
        )
    _check_names("layers", download.adapter.layers, expected.adapter.layers)
    _check_names("tensors", download.adapter.tensors, expected.adapter.tensors)
    for name, layer in expected.adapter.layers.items():
        _check_layer(name, download.adapter.layers[name], layer)
    for name, tensor in expected.adapter.tensors.items():
        got = download.adapter.tensors[name]
        expect((got.dtype, got.shape) == (tensor.dtype, tensor.shape), f"tensor {name}", tensor.shape, got.shape)
        expect(_finite(got), f"tensor {name}", "finite numbers", "others")
    _check_merged(download.merged, expected.adapter.layers)


def _check_names(what: str, got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    expect(got.keys() == expected.keys(), f"download.{what}", f"{len(expected)} of the site's model", sorted(got)[:10])


def _check_layer(name: str, got: LoraLayer, expected: LoraLayer) -> None:
    for key in ("rank", "shape", "scaling", "kind", "kernel"):
        expect(getattr(got, key) == getattr(expected, key), f"{key} of {name}", getattr(expected, key), getattr(got, key))
    expect(got.A.dtype == expected.A.dtype, f"dtype of {name}", expected.A.dtype, got.A.dtype)
    expect(_finite(got.A) and _finite(got.B), f"layer {name}", "finite numbers", "others")


def _check_merged(merged: Adapter | None, layers: Mapping[str, LoraLayer]) -> None:
    for name, layer in merged.layers.items() if merged else ():
        expect(name in layers, "download.merged", "layers of the site's model", name)
        own = layers[name]
        same = (layer.shape, layer.kind, layer.kernel, layer.A.dtype) == (own.shape, own.kind, own.kernel, own.A.dtype)
        expect(same, f"merged {name}", f"{own.kind} {own.shape}", f"{layer.kind} {layer.shape}")
        expect(layer.rank <= min(own.shape), f"merged {name}", f"a rank of at most {min(own.shape)}", layer.rank)
        expect(_finite(layer.A) and _finite(layer.B), f"merged {name}", "finite numbers", "others")


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def refusal(refused: Refused) -> ConfigError:
    """What of a refusal may leave the site: the key, and nothing of the site's own."""
    return ConfigError(f"{refused.key}: does not fit what the site allows; its operator finds the reason in the site's log")
