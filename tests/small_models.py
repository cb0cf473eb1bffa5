"""A small config of each architecture with every term active, which the identities and the oracles are run on."""

import jax
import pytest

import rwkv_jax
from rwkv_jax.models import ARCHITECTURES

SIZE = {"vocab_size": 29, "num_layers": 2, "embed_dim": 12, "ffn_dim": 20}
SMALL = {
    "rwkv4": rwkv_jax.RWKV4Config(**SIZE),
    "rwkv5.1": rwkv_jax.RWKV5Config(**SIZE, head_dim=4, variant="5.1"),
    "rwkv5.2": rwkv_jax.RWKV5Config(**SIZE, head_dim=4),
    "rwkv6": rwkv_jax.RWKV6Config(**SIZE, head_dim=4, mix_rank=3, decay_rank=5),
    "rwkv7": rwkv_jax.RWKV7Config(
        **{**SIZE, "num_layers": 3},
        head_dim=4,
        decay_rank=3,
        iclr_rank=5,
        value_rank=2,
        gate_rank=7,
    ),
    # Its window is shorter than most of the tests' texts.
    "transformer": rwkv_jax.TransformerConfig(**SIZE, head_dim=6, rotary_fraction=0.7, context_length=24),
}
"""By a name of its own; an architecture may stand here more than once."""
RWKV = [name for name in SMALL if name != "transformer"]
"""Those with a WKV operator, and with official files of other programs."""
FAST = ("rwkv4", "rwkv7")
FAST_PAIRS = [("rwkv4", "scan"), ("rwkv7", "parallel")]
"""What the fast tests are given: these models, or these with their backends."""
EVERY = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name not in FAST)]
"""For tests that take long to compile."""
EVERY_RWKV = [name for name in EVERY if name in FAST or name.values[0] in RWKV]
BACKENDS = [(name, backend) for name in SMALL for backend in (("scan", "parallel") if name in RWKV else (None,))]
"""(name, backend) of every model with each of its own that runs anywhere."""
assert {config.architecture for config in SMALL.values()} == ARCHITECTURES.keys()

forward = jax.jit(rwkv_jax.forward, static_argnames=("config", "backend", "positions"))
"""Compiled whole: called eagerly, a model is some hundred small programs."""
