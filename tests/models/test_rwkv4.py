"""What only RWKV-4 has: a normalised sum with unbounded exponents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax


@pytest.mark.parametrize("backend", ["scan", "parallel"])
@pytest.mark.parametrize("time_decay", [-8.0, 3.0])
def test_extreme_decays_and_keys_stay_finite(time_decay, backend):
    config = rwkv_jax.RWKV4Config(vocab_size=11, num_layers=1, embed_dim=8)
    params = jax.tree.map(lambda x: x + 0.1, rwkv_jax.init(jax.random.key(0), config))
    att = params.blocks.att
    key = 40 * jax.random.normal(jax.random.key(1), att.key.shape)
    att = att._replace(time_decay=jnp.full_like(att.time_decay, time_decay), key=key)
    params = params._replace(blocks=params.blocks._replace(att=att))
    tokens = jax.random.randint(jax.random.key(2), (2, 300), 0, 11)
    loss = lambda p: jnp.var(rwkv_jax.forward(p, config, tokens, backend=backend)[0])
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
