"""Image classification: an embedded small network (`tasks.vision.small`), or any transformers classifier, in one of two forms.

* Modules of the model (`lora.target_modules`; by default the query and value projections): LoRA inside, under the model's own
  module names, so that PEFT loads the adapter into it. Everything below the first adapted layer is frozen. If the layers can
  be run separately (compared with the whole model when it is loaded), it runs once for each image, and its hidden states are
  kept; otherwise the whole model runs from the pixels at every step. The task's name says which.
* `map`: every image runs once through the frozen model, and LoRA adapts a map of its head's input, which starts as the
  identity: `logits = head(map(f))`. A federation then takes seconds; the adapter belongs to the map.

Images go through the model's own image processor. The outputs of the frozen part are kept on disk, under a key made of
weights, settings, images and dtype. `model.dtype` is for this part only; everything that is trained, and everything above it,
is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from anyrank import devices, keys
from anyrank.config.sections import DataConfig, LoraConfig, ModelConfig, SiteConfig
from anyrank.data import images
from anyrank.data import sites as of_sites
from anyrank.data.images import Images
from anyrank.devices import all_cores, has_bfloat16, spread
from anyrank.errors import ConfigError, DataError, ModelError
from anyrank.progress import Progress
from anyrank.tasks.base import Examples, Inputs, Task
from anyrank.tasks.frozen import Frozen, Step, Tensors, Wanted
from anyrank.tasks.vision import classifier as pretrained
from anyrank.tasks.vision import prefix, small
from anyrank.tasks.vision.classifier import Classifier
from anyrank.tasks.vision.pixels import HiddenInputs, PixelInputs

MAP = "map"
_FORMAT = "1"  # version of the files on disk; raise it when the computation changes
_BATCH = 16  # images per pass of the frozen part


def load(
    model: ModelConfig,
    data: DataConfig,
    lora: LoraConfig,
    cache: Path,
    progress: Progress | None = None,
    sites: Sequence[SiteConfig] = (),
) -> Task:
    """The image task of a configuration. `cache`: the folder of base models and frozen features; `progress(done, total)`
    counts images. Head (`model.head`): `frozen` (the model's own or a new one), or `trained`. The task does not depend on
    the run seed. Raises `ConfigError`, `DataError` and `ModelError`.
    """
    if model.name in small.MODELS:
        return small.load(model, data, lora, cache, progress, sites)
    if model.head == "label-names":
        raise ConfigError("model.head: label-names is for text; images take frozen or trained")
    if not model.pretrained:
        raise ConfigError(f"model.pretrained = false: is only for {', '.join(small.MODELS)}; remove it")
    train, test = of_sites.load_split(images, data, sites)
    found = pretrained.load(model, train.label_names, data.rotate)
    parts = {"train": images.limited(train, data).relabelled(found.label_names), "test": test.relabelled(found.label_names)}
    device = devices.find(model.device)
    found.model.to(device)
    frozen = _Frozen(found, model, device, cache, progress)
    built = (_on_map if lora.target_modules == (MAP,) else _inside)(frozen, parts, lora.target_modules)
    made = f"{model.head} head{' made anew' if found.remade else ''}"
    return Task(
        name=f"images{f' turned by {data.rotate} degrees' if data.rotate else ''} ({built.how}, {made})",
        module=built.module.eval().requires_grad_(False),
        targets=built.targets,
        train=Examples(built.inputs["train"], torch.from_numpy(parts["train"].labels)),
        test=Examples(built.inputs["test"], torch.from_numpy(parts["test"].labels)),
        label_names=found.label_names,
        head=model.head,
        base_model=found.name,
        trained=built.trained if model.head == "trained" else (),
        columns=parts["train"].columns,
        test_columns=parts["test"].columns,
    )


@dataclass(frozen=True)
class _Built:
    """A module, the names of its targets and of its head's parameters, its inputs by part, and how it was made, in words."""

    module: nn.Module
    targets: tuple[str, ...]
    trained: tuple[str, ...]
    inputs: Mapping[str, Inputs]
    how: str


def _on_map(frozen: _Frozen, parts: Mapping[str, Images], endings: Sequence[str]) -> _Built:
    """LoRA on a map between the frozen model and its head."""
    found = frozen.classifier
    if len(found.heads) != 1:
        raise ModelError(
            f"lora.target_modules = ['map']: expected a model with one linear head, {found.name} has {len(found.heads)}; name "
            "modules of the model instead"
        )
    features = frozen.inputs_of(found.heads[0], parts)
    if features["train"].ndim != 2:
        raise ModelError(f"lora.target_modules = ['map']: the head of {found.name} takes more than one vector an image")
    inputs = {part: HiddenInputs(values, on_disk=frozen.on_disk) for part, values in features.items()}
    module = MapClassifier(found.model.get_submodule(found.heads[0]))
    trained = tuple(f"head.{name}" for name, _ in module.head.named_parameters())
    return _Built(module, (MAP,), trained, inputs, f"LoRA on a map of frozen features, {frozen.dtype_name}")


def _inside(frozen: _Frozen, parts: Mapping[str, Images], endings: Sequence[str]) -> _Built:
    """LoRA on modules of the model; everything below the first adapted layer runs once for each image."""
    found = frozen.classifier
    if MAP in endings:
        raise ModelError(
            f"lora.target_modules: '{MAP}' is above the model and excludes other modules; remove the others, or it"
        )
    targets = pretrained.targets(found, endings)
    inner = [target for target in targets if target not in found.heads]
    cut = prefix.find(found.model, inner, frozen.sample(parts["test"]))
    if cut is None:
        inputs = {
            part: PixelInputs(values, scale=found.processor.scale, on_disk=frozen.on_disk)
            for part, values in frozen.pixels(parts).items()
        }
        return _Built(WholeClassifier(found.model), targets, found.trained, inputs, "LoRA in the model, from pixels")
    inputs = {part: HiddenInputs(values, on_disk=frozen.on_disk) for part, values in frozen.inputs_of(cut.place, parts).items()}
    module = prefix.SplitClassifier(found.model, cut)
    how = f"LoRA from {cut.place} on, frozen prefix {frozen.dtype_name}"
    return _Built(module, targets, found.trained, inputs, how)


# --- modules ---------------------------------------------------------------------------------------------------------


class MapClassifier(nn.Module):
    """`head(map(f))` of features `inputs` `[b, d]`; `map` starts, and without LoRA stays, the identity."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.map = nn.Linear(head.in_features, head.in_features, bias=False)
        nn.init.eye_(self.map.weight)
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.map(inputs))


class WholeClassifier(nn.Module):
    """A transformers classifier from `inputs` `[b, channels, h, w]` to its logits, its modules under their own names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        self._model = (model,)  # in a tuple, so that its modules are not registered under a second name

    def forward(self, inputs: Tensor) -> Tensor:
        return self._model[0](pixel_values=inputs).logits


# --- the frozen part -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Frozen:
    """The outputs of a classifier's frozen part for images: computed once, then read from the folder `cache`."""

    classifier: Classifier
    config: ModelConfig
    device: torch.device
    cache: Path
    progress: Progress | None

    @property
    def on_disk(self) -> bool:
        """Whether the outputs stay in their file during a run."""
        return self.config.features == "disk"

    @property
    def bfloat16(self) -> bool:
        return self.config.dtype == "bfloat16" or (self.config.dtype == "auto" and has_bfloat16(self.device))

    @property
    def dtype_name(self) -> str:
        return "bfloat16" if self.bfloat16 else "float32"

    def sample(self, given: Images) -> Tensor:
        """Two images in the form of the model's input, float32 `[2, channels, h, w]`, on its device.

        Of sites, only their size is taken, which all have: what is made of the model must not depend on one of them.
        """
        _, values = next(self._batches(given.take(np.arange(min(2, len(given))))))
        if of_sites.OWNER in given.columns:
            shape, draw = (2, *values.shape[1:]), keys.generator(0, "sample")
            values = torch.randint(256, shape, generator=draw, dtype=torch.uint8)
        return self.classifier.processor.scale(values).to(self.device)

    def pixels(self, parts: Mapping[str, Images]) -> dict[str, Tensor]:
        """The images of each part in the form of the model's input, but not scaled, uint8 `[n, channels, h, w]`."""
        return self._once("pixels", parts, lambda values: values)

    def inputs_of(self, place: str, parts: Mapping[str, Images]) -> dict[str, Tensor]:
        """The input of the module `place` for the images of each part: vectors in float32, others in the frozen dtype."""

        def run(values: Tensor) -> Tensor:
            scaled = self.classifier.processor.scale(values).to(self.device)
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                found = prefix.inputs_of(self.classifier.model, place, scaled)
            return found.to("cpu", torch.bfloat16 if self.bfloat16 and found.ndim > 2 else torch.float32)

        return self._once(f"input of {place}, {self.dtype_name}", parts, run)

    def _once(self, what: str, parts: Mapping[str, Images], run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """`run` of every part's images, batch by batch, or its outputs from the cache."""
        kept = Frozen(self.cache, "images", self.progress, self.on_disk)
        found = kept({part: self._wanted(what, given, run, of_sites.groups(given.columns)) for part, given in parts.items()})
        return {part: tensors["values"] for part, tensors in found.items()}

    def _wanted(self, what: str, given: Images, run: Callable[[Tensor], Tensor], groups: tuple[int, ...]) -> Wanted:
        ends = np.cumsum(groups)
        apart = [given.take(np.arange(end - size, end)) for size, end in zip(groups, ends, strict=True)]
        each = tuple(self._wanted(what, part, run, (len(part),)) for part in apart) if len(groups) > 1 else ()
        compute = partial(self._compute, given, run, bool(groups))
        return Wanted(self._key(what, given, groups), len(given), compute, each)

    def _compute(self, given: Images, run: Callable[[Tensor], Tensor], apart: bool, step: Step) -> Tensors:
        """`run` of all images; `apart`: in the same way on every number of cores."""
        values: list[Tensor] = []

        def take(batch: tuple[Tensor, Tensor], computed: Tensor) -> None:
            if not values:
                values.append(computed.new_empty(len(given), *computed.shape[1:]))
            values[0][batch[0]] = computed
            step(len(computed))

        if apart:
            spread(self._batches(given), lambda batch: run(batch[1]), take)
        else:
            for batch in self._batches(given):
                with all_cores():
                    computed = run(batch[1])
                take(batch, computed)
        return {"values": values[0]}

    def _key(self, what: str, given: Images, groups: tuple[int, ...]) -> dict[str, str]:
        key = {"format": _FORMAT, "model": self.classifier.digest, "what": what, "images": given.digest()}
        more = {"rotate": str(self.classifier.processor.degrees)}
        if groups:  # other batches, each on one core: other last digits
            more["groups"] = " ".join(map(str, groups))
        return key | more | ({"device": self.device.type} if self.device.type != "cpu" else {})

    def _batches(self, given: Images) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices `[b]` of images with their pixels, uint8 `[b, channels, h, w]`."""
        pictures = self._processed(given)
        for index in torch.arange(len(given)).split(_BATCH):
            yield index, torch.from_numpy(np.stack([next(pictures) for _ in index]))

    def _processed(self, given: Images) -> Iterator[np.ndarray]:
        shape = None
        for i, picture in enumerate(given):
            values = self.classifier.processor(picture, given.where(i))
            shape = shape or values.shape
            if values.shape != shape:
                raise DataError(
                    f"{given.where(i)}: the model's image processor makes it {list(values.shape)}, and {given.where(0)} "
                    f"{list(shape)}; make all images of one size"
                )
            yield values
