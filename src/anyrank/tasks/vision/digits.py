"""The embedded task: scikit-learn's bundled 8x8 digits, learned upright and then rotated by 90 degrees.

The base model, a small network, is pretrained when it is needed (a second or two) and kept in the cache. Its head stays frozen,
and clients adapt it to the rotated images by LoRA. The data are real, nothing is downloaded, and a federation takes seconds.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank import keys
from anyrank.config.sections import DataConfig, LoraConfig, ModelConfig
from anyrank.errors import ConfigError, ModelError, nearest
from anyrank.tasks.base import Examples, Task, TensorInputs, resolve_targets
from anyrank.tasks.vision.pretraining import Recipe, pretrained

_SEED = 0  # of the held-out images: they are given, and the same for every run seed
_RECIPE = Recipe("digits", version=1, epochs=30)


class Block(nn.Module):
    """A pre-norm transformer block with PEFT's usual names for its projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DigitsTransformer(nn.Module):
    """A vision transformer for 8x8 images: four patches of 4x4, one block of width 64, mean pooling."""

    def __init__(self, width: int = 64, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Linear(16, width)
        self.position = nn.Parameter(torch.zeros(4, width))
        self.block = Block(width, heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        patches = inputs.unflatten(1, (2, 4, 2, 4)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.block(self.patch(patches) + self.position)).mean(dim=1))


class DigitsMLP(nn.Module):
    """Two hidden layers of width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(F.relu(self.fc2(F.relu(self.fc1(inputs)))))


MODELS = {
    "digits-transformer": (DigitsTransformer, ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")),
    "digits-mlp": (DigitsMLP, ("fc1", "fc2")),
}


def load(model: ModelConfig, data: DataConfig, lora: LoraConfig, folder: Path, progress=None) -> Task:
    """The digits task: 1,437 images to train on and 360 held out, all rotated by 90 degrees; head frozen or trained.

    `folder`: the cache of base models.
    """
    name = model.name or "digits-transformer"
    if name not in MODELS or model.path:
        raise ConfigError(f"model.name: '{model.path or name}' is no model for the digits; {nearest(name, MODELS)}")
    if data.source != "digits":
        raise ConfigError(f"data.source: expected 'digits' for image classification, got '{data.source}'")
    if model.head == "label-names":
        raise ConfigError("model.head: label-names is for text; the digits take frozen or trained")
    kind, default_targets = MODELS[name]
    images, labels, held_out = _images()
    module = pretrained(_RECIPE, name, kind(), images[~held_out], labels[~held_out], folder)
    targets = resolve_targets(module, lora.target_modules or default_targets)
    if not targets:
        known = [target for target, child in module.named_modules() if isinstance(child, nn.Linear)]
        raise ModelError(f"lora.target_modules: {', '.join(lora.target_modules)} match nothing; known: {', '.join(known)}")
    turned = torch.rot90(images.unflatten(1, (8, 8)), dims=(1, 2)).flatten(1)
    return Task(
        name="digits turned by 90 degrees",
        module=module,
        targets=targets,
        train=Examples(TensorInputs(turned[~held_out]), labels[~held_out]),
        test=Examples(TensorInputs(turned[held_out]), labels[held_out]),
        label_names=tuple(map(str, range(10))),
        head=model.head,
        base_model=name,
        trained=("head.weight", "head.bias") if model.head == "trained" else (),
    )


def _images() -> tuple[Tensor, Tensor, Tensor]:
    """Images `[1797, 64]` centred and scaled, labels `[1797]`, and which are held out (a fixed fifth)."""
    pixels, labels = _table()
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[keys.rng(_SEED, "digits", "held-out").permutation(len(labels))[: len(labels) // 5 + 1]] = True
    images = torch.from_numpy(pixels).float() / 8 - 1
    return images, torch.from_numpy(labels).long(), torch.from_numpy(held_out)


def _table() -> tuple[np.ndarray, np.ndarray]:
    """Pixels `[1797, 64]` from 0 to 16 and labels, as `sklearn.datasets.load_digits` gives them.

    They are read from the package's own file, because importing scikit-learn takes longer than a short federation.
    """
    spec = importlib.util.find_spec("sklearn")  # runs nothing of the package
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz" if spec else None
    if path is None or not path.is_file():  # a version that keeps it elsewhere
        from sklearn.datasets import load_digits

        return load_digits(return_X_y=True)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1], table[:, -1].astype(np.int64)
