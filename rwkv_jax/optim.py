"""The optimiser: Adam or AdamW with RWKV's parameter groups and learning-rate schedules, from optax."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from .loss import L2WRAP


@dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated. The defaults are RWKV-4's."""

    lr: float = 6e-4
    """Initial learning rate."""
    lr_final: float = 1e-5
    """Learning rate at the last step."""
    schedule: Literal["exponential", "cosine", "warmup_stable_decay"] = "exponential"
    """How it falls from lr to lr_final after constant_steps; warmup_stable_decay falls linearly, and constant_steps says when."""
    constant_steps: int = 0
    """Steps at lr before it falls (RWKV-4's constant phase; the stable phase of warmup_stable_decay)."""
    warmup_steps: int = 0
    """First steps, over which a factor rises linearly from warmup_start to 1."""
    warmup_start: float = 0.2
    """The factor's first value (RWKV-4: 0.2, RWKV-7: 0.01)."""
    b1: float = 0.9
    """Adam's decay of the mean of gradients."""
    b2: float = 0.99
    """Adam's decay of the mean of squares."""
    eps: float = 1e-8
    """Added to the root of the mean of squares."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices, times the learning rate a step; never of vectors. 0 is Adam."""
    weight_decay_final: float | None = None
    """Weight decay at the last step, reached exponentially; none: constant."""
    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    lr_multiples: bool = True
    """Whether parameters have their version's multiple of the learning rate (RWKV-4: time_decay 2, time_first 3)."""
    l2wrap: float = L2WRAP
    """Strength of the pull on each position's largest logit; 0 for none."""
    accumulate: int = 1
    """Equal parts that a batch is cut into, their gradients averaged, to save memory."""
    loss_chunk: int | None = None
    """Tokens a row whose logits are held at once, to save memory at the cost of one more product with the head; none: all."""
    segment: int | None = None
    """Tokens a row whose activations are held at once, the state going from segment to segment; none: data.context_length."""
    bptt: int | None = None
    """Segments that gradients reach back over (truncated backpropagation through time); none: the whole row."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What parameters are kept in between updates; bfloat16 is half the memory, rounded at random. Adam's means are float32."""

    def __post_init__(self):
        rules = {
            "lr": 0 < self.lr < math.inf, "lr_final": 0 <= self.lr_final < math.inf, "constant_steps": self.constant_steps >= 0,
            "warmup_steps": self.warmup_steps >= 0, "warmup_start": 0 < self.warmup_start <= 1,
            "b1": 0 <= self.b1 < 1, "b2": 0 <= self.b2 < 1, "eps": self.eps > 0,
            "weight_decay": self.weight_decay >= 0, "clip_norm": self.clip_norm > 0, "l2wrap": self.l2wrap >= 0,
            "accumulate": self.accumulate >= 1, "loss_chunk": self.loss_chunk is None or self.loss_chunk >= 1,
            "segment": self.segment is None or self.segment >= 1, "bptt": self.bptt is None or self.bptt >= 1,
        }  # fmt: skip
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; see --help for its range")
        if self.weight_decay_final is not None and min(self.weight_decay, self.weight_decay_final) <= 0:
            raise ValueError(
                f"optim.weight_decay_final is {self.weight_decay_final} and weight_decay {self.weight_decay}; "
                "an exponential path needs both above 0"
            )


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, 0 to num_steps.

    With progress p going from 0 at `constant_steps` to 1 at `num_steps`: exponential is lr (lr_final / lr)^p (linear if
    lr_final is 0), cosine and warmup_stable_decay go by a half cosine and a line. Source: RWKV-v4neo/src/trainer.py.

    Raises:
        ValueError: The constant phase does not end before the last step.
    """
    if config.constant_steps >= num_steps:
        raise ValueError(
            f"optim.constant_steps is {config.constant_steps}; it must be less than run.steps, {num_steps}"
        )

    def schedule(step):
        progress = jnp.clip((step - config.constant_steps) / (num_steps - config.constant_steps), 0, 1)
        linear = config.lr + (config.lr_final - config.lr) * progress
        if config.schedule == "cosine":
            rate = config.lr_final + (config.lr - config.lr_final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "exponential" and config.lr_final > 0:
            rate = config.lr * (config.lr_final / config.lr) ** progress
        else:
            rate = linear
        warmup = jnp.minimum(step / max(config.warmup_steps, 1), 1) if config.warmup_steps else 1.0
        return rate * (config.warmup_start + (1 - config.warmup_start) * warmup)

    return schedule


def make_optimizer(config: OptimConfig, declaration: Any, num_steps: int) -> optax.GradientTransformation:
    """Returns clip, Adam, weight decay of matrices, each parameter's multiple, and the schedule, in this order.

    Args:
        config: Rates and schedule.
        declaration: The model's parameters, which say what decays and at which multiple.
        num_steps: Length of the run.
    """
    multiples = jax.tree.map(lambda p: p.lr_multiple if config.lr_multiples else 1.0, declaration)

    def decay(step):
        if config.weight_decay_final is None:
            return config.weight_decay
        ratio = config.weight_decay_final / config.weight_decay
        return config.weight_decay * ratio ** jnp.clip(step / num_steps, 0, 1)

    def scale(updates, state, params=None):
        del params
        return jax.tree.map(lambda update, multiple: update * multiple, updates, multiples), state

    parts = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
    ]
    if config.weight_decay > 0:
        mask = jax.tree.map(lambda p: p.decays, declaration)
        parts.append(optax.add_decayed_weights(decay, mask))
    parts.append(optax.GradientTransformation(lambda params: optax.EmptyState(), scale))
    parts.append(optax.scale_by_learning_rate(learning_rate(config, num_steps)))
    return optax.chain(*parts)
