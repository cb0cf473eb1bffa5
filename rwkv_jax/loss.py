"""The training loss: cross-entropy and RWKV's pull on the largest logit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
