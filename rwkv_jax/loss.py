"""The training loss: cross-entropy and RWKV's pull on the largest logit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .nn.linear import linear
from .sharding import fitting, in_use

L2WRAP = 1e-4
"""Strength of the pull: the gradient of a position's largest logit is L2WRAP times that logit. Source: RWKV-v4neo."""


class Loss(NamedTuple):
    """The parts of the loss, each a mean over positions."""

    total: Array
    """What is minimised: cross_entropy + l2wrap."""
    cross_entropy: Array
    """Nats per token."""


def cross_entropy(logits: Float[Array, "B T A"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns -log softmax(logits)[target] at every position, in nats."""
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - own


def language_model_loss(
    logits: Float[Array, "B T A"],
    targets: Int[Array, "B T"],
    l2wrap: float = L2WRAP,
    weights: Float[Array, "B T"] | None = None,
) -> Loss:
    """Returns the mean cross-entropy, and its sum with l2wrap / 2 * mean(max_logit^2).

    Upstream writes the second part as an extra gradient, which ignores the scale of the incoming one and so counts too much
    under gradient accumulation; as a term of the loss it is scaled and averaged like the rest.

    Args:
        logits: From `forward`.
        targets: The next tokens.
        l2wrap: Strength of the pull on each position's largest logit; 0 for none.
        weights: Of each position in the means, in place of 1 / (B * T); a position of weight 0 has no gradient.
    """

    def mean(x):
        return x.mean() if weights is None else jnp.where(weights > 0, x * weights, 0).sum()

    entropy = mean(cross_entropy(logits, targets))
    pull = 0.5 * l2wrap * mean(jnp.square(logits.max(-1)))
    return Loss(entropy + pull, entropy)


def chunked_language_model_loss(
    x: Float[Array, "B T D"],
    head: Float[Array, "D A"],
    targets: Int[Array, "B T"],
    l2wrap: float = L2WRAP,
    weights: Float[Array, "B T"] | None = None,
    *,
    chunk: int,
) -> Loss:
    """Returns `language_model_loss` of the logits x @ head, of which only those of `chunk` tokens a row exist at a time.

    The backward pass computes them again, chunk by chunk, so memory does not grow with vocabulary times tokens; the cost is one more
    product with the head. On a mesh every device goes through its own tokens, and the head's gradient is summed over devices once.

    Args:
        x: What the head reads, from `rwkv_jax.hidden`.
        head: The head's matrix.
        targets: As in `language_model_loss`, like the next two.
        l2wrap: Strength of the pull.
        weights: Of each position.
        chunk: Tokens a row (on a mesh: a device's part of a row) whose logits are held at once.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if weights is None:
        weights = jnp.full(targets.shape, 1 / targets.size, wide)

    def local(x, head, targets, weights):
        @jax.checkpoint
        def add(total: Loss, part) -> tuple[Loss, None]:
            x, targets, weights = part
            loss = language_model_loss(linear(x, head, dtype=wide), targets, l2wrap, weights)
            return jax.tree.map(jnp.add, total, loss), None

        parts = jax.tree.map(lambda array: _chunks(array, chunk), (x, targets, weights))
        return jax.lax.scan(add, Loss(jnp.zeros((), wide), jnp.zeros((), wide)), parts)[0]

    rows = fitting(targets.shape, ("batch", "time"))
    manual = {name for part in rows for name in ((part,) if isinstance(part, str) else part or ())}
    if not in_use() or not manual:
        return local(x, head, targets, weights)

    def summed(*arrays):
        return jax.lax.psum(local(*arrays), tuple(manual))

    specs = (jax.P(*rows, None), jax.P(), rows, rows)
    whole = jax.shard_map(summed, in_specs=specs, out_specs=jax.P(), axis_names=manual, check_vma=False)
    return whole(x, head, targets, weights)


def _chunks(x: Array, chunk: int) -> Array:
    """Cuts [B, T, ...] into [N, B, chunk, ...], padded with zeros: of weights, too, so that padding counts nothing."""
    padding = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
