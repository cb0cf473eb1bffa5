"""The WKV operator of RWKV-5 and RWKV-6."""

from .api import explain_wkv6, init_wkv6_state, wkv6

__all__ = ["explain_wkv6", "init_wkv6_state", "wkv6"]
