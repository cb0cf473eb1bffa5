"""WKV operators of RWKV: arrays in, arrays out; nothing here knows of models."""

from .wkv4 import WKV4State, explain_wkv4, init_wkv4_state, wkv4

__all__ = ["WKV4State", "explain_wkv4", "init_wkv4_state", "wkv4"]
