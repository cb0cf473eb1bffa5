"""The models: siblings behind one interface.

Each module has its config (a frozen dataclass named in `ARCHITECTURES`), `declare(config)`, `init_state(config, batch_size,
dtype)` and `block(params, config, x, state, reset=, length=, backend=)`, and Params with emb, ln0, blocks, ln_out, head.
A new version is a new file and a line in each of the two tables below.
"""

from types import ModuleType

from . import rwkv4
from .rwkv4 import RWKV4Config

Config = RWKV4Config
"""Any model's config."""

ARCHITECTURES: dict[str, type[Config]] = {"rwkv4": RWKV4Config}
"""Config class by the name in its `architecture` field."""

_MODULES = {"rwkv4": rwkv4}


def module_of(config: Config) -> ModuleType:
    """Returns the module that a config belongs to."""
    if type(config) not in ARCHITECTURES.values():
        raise TypeError(
            f"{config!r} is not a model config; pass one of {', '.join(ARCHITECTURES)}'s, such as RWKV4Config()"
        )
    return _MODULES[config.architecture]
