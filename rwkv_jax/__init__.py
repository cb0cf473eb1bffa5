"""RWKV in JAX: pure functions `(params, config, inputs, state) -> (outputs, state)`."""

from .lm import count_params, forward, hidden, init, init_state, unembed
from .load import load, load_state
from .models.rwkv4 import RWKV4Config
from .models.rwkv5 import RWKV5Config
from .models.rwkv6 import RWKV6Config
from .models.rwkv7 import RWKV7Config
from .models.transformer import TransformerConfig
from .save import save, save_state

__all__ = [
    "RWKV4Config",
    "RWKV5Config",
    "RWKV6Config",
    "RWKV7Config",
    "TransformerConfig",
    "count_params",
    "forward",
    "hidden",
    "init",
    "init_state",
    "load",
    "load_state",
    "save",
    "save_state",
    "unembed",
]
