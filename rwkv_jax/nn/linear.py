"""Matrix products over the last axis."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..sharding import constrain, in_use


def linear(x: Float[Array, "*B D"], weight: Float[Array, "D E"], dtype: Any = None) -> Float[Array, "*B E"]:
    """Returns x @ weight, multiplied in x's dtype and accumulated into `dtype` (default: x's).

    The product is one of two matrices with x behind a barrier. Otherwise XLA's CPU backend fuses what made x into the
    weight's gradient, x^T g over batch and time, and copies both through a transpose first.
    """
    if "sequence" in in_use():  # Rows and tokens that are both cut do not flatten into one cut axis.
        return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=dtype)
    flat = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
    product = jnp.matmul(flat, weight.astype(x.dtype), preferred_element_type=dtype)
    return product.reshape(*x.shape[:-1], weight.shape[-1])


def embed(table: Float[Array, "A D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Returns the tokens' rows of the table; a token outside the vocabulary gives NaN rather than some other row."""
    rows = constrain(table, "vocab", None).at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    # Here, and not after a norm: XLA's partitioner (JAX 0.10) gives wrong numbers when one row's channels become cut tokens.
    return constrain(rows, "batch", "time", "residual")
