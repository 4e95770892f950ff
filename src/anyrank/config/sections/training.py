"""`[lora]` and `[train]`: the adapters, and their local training."""

from __future__ import annotations

from dataclasses import dataclass

from anyrank.config.describe import COUNT, LATER, NATURAL, NOT_NEGATIVE, POSITIVE, key
from anyrank.config.sections.values import expect, one_of
from anyrank.errors import ConfigError

SCALINGS = ("constant", "standard", "rslora")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "linear", "cosine")


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
        expect(self.alpha > 0, "lora.alpha", POSITIVE, self.alpha)
        one_of(self.scaling, SCALINGS, "lora.scaling")


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
    precondition: bool = key(
        False,
        "Whether the gradient of B is multiplied by (s^2 A A^T)^-1, so that a step does not depend on how the rows of A are "
        "scaled (LoRA-FA). With B frozen, the gradient of A by (s^2 B^T B)^-1. For methods that train one factor per round.",
        also={"PEFT": "LoraFAOptimizer"},
        metadata=LATER,
    )

    def __post_init__(self) -> None:
        one_of(self.optimizer, OPTIMIZERS, "train.optimizer")
        one_of(self.schedule, SCHEDULES, "train.schedule")
        expect(self.learning_rate > 0, "train.learning_rate", POSITIVE, self.learning_rate)
        expect(self.final_learning_rate >= 0, "train.final_learning_rate", NOT_NEGATIVE, self.final_learning_rate)
        expect(0 <= self.momentum < 1, "train.momentum", "at least 0, below 1", self.momentum)
        expect(self.weight_decay >= 0, "train.weight_decay", NOT_NEGATIVE, self.weight_decay)
        expect(self.batch_size >= 1, "train.batch_size", COUNT, self.batch_size)
        wanted = f"a whole number from 1 to train.batch_size = {self.batch_size}"
        expect(1 <= self.accumulation_steps <= self.batch_size, "train.accumulation_steps", wanted, self.accumulation_steps)
        expect(self.proximal_mu >= 0, "train.proximal_mu", NOT_NEGATIVE, self.proximal_mu)
        expect(self.local_steps >= 0 and self.local_epochs >= 0, "train", "local_steps and local_epochs of at least 0", "less")
        if self.local_steps and self.local_epochs:
            raise ConfigError("train: give local_steps or local_epochs, not both")
        if not self.local_steps and not self.local_epochs:
            object.__setattr__(self, "local_steps", 10)
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError("train.momentum: is for optimizer = 'sgd'; remove it, AdamW has its own momentum")
