"""RWKV in JAX: pure functions `(params, config, inputs, state) -> (outputs, state)`."""

from typing import TYPE_CHECKING, Any

from .lm import count_params, forward, hidden, init, init_state, unembed, unstack
from .load import load, load_state
from .models.rwkv4 import RWKV4Config
from .models.rwkv5 import RWKV5Config
from .models.rwkv6 import RWKV6Config
from .models.rwkv7 import RWKV7Config
from .models.transformer import TransformerConfig
from .save import save, save_state

if TYPE_CHECKING:
    from .question import answer, fill_blank

__all__ = [
    "RWKV4Config",
    "RWKV5Config",
    "RWKV6Config",
    "RWKV7Config",
    "TransformerConfig",
    "answer",
    "count_params",
    "fill_blank",
    "forward",
    "hidden",
    "init",
    "init_state",
    "load",
    "load_state",
    "save",
    "save_state",
    "unembed",
    "unstack",
]


def __getattr__(name: str) -> Any:
    # What reads text stands on grain, which takes seconds to import.
    if name in ("answer", "fill_blank"):
        from . import question

        return getattr(question, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
