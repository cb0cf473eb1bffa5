"""The token shift: what each channel saw one token ago. Of a row cut over devices, a part hands one token to the next."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..sharding import fitting, in_use
from . import parts


def token_shift(
    x: Float[Array, "B T D"],
    last: Float[Array, "B D"],
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """Returns x one token earlier, and the last token's x for the next call.

    Args:
        x: Activations.
        last: x of the token before the first; zeros at the start of a sequence.
        reset: True where a token starts a sequence: its predecessor is zeros.
        length: Tokens of each row that count; None is T.

    Returns:
        The shifted activations in x's dtype, and x of the last token that counts (`last` where none does) in last's dtype.
    """
    if not in_use() or (rows := fitting(x.shape, ("batch", "time", None)))[1] is None:
        return _shift(x, last, last, reset, length)

    def local(x, last, reset, length):
        before = jnp.where(jax.lax.axis_index(parts.AXIS) == 0, last.astype(x.dtype), parts.shift(x[:, -1]))
        own_length = None if length is None else parts.local_length(length, x.shape[1])
        shifted, newest = _shift(x, before, last, reset, own_length)
        if length is None:
            return shifted, parts.from_last(newest)
        own = -(-length // x.shape[1]) - 1 == jax.lax.axis_index(parts.AXIS)
        newest = jax.lax.psum(jnp.where(own[:, None], newest, 0), parts.AXIS)
        return shifted, jnp.where(length[:, None] == 0, last, newest)

    row = jax.P(rows[0])
    return jax.shard_map(
        local, in_specs=(rows, row, None if reset is None else jax.P(*rows[:2]), None if length is None else row),
        out_specs=(rows, row), check_vma=False,
    )(x, last, reset, length)  # fmt: skip


def _shift(x: Array, before: Array, last: Array, reset: Array | None, length: Array | None) -> tuple[Array, Array]:
    """As `token_shift`; `before` is what the first token's predecessor has, `last` what is returned where no token counts."""
    extended = jnp.concatenate([before.astype(x.dtype)[:, None], x], axis=1)
    shifted = extended[:, :-1]
    if reset is not None:
        shifted = jnp.where(reset[..., None], 0, shifted)
    if length is None:
        return shifted, x[:, -1].astype(last.dtype)
    newest = jnp.take_along_axis(extended, length[:, None, None], axis=1)[:, 0]
    return shifted, jnp.where(length[:, None] == 0, last, newest.astype(last.dtype))
