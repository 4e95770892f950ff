"""A run's configuration: its sections, and how they are read and written."""

from anyrank.config.sections import (
    ClientsConfig,
    Config,
    DataConfig,
    EvalConfig,
    GuardConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    PartitionConfig,
    PrivacyConfig,
    RobustConfig,
    RoundsConfig,
    RunConfig,
    SiteConfig,
    TrainConfig,
)
from anyrank.config.tables import from_table, identity, load, override, to_table

__all__ = [
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
    "from_table",
    "identity",
    "load",
    "override",
    "to_table",
]
