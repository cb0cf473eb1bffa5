"""Functions of single tokens, a few thousand tokens at a time, so that what lies between fits in a CPU's cache."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float
from rwkv_kernels.dispatch import here

from ..sharding import in_use

SLICE_BYTES = 8 << 20
"""Of what lies between, in a slice: a quarter of a common last-level cache, since its gradient and others want room beside it."""
MOST_SLICES = 8
"""Each is compiled."""


def in_slices(
    function: Callable[[Float[Array, "... D"]], Float[Array, "... E"]], x: Float[Array, "B T D"], width: int
) -> Float[Array, "B T E"]:
    """Returns function(x), traced for one CPU device formed in slices of tokens, elsewhere at once.

    A channel mix makes four times as many channels as it reads, and reads them again in its gradient.

    Args:
        function: Of tokens that do not depend on each other; it keeps the axes before the last.
        x: Tokens.
        width: The most channels a token that the function holds in between.
    """
    num_tokens = x.shape[0] * x.shape[1]
    most = min(MOST_SLICES, num_tokens * width * x.dtype.itemsize // SLICE_BYTES)
    number = next((n for n in range(most, 1, -1) if num_tokens % n == 0), 1)  # All slices have one shape.
    if number == 1 or in_use() or here().platform != "cpu":
        return function(x)
    slices = jnp.split(x.reshape(num_tokens, -1), number)
    return jnp.concatenate([function(part) for part in slices]).reshape(*x.shape[:2], -1)
