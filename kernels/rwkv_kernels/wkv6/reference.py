"""The WKV operator of RWKV-5 and RWKV-6, one token at a time: the oracle that every backend is held against.

It is a plain `lax.scan`, differentiated by autodiff in any mode, and is kept simple rather than fast.

Source: arXiv 2404.05892, equations 8 and 19; the decay is the log-decay w < 0 here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def scan(
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    w: Float[Array, "B T H K"] | Float[Array, "H K"],
    u: Float[Array, "H K"],
    state: Float[Array, "B H K V"],
    reset: Bool[Array, "B T"] | None,
    length: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Computes WKV by one `lax.scan` over time; arguments and result as in `wkv6`, in the state's dtype."""

    def step(state, inputs):
        r, k, v, w, reset, valid = inputs
        past = jnp.where(reset, 0, state)
        kv = k[..., :, None] * v[..., None, :]
        y = jnp.sum(r[..., :, None] * (past + u[..., :, None] * kv), -2)
        new = jnp.exp(w)[..., :, None] * past + kv
        return jnp.where(valid, new, state), jnp.where(valid[..., 0], y, 0)

    r, k, v, w = (x.astype(state.dtype) for x in (r, k, v, w))
    batch, num_tokens, _, _ = k.shape
    reset = jnp.zeros((batch, num_tokens), bool) if reset is None else reset
    length = jnp.full((batch,), num_tokens) if length is None else length
    valid = jnp.arange(num_tokens) < length[:, None]
    w = jnp.broadcast_to(w, k.shape)
    masks = (mask.T[..., None, None, None] for mask in (reset, valid))
    state, y = jax.lax.scan(step, state, (*(x.swapaxes(0, 1) for x in (r, k, v, w)), *masks))
    return y.swapaxes(0, 1), state
