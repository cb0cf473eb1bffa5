"""Layer normalisation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import params as p
from .axes import spread, squeezed

EPS = 1e-5
"""Added to the variance, in every version."""


class LayerNorm(NamedTuple):
    """Gain and offset a channel, [D]."""

    weight: p.Leaf
    bias: p.Leaf


def declare_layer_norm(key: str, embed_dim: int) -> LayerNorm:
    """Declares the parameters under the official prefix `key`."""
    return LayerNorm(
        weight=p.Param(f"{key}.weight", (embed_dim,), ("embed",), p.ones),
        bias=p.Param(f"{key}.bias", (embed_dim,), ("embed",), p.zeros),
    )


def layer_norm(params: LayerNorm, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns x with mean 0 and variance 1 over the last axis, then scaled and shifted a channel.

    Computed in float32 (float64 for float64 inputs) and returned in x's dtype.
    """
    wide = squeezed(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    scale = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + EPS)
    y = centred * scale * spread(params.weight, wide) + spread(params.bias, wide)
    return y.astype(x.dtype).reshape(x.shape)
