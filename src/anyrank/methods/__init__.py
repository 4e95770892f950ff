"""The aggregation methods. One file a method; importing this package registers them all."""

from anyrank.methods import (  # noqa: F401
    fedavg,
    fedex,
    fedsa,
    fedsvd,
    ffa_lora,
    flexlora,
    flora,
    florist,
    hetlora,
    lora_fair,
    raflora,
    rbla,
    references,
    rolora,
    stayput,
    zeropad,
)
from anyrank.methods.base import Holds, Method, Part, Traits
from anyrank.methods.registry import REGISTRY, load_file, make, register

__all__ = ["REGISTRY", "Holds", "Method", "Part", "Traits", "load_file", "make", "register"]
