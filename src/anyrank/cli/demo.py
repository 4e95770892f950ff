"""The demo's configuration."""

from __future__ import annotations

from anyrank.config.sections import Config

CONFIG = Config().replace(
    run={"name": "demo", "rounds": 30},
    model={"name": "digits-transformer"},
    clients={"participation": 0.5},
)
