"""The small model of each version, in float64, with each backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import EVERY, SMALL

import rwkv_jax


@pytest.fixture(params=EVERY)
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
