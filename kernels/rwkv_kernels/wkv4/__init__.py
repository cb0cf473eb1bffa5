"""RWKV-4's WKV operator."""

from .api import explain_wkv4, init_wkv4_state, wkv4
from .reference import WKV4State

__all__ = ["WKV4State", "explain_wkv4", "init_wkv4_state", "wkv4"]
