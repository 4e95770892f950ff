"""`[method]`: how adapters are merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anyrank.config.describe import LATER, key


@dataclass(frozen=True)
class MethodConfig:
    """`[method]`: how the clients' adapters are merged. The method's own options are further keys of this section."""

    name: str = key(
        "stayput",
        "The aggregation method: one that `anyrank methods` lists, or one that method.file registers.",
        also={"Flower": "strategy"},
    )
    file: str = key("", "A Python file that registers your own method under the name in method.name.")
    options: Mapping[str, Any] = key(
        dict, "The method's own options. Each is written as a key of this section, for example split = 'balanced'."
    )
    handed_in: str = key(
        "", "Digest of a method that was passed from Python. Written automatically; do not set it by hand.", metadata=LATER
    )
