"""The models on the kernels, interpreted: the same numbers as on the chunked form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import EVERY_RWKV, SMALL

import rwkv_jax


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_RWKV)
def test_logits_state_and_gradients_equal_the_chunked_form(name, x64):
    config = SMALL[name]
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: rwkv_jax.init(jax.random.key(0), config))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 37), np.int32))
    reset, length = jnp.asarray(rng.random((2, 37)) < 0.1), jnp.array([29, 37])

    def loss(params, state, backend):
        logits, state = rwkv_jax.forward(params, config, tokens, state, reset, length, backend)
        counts = jnp.arange(37)[:, None] < length[:, None, None]
        return jnp.sum(jnp.where(counts, jnp.sin(logits), 0)) + sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(state))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    state = jax.tree.map(lambda x: rng.random(x.shape), rwkv_jax.init_state(config, 2, jnp.float64))
    expected = step(params, state, "parallel")
    for backend in ("pallas_gpu_interpreted", "pallas_tpu_interpreted"):
        for a, e in zip(jax.tree.leaves(step(params, state, backend)), jax.tree.leaves(expected), strict=True):
            tolerance = 1e-8 * float(jnp.linalg.norm(e) + 1)
            np.testing.assert_allclose(a, e, rtol=1e-8, atol=tolerance, err_msg=backend)
