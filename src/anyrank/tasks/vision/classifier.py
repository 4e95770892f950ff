"""A pretrained transformers image classifier with its image processor: found, checked, loaded, its head found by structure.

Nothing here trains, and no code of a model folder is run. transformers is imported when a classifier is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from anyrank import keys
from anyrank.config.sections import ModelConfig
from anyrank.data import cache
from anyrank.errors import DataError, ModelError, nearest
from anyrank.tasks.base import resolve_targets
from anyrank.tasks.pretrained import first_line, quiet, sha256, snapshot, weight_files, without_extra
from anyrank.tasks.vision.pixels import Scale

_SETTINGS_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
_PATTERNS = ("*.safetensors", "*.safetensors.index.json", *_SETTINGS_FILES)
_HEAD_SEED = 0  # a random head belongs to the task, not to the run: it is the same for every run seed
# The query and value projections, LoRA's own choice (Hu et al. 2021, section 4.2) and PEFT's for every transformer that it has
# a row for. It has none for image models; transformers 5 names them as the first pair does, earlier ones as the second.
_QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"))


@dataclass(frozen=True, eq=False)
class Processor:
    """The form of the model's input: `resize` is the model's image processor without the scaling; `channels` 1 or 3."""

    resize: Any
    scale: Scale
    channels: int
    degrees: int = 0

    def __call__(self, picture: np.ndarray, where: str) -> np.ndarray:
        """uint8 `[h, w]` or `[h, w, 3]` as uint8 `[channels, h', w']`, rotated and resized; grey becomes colour."""
        if self.channels == 1 and picture.ndim == 3:
            raise DataError(f"{where}: expected a grey image, which is what the model takes, got a colour one; convert it")
        values = picture[..., None] if picture.ndim == 2 else picture
        values = np.rot90(values, self.degrees // 90).repeat(self.channels if picture.ndim == 2 else 1, axis=2)
        try:
            return _processed(self.resize, values, do_rescale=False, do_normalize=False)
        except ValueError as error:
            raise DataError(f"{where}: the model's image processor refuses it: {first_line(error)}") from None


@dataclass(frozen=True, eq=False)
class Classifier:
    """A frozen model, float32, by its `name` and the `digest` of everything that determines its outputs.

    `heads`: the linear layers that give the logits of `label_names`; `remade`: they are new, because the model's were for other
    labels.
    """

    name: str
    digest: str
    model: nn.Module
    processor: Processor
    heads: tuple[str, ...]
    label_names: tuple[str, ...]
    remade: bool

    @property
    def trained(self) -> tuple[str, ...]:
        """The parameters of a trained head."""
        return tuple(f"{head}.{name}" for head in self.heads for name, _ in self.model.get_submodule(head).named_parameters())


def load(config: ModelConfig, label_names: tuple[str, ...], degrees: int) -> Classifier:
    """The classifier of `config` for examples with `label_names`, in the model's own order if it has one.

    The model's head is kept if its labels are those of the data: the same names, or the same number of labels if one side has
    numbers for names. Otherwise a new head is made: zero if it is trained; random rows of length 1, the same for every seed, if
    it is frozen.
    """
    folder, digest = _source(config)
    settings, processor = _settings(folder)
    order = _order(settings, label_names)
    if settings.num_labels != len(label_names):
        settings.num_labels = len(label_names)
    model, lacking = _model(folder, settings)
    heads = _heads(model, settings.num_labels)
    lost = sorted(key for key in lacking if key.rpartition(".")[0] not in heads)
    if lost:
        raise ModelError(
            f"{folder}: the weights lack {lost[0]} ({len(lost)} in all); the files belong to different classifiers"
        )
    remade = order is None or bool(lacking)
    if not heads and (remade or config.head == "trained"):
        raise ModelError(
            f"{folder}: no linear layer of {settings.num_labels} outputs above the {settings.model_type} model: its head can "
            "be neither trained nor replaced; choose another model"
        )
    for head in heads if remade else ():
        _remake(model.get_submodule(head), head, config.head)
    name, processor = config.path or config.name, replace(processor, degrees=degrees)
    return Classifier(name, digest, model, processor, heads, order or label_names, remade)


def targets(classifier: Classifier, endings: Sequence[str]) -> tuple[str, ...]:
    """Full names of the modules that `endings` match; if empty, of the query and value projections."""
    modules = dict(classifier.model.named_modules())
    leaves = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))}
    endings = endings or next((pair for pair in _QUERY_AND_VALUE if leaves.issuperset(pair)), ())
    if not endings:
        kind = classifier.model.config.model_type
        raise ModelError(
            f"lora.target_modules: '{kind}' has no query and value projections, which are the default; name modules, such as "
            f"{', '.join(sorted(leaves)[:8])}, or map"
        )
    for ending in endings:
        if not resolve_targets(classifier.model, [ending]):
            kind = type(classifier.model).__name__
            raise ModelError(f"lora.target_modules: '{ending}' matches no module of {kind}; {nearest(ending, leaves)}")
    return resolve_targets(classifier.model, endings)


# --- loading ---------------------------------------------------------------------------------------------------------


def _source(config: ModelConfig) -> tuple[Path, str]:
    """The model's folder, and the digest of all files that determine its outputs."""
    name = config.path or config.name
    if not name:
        raise ModelError(
            "model: image classification needs model.name (fashion-mlp, fashion-cnn, fashion-vit or a hub id) or model.path "
            "(a transformers folder)"
        )
    folder = Path(config.path) if config.path else snapshot(name, _PATTERNS)
    weights = [file.name for file in weight_files(folder, name)]
    files = sorted([*weights, *(file for file in _SETTINGS_FILES if (folder / file).is_file())])
    return folder, cache.digest(f"{file} {sha256(folder / file)}" for file in files)


def _settings(folder: Path) -> tuple[Any, Processor]:
    """The model's configuration and its processor, always the one based on Pillow, so that pixels are the same everywhere."""
    try:
        import transformers
    except ImportError:
        raise without_extra() from None
    backend = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            settings = transformers.AutoConfig.from_pretrained(folder, **local)
            resize = transformers.AutoImageProcessor.from_pretrained(folder, **backend, **local)
    except Exception as error:  # transformers raises many kinds of errors
        raise ModelError(
            f"{folder}: transformers cannot load the model's settings or its image processor: {first_line(error)}; save both "
            "with save_pretrained"
        ) from None
    channels = getattr(settings, "num_channels", 3)
    return settings, Processor(resize, _scale(folder, resize, channels), channels)


def _scale(folder: Path, resize: Any, channels: int) -> Scale:
    """The processor's scaling, tried on a picture: what it does beyond that could not be done batch by batch."""
    scale = Scale(
        factor=resize.rescale_factor if resize.do_rescale else 1.0,
        mean=tuple(resize.image_mean) if resize.do_normalize else (0.0,),
        std=tuple(resize.image_std) if resize.do_normalize else (1.0,),
    )
    picture = (np.arange(40 * 40 * channels) % 251).astype(np.uint8).reshape(40, 40, channels)
    whole, bare = _processed(resize, picture), _processed(resize, picture, do_rescale=False, do_normalize=False)
    if bare.dtype != np.uint8 or not np.allclose(scale(torch.from_numpy(bare)), whole, atol=1e-4):
        raise ModelError(
            f"{folder}: {type(resize).__name__} does more than resizing, rescaling and normalising; choose another model"
        )
    return scale


def _processed(resize: Any, picture: np.ndarray, **options: bool) -> np.ndarray:
    """One picture `[h, w, channels]` through an image processor: `[channels, h', w']`."""
    return resize(images=picture, input_data_format="channels_last", return_tensors="np", **options)["pixel_values"][0]


def _model(folder: Path, settings: Any) -> tuple[nn.Module, set[str]]:
    """The model, float32 and frozen, and the names of parameters that are missing in the files or have another shape there."""
    from transformers import AutoModelForImageClassification

    options: Mapping[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    try:
        with quiet():
            model, report = AutoModelForImageClassification.from_pretrained(folder, config=settings, **options)
    except Exception as error:  # transformers raises many kinds of errors
        raise ModelError(f"{folder}: transformers cannot load an image classifier: {first_line(error)}") from None
    mismatched = {each if isinstance(each, str) else each[0] for each in report["mismatched_keys"]}
    return model.float().eval().requires_grad_(False), set(report["missing_keys"]) | mismatched


# --- heads -----------------------------------------------------------------------------------------------------------


def _order(settings: Any, label_names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The labels in the order of the model's outputs; `None` if its head is for other labels.

    Names that are numbers, or transformers' default `LABEL_0`, only give the order.
    """
    own = tuple(str(settings.id2label[i]) for i in range(settings.num_labels))
    if set(own) == set(label_names):
        return own
    counted = all(re.fullmatch(r"LABEL_\d+", name) for name in own) or label_names == tuple(map(str, range(len(own))))
    return label_names if counted and len(own) == len(label_names) else None


def _heads(model: nn.Module, classes: int) -> tuple[str, ...]:
    """Full names of the linear layers with `classes` outputs that are not part of the inner model without head."""
    base = getattr(model, model.base_model_prefix, None)
    within = {id(module) for module in base.modules()} if isinstance(base, nn.Module) else set()
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes and id(module) not in within
    )


def _remake(head: nn.Linear, name: str, kind: str) -> None:
    rows = torch.zeros(head.weight.shape)
    if kind == "frozen":
        rows = F.normalize(torch.randn(head.weight.shape, generator=keys.generator(_HEAD_SEED, "head", name)), dim=1)
    with torch.no_grad():
        head.weight.copy_(rows)
        if head.bias is not None:
            head.bias.zero_()
