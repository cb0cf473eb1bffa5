"""Training: one pure step, and the evaluation of a whole stream of text."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from . import params as p
from . import sharding
from .lm import forward, hidden, init_state, unembed
from .loss import Loss, chunked_language_model_loss, cross_entropy, language_model_loss
from .models import Config, module_of

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
    """What is trained: all parameters, or what a method of fine-tuning puts beside them; float32, or bfloat16 if asked for."""
    opt_state: Any
    """Of optax, float32."""
    key: PRNGKeyArray
    """For what draws at random during training: the rounding of bfloat16 parameters."""
    memory: Any = None
    """The model's state after the last batch, where rows go on from there; None where every row starts anew."""


class Metrics(NamedTuple):
    """Of one step, float32 scalars."""

    loss: Array
    """Cross-entropy in nats per token."""
    total_loss: Array
    """What was minimised: with the pull on the largest logits."""
    grad_norm: Array
    """Global norm of the gradient before clipping."""


def init_train_state(
    key: PRNGKeyArray,
    config: Config,
    optimizer: optax.GradientTransformation,
    params: Any = None,
    *,
    mesh: Mesh | None = None,
    declaration: Any = None,
    param_dtype: str = "float32",
    carried_rows: int | None = None,
) -> TrainState:
    """Returns step 0 with fresh parameters, or with those given.

    Args:
        key: Of the initialisation.
        config: The model's.
        optimizer: From `make_optimizer`.
        params: What is trained; None: fresh parameters.
        mesh: On which every array is made in its place, never whole on one device; None: the default device.
        declaration: Of what is trained; None: the model's parameters.
        param_dtype: What parameters are kept in.
        carried_rows: Rows of a batch, if each goes on from the state in which the one before it ended.
    """
    declaration = module_of(config).declare(config) if declaration is None else declaration
    where = None if mesh is None else sharding.param_shardings(declaration, config.num_layers, mesh)
    init_key, key = jax.random.split(key)
    if params is None:
        params = p.init(init_key, declaration, config.num_layers, where)
    elif where is not None:
        params = jax.device_put(params, where)

    def rest(params):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        memory = None if carried_rows is None else init_state(config, carried_rows)
        own = jax.tree.map(lambda x: x.astype(param_dtype), params)
        return TrainState(jnp.zeros((), jnp.int32), own, optimizer.init(wide), key, memory)

    if mesh is None:
        return rest(params)
    return jax.jit(rest, out_shardings=train_state_shardings(jax.eval_shape(rest, params), where, optimizer, mesh))(
        params
    )


def train_state_shardings(shapes: TrainState, params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Returns the sharding of every array of a training state: the optimiser's lie as the parameters that they belong to.

    Args:
        shapes: The state, or its shapes.
        params: The shardings of the parameters.
        optimizer: The state's.
        mesh: Of the shardings.
    """
    whole = sharding.replicated(mesh)
    opt_state = optax.tree.map_params(
        optimizer, lambda _, own: own, shapes.opt_state, params, transform_non_params=lambda _: whole
    )
    rows = NamedSharding(mesh, sharding.spec(None, "batch"))
    return shapes._replace(
        step=whole, params=params, opt_state=opt_state, key=whole, memory=jax.tree.map(lambda _: rows, shapes.memory)
    )


def train_step(
    train_state: TrainState,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    reset: Bool[Array, "B T"] | None,
    length: Int[Array, "B"] | None = None,
    frozen: Any = None,
    counts: Bool[Array, "B T"] | None = None,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    l2wrap: float,
    accumulate: int = 1,
    loss_chunk: int | None = None,
    segment: int | None = None,
    bptt: int | None = None,
    backend: str | None = None,
    assemble: Assemble = whole,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one update on a batch, and what was measured before it. Pure; jit it with donate_argnums=0.

    Args:
        train_state: Before the update.
        inputs: Tokens; every row starts from the zero state, or that of `assemble`, or that in `train_state.memory`.
        targets: The next token at each position.
        reset: True where a document starts; None: nowhere.
        length: Tokens of each row that count, the loss being their mean; None: all.
        frozen: What `assemble` takes beside what is trained.
        counts: Which of those tokens' targets the loss is the mean over, such as an answer's; None: all.
        config: The model's.
        optimizer: From `make_optimizer`.
        l2wrap: As in `language_model_loss`.
        accumulate: Equal parts that the batch is cut into, one after the other; gradients are averaged in float32.
        loss_chunk: Tokens a row whose logits are held at once, as in `chunked_language_model_loss`; None: all.
        segment: Tokens a row whose activations are held at once: rows are cut into segments, and the state goes from one to the
            next. None: all.
        bptt: Segments that a gradient reaches back over, a multiple of which makes a row; None: the whole row.
        backend: Of the WKV operator.
        assemble: Forms all parameters and the first state from what is trained and what is not; static.

    Raises:
        ValueError: `accumulate` does not divide the batch, or `segment` and `bptt` the row.
    """
    num_rows, num_tokens = inputs.shape
    segment = segment or num_tokens
    window = segment * (bptt or num_tokens // segment)
    wide = jnp.promote_types(jax.tree.leaves(train_state.params)[0].dtype, jnp.float32)
    if num_rows % accumulate:
        raise ValueError(f"a batch of {num_rows} does not divide into accumulate={accumulate} parts")
    if num_tokens % segment or num_tokens % window:
        raise ValueError(
            f"{num_tokens} tokens a row do not divide into windows of bptt={bptt} x segment={segment} tokens"
        )

    def run_segment(params, state, batch):
        inputs, targets, reset, length, weights = batch
        x, state = hidden(params, config, inputs, state, reset, length, backend)
        if loss_chunk is not None:
            return state, chunked_language_model_loss(x, params.head, targets, l2wrap, weights, chunk=loss_chunk)
        return state, language_model_loss(unembed(params, x), targets, l2wrap, weights)

    def run_window(trained, batch, state):
        params, start = assemble(trained, frozen)
        state = _rows(start, batch[0].shape[0]) if state is None else state
        if window == segment:
            state, loss = run_segment(params, state, batch)
        else:
            run = jax.checkpoint(lambda state, part: run_segment(params, state, part))
            state = init_state(config, batch[0].shape[0], wide) if state is None else state
            state, losses = jax.lax.scan(run, state, _cut(batch, segment))
            loss = jax.tree.map(lambda x: x.mean(), losses)
        return loss.total, (loss, state)

    def gradient_of_window(batch, state) -> tuple[Any, Loss, Any]:
        grads, (loss, state) = jax.grad(run_window, has_aux=True)(train_state.params, batch, state)
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), grads), loss, state

    def gradient_of_rows(batch, state) -> tuple[Any, Loss, Any]:
        if window == num_tokens:
            return gradient_of_window(batch, state)
        if state is None:
            if assemble(train_state.params, frozen)[1] is not None:
                raise ValueError("a learned first state needs the gradient of the whole row; leave bptt out")
            state = init_state(config, batch[0].shape[0], wide)

        def add(carry, part):
            total, state = carry
            *own, state = gradient_of_window(part, state)
            return (jax.tree.map(jnp.add, total, tuple(own)), state), None

        parts = _cut(batch, window)
        zeros = _zeros_like(gradient_of_window, jax.tree.map(lambda x: x[0], parts), state)[:2]
        (total, state), _ = jax.lax.scan(add, (zeros, state), parts)
        return *jax.tree.map(lambda x: x * (window / num_tokens), total), state

    weights = None
    if length is not None or counts is not None:
        valid = jnp.ones(inputs.shape, bool) if length is None else jnp.arange(num_tokens) < length[:, None]
        valid = valid if counts is None else valid & counts
        weights = accumulate * (num_tokens // segment) * valid / valid.sum()
    batch = (inputs, targets, reset, length, weights)
    memory = jax.tree.map(lambda x: x.astype(wide), train_state.memory)
    if accumulate == 1:
        grads, loss, memory_after = gradient_of_rows(batch, memory)
    else:
        # Part i has every accumulate-th row, so that each device has rows of every part.
        def parts_of(axis):
            return lambda x: jnp.moveaxis(x.reshape(*x.shape[:axis], -1, accumulate, *x.shape[axis + 1 :]), axis + 1, 0)

        parts = jax.tree.map(parts_of(0), batch), jax.tree.map(parts_of(1), memory)

        def add(total, part):
            *own, state = gradient_of_rows(*part)
            return jax.tree.map(jnp.add, total, tuple(own)), state if memory is not None else None

        zeros = _zeros_like(gradient_of_rows, *jax.tree.map(lambda x: x[0], parts))[:2]
        total, states = jax.lax.scan(add, zeros, parts)
        grads, loss = jax.tree.map(lambda x: x / accumulate, total)
        memory_after = jax.tree.map(lambda x, like: jnp.moveaxis(x, 0, 2).reshape(like.shape), states, memory)

    params = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), train_state.params)
    updates, opt_state = optimizer.update(grads, train_state.opt_state, params)
    params = _rounded(
        optax.apply_updates(params, updates),
        train_state.params,
        jax.random.fold_in(train_state.key, train_state.step),
    )
    metrics = Metrics(loss.cross_entropy, loss.total, optax.tree.norm(grads))
    return (
        train_state._replace(
            step=train_state.step + 1,
            params=params,
            opt_state=opt_state,
            memory=None if memory is None else jax.tree.map(lambda x: x.astype(jnp.float32), memory_after),
        ),
        metrics,
    )


def _cut(batch: Any, num_tokens: int) -> Any:
    """Cuts inputs, targets, reset, length and weights along time: a leading axis of parts of `num_tokens` tokens."""
    inputs, targets, reset, length, weights = batch
    parts = inputs.shape[1] // num_tokens

    def cut(x):
        return None if x is None else jnp.moveaxis(x.reshape(x.shape[0], parts, num_tokens), 1, 0)

    lengths = None if length is None else jnp.clip(length - num_tokens * jnp.arange(parts)[:, None], 0, num_tokens)
    return cut(inputs), cut(targets), cut(reset), lengths, cut(weights)


def _zeros_like(function: Any, *args: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))


def _rounded(params: Any, like: Any, key: PRNGKeyArray) -> Any:
    """Returns float32 parameters in the dtype that they are kept in. To bfloat16 they are rounded up or down at random, right on
    average: rounded to nearest, steps smaller than half a digit would all be lost."""
    leaves, structure = jax.tree.flatten(params)

    def one(i, x, kept):
        if kept.dtype == x.dtype:
            return x
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        noise = jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint16).astype(jnp.uint32)
        kept_bits = jnp.where(jnp.isfinite(x), (bits + noise) >> 16, bits >> 16).astype(jnp.uint16)
        return jax.lax.bitcast_convert_type(kept_bits, jnp.bfloat16)

    return structure.unflatten(
        [one(i, *pair) for i, pair in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))]
    )


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
    state, nats, num_tokens, running = None, 0.0, 0, 0.0
    for batch in batches:
        if state is None or batch.fresh:
            state = _rows(start, batch.inputs.shape[0])
        reset = batch.reset if packed else None
        cost, state = _evaluation_step(params, config, batch.inputs, batch.targets, batch.valid, reset, state, backend)
        nats += float(running)  # Of the batch before, while this one is running.
        running = cost
        num_tokens += int(np.sum(batch.valid))
    return Evaluation(nats + float(running), num_tokens)


def _rows(start: Any, batch_size: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, batch_size, axis=1), start)
