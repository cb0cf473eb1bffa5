"""RWKV-4's WKV operator, one token at a time: the oracle that every backend is held against.

It is a plain `lax.scan`, differentiated by autodiff in any mode, and is kept simple rather than fast.

Source: arXiv 2305.13048, equations 16 and 21 to 28 (the stable recurrence); the decay is the log-decay w < 0 here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

EMPTY = -1e38
"""The exponent `pp` of a state that has seen nothing: exp(EMPTY - anything finite) is 0."""


class WKV4State(NamedTuple):
    """A weighted sum of values and its normaliser, both scaled by exp(-pp): float32 (or float64) [B, D]."""

    aa: Array
    bb: Array
    pp: Array


def scan(
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    w: Float[Array, "D"],
    u: Float[Array, "D"],
    state: WKV4State,
    reset: Bool[Array, "B T"] | None,
    length: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B T D"], WKV4State]:
    """Computes WKV by one `lax.scan` over time; arguments and result as in `wkv4`, in the state's dtype."""

    def step(carry: WKV4State, inputs):
        k, v, reset, valid = inputs
        aa, bb, pp = carry
        pp = jnp.where(reset, EMPTY, pp)

        q = jnp.maximum(pp, u + k)
        e1, e2 = jnp.exp(pp - q), jnp.exp(u + k - q)
        y = (e1 * aa + e2 * v) / (e1 * bb + e2)

        q = jnp.maximum(pp + w, k)
        e1, e2 = jnp.exp(pp + w - q), jnp.exp(k - q)
        new = WKV4State(e1 * aa + e2 * v, e1 * bb + e2, q)
        return jax.tree.map(lambda new, old: jnp.where(valid, new, old), new, carry), jnp.where(valid, y, 0)

    k, v = (x.astype(state.aa.dtype) for x in (k, v))
    batch, num_tokens, _ = k.shape
    reset = jnp.zeros((batch, num_tokens), bool) if reset is None else reset
    length = jnp.full((batch,), num_tokens) if length is None else length
    valid = jnp.arange(num_tokens) < length[:, None]
    time_first = (k.swapaxes(0, 1), v.swapaxes(0, 1), reset.T[..., None], valid.T[..., None])
    state, y = jax.lax.scan(step, state, time_first)
    return y.swapaxes(0, 1), state
