"""The models: siblings behind one interface.

Each module has its config (a frozen dataclass, named in `ARCHITECTURES`), Params with emb, blocks, ln_out and head, and
    declare(config)                                 every parameter, once
    recognises(shapes), config_of(shapes)           for official checkpoints
    init_state(config, batch_size, dtype)           the zero state: what goes along time
    fresh_state(config, batch_size, dtype)          what a call without a state begins with: the zero state, or less that means it
    embed_tokens(params, tokens, dtype)             what the first block reads
    init_depth(config, x)                           what goes along layers beside the residual
    block(params, config, (x, depth), state, reset=, length=, backend=) -> ((x, depth), state)
A new version is a new file and a line in each of the two tables below.
"""

from types import ModuleType

from . import rwkv4, rwkv5, rwkv6, rwkv7, transformer
from .base import ModelConfig as Config
from .base import Shapes
from .rwkv4 import RWKV4Config
from .rwkv5 import RWKV5Config
from .rwkv6 import RWKV6Config
from .rwkv7 import RWKV7Config
from .transformer import TransformerConfig

ARCHITECTURES: dict[str, type[Config]] = {
    "rwkv4": RWKV4Config,
    "rwkv5": RWKV5Config,
    "rwkv6": RWKV6Config,
    "rwkv7": RWKV7Config,
    "transformer": TransformerConfig,
}
"""Config class by the name in its `architecture` field."""

_MODULES: dict[type[Config], ModuleType] = {
    RWKV4Config: rwkv4,
    RWKV5Config: rwkv5,
    RWKV6Config: rwkv6,
    RWKV7Config: rwkv7,
    TransformerConfig: transformer,
}


def config_of(shapes: Shapes) -> Config:
    """Returns the config that the shapes of an official checkpoint's tensors imply, the version included.

    Raises:
        ValueError: The keys are no version's, or those of more than one.
    """
    found = [module for module in _MODULES.values() if module.recognises(shapes)]
    if len(found) != 1:
        names = ", ".join(module.__name__.rpartition(".")[2] for module in found) or "none"
        some = ", ".join(list(shapes)[:4])
        raise ValueError(
            f"the tensors are those of {names} of the versions known here ({', '.join(ARCHITECTURES)}); there are {some}, ..."
        )
    return found[0].config_of(shapes)


def module_of(config: Config) -> ModuleType:
    """Returns the module that a config belongs to."""
    if type(config) not in _MODULES:
        raise TypeError(
            f"{config!r} is not a model config; pass one of {', '.join(ARCHITECTURES)}'s, such as RWKV4Config()"
        )
    return _MODULES[type(config)]
