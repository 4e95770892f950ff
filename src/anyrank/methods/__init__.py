"""The aggregation methods. One file a method; importing this package registers them all."""

from anyrank.methods import fedavg, ffa_lora, flexlora, raflora, rbla, references, zeropad  # noqa: F401
from anyrank.methods.base import Holds, Method, Part, Traits
from anyrank.methods.registry import REGISTRY, load_file, make, register

__all__ = ["REGISTRY", "Holds", "Method", "Part", "Traits", "load_file", "make", "register"]
