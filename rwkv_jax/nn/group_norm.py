"""Normalisation of every head by itself: `ln_x` of RWKV-5 and later."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .axes import spread, squeezed
from .layer_norm import LayerNorm


def group_norm(params: LayerNorm, x: Float[Array, "*B H V"], eps: float) -> Float[Array, "*B D"]:
    """Returns x with mean 0 and variance 1 over each head, its heads joined, then scaled and shifted a channel.

    Computed in float32 (float64 for float64 inputs) and returned in x's dtype.

    Args:
        params: Gain and offset a channel, [D], D = H * V.
        x: Heads.
        eps: Added to the variance (`ln_x_eps`: 64e-5 in most released models).
    """
    wide = squeezed(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    joined = normal.reshape(*x.shape[:-2], -1)
    return (joined * spread(params.weight, joined) + spread(params.bias, joined)).astype(x.dtype)
