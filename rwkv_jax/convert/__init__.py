"""Checkpoints made by other programs."""

from .official import load_safetensors, save_safetensors

__all__ = ["load_safetensors", "save_safetensors"]
