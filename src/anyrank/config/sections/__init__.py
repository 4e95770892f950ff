"""A run's configuration: frozen dataclasses, to and from TOML. Unknown keys are errors that name the nearest known one.

Each key has its own description (`describe.key`), which `anyrank explain` and docs/configuration.md show. Each section checks
its values when it is created, so that a wrong value is an error before anything is loaded. Names follow PEFT, transformers
and flwr-datasets where these have one.
"""

from anyrank.config.sections.clients import RANK_ORDERS, ClientsConfig
from anyrank.config.sections.data import INSTRUCTIONS, PARTITIONS, DataConfig, PartitionConfig
from anyrank.config.sections.defence import RULES, GuardConfig, RobustConfig
from anyrank.config.sections.method import MethodConfig
from anyrank.config.sections.model import (
    DEVICES,
    DTYPES,
    FEATURES,
    HANDED_IN,
    HEADS,
    OWN_HEADS,
    TASKS,
    TRAIN_DTYPES,
    ModelConfig,
)
from anyrank.config.sections.privacy import ACCOUNTANTS, COUNTS, NOISE_AT, PRIVACY_LEVELS, PrivacyConfig
from anyrank.config.sections.rounds import LATE, RoundsConfig
from anyrank.config.sections.run import STACKINGS, RunConfig
from anyrank.config.sections.scoring import EXTRACTS, SCORES, EvalConfig
from anyrank.config.sections.sites import SiteConfig
from anyrank.config.sections.training import OPTIMIZERS, SCALINGS, SCHEDULES, LoraConfig, TrainConfig
from anyrank.config.sections.whole import READ_BY, Config

__all__ = [
    "ACCOUNTANTS",
    "COUNTS",
    "DEVICES",
    "DTYPES",
    "EXTRACTS",
    "FEATURES",
    "HANDED_IN",
    "HEADS",
    "INSTRUCTIONS",
    "LATE",
    "NOISE_AT",
    "OPTIMIZERS",
    "OWN_HEADS",
    "PARTITIONS",
    "PRIVACY_LEVELS",
    "RANK_ORDERS",
    "READ_BY",
    "RULES",
    "SCALINGS",
    "SCHEDULES",
    "SCORES",
    "STACKINGS",
    "TASKS",
    "TRAIN_DTYPES",
    "ClientsConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GuardConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RobustConfig",
    "RoundsConfig",
    "RunConfig",
    "SiteConfig",
    "TrainConfig",
]
