"""Architectures of equal size: as many layers, as wide, the same vocabulary, and a channel mix that makes up the difference."""

from dataclasses import replace

from rwkv_jax.lm import count_params
from rwkv_jax.models import Config, RWKV4Config

HIDDEN_STEP = 8
"""Hidden widths are multiples of this, which matrix units want."""


def non_embedding(model: Config) -> int:
    """Returns the number of parameters without embedding and head."""
    return count_params(model) - 2 * model.vocab_size * model.embed_dim


def as_large_as_rwkv4(model: Config) -> Config:
    """Returns the model with the hidden width at which its parameters come nearest to those of RWKV-4 with its own 4 D.

    Raises:
        ValueError: No hidden width makes the architecture as small as RWKV-4 of this size.
    """
    rwkv4 = RWKV4Config(vocab_size=model.vocab_size, num_layers=model.num_layers, embed_dim=model.embed_dim)
    target = non_embedding(rwkv4)
    least, more = (non_embedding(replace(model, ffn_dim=steps * HIDDEN_STEP)) for steps in (1, 2))
    steps = 1 + round((target - least) / (more - least))
    if steps < 1:
        raise ValueError(
            f"{model.architecture} of {model.num_layers} layers of width {model.embed_dim} has at least {least} parameters, RWKV-4 "
            f"{target}; take a larger width"
        )
    return replace(model, ffn_dim=steps * HIDDEN_STEP)
