"""Common parts of loading pretrained transformers models: finding and identifying files, loading without progress output."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from anyrank.errors import ModelError


def snapshot(name: str, patterns: Sequence[str]) -> Path:
    """The local snapshot of a hub model, downloaded if it is missing (unless HF_HUB_OFFLINE forbids it)."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise without_extra() from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # errors of the hub client, of its HTTP library and of the system have no common base
        raise ModelError(
            f"model.name = '{name}': not a packaged model, and cannot be loaded from the Hugging Face hub "
            f"({first_line(error)}); check the name and the network, or give model.path, a local folder"
        ) from None


def weight_files(folder: Path, name: str) -> list[Path]:
    """The weight files of a model folder; `ModelError` if it is not a model folder, or has none."""
    if not folder.is_dir():
        raise ModelError(f"model '{name}': no such folder: {folder}; expected a transformers model folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; expected a transformers model folder, as save_pretrained writes it")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = " (pickled weights are never read)" if any(folder.glob("*.bin")) else ""
        raise ModelError(f"{folder}: no .safetensors weights{pickled}; save the model with safe_serialization=True")
    return weights


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_extra() -> ModelError:
    return ModelError("a pretrained model needs transformers; pip install 'anyrank[text]'")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, load reports or length warnings from transformers; its settings are restored afterwards."""
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
