"""WKV operators of RWKV: arrays in, arrays out; nothing here knows of models."""

from .wkv4 import WKV4State, explain_wkv4, init_wkv4_state, wkv4
from .wkv6 import explain_wkv6, init_wkv6_state, wkv6
from .wkv7 import explain_wkv7, init_wkv7_state, wkv7

__all__ = [
    "WKV4State",
    "explain_wkv4",
    "explain_wkv6",
    "explain_wkv7",
    "init_wkv4_state",
    "init_wkv6_state",
    "init_wkv7_state",
    "wkv4",
    "wkv6",
    "wkv7",
]
