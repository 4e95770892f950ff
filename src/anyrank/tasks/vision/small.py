"""Small networks for small images, created when needed: an MLP, a CNN and a vision transformer, pretrained or random.

They are named after Fashion-MNIST, and adapt to the size, the colour and the labels of any source. A pretrained model first
learns a sixth of the training images, unrotated; these are not used again. The clients share the other images, rotated by
`data.rotate`, and have to adapt the model. With `model.pretrained = false`, the model keeps its random weights and is frozen
too; then only LoRA learns. That is RBLA's setting, where networks are trained from scratch with LoRA on every layer (add
`head` to `lora.target_modules` too): no layer moves from its random start by more than the rank allows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank import keys
from anyrank.config.sections import DataConfig, LoraConfig, ModelConfig, SiteConfig
from anyrank.data import images
from anyrank.data import sites as of_sites
from anyrank.data.images import Images
from anyrank.errors import ConfigError, DataError, ModelError, nearest
from anyrank.tasks.base import Examples, Task, resolve_targets
from anyrank.tasks.vision.digits import Block
from anyrank.tasks.vision.pixels import PixelInputs, Scale, turned
from anyrank.tasks.vision.pretraining import Progress, Recipe, pretrained, randomise

_SEED = 0  # of a random base, which is the same for every run seed, like a pretrained one
_SHARE = 6  # one training image in this many is for the base model: 10,000 of Fashion-MNIST's 60,000
_SCALE = Scale()
Shape = tuple[int, int, int]  # channels, height, width of an image


class FashionMLP(nn.Module):
    """Two hidden layers of width 128."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(shape[0] * shape[1] * shape[2], 128), nn.Linear(128, 128)
        self.head = nn.Linear(128, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(F.relu(self.fc2(F.relu(self.fc1(inputs.flatten(1))))))


class FashionCNN(nn.Module):
    """Two strided convolutions of 32 and 64 channels and a hidden layer of 128; every layer except the head allows rank 32."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 32, 7, stride=2, padding=3)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.fc1, self.head = nn.Linear(64 * 9, 128), nn.Linear(128, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.conv2(F.relu(self.conv1(inputs))))
        return self.head(F.relu(self.fc1(F.adaptive_avg_pool2d(hidden, 3).flatten(1))))


class FashionViT(nn.Module):
    """A vision transformer: 4 x 4 patches, four blocks of width 64, mean pooling."""

    def __init__(self, shape: Shape, classes: int, width: int = 64) -> None:
        super().__init__()
        if shape[1] % 4 or shape[2] % 4:
            raise ModelError(
                f"model.name = 'fashion-vit': expected images with sides divisible by 4, got {shape[1]}x{shape[2]}"
            )
        self.patch = nn.Linear(shape[0] * shape[1] * shape[2] // 16, width)
        self.position = nn.Parameter(torch.zeros(16, width))
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        patches = inputs.unflatten(3, (4, -1)).unflatten(2, (4, -1)).permute(0, 2, 4, 1, 3, 5)  # [b, 4, 4, channels, h/4, w/4]
        hidden = self.patch(patches.flatten(3).flatten(1, 2)) + self.position
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden).mean(dim=1))


@dataclass(frozen=True)
class _Kind:
    """An architecture, its default LoRA layers, and how it is pretrained."""

    make: Callable[[Shape, int], nn.Module]
    targets: tuple[str, ...]
    recipe: Recipe


MODELS: Mapping[str, _Kind] = MappingProxyType(
    {
        "fashion-mlp": _Kind(FashionMLP, ("fc1", "fc2"), Recipe("fashion-mlp", version=1, epochs=8)),
        "fashion-cnn": _Kind(FashionCNN, ("conv1", "conv2", "fc1"), Recipe("fashion-cnn", version=1, epochs=6)),
        "fashion-vit": _Kind(
            FashionViT, ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"), Recipe("fashion-vit", version=1, epochs=6)
        ),
    }
)


def load(
    model: ModelConfig,
    data: DataConfig,
    lora: LoraConfig,
    folder: Path,
    progress: Progress | None = None,
    sites: Sequence[SiteConfig] = (),
) -> Task:
    """The task of an embedded model on the images of `data`; head frozen or trained. `folder`: the cache of base models."""
    if model.head == "label-names":
        raise ConfigError("model.head: label-names is for text; images take frozen or trained")
    if sites and model.pretrained:
        raise ConfigError(
            f"model.name = '{model.name}': is pretrained on a part of the images, which belong to the [[sites]]; set "
            "model.pretrained = false, or use a transformers model"
        )
    train, test = of_sites.load_split(images, data, sites)
    given, train = _shared_out(train, model, data)
    values = train.stacked()
    module = MODELS[model.name].make(values.shape[1:], len(train.label_names))
    targets = _targets(module, lora.target_modules or MODELS[model.name].targets)
    test_values = _alike(test.stacked(), values, "sites" if sites else data.test_source or data.source)
    if model.pretrained:
        _pretrain(model.name, module, given, _alike(given.stacked(), values, data.source), folder, progress)
        made = f"pretrained on a sixth of the images{', as they are' if data.rotate else ''}"
    else:
        randomise(module, keys.generator(_SEED, model.name, "random base"))
        made = "a random frozen base"
    return Task(
        name=f"images{f' turned by {data.rotate} degrees' if data.rotate else ''}, {model.name}, {made}",
        module=module,
        targets=targets,
        train=_examples(train, turned(values, data.rotate)),
        test=_examples(test, turned(test_values, data.rotate)),
        label_names=train.label_names,
        head=model.head,
        base_model=model.name,
        trained=("head.weight", "head.bias") if model.head == "trained" else (),
        columns=train.columns,
        test_columns=test.columns,
    )


def _shared_out(train: Images, model: ModelConfig, data: DataConfig) -> tuple[Images, Images]:
    """The training images for the base model, and those of the clients."""
    base = train.sample(len(train) // _SHARE if model.pretrained else 0, "pretraining")
    if model.pretrained and not base.any():
        raise DataError(
            f"{data.source}: {len(train)} training images are too few to pretrain {model.name} on a part of them; use more, or "
            "model.pretrained = false"
        )
    return train.take(np.flatnonzero(base)), images.limited(train.take(np.flatnonzero(~base)), data)


def _targets(module: nn.Module, endings: Sequence[str]) -> tuple[str, ...]:
    for ending in endings:
        if not resolve_targets(module, [ending]):
            known = [name for name, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d))]
            raise ModelError(f"lora.target_modules: '{ending}' matches nothing; {nearest(ending, known)}")
    return resolve_targets(module, endings)


def _alike(values: np.ndarray, train: np.ndarray, source: str) -> np.ndarray:
    """`values` `[n, channels, h, w]`, if they are of the shape of the training images."""
    if values.shape[1:] != train.shape[1:]:
        got, expected = (images.spoken((*each.shape[2:], 3)[: 2 + (each.shape[1] > 1)]) for each in (values, train))
        raise DataError(f"{source}: expected held-out images like the training images, {expected}, got {got}")
    return values


def _pretrain(name: str, module: nn.Module, given: Images, values: np.ndarray, folder: Path, progress: Progress | None) -> None:
    source = hashlib.sha256(str(values.shape).encode() + values.tobytes() + given.labels.tobytes()).hexdigest()
    labels = torch.from_numpy(given.labels)
    pretrained(MODELS[name].recipe, name, module, _SCALE(torch.from_numpy(values)), labels, folder, source, progress)


def _examples(given: Images, values: np.ndarray) -> Examples:
    return Examples(PixelInputs(torch.from_numpy(values), scale=_SCALE), torch.from_numpy(given.labels))
