"""The records that server and clients exchange in a round, and the server's state between two rounds."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.lazy import outlined
from anyrank.errors import AdapterError, ConfigError
from anyrank.messages.reduction import Reduced, nbytes

BOTH = frozenset({"A", "B"})
EVERYTHING = BOTH | {"tensors"}
SCALING_RULES = ("constant", "standard", "rslora")


@dataclass(frozen=True)
class Scaling:
    """The scaling `s(r)` that a client of rank r uses: `alpha` (constant), `alpha / r` (standard), `alpha / sqrt(r)` (rslora).

    `layer_alpha` overrides alpha for single layers, as PEFT's `alpha_pattern` does.

    >>> Scaling(16, "standard").of("any", 8), Scaling(16, "rslora").of("any", 4), Scaling(2, "constant").of("any", 4)
    (2.0, 8.0, 2.0)
    """

    alpha: float
    rule: str = "standard"
    layer_alpha: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule not in SCALING_RULES:
            raise ConfigError(f"scaling: expected one of {', '.join(SCALING_RULES)}, got {self.rule!r}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha: expected a positive number, got {self.alpha}")

    def of(self, layer: str, rank: int) -> float:
        """The scaling of `layer` at `rank`."""
        alpha = float(self.layer_alpha.get(layer, self.alpha))
        return {"constant": alpha, "standard": alpha / rank, "rslora": alpha / math.sqrt(rank)}[self.rule]


@dataclass(frozen=True)
class Client:
    """A registered client: its name and the rank that its hardware allows (`layer_ranks`: other ranks for some layers)."""

    name: str
    rank: int
    layer_ranks: Mapping[str, int] = field(default_factory=dict)

    def rank_of(self, layer: str) -> int:
        return self.layer_ranks.get(layer, self.rank)


@dataclass(frozen=True)
class Pruning:
    """How a client may lower its own rank (HetLoRA): it penalises the slices past `kept(rank)`, the tail, and drops them
    if they have become smaller.

    The local loss of each layer grows by `penalty * |B[:, tail]| * |A[tail]|` (Frobenius norms); a layer whose product of
    norms is smaller after the training than it was before loses its tail.

    >>> [Pruning(gamma=0.99, penalty=0.0, min_rank=2).kept(rank) for rank in (1, 2, 3, 32, 200)]
    [1, 2, 2, 31, 198]
    """

    gamma: float
    penalty: float
    min_rank: int

    def kept(self, rank: int) -> int:
        """`max(min_rank, floor(gamma * rank))`, and never more than `rank`."""
        return min(rank, max(self.min_rank, math.floor(self.gamma * rank)))


@dataclass(frozen=True)
class Download:
    """The download of a client, from which it starts its round.

    `adapter` in the client's ranks; `slices` `{layer: which of the server's slices these are}`; `train`: the factors that
    the client trains and uploads; `send`: the factors that are sent to it (FFA-LoRA's A comes from the seed instead);
    `private`: which of `A`, `B` and `tensors` stay with the client and are not sent in either direction; `merged`: a low-rank
    sum that the client adds to its original base model for this round; `pruning`: how the client may lower its rank, if at
    all; `rescale`: the factor that takes the change from the server's scaling to the client's, B or both by its root.
    """

    adapter: Adapter
    slices: Mapping[str, tuple[int, ...]]
    train: frozenset[str] = BOTH
    send: frozenset[str] = BOTH
    private: frozenset[str] = frozenset()
    merged: Adapter | None = None
    pruning: Pruning | None = None
    rescale: Literal["B", "both"] = "B"

    def download_bytes(self, reduced: Reduced = "") -> int:
        """Bytes of the download; `reduced`: how the sum in the base model is sent, exactly by default."""
        layers = outlined(self.merged.layers).values() if self.merged else ()
        merged = sum(nbytes(factor, layer.rank, reduced) for layer in layers for factor in (layer.A, layer.B))
        return self._travelling(self.adapter, self.send) + merged

    def upload_bytes(self, adapter: Adapter | None = None) -> int:
        """Bytes of the upload: of `adapter`, or by default of an adapter with the download's ranks."""
        return self._travelling(adapter or self.adapter, self.train)

    def _travelling(self, adapter: Adapter, factors: frozenset[str]) -> int:
        tensors = 0 if "tensors" in self.private else tensor_bytes(adapter)
        return factor_bytes(adapter, factors - self.private) + tensors


@dataclass(frozen=True)
class Counts:
    """A model's results on a client's own held-out examples, as sums, which are added over clients: the number of `examples`,
    the sum of their `losses` (`None` if it is not finite), how many answers are `correct` (`None` if no answer is right or
    wrong), and `by_label`, `{label: (examples, correct)}`, where that may be sent.
    """

    examples: int
    losses: float | None
    correct: int | None = None
    by_label: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientUpdate:
    """The upload of a client: its trained adapter, its number of examples (its weight), figures about its training, and the
    results of what it downloaded on its own held-out examples, if they are wanted.
    """

    adapter: Adapter
    num_examples: int
    client: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: Counts | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.num_examples, int) or isinstance(self.num_examples, bool) or self.num_examples < 1:
            raise AdapterError(
                f"client {self.client or '?'}: num_examples must be a whole number of at least 1, got {self.num_examples!r}"
            )


class Code(enum.Enum):
    """Why a client sent nothing usable, as a code that may leave its site."""

    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    CRASHED = "crashed"
    LATE = "late"
    REFUSED = "refused"
    PRIVATE = "private training failed"


@dataclass(frozen=True)
class Reported:
    """What a client that does not train sends: the results of what it downloaded on its own held-out examples, or `None` if it
    has none, or may not send them."""

    client: str
    counts: Counts | None


@dataclass(frozen=True)
class Unreadable:
    """A reply that is no update and no failure; `reason`: why, in words of the server."""

    client: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """A client that sent nothing usable in this round: a `code`, and the `reason` if it may be known."""

    client: str
    code: Code
    reason: str = ""

    def __str__(self) -> str:
        return self.reason or self.code.value


@dataclass(eq=False)
class Job:
    """One client's work in one round: the client, its number of examples (by the server's own record), and its download.

    `make` builds the download and is a pure function. It is called when the download is first needed, that is when it is sent.
    The download is kept until `settle`, since the downloads of a cohort may be a hundred times as large as the server's state.
    """

    client: Client
    num_examples: int
    make: Callable[[], Download] = field(repr=False)
    _made: Download | None = field(default=None, init=False, repr=False)

    @property
    def download(self) -> Download:
        """The client's download."""
        if self._made is None:
            self._made = self.make()
        return self._made

    def settle(self) -> None:
        """Release the download, after the reply has been checked."""
        self._made = None


@dataclass(frozen=True)
class Facts:
    """Facts about a task: for reports, forecasts, and a server that has neither data nor model.

    `inputs_bytes`: bytes of all examples; `inputs_on_disk`: the examples are in a file that the operating system caches;
    `model_bytes`: bytes of the base model.
    """

    task: str
    head: str = ""
    base_model: str = ""
    label_names: tuple[str, ...] = ()
    train_examples: int = 0
    test_examples: int = 0
    inputs_bytes: int = 0
    inputs_on_disk: bool = False
    model_bytes: int = 0

    def table(self) -> dict[str, Any]:
        """The entries of a summary."""
        return {
            "task": self.task,
            "head": self.head,
            "base_model": self.base_model,
            "train_examples": self.train_examples,
            "test_examples": self.test_examples,
            "inputs_bytes": self.inputs_bytes,
            "inputs_in": "disk" if self.inputs_on_disk else "memory",
        }


@dataclass(frozen=True)
class Profile:
    """The cost of one local step: `step_s`, seconds by client, and `activations`, the bytes that it keeps for its gradients."""

    step_s: Mapping[str, float]
    activations: int


@dataclass(frozen=True)
class ServerState:
    """The server's state between rounds, one type for all methods.

    `round`: rounds done; `adapter`: the global update at the federation's largest rank; `scaling`: the rule that clients
    use; `merged`: the sum in the base model; `extra`: everything else that a method keeps, as adapters by name.
    """

    round: int
    seed: int
    adapter: Adapter
    scaling: Scaling
    merged: Adapter | None = None
    extra: Mapping[str, Adapter] = field(default_factory=dict)

    def rank_of(self, layer: str) -> int:
        """The server's rank of a layer, whose numbers are not read for it."""
        return outlined(self.adapter.layers)[layer].rank


def factor_bytes(adapter: Adapter, factors: frozenset[str]) -> int:
    """Bytes of the named factors (`{"A", "B"}` or one of them) over all layers."""
    return sum(
        factor.nbytes
        for layer in outlined(adapter.layers).values()
        for name, factor in (("A", layer.A), ("B", layer.B))
        if name in factors
    )


def layer_bytes(adapter: Adapter, name: str) -> int:
    """Bytes of a layer's factors."""
    layer = outlined(adapter.layers)[name]
    return layer.A.nbytes + layer.B.nbytes


def tensor_bytes(adapter: Adapter) -> int:
    """Bytes of the plain tensors (head, biases)."""
    return sum(tensor.nbytes for tensor in outlined(adapter.tensors).values())


@dataclass(frozen=True, eq=False)
class Scores:
    """A model's results on held-out examples: `losses` `[n]` float64, `labels` `[n]`, and which answers are `correct` `[n]`
    bool (`None` if no answer is right or wrong, as in regression).

    For metrics: `predictions` `[n]`, whole numbers like the labels, or the outputs of a task without classes; `scores`
    `[n, classes]` float32, probabilities, only if a metric needs them; `targets` `[n]` and their `names`, if predictions are
    compared with something other than the labels. `figures`: the metrics by name, each a number or one number per label;
    `sites`: the same by site, each on the site's own examples, `None` where a metric fails on these.
    """

    correct: np.ndarray | None
    losses: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray | None = None
    scores: np.ndarray | None = None
    targets: np.ndarray | None = None
    names: tuple[str, ...] = ()
    figures: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    sites: Mapping[str, Mapping[str, float | Mapping[str, float] | None]] = field(default_factory=dict)

    def of_rows(self, rows: np.ndarray) -> Scores:
        """The results on the examples `rows` `[m]` alone, without metrics."""
        names = ("correct", "losses", "labels", "predictions", "scores", "targets")
        arrays = {name: None if (array := getattr(self, name)) is None else array[rows] for name in names}
        return Scores(**arrays, names=self.names)

    @property
    def accuracy(self) -> float | None:
        """The share of examples that are correct."""
        return None if self.correct is None else float(self.correct.mean())

    @property
    def loss(self) -> float:
        return float(self.losses.mean())
