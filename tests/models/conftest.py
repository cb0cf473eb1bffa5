"""A small model of each version with every term active."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax.models import ARCHITECTURES

SMALL = {"rwkv4": rwkv_jax.RWKV4Config(vocab_size=29, num_layers=2, embed_dim=12, ffn_dim=20)}
assert SMALL.keys() == ARCHITECTURES.keys()


@pytest.fixture(params=SMALL)
def config(request):
    return SMALL[request.param]


@pytest.fixture
def params(config, x64):
    """float64, moved away from the initialisation, where many matrices are 0."""
    rng = np.random.default_rng(3)
    fresh = rwkv_jax.init(jax.random.key(0), config)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) + 0.3 * rng.normal(size=x.shape), fresh)


@pytest.fixture(params=["scan", "parallel"])
def backend(request):
    return request.param
