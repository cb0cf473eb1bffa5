"""RWKV-7's WKV operator, one token at a time: the oracle that every backend is held against.

It is a plain `lax.scan`, differentiated by autodiff in any mode, and is kept simple rather than fast.

Source: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_demo.py (RWKV7_OP); the decay is the log-decay w < 0 here.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def scan(
    r: Float[Array, "B T H K"],
    w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    state: Float[Array, "B H V K"],
    reset: Bool[Array, "B T"] | None,
    length: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H V K"]]:
    """Computes WKV by one `lax.scan` over time; arguments and result as in `wkv7`, in the state's dtype."""

    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # Whatever a device multiplies in by default.

    def step(state, inputs):
        r, w, k, v, a, b, reset, valid = inputs
        past = jnp.where(reset[:, None, None, None], 0, state)
        removed = einsum("bhvk,bhk->bhv", past, a)
        new = past * jnp.exp(w)[:, :, None] + removed[..., None] * b[:, :, None] + v[..., None] * k[:, :, None]
        y = einsum("bhvk,bhk->bhv", new, r)
        return jnp.where(valid[:, None, None, None], new, state), jnp.where(valid[:, None, None], y, 0)

    r, w, k, v, a, b = (x.astype(state.dtype) for x in (r, w, k, v, a, b))
    batch, num_tokens = r.shape[:2]
    reset = jnp.zeros((batch, num_tokens), bool) if reset is None else reset
    length = jnp.full((batch,), num_tokens) if length is None else length
    valid = jnp.arange(num_tokens) < length[:, None]
    time_first = jax.tree.map(lambda x: x.swapaxes(0, 1), (r, w, k, v, a, b, reset, valid))
    state, y = jax.lax.scan(step, state, time_first)
    return y.swapaxes(0, 1), state
