"""Adapters: LoRA layers with their plain tensors, PEFT's folders in and out."""

from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.adapter.stored import open_adapter

__all__ = ["Adapter", "LoraLayer", "open_adapter"]
