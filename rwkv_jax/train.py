"""Training: one pure step, and the evaluation of a whole stream of text."""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from .lm import forward, init, init_state
from .loss import Loss, cross_entropy, language_model_loss
from .models import Config


class TrainState(NamedTuple):
    """All that training changes, and all that a checkpoint of it needs."""

    step: Array
    """Updates made, int32."""
    params: Any
    """float32 master parameters."""
    opt_state: Any
    """Of optax."""
    key: PRNGKeyArray
    """For whatever draws at random during training; RWKV-4 draws nothing."""


class Metrics(NamedTuple):
    """Of one step, float32 scalars."""

    loss: Array
    """Cross-entropy in nats per token."""
    total_loss: Array
    """What was minimised: with the pull on the largest logits."""
    grad_norm: Array
    """Global norm of the gradient before clipping."""


def init_train_state(key: PRNGKeyArray, config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns step 0 with fresh parameters."""
    init_key, key = jax.random.split(key)
    params = init(init_key, config)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def train_step(
    train_state: TrainState,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    reset: Bool[Array, "B T"] | None,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    l2wrap: float,
    accumulate: int = 1,
    backend: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one update on a batch, and what was measured before it. Pure; jit it with donate_argnums=0.

    Args:
        train_state: Before the update.
        inputs: Tokens; every row starts from the zero state.
        targets: The next token at each position.
        reset: True where a document starts; None: nowhere.
        config: The model's.
        optimizer: From `make_optimizer`.
        l2wrap: As in `language_model_loss`.
        accumulate: Equal parts that the batch is cut into, one after the other; gradients are averaged in float32.
        backend: Of the WKV operator.

    Raises:
        ValueError: `accumulate` does not divide the batch.
    """
    if inputs.shape[0] % accumulate:
        raise ValueError(f"a batch of {inputs.shape[0]} does not divide into accumulate={accumulate} parts")

    def loss_fn(params, inputs, targets, reset):
        logits, _ = forward(params, config, inputs, None, reset, backend=backend)
        loss = language_model_loss(logits, targets, l2wrap)
        return loss.total, loss

    def gradient(batch) -> tuple[Any, Loss]:
        return jax.grad(loss_fn, has_aux=True)(train_state.params, *batch)

    batch = (inputs, targets, reset)
    if accumulate == 1:
        grads, loss = gradient(batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(part)), None

        shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
        total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
        grads, loss = jax.tree.map(lambda x: x / accumulate, total)

    updates, opt_state = optimizer.update(grads, train_state.opt_state, train_state.params)
    params = optax.apply_updates(train_state.params, updates)
    metrics = Metrics(loss.cross_entropy, loss.total, optax.tree.norm(grads))
    return train_state._replace(step=train_state.step + 1, params=params, opt_state=opt_state), metrics


class Evaluation(NamedTuple):
    """The cost of a stream of text."""

    nats: float
    """Sum of -log p over all tokens."""
    num_tokens: int


@partial(jax.jit, static_argnames=("config", "backend"))
def _evaluation_step(params, config, inputs, targets, valid, reset, state, backend):
    logits, state = forward(params, config, inputs, state, reset, valid.sum(1), backend)
    return jnp.where(valid, cross_entropy(logits, targets), 0).sum(), state


def evaluate(
    params: Any, config: Config, batches: Iterable[Any], backend: str | None = None, *, packed: bool = False
) -> Evaluation:
    """Returns the cost of all tokens of a stream, the state being carried from one batch to the next.

    Args:
        params: The model's.
        config: The model's.
        batches: From `validation_batches`: inputs, targets, valid, reset, each [B, T], a row's valid tokens coming first.
        backend: Of the WKV operator.
        packed: Whether the state is reset where a document starts, as in training with documents="packed".
    """
    state, nats, num_tokens = None, 0.0, 0
    for batch in batches:
        if state is None:
            state = init_state(config, batch.inputs.shape[0])
        reset = batch.reset if packed else None
        cost, state = _evaluation_step(params, config, batch.inputs, batch.targets, batch.valid, reset, state, backend)
        nats += float(cost)
        num_tokens += int(np.sum(batch.valid))
    return Evaluation(nats, num_tokens)
