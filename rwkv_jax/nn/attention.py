"""Softmax attention and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

ROTARY_BASE = 10000.0
"""Longest wavelength of the rotary positions, over 2 pi. Source: arXiv 2104.09864, section 3.2.2."""


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S H K"],
    value: Float[Array, "B S H K"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B T H K"]:
    """Returns softmax(q k^T / sqrt(K)) v of every head, over the keys that each query sees, of which there is at least one.

    The softmax is float32, float64 for float64 inputs: there jax.nn.dot_product_attention would round it to float32.

    Args:
        query: In the compute dtype.
        key: In the same.
        value: In the same.
        visible: Whether a query sees a key.
    """
    if query.dtype != jnp.float64:
        return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])
    scores = jnp.einsum("bthk,bshk->bhts", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf))
    return jnp.einsum("bhts,bshk->bthk", weights, value)


def rotate(x: Float[Array, "B T H K"], positions: np.ndarray, width: int) -> Float[Array, "B T H K"]:
    """Returns x with the first `width` channels of every head turned by its position, in float32 or wider, in x's dtype.

    Channel i < width / 2 and channel i + width / 2 are a pair, turned by position * ROTARY_BASE^(-2i / width), as in GPT-NeoX.

    Args:
        x: Queries or keys; only the difference of their positions matters.
        positions: [T], known when compiling, so that angles are exact in float64.
        width: Even, at most K.

    Source: arXiv 2104.09864; EleutherAI/gpt-neox, megatron/model/positional_embeddings.py.
    """
    angles = positions[:, None, None] * ROTARY_BASE ** (-np.arange(0, width, 2) / width)
    wide = x[..., :width].astype(jnp.promote_types(x.dtype, jnp.float32))
    cos, sin = (jnp.asarray(f(angles), wide.dtype) for f in (np.cos, np.sin))
    first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., width:]], axis=-1)
