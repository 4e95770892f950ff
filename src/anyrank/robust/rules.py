"""The choice of a run's rule."""

from __future__ import annotations

from anyrank.privacy.noise import Mechanism
from anyrank.robust.base import Rule
from anyrank.robust.central_noise import CentralNoise


def rule_of(mechanism: Mechanism | None) -> Rule:
    """The rule of a run with `mechanism`: the privacy plan with its key, or `None`."""
    return CentralNoise(mechanism) if mechanism and mechanism.plan.central else Rule()
