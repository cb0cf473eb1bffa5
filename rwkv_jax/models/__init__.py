"""The models: siblings behind one interface.

Each module has its config (a frozen dataclass named in `ARCHITECTURES`), `declare(config)`, `init_state(config, batch_size,
dtype)`, `init_depth(config, x)` and `block(params, config, (x, depth), state, reset=, length=, backend=) -> ((x, depth), state)`, and
Params with emb, ln0, blocks, ln_out, head. The state goes along time, the depth along layers. A new version is a new file and a line
in each of the two tables below.
"""

from types import ModuleType

from . import rwkv4
from .base import ModelConfig as Config
from .rwkv4 import RWKV4Config

ARCHITECTURES: dict[str, type[Config]] = {"rwkv4": RWKV4Config}
"""Config class by the name in its `architecture` field."""

_MODULES: dict[type[Config], ModuleType] = {RWKV4Config: rwkv4}


def module_of(config: Config) -> ModuleType:
    """Returns the module that a config belongs to."""
    if type(config) not in _MODULES:
        raise TypeError(
            f"{config!r} is not a model config; pass one of {', '.join(ARCHITECTURES)}'s, such as RWKV4Config()"
        )
    return _MODULES[type(config)]
