"""Text classification with a whole classifier, as `AutoModelForSequenceClassification` loads it, with its own pooling.

`model.head = "model"`: the model's own head classifies and is frozen; its labels must be those of the data.
`model.head = "model-trained"`: that head is trained together with the adapters; if the model has no head for these labels, a
new one is made and trained. The task's name says which. LoRA is on PEFT's default modules for the architecture, or on
`lora.target_modules`; the head gets no LoRA. The whole model runs from the token ids at every step, in evaluation mode
(without dropout). Adapters are those of the classifier as PEFT loads it, with a trained head among their `modules_to_save`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyrank import keys
from anyrank.config.sections import DataConfig, LoraConfig, ModelConfig, SiteConfig
from anyrank.data import sites as of_sites
from anyrank.data import texts as sources
from anyrank.data.texts import Table
from anyrank.errors import ModelError
from anyrank.progress import Progress
from anyrank.tasks.base import Examples, Task
from anyrank.tasks.pretrained import first_line, quiet, without_extra
from anyrank.tasks.text.encoder import POOLER, Source, as_arguments, check_length, find_source, named_targets, tokenize
from anyrank.tasks.text.features import token_inputs

_HEAD_SEED = 0  # a new head belongs to the task, not to the run: its start is the same for every run seed


def load(
    model: ModelConfig,
    data: DataConfig,
    lora: LoraConfig,
    cache: Path,
    progress: Progress | None = None,
    sites: Sequence[SiteConfig] = (),
) -> Task:
    """The task of a whole classifier; its labels are in the order of the model's outputs. Raises `DataError`, `ModelError`."""
    tables = dict(zip(("train", "test"), of_sites.load_split(sources, data, sites), strict=True))
    found = _pretrained(find_source(model), tables["train"].label_names, model)
    endings = lora.target_modules or _default_targets(found.model.config.model_type)
    targets = named_targets(found.model, endings, _head_parts(found.model), "the head gets no LoRA")
    parts = {part: _examples(found, table, model.max_length) for part, table in tables.items()}
    return Task(
        name=f"text classification (LoRA in the whole model, {found.made})",
        module=SequenceClassifier(found.model),
        targets=targets,
        train=parts["train"],
        test=parts["test"],
        label_names=found.label_names,
        head=model.head,
        base_model=found.source.name,
        peft=_as_peft_saves(found),
        trained=found.trained,
        columns=tables["train"].columns,
        test_columns=tables["test"].columns,
    )


@dataclass(frozen=True, eq=False)
class _Classifier:
    """A frozen classifier with its tokenizer: `label_names` in the order of its outputs, the names of its `trained` parameters,
    how its head was `made`, in words, and the padding token.
    """

    source: Source
    tokenizer: Any
    model: nn.Module
    label_names: tuple[str, ...]
    trained: tuple[str, ...]
    made: str
    pad: int


class SequenceClassifier(nn.Module):
    """A transformers classifier under its own module names: logits from token ids `inputs` `[b, t]`, `mask` and `segments`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        self._model = (model,)  # in a tuple, so that its modules are not registered twice

    def forward(self, inputs: Tensor, mask: Tensor, segments: Tensor | None = None) -> Tensor:
        return self._model[0](**as_arguments(inputs, segments), attention_mask=mask.long()).logits


def _examples(found: _Classifier, table: Table, max_length: int) -> Examples:
    tokens = tokenize(found.source.name, found.tokenizer, found.model.config, table.texts, max_length)
    place = np.array([found.label_names.index(name) for name in table.label_names])
    return Examples(token_inputs(tokens, found.pad), torch.from_numpy(place[table.labels]))


def _default_targets(architecture: str) -> Sequence[str]:
    """The module names that PEFT adapts by default."""
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
    except ImportError:
        raise ModelError("lora.target_modules: PEFT's default needs peft; pip install 'anyrank[peft]', or name them") from None
    names = DEFAULTS.get(architecture)
    if not isinstance(names, (list, tuple, set)):
        raise ModelError(f"lora.target_modules: PEFT has no default for the architecture '{architecture}'; name them")
    return tuple(names)


# --- loading ---------------------------------------------------------------------------------------------------------


def _pretrained(source: Source, label_names: tuple[str, ...], config: ModelConfig) -> _Classifier:
    """The classifier of a local folder (float32, frozen); nothing is downloaded, no code of the folder is run."""
    try:
        import transformers
    except ImportError:
        raise without_extra() from None
    local: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True} | local
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **local)
            settings = transformers.AutoConfig.from_pretrained(source.folder, **local)
            order = _order(settings, label_names)
            settings.num_labels = len(label_names)
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                source.folder, config=settings, **options
            )
    except Exception as error:  # transformers raises nearly every kind
        raise ModelError(f"{source.folder}: transformers cannot load a sequence classifier: {first_line(error)}") from None
    _check(source, settings)
    check_length(source, settings, config.max_length)
    model = model.float().eval().requires_grad_(False)
    model.config.use_cache = False  # a decoder's cache of keys and values: nothing is generated here
    pad = _pad(source, tokenizer, model)
    anew = _lacking(source, model, report) | (_last(model, len(label_names)) if order is None else set())
    if anew and config.head == "model":
        raise ModelError(_other_labels(source, settings, label_names))
    _make_anew(model, anew)
    made = f"its head made anew for {len(label_names)} labels" if anew else "its own head"
    trained = _head_parameters(model) | anew if config.head == "model-trained" else set()
    made += ", trained" if trained else ", frozen"
    return _Classifier(source, tokenizer, model, order or label_names, tuple(sorted(trained)), made, pad)


def _check(source: Source, settings: Any) -> None:
    if getattr(settings, "is_encoder_decoder", False):
        raise ModelError(f"{source.folder}: expected an encoder or a decoder, got the encoder-decoder '{settings.model_type}'")
    if settings.problem_type not in (None, "single_label_classification"):
        raise ModelError(f"{source.folder}: expected a model that chooses one label, got one for {settings.problem_type}")


def _order(settings: Any, label_names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The labels in the order of the model's outputs; `None` if its head is for other labels.

    Names that are numbers from 0, or transformers' default `LABEL_0`, only give the order.
    """
    own = [str(settings.id2label[i]) for i in range(settings.num_labels)]
    by_name = {name.casefold(): name for name in label_names}
    if len(own) == len(by_name) and {name.casefold() for name in own} == by_name.keys():
        return tuple(by_name[name.casefold()] for name in own)
    counted = all(re.fullmatch(r"LABEL_\d+", name) for name in own) or label_names == tuple(map(str, range(len(own))))
    return label_names if counted and len(own) == len(label_names) else None


def _pad(source: Source, tokenizer: Any, model: nn.Module) -> int:
    """The padding token. A decoder classifies by a text's last token that is not padding, so it must be known."""
    settings = model.config
    known = (settings.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((token for token in known if token is not None), None)
    if pad is None and hasattr(model, "score"):
        raise ModelError(f"{source.folder}: neither the model nor its tokenizer names a padding token (pad_token); set one")
    settings.pad_token_id = 0 if pad is None else pad
    return settings.pad_token_id


# --- heads -----------------------------------------------------------------------------------------------------------


def _head_parts(model: nn.Module) -> tuple[str, ...]:
    """The children above the headless model."""
    return tuple(name for name, _ in model.named_children() if name != model.base_model_prefix)


def _as_peft_saves(found: _Classifier) -> dict[str, Any]:
    """PEFT's name for the parameters trained without LoRA: a whole head. PEFT cannot load a `SEQ_CLS` folder without one."""
    if not found.trained:
        return {}
    parts, parents = _head_parts(found.model), {name.rpartition(".")[0] for name in found.trained}
    saved = {parent.split(".")[0] if parent.split(".")[0] in parts else parent for parent in parents}
    return {"task_type": "SEQ_CLS", "modules_to_save": sorted(saved)}


def _head_parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.split(".")[0] in _head_parts(model)}


def _last(model: nn.Module, classes: int) -> set[str]:
    """The head's parameters that have an entry for each class."""
    return {name for name in _head_parameters(model) if model.get_parameter(name).shape[0] == classes}


def _lacking(source: Source, model: nn.Module, report: Mapping[str, Any]) -> set[str]:
    """Parameters of the head, or of the pooler below it, that are missing in the files or have another shape there."""
    mismatched = {each if isinstance(each, str) else each[0] for each in report["mismatched_keys"]}
    lacking = set(report["missing_keys"]) | mismatched
    below = sorted(name for name in lacking - _head_parameters(model) if POOLER not in name.split("."))
    if below:  # transformers fills them at random
        raise ModelError(
            f"{source.folder}: the weights lack {below[0]} ({len(below)} in all); the files belong to different models"
        )
    return lacking


def _make_anew(model: nn.Module, names: set[str]) -> None:
    """Normal weights as transformers draws them, from keys of their own; biases of zero."""
    spread = getattr(model.config, "initializer_range", 0.02)
    with torch.no_grad():
        for name in sorted(names):
            parameter, draw = model.get_parameter(name), keys.generator(_HEAD_SEED, "head", name)
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * spread if parameter.ndim > 1 else 0.0)


def _other_labels(source: Source, settings: Any, label_names: tuple[str, ...]) -> str:
    return (
        f"model.head = 'model': {source.folder} has no head for the data's {len(label_names)} labels "
        f"({', '.join(label_names[:3])}{', …' if len(label_names) > 3 else ''}): name them as its config.json does (id2label; "
        "data.label_names), or use head = 'model-trained', which makes a new one"
    )
