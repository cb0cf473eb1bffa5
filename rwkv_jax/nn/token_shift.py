"""The token shift: what each channel saw one token ago."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
    extended = jnp.concatenate([last.astype(x.dtype)[:, None], x], axis=1)
    shifted = extended[:, :-1]
    if reset is not None:
        shifted = jnp.where(reset[..., None], 0, shifted)
    if length is None:
        return shifted, x[:, -1].astype(last.dtype)
    newest = jnp.take_along_axis(extended, length[:, None, None], axis=1)[:, 0]
    return shifted, jnp.where(length[:, None] == 0, last, newest.astype(last.dtype))
