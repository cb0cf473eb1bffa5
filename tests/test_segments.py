"""What saves memory in training: logits in chunks, rows in segments, states carried on, bfloat16 parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import SMALL, forward

import rwkv_jax
from rwkv_jax import train
from rwkv_jax.loss import chunked_language_model_loss, language_model_loss
from rwkv_jax.text import TokenStream, train_batches

ROWS, TOKENS, SEGMENT = 2, 24, 8


def start(config, **options):
    """A training state whose update, an SGD step of rate 1, shows the gradient; and a batch."""
    optimizer = optax.sgd(1.0)
    params = jax.tree.map(lambda x: x.astype(float), rwkv_jax.init(jax.random.key(0), config))
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)
    state = train.init_train_state(jax.random.key(1), config, optimizer, params, param_dtype="float64", **options)
    state = state._replace(params=params)
    text = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, TOKENS + 1)), jnp.int32)
    reset = jnp.zeros((ROWS, TOKENS), bool).at[1, 11].set(True)
    return (
        state,
        (text[:, :-1], text[:, 1:], reset),
        partial(train.train_step, config=config, optimizer=optimizer, l2wrap=1e-2),
    )


def gradient(state, batch, step):
    """The gradient that a step took, and its metrics."""
    after, metrics = jax.jit(step)(state, *batch)
    return jax.tree.map(np.subtract, state.params, after.params), metrics, after


def assert_close(a, b, rtol=1e-9):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("chunk", [5, 40])
def test_the_loss_in_chunks_is_the_loss_and_so_are_its_gradients(x64, chunk):
    rng = np.random.default_rng(0)
    x, head = jnp.asarray(rng.standard_normal((3, 12, 6))), jnp.asarray(rng.standard_normal((6, 17)))
    targets = jnp.asarray(rng.integers(0, 17, (3, 12)), jnp.int32)
    some = jnp.asarray(rng.random((3, 12)) * (rng.random((3, 12)) < 0.7))

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def whole(x, head, weights):
        return language_model_loss(x @ head, targets, 0.1, weights).total

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def parts(x, head, weights):
        return chunked_language_model_loss(x, head, targets, 0.1, weights, chunk=chunk).total

    for weights in (None, some):
        assert_close(parts(x, head, weights), whole(x, head, weights))


def temporaries(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_the_chunked_loss_holds_no_more_for_a_longer_text():
    def loss(x, head, targets):
        return jax.grad(lambda x, head: chunked_language_model_loss(x, head, targets, chunk=16).total, (0, 1))(x, head)

    head = jax.ShapeDtypeStruct((8, 4096), jnp.float32)
    sizes = [
        temporaries(loss, jax.ShapeDtypeStruct((1, n, 8), jnp.float32), head, jax.ShapeDtypeStruct((1, n), jnp.int32))
        for n in (64, 1024)
    ]
    assert sizes[1] - sizes[0] < 960 * 4096  # One byte for each logit more; the logits would be four and more.


@pytest.mark.parametrize("length", [pytest.param(None, marks=pytest.mark.slow), [24, 13]])
def test_segments_give_the_gradient_of_the_whole_row(length, x64):
    state, batch, step = start(SMALL["rwkv4"])
    batch = (*batch, length if length is None else jnp.array(length))
    whole, metrics, _ = gradient(state, batch, step)
    parts, own, _ = gradient(state, batch, partial(step, segment=SEGMENT, loss_chunk=3))
    assert_close(parts, whole, rtol=1e-8)
    assert_close(own, metrics)


@pytest.mark.slow
def test_truncated_backpropagation_is_the_mean_gradient_of_segments_from_states_held_fixed(x64):
    config = SMALL["rwkv4"]
    state, (inputs, targets, reset), step = start(config)
    found, metrics, _ = gradient(state, (inputs, targets, reset), partial(step, segment=SEGMENT, bptt=1))

    def loss(params, memory, part):
        logits, memory = forward(params, config, inputs[:, part], memory, reset[:, part])
        return language_model_loss(logits, targets[:, part], 1e-2).total, memory

    memory, total, losses = rwkv_jax.init_state(config, ROWS), None, []
    for first in range(0, TOKENS, SEGMENT):
        (value, memory), own = jax.value_and_grad(loss, has_aux=True)(
            state.params, memory, slice(first, first + SEGMENT)
        )
        total = own if total is None else jax.tree.map(jnp.add, total, own)
        losses.append(value)
    assert_close(found, jax.tree.map(lambda x: x / 3, total), rtol=1e-8)
    assert_close(metrics.total_loss, np.mean(losses))
    assert abs(optax.tree.norm(found) - optax.tree.norm(gradient(state, (inputs, targets, reset), step)[0])) > 1e-6


@pytest.mark.slow
def test_a_window_of_two_segments_reaches_back_over_both(x64):
    config = SMALL["rwkv4"]
    state, batch, step = start(config)
    batch = tuple(x[:, :16] for x in batch)
    whole, _, _ = gradient(state, batch, step)
    parts, _, _ = gradient(state, batch, partial(step, segment=SEGMENT, bptt=2))
    assert_close(parts, whole, rtol=1e-8)


@pytest.mark.slow
def test_truncated_backpropagation_holds_no_more_for_a_longer_row():
    config = SMALL["rwkv4"]
    optimizer = optax.sgd(1.0)
    state = train.init_train_state(jax.random.key(0), config, optimizer)
    step = partial(
        train.train_step, config=config, optimizer=optimizer, l2wrap=0.0, segment=32, bptt=1, loss_chunk=32,
        backend="parallel",
    )  # fmt: skip
    sizes = []
    for n in (128, 1024):
        tokens = jax.ShapeDtypeStruct((4, n), jnp.int32)
        sizes.append(temporaries(step, state, tokens, tokens, None))
    assert sizes[1] - sizes[0] < 4 * 896 * 4 * 4  # The tokens themselves, copied.


def test_a_carried_state_goes_on_where_the_batch_before_it_ended(x64):
    config = SMALL["rwkv4"]
    state, batch, step = start(config, carried_rows=ROWS)
    _, _, after = gradient(state, batch, step)
    _, expected = forward(state.params, config, batch[0], None, batch[2])
    assert_close(after.memory, expected, rtol=1e-5)  # It is kept in float32.
    _, metrics, _ = gradient(after, batch, step)
    logits, _ = forward(after.params, config, batch[0], after.memory, batch[2])
    assert_close(metrics.loss, language_model_loss(logits, batch[1]).cross_entropy)


def test_accumulation_carries_every_rows_own_state(x64):
    config = SMALL["rwkv4"]
    state, batch, step = start(config, carried_rows=ROWS)
    whole, parts = (gradient(state, batch, partial(step, accumulate=n)) for n in (1, 2))
    assert_close(parts[0], whole[0], rtol=1e-8)
    assert_close(parts[2].memory, whole[2].memory, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"segment": 7}, {"segment": 8, "bptt": 2}])
def test_segments_that_do_not_divide_a_row_are_refused(changes):
    config = SMALL["rwkv4"]
    state = train.init_train_state(jax.random.key(0), config, optax.sgd(1.0))
    tokens = jnp.zeros((ROWS, TOKENS), jnp.int32)
    with pytest.raises(ValueError, match="24 tokens a row do not divide into windows"):
        train.train_step(state, tokens, tokens, None, config=config, optimizer=optax.sgd(1.0), l2wrap=0.0, **changes)


def test_parameters_in_bfloat16_are_rounded_up_or_down_and_right_on_average():
    config, optimizer = SMALL["rwkv4"], optax.sgd(0.0)
    state = train.init_train_state(jax.random.key(0), config, optimizer, param_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    between = jnp.full((4000,), 1 + 2.0**-9)  # A quarter of the way from 1 to the next number, 1 + 2^-7.
    found = train._rounded({"x": between}, {"x": between.astype(jnp.bfloat16)}, jax.random.key(1))["x"]
    assert set(np.unique(found).astype(float)) == {1.0, 1.0078125}
    assert abs(float(found.astype(jnp.float32).mean()) - float(between[0])) < 4 * 0.0034 / 4000**0.5
    kept = train._rounded(
        {"x": jnp.asarray([jnp.inf, jnp.nan, 0.0])}, {"x": jnp.zeros(3, jnp.bfloat16)}, jax.random.key(1)
    )
    np.testing.assert_array_equal(np.asarray(kept["x"], float), [np.inf, np.nan, 0.0])


@pytest.fixture
def stream():
    return TokenStream(np.arange(1, 402, dtype=np.int32), np.array([0]), num_bytes=400)


def test_rows_that_are_carried_walk_through_their_part_of_the_text(stream):
    batches = train_batches(stream, context_length=10, batch_size=4, seed=0, carry=True)
    taken = [next(batches) for _ in range(11)]
    walked = np.concatenate([batch.inputs for batch in taken[:10]], axis=1)
    np.testing.assert_array_equal(walked, np.arange(1, 401).reshape(4, 100))
    assert taken[0].reset[:, 0].all() and not any(batch.reset.any() for batch in taken[1:10])
    np.testing.assert_array_equal(taken[10].inputs, taken[0].inputs)
    assert taken[10].reset[:, 0].all()


@pytest.mark.parametrize("carry", [False, True])
def test_processes_read_every_row_of_a_batch_once(stream, carry):
    def draw(rows):
        batches = train_batches(stream, context_length=10, batch_size=4, seed=3, carry=carry, rows=rows)
        return [next(batches).inputs for _ in range(12)]

    whole, parts = draw(None), [draw(np.asarray(rows)) for rows in ([0, 1], [2, 3])]
    for i, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), batch)
