"""Shapes of activations whose gradients XLA's CPU backend sums quickly: it is slow at sums over arrays with axes of length 1."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..sharding import in_use


def spread(weight: Float[Array, "*D"], like: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns a weight, [D] or [H, K], at every token of `like`, in its shape and dtype.

    Its gradient is then one sum over batch and time. What broadcasting does by itself leaves out axes of length 1, and XLA's CPU
    backend forms the sum of [1, T, D] over T alone fifty times as slowly: one row trained at less than half the speed of two.
    """
    return jnp.broadcast_to(weight.astype(like.dtype), like.shape)


def squeezed(x: Float[Array, "*B D"]) -> Float[Array, "*A D"]:
    """Returns x without axes of length 1 but the last, to sum over its last axis; on a mesh, as it is.

    In the gradient of a norm, XLA's CPU backend forms the sum of [1, T, D] over D ten times as slowly as that of [T, D].
    """
    if in_use():  # Its partitioner (JAX 0.10) gives wrong numbers when one row's channels become cut tokens.
        return x
    return x.reshape(*(size for size in x.shape[:-1] if size != 1), x.shape[-1])
