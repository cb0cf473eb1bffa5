"""Functions of tokens that a CPU forms in slices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax.nn import slices
from rwkv_jax.nn.slices import MOST_SLICES, in_slices


@pytest.fixture
def tiny_cache(monkeypatch):
    monkeypatch.setattr(slices, "SLICE_BYTES", 4 * 16 * 4)  # Four tokens of 16 float32 channels.


def squares(x, weight):
    return jnp.square(x @ weight) @ weight.T


def lengths_of(function, shape, width=16):
    """How many tokens a row each call of the function gets, rows being one."""
    seen = []
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    jax.eval_shape(lambda x: in_slices(lambda x: (seen.append(x.shape), function(x))[1], x, width), x)
    return seen


@pytest.mark.parametrize("shape", [(1, 24, 3), (2, 12, 3), (3, 7, 3)])
def test_slices_give_the_value_and_the_gradients_of_the_whole(tiny_cache, x64, shape):
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=(3, 16)))
    cut = lambda x, w: in_slices(partial(squares, weight=w), x, 16)
    assert len(lengths_of(partial(squares, weight=weight), shape)) > 1
    np.testing.assert_allclose(cut(x, weight), squares(x, weight), rtol=1e-12)
    expected = jax.grad(lambda *a: jnp.sin(squares(*a)).sum(), (0, 1))(x, weight)
    actual = jax.grad(lambda *a: jnp.sin(cut(*a)).sum(), (0, 1))(x, weight)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-12)


def test_slices_are_equal_few_and_only_where_they_help(tiny_cache):
    same = lambda x: x
    assert lengths_of(same, (1, 16, 3)) == [(4, 3)] * 4
    assert lengths_of(same, (2, 8, 3)) == [(4, 3)] * 4
    assert lengths_of(same, (1, 7, 3)) == [(1, 7, 3)]  # Fits.
    assert lengths_of(same, (1, 22, 3)) == [(11, 3)] * 2  # 5 slices would not be equal.
    assert lengths_of(same, (1, 23, 3)) == [(1, 23, 3)]  # None would.
    assert lengths_of(same, (1, 800, 3)) == [(100, 3)] * MOST_SLICES


def test_a_mesh_has_no_slices(tiny_cache):
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert lengths_of(lambda x: x, (2, 8, 3)) == [(2, 8, 3)]


def test_every_model_forms_its_hidden_channels_in_slices(tiny_cache, config, fresh):
    tokens = jnp.zeros((1, 32), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda p: rwkv_jax.forward(p, config, tokens)[0])(fresh)
    assert f"[4,{config.ffn_dim}]" in str(jaxpr)
    assert f"32,{config.ffn_dim}]" not in str(jaxpr)
