"""Training: one pure step, and the evaluation of a whole stream of text."""

from collections.abc import Callable, Iterable
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

Assemble = Callable[[Any, Any], tuple[Any, Any]]
"""(what is trained, what is not) -> (all parameters, the state of one row that every row starts from; None is the zero state)."""


def whole(trained: Any, frozen: Any) -> tuple[Any, None]:
    """Returns what is trained as all parameters: training from scratch, or fine-tuning of everything."""
    del frozen
    return trained, None


class TrainState(NamedTuple):
    """All that training changes, and all that a checkpoint of it needs."""

    step: Array
    """Updates made, int32."""
    params: Any
    """What is trained, float32: all parameters, or what a method of fine-tuning puts beside them."""
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


def init_train_state(
    key: PRNGKeyArray, config: Config, optimizer: optax.GradientTransformation, params: Any = None
) -> TrainState:
    """Returns step 0 with fresh parameters, or with those given."""
    init_key, key = jax.random.split(key)
    params = init(init_key, config) if params is None else params
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def train_step(
    train_state: TrainState,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    reset: Bool[Array, "B T"] | None,
    length: Int[Array, "B"] | None = None,
    frozen: Any = None,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    l2wrap: float,
    accumulate: int = 1,
    backend: str | None = None,
    assemble: Assemble = whole,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one update on a batch, and what was measured before it. Pure; jit it with donate_argnums=0.

    Args:
        train_state: Before the update.
        inputs: Tokens; every row starts from the zero state, or that of `assemble`.
        targets: The next token at each position.
        reset: True where a document starts; None: nowhere.
        length: Tokens of each row that count, the loss being their mean; None: all.
        frozen: What `assemble` takes beside what is trained.
        config: The model's.
        optimizer: From `make_optimizer`.
        l2wrap: As in `language_model_loss`.
        accumulate: Equal parts that the batch is cut into, one after the other; gradients are averaged in float32.
        backend: Of the WKV operator.
        assemble: Forms all parameters and the first state from what is trained and what is not; static.

    Raises:
        ValueError: `accumulate` does not divide the batch.
    """
    if inputs.shape[0] % accumulate:
        raise ValueError(f"a batch of {inputs.shape[0]} does not divide into accumulate={accumulate} parts")

    def loss_fn(trained, inputs, targets, reset, length, weights):
        params, start = assemble(trained, frozen)
        logits, _ = forward(params, config, inputs, _rows(start, inputs.shape[0]), reset, length, backend)
        loss = language_model_loss(logits, targets, l2wrap, weights)
        return loss.total, loss

    def gradient(batch) -> tuple[Any, Loss]:
        return jax.grad(loss_fn, has_aux=True)(train_state.params, *batch)

    weights = None
    if length is not None:
        valid = jnp.arange(inputs.shape[1]) < length[:, None]
        weights = accumulate * valid / valid.sum()
    batch = (inputs, targets, reset, length, weights)
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
    params: Any,
    config: Config,
    batches: Iterable[Any],
    backend: str | None = None,
    start: Any = None,
    *,
    packed: bool = False,
) -> Evaluation:
    """Returns the cost of all tokens of a stream, the state being carried from one batch to the next.

    Args:
        params: The model's.
        config: The model's.
        batches: From `validation_batches`: inputs, targets, valid, reset, each [B, T], a row's valid tokens coming first, and
            fresh, whether all rows start anew.
        backend: Of the WKV operator.
        start: The state of one row that every row starts from; None is the zero state.
        packed: Whether the state is reset where a document starts, as in training with documents="packed".
    """
    start = init_state(config, 1) if start is None else start
    state, nats, num_tokens = None, 0.0, 0
    for batch in batches:
        if state is None or batch.fresh:
            state = _rows(start, batch.inputs.shape[0])
        reset = batch.reset if packed else None
        cost, state = _evaluation_step(params, config, batch.inputs, batch.targets, batch.valid, reset, state, backend)
        nats += float(cost)
        num_tokens += int(np.sum(batch.valid))
    return Evaluation(nats, num_tokens)


def _rows(start: Any, batch_size: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, batch_size, axis=1), start)
