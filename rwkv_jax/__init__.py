"""RWKV in JAX: pure functions `(params, config, inputs, state) -> (outputs, state)`."""

from .lm import count_params, forward, hidden, init, init_state, unembed
from .load import load
from .models.rwkv4 import RWKV4Config
from .models.rwkv5 import RWKV5Config
from .models.rwkv6 import RWKV6Config

__all__ = [
    "RWKV4Config",
    "RWKV5Config",
    "RWKV6Config",
    "count_params",
    "forward",
    "hidden",
    "init",
    "init_state",
    "load",
    "unembed",
]
