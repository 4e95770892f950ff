"""Everything that a run consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anyrank.config.sections import Config
from anyrank.federation.cohort import Population
from anyrank.federation.engine import Engine
from anyrank.federation.standing import Labels
from anyrank.methods import Method
from anyrank.privacy.plan import PrivacyPlan


@dataclass(frozen=True, eq=False)
class Federation:
    """Everything a run consists of. `step_factor` multiplies the local steps of the round plan (1 but for `centralized`);
    `labels`: what kinds of examples each client has, where clients are told apart; `privacy`: what is promised of what they
    send."""

    config: Config
    method: Method
    population: Population
    engine: Engine
    facts: Mapping[str, Any] = field(default_factory=dict)
    step_factor: int = 1
    labels: Labels | None = None
    privacy: PrivacyPlan | None = None

    def counted(self, num_examples: int) -> int:
        """The examples that a client counts as: its own number, or what a privacy plan declares in its stead."""
        return self.privacy.declared(num_examples) if self.privacy else num_examples

    @property
    def upload_bound(self) -> float:
        """The norm that an upload's change may have."""
        return self.privacy.upload_bound if self.privacy else math.inf
