"""The configuration of one run: all sections together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anyrank.config.describe import LATER
from anyrank.config.sections.clients import ClientsConfig
from anyrank.config.sections.data import DataConfig
from anyrank.config.sections.defence import GuardConfig, RobustConfig
from anyrank.config.sections.method import MethodConfig
from anyrank.config.sections.model import HANDED_IN, OWN_HEADS, ModelConfig
from anyrank.config.sections.privacy import PrivacyConfig
from anyrank.config.sections.rounds import RoundsConfig
from anyrank.config.sections.run import RunConfig
from anyrank.config.sections.scoring import EvalConfig
from anyrank.config.sections.sites import AUTO, OF_SITES, SiteConfig, check_data, clients_of, in_order
from anyrank.config.sections.training import LoraConfig, TrainConfig
from anyrank.config.sections.values import expect
from anyrank.errors import ConfigError

_LM, _PICTURES, _TEXT = "causal-lm", "image-classification", "text-classification"
# Keys that only some tasks read, and a name for these tasks. With another task, such a key is an error, never ignored.
READ_BY = {
    **{("data", name): ((_LM, _PICTURES, _TEXT), "a source of your own") for name in ("split", "test_split")},
    ("data", "label_names"): ((_TEXT,), "texts, and for [[sites]]"),
    ("data", "rotate"): ((_PICTURES,), "images of your own source"),
    ("model", "pretrained"): ((_PICTURES,), "images of your own source"),
    **{("data", name): ((_LM, _PICTURES), "images of your own source") for name in ("train_examples", "test_examples")},
    **{("data", name): ((_LM,), _LM) for name in ("format", "prompt", "completion", "template", "chat", "options")},
    **{("eval", name): ((_LM,), _LM) for name in ("score", "extract", "max_new_tokens", "length_normalized")},
}


@dataclass(frozen=True)
class Config:
    """The configuration of one federated run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sites: tuple[SiteConfig, ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        if self.sites:
            self._take_sites()
        embedded = self.model.task == "image-classification" and self.data.source == "digits" and not self.sites
        task = "digits" if embedded else self.model.task
        for (section, name), (tasks, what) in READ_BY.items():
            table = getattr(self, section)
            value = getattr(table, name)
            usual = value == getattr(type(table)(), name)
            may = bool(self.model.file) or task == HANDED_IN  # such a task may read any key
            may = may or (name == "label_names" and bool(self.sites))
            expect(usual or may or task in tasks, f"{section}.{name}", f"no value, because this key is only for {what}", value)
        if self.model.head in OWN_HEADS and task != _TEXT and not self.model.file:
            raise ConfigError(f"model.head: '{self.model.head}' is only for {_TEXT}; use trained or frozen")

        if self.privacy.level == "person" and not self.data.person:
            raise ConfigError(
                "data.person: expected the column that names whose each example is, for privacy.level = 'person', got none"
            )

        if self.privacy.draws_units:
            self._check_numbers()

    def _check_numbers(self) -> None:
        """Raise `ConfigError` for numbers in which an example's gradient depends on other examples by rounding."""
        for name, expected in (("train_dtype", "'float32'"), ("dtype", "'float32', or 'auto', which is float32 then")):
            value = getattr(self.model, name)
            if value == "bfloat16":
                raise ConfigError(
                    f"model.{name}: expected {expected}, with privacy.level = '{self.privacy.level}', got {value!r}: rounding "
                    "depends on the other examples of a batch, more than the noise covers"
                )

    def _take_sites(self) -> None:
        """Put the sites in order, and their names and ranks into `clients`. `ConfigError` for keys that say otherwise."""
        if self.model.file or self.model.task == HANDED_IN:
            raise ConfigError(
                "sites: a task of your own reads its examples itself; divide them by data.partition, or by shards"
            )
        check_data(self.data)
        object.__setattr__(self, "sites", in_order(self.sites))
        object.__setattr__(self, "clients", dataclasses.replace(self.clients, **clients_of(self.sites, self.clients)))

    @property
    def site_files(self) -> dict[str, str]:
        """The files that the sites name, by dotted key."""
        return {name: path for site in self.sites for name, path in site.files.items()}

    @property
    def undecided(self) -> tuple[SiteConfig, ...]:
        """The sites whose rank is `auto`."""
        return tuple(site for site in self.sites if site.rank == AUTO)

    def at_rank(self, rank: int) -> Config:
        """A copy in which all clients, or sites, have one rank."""
        if not self.sites:
            return self.replace(clients={"ranks": (rank,)})
        return self.with_ranks({site.name: rank for site in self.sites})

    def with_ranks(self, ranks: Mapping[str, int]) -> Config:
        """A copy in which the sites that `ranks` names have these ranks."""
        sites = tuple(dataclasses.replace(site, rank=ranks.get(site.name, site.rank)) for site in self.sites)
        usual = {name: getattr(ClientsConfig(), name) for name in OF_SITES}
        if any(site.rank == AUTO for site in sites):
            usual["ranks"] = self.clients.ranks
        return dataclasses.replace(self, sites=sites, clients=dataclasses.replace(self.clients, **usual))

    def replace(self, **sections: Mapping[str, Any]) -> Config:
        """A copy with some keys of some sections changed: `config.replace(run={"seed": 1})`."""
        changed = {name: dataclasses.replace(getattr(self, name), **keys) for name, keys in sections.items()}
        return dataclasses.replace(self, **changed)
