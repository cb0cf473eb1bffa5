"""RWKV-7's WKV operator."""

from .api import explain_wkv7, init_wkv7_state, wkv7

__all__ = ["explain_wkv7", "init_wkv7_state", "wkv7"]
