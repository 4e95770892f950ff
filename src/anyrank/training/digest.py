"""The digest of a base model, by which sites see that they have the same one."""

from __future__ import annotations

import hashlib

import torch

from anyrank.training.lora import LoraModel

_PIECE = 1 << 24  # numbers that are copied at a time


def base_digest(model: LoraModel) -> str:
    """SHA-256 of the module's parameters and buffers, by name: bytes, shapes and number types. Layers that the task has run
    once and released, because they are below every adapter, are not in it."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.module.state_dict().items()):
        total.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            total.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()
