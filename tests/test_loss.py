"""The loss, the training step and the evaluation, against numpy in float64 and against each other."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rwkv_jax import RWKV4Config, forward
from rwkv_jax.loss import L2WRAP, cross_entropy, language_model_loss
from rwkv_jax.models import rwkv4
from rwkv_jax.optim import OptimConfig, make_optimizer
from rwkv_jax.train import evaluate, init_train_state, train_step

MODEL = RWKV4Config(vocab_size=13, num_layers=2, embed_dim=8, remat="none")
OPTIMIZER = make_optimizer(OptimConfig(lr=1e-2, lr_final=1e-2), rwkv4.declare(MODEL), num_steps=1000)


class Batch(NamedTuple):
    """What `evaluate` reads."""

    inputs: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    valid: np.ndarray
    fresh: bool = False


def random_logits(shape=(2, 5, 7), scale=4.0):
    rng = np.random.default_rng(0)
    return scale * rng.normal(size=shape), rng.integers(0, shape[-1], shape[:2]).astype(np.int32)


def numpy_cross_entropy(logits, targets):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, np.asarray(targets)[..., None], axis=-1)[..., 0]


@cache
def random_state():
    """A TrainState whose parameters are all away from zero, so that every gradient is."""
    state = init_train_state(jax.random.key(0), MODEL, OPTIMIZER)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state.params)
    return state._replace(params=params, opt_state=OPTIMIZER.init(params))


scan_forward = jax.jit(partial(forward, backend="scan"), static_argnums=1)


def random_tokens(batch_size, num_tokens, seed=0):
    tokens = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (batch_size, num_tokens))
    return jnp.asarray(tokens, jnp.int32)


@pytest.mark.parametrize("scale", [0.0, 4.0, 1e4])
def test_cross_entropy_equals_numpy(scale):
    logits, targets = random_logits(scale=scale)
    actual = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    np.testing.assert_allclose(actual, numpy_cross_entropy(logits, targets), rtol=1e-6, atol=1e-6)


def test_cross_entropy_of_equal_logits_is_the_log_of_their_number():
    actual = cross_entropy(jnp.full((1, 1, 256), 3.0), jnp.zeros((1, 1), jnp.int32))
    assert float(actual[0, 0]) == pytest.approx(np.log(256), rel=1e-6)


@pytest.mark.parametrize("l2wrap", [0.0, L2WRAP, 0.5])
def test_the_losses_are_the_mean_entropy_and_its_sum_with_the_pull(x64, l2wrap):
    logits, targets = random_logits()
    loss = language_model_loss(jnp.asarray(logits), jnp.asarray(targets), l2wrap)
    entropy = numpy_cross_entropy(logits, targets).mean()
    assert float(loss.cross_entropy) == pytest.approx(entropy, rel=1e-12)
    assert float(loss.total) == pytest.approx(entropy + l2wrap / 2 * (logits.max(-1) ** 2).mean(), rel=1e-12)


def test_l2wrap_adds_upstreams_gradient_to_each_largest_logit(x64):
    logits, targets = random_logits()
    gradient = jax.grad(lambda x: language_model_loss(x, jnp.asarray(targets)).total)(jnp.asarray(logits))
    batch_size, num_tokens, vocab_size = logits.shape
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) - np.eye(vocab_size)[targets]
    for b in range(batch_size):
        for t in range(num_tokens):  # RWKV-v4neo/src/model.py, class L2Wrap
            expected[b, t, logits[b, t].argmax()] += logits[b, t].max() * 1e-4
    np.testing.assert_allclose(gradient, expected / (batch_size * num_tokens), rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_accumulating_gradients_changes_no_update(x64):
    # SGD, because Adam's first step would hide a gradient of the wrong size; float64, to leave no doubt.
    optimizer = optax.sgd(0.1)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), random_state().params)
    state = random_state()._replace(params=params, opt_state=optimizer.init(params))
    inputs, targets = random_tokens(8, 6), random_tokens(8, 6, seed=1)
    reset = random_tokens(8, 6, seed=2) < 3
    step = partial(train_step, config=MODEL, optimizer=optimizer, l2wrap=0.3)
    whole_state, whole = jax.jit(step)(state, inputs, targets, reset)
    parts_state, parts = jax.jit(partial(step, accumulate=4))(state, inputs, targets, reset)
    np.testing.assert_allclose(parts, whole, rtol=1e-12)
    for start, a, b in zip(*map(jax.tree.leaves, (state.params, whole_state.params, parts_state.params)), strict=True):
        moved = np.abs(np.asarray(a - start)).max()
        assert moved > 0
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * moved)


def test_a_batch_that_does_not_divide_is_refused():
    tokens = random_tokens(6, 4)
    step = partial(train_step, config=MODEL, optimizer=OPTIMIZER, l2wrap=0.0, accumulate=4)
    with pytest.raises(ValueError, match=r"batch of 6 .* accumulate=4"):
        jax.eval_shape(lambda: step(init_train_state(jax.random.key(0), MODEL, OPTIMIZER), tokens, tokens, None))


@pytest.mark.slow
def test_metrics_are_the_loss_and_the_gradient_norm_of_the_whole_batch_before_the_update():
    state, inputs, targets = random_state(), random_tokens(2, 6), random_tokens(2, 6, seed=1)
    step = partial(train_step, config=MODEL, optimizer=OPTIMIZER, l2wrap=0.2, accumulate=2)
    _, metrics = jax.jit(step)(state, inputs, targets, None)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def scan_gradient(params):
        logits, _ = forward(params, MODEL, inputs, backend="scan")
        return language_model_loss(logits, targets, 0.2).total, logits

    gradient, logits = scan_gradient(state.params)
    logits = np.asarray(logits, np.float64)
    entropy = numpy_cross_entropy(logits, targets).mean()
    norm = np.sqrt(sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(gradient)))
    assert float(metrics.loss) == pytest.approx(entropy, rel=1e-5)
    assert float(metrics.total_loss) == pytest.approx(entropy + 0.1 * (logits.max(-1) ** 2).mean(), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)


@pytest.mark.slow
def test_bfloat16_training_learns_a_repeated_batch_and_keeps_float32_parameters():
    config = RWKV4Config(vocab_size=13, num_layers=2, embed_dim=8, dtype="bfloat16")
    state = init_train_state(jax.random.key(0), config, OPTIMIZER)
    tokens = random_tokens(2, 9)
    step = jax.jit(partial(train_step, config=config, optimizer=OPTIMIZER, l2wrap=L2WRAP), donate_argnums=0)
    losses = []
    for _ in range(60):
        state, metrics = step(state, tokens[:, :-1], tokens[:, 1:], None)
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(13), abs=0.2)  # fresh output matrices are zero: close to uniform
    assert losses[-1] < 0.5 * losses[0]
    assert np.isfinite(losses).all()
    assert int(state.step) == 60
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}


def cut(tokens, pieces, width):
    """Streams, one a row, cut into batches of `pieces` tokens, padded to `width` with an id not to count."""
    batches, start = [], 0
    for piece in pieces:
        inputs, targets = (np.full((len(tokens), width), 12, np.int32) for _ in range(2))
        inputs[:, :piece], targets[:, :piece] = (
            tokens[:, start : start + piece],
            tokens[:, start + 1 : start + piece + 1],
        )
        valid = np.broadcast_to(np.arange(width) < piece, inputs.shape)
        batches.append(Batch(inputs, targets, valid))
        start += piece
    return batches


@pytest.mark.parametrize("pieces", [(12, 12), (12, 12, 12, 4), (5, 1, 12)])
def test_evaluation_carries_the_state_and_counts_valid_tokens_only(pieces):
    params = random_state().params
    tokens = random_tokens(2, sum(pieces) + 1)
    cost = evaluate(params, MODEL, cut(tokens, pieces, width=12))
    logits, _ = scan_forward(params, MODEL, tokens[:, :-1])
    assert cost.num_tokens == 2 * sum(pieces)
    assert cost.nats == pytest.approx(numpy_cross_entropy(logits, tokens[:, 1:]).sum(), rel=1e-5)


def test_evaluation_of_rows_of_unequal_length_counts_each_to_its_end():
    params, tokens = random_state().params, random_tokens(2, 9)
    valid = np.arange(8) < np.array([[8], [3]])
    cost = evaluate(params, MODEL, [Batch(tokens[:, :-1], tokens[:, 1:], valid)])
    logits, _ = scan_forward(params, MODEL, tokens[:, :-1])
    assert cost.num_tokens == 11
    assert cost.nats == pytest.approx((numpy_cross_entropy(logits, tokens[:, 1:]) * valid).sum(), rel=1e-5)
