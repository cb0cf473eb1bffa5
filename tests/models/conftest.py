"""The small model of each version, in float64, with each backend."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BACKENDS, EVERY, FAST_PAIRS, SMALL

import rwkv_jax


@pytest.fixture
def config(request):
    return SMALL[request.param]


@pytest.fixture
def params(config, x64):
    """float64, moved away from the initialisation, where many matrices are 0."""
    return _moved(config)


@pytest.fixture
def fresh(config):
    """As initialised, in float32."""
    return _fresh(config)


@cache
def _fresh(config):
    return rwkv_jax.init(jax.random.key(0), config)


@cache
def _moved(config):
    rng = np.random.default_rng(3)
    moved = lambda x: jnp.asarray(x.astype(np.float64) + 0.3 * rng.normal(size=x.shape))
    return jax.tree.map(moved, jax.device_get(_fresh(config)))


def pytest_generate_tests(metafunc):
    """A test of a model has each of them, and one of a model with a backend each with each of its own."""
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if {"config", "backend"} <= set(metafunc.fixturenames):
        pairs = [pytest.param(*pair, marks=() if pair in FAST_PAIRS else pytest.mark.slow) for pair in BACKENDS]
        metafunc.parametrize(("config", "backend"), pairs, indirect=["config"])
    elif "config" in metafunc.fixturenames and "config" not in given:
        metafunc.parametrize("config", EVERY, indirect=True)
