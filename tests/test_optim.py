"""Schedules and updates against their formulas in numpy, float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import RWKV4Config
from rwkv_jax.models import rwkv4
from rwkv_jax.optim import OptimConfig, learning_rate, make_optimizer

MODEL = RWKV4Config(vocab_size=11, num_layers=2, embed_dim=6)
STRUCTURE = jax.tree.structure(rwkv4.declare(MODEL))
NUM_STEPS = 200


def rate(config, step, num_steps=NUM_STEPS):
    """The learning rate by the definition in rwkv.md, one branch a schedule."""
    if step <= config.constant_steps:
        value = config.lr
    else:
        progress = (step - config.constant_steps) / (num_steps - config.constant_steps)
        if config.schedule == "cosine":
            value = config.lr_final + (config.lr - config.lr_final) * (1 + math.cos(math.pi * progress)) / 2
        elif config.schedule == "exponential" and config.lr_final > 0:
            value = math.exp((1 - progress) * math.log(config.lr) + progress * math.log(config.lr_final))
        else:
            value = (1 - progress) * config.lr + progress * config.lr_final
    if step < config.warmup_steps:
        value *= config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
    return value


def rates(config, steps):
    """The library's learning rates at some steps."""
    return np.asarray(jax.vmap(learning_rate(config, NUM_STEPS))(jnp.asarray(steps)))


@pytest.mark.parametrize("schedule", ["exponential", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"constant_steps": 80},
        {"lr_final": 0.0, "constant_steps": 80},
        {"warmup_steps": 50},
        {"warmup_steps": 50, "constant_steps": 20, "warmup_start": 0.01},
    ],
    ids=["plain", "constant_phase", "final_zero", "warmup", "warmup_past_the_constant_phase"],
)
def test_learning_rate_is_the_published_function_of_the_step(schedule, changes):
    config = OptimConfig(lr=6e-4, **{"lr_final": 1e-5, "schedule": schedule, **changes})
    steps = np.array([0, 1, 10, 20, 21, 49, 50, 79, 80, 81, 140, 199, 200])
    # atol: what is left of the float32 rounding of lr where lr_final is 0.
    np.testing.assert_allclose(rates(config, steps), [rate(config, s) for s in steps], rtol=2e-6, atol=1e-10)


def test_exponential_schedule_hits_its_three_published_points():
    config = OptimConfig(lr=4e-4, lr_final=1e-6, constant_steps=100)
    geometric_mean = math.sqrt(4e-4 * 1e-6)
    np.testing.assert_allclose(rates(config, [100, 150, 200]), [4e-4, geometric_mean, 1e-6], rtol=2e-6)


def test_exponential_schedule_to_zero_is_a_line():
    config = OptimConfig(lr=1e-3, lr_final=0.0)
    np.testing.assert_allclose(rates(config, [0, 50, 100, 200]), [1e-3, 7.5e-4, 5e-4, 0.0], rtol=2e-6)


def test_warmup_starts_at_its_first_factor_and_ends_at_one():
    config = OptimConfig(lr=1e-3, lr_final=1e-3, warmup_steps=10)
    np.testing.assert_allclose(rates(config, [0, 5, 10, 100]), [2e-4, 6e-4, 1e-3, 1e-3], rtol=2e-6)


def test_learning_rate_stays_at_its_end_beyond_the_last_step():
    config = OptimConfig(lr=1e-3, lr_final=1e-5)
    np.testing.assert_allclose(rates(config, [200, 201, 600]), 1e-5, rtol=2e-6)


@pytest.mark.parametrize("constant_steps", [NUM_STEPS, NUM_STEPS + 1])
def test_a_constant_phase_without_an_end_is_refused(constant_steps):
    with pytest.raises(ValueError, match=f"optim.constant_steps is {constant_steps}.*{NUM_STEPS}"):
        learning_rate(OptimConfig(constant_steps=constant_steps), NUM_STEPS)


def by_name(tree):
    """Leaves of a parameter-shaped tree by official name without the layer."""
    names = [param.key.removeprefix("blocks.{layer}.") for param in jax.tree.leaves(rwkv4.declare(MODEL))]
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def is_matrix(name):
    """Whether an official name is that of a matrix: those of layer norms end in .weight too."""
    return name.endswith(".weight") and "ln" not in name


def random_params(seed, scale):
    rng = np.random.default_rng(seed)
    declared = jax.tree.leaves(rwkv4.declare(MODEL))
    arrays = [rng.normal(size=param.stacked_shape(MODEL.num_layers)) for param in declared]
    return jax.tree.map(lambda x: jnp.asarray(scale * x, jnp.float32), jax.tree.unflatten(STRUCTURE, arrays))


def adam(params, gradients, config, num_steps):
    """Adam or AdamW after clipping, in float64, over dicts of arrays; rates and groups as upstream's."""
    params = {name: np.asarray(x, np.float64) for name, x in params.items()}
    mean = {name: np.zeros_like(x) for name, x in params.items()}
    square = {name: np.zeros_like(x) for name, x in params.items()}
    for step, gradient in enumerate(gradients):
        gradient = {name: np.asarray(x, np.float64) for name, x in gradient.items()}
        norm = math.sqrt(sum(float((x * x).sum()) for x in gradient.values()))
        clip = min(1.0, config.clip_norm / norm)
        decay = config.weight_decay
        if config.weight_decay_final is not None:
            decay *= (config.weight_decay_final / config.weight_decay) ** (step / num_steps)
        for name, x in params.items():
            g = clip * gradient[name]
            mean[name] = config.b1 * mean[name] + (1 - config.b1) * g
            square[name] = config.b2 * square[name] + (1 - config.b2) * g * g
            update = (mean[name] / (1 - config.b1 ** (step + 1))) / (
                np.sqrt(square[name] / (1 - config.b2 ** (step + 1))) + config.eps
            )
            multiple = {"att.time_decay": 2.0, "att.time_first": 3.0}.get(name, 1.0) if config.lr_multiples else 1.0
            update = update + decay * x if is_matrix(name) else update
            params[name] = x - rate(config, step, num_steps) * multiple * update
    return params


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 0.01},
        {"clip_norm": 1e6},
        {"lr_multiples": False},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "weight_decay_final": 0.001},
        {"b1": 0.8, "b2": 0.95, "eps": 1e-3},
        {"schedule": "cosine", "warmup_steps": 3, "constant_steps": 1},
    ],
    ids=[
        "defaults",
        "clips_hard",
        "never_clips",
        "no_multiples",
        "decays",
        "decay_falls",
        "other_adam",
        "schedule",
    ],
)
def test_updates_are_those_of_numpy_adam_with_clip_groups_and_decay(changes):
    config = OptimConfig(lr=3e-2, lr_final=1e-3, **changes)
    params = start = random_params(0, 1.0)
    # The first gradient is clipped at the default norm of 1, the others are not.
    gradients = [random_params(seed, scale) for seed, scale in ((1, 0.3), (2, 0.01), (3, 0.02), (4, 0.02))]
    optimizer = make_optimizer(config, rwkv4.declare(MODEL), num_steps=8)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    expected = adam(by_name(start), [by_name(gradient) for gradient in gradients], config, num_steps=8)
    for name, actual in by_name(params).items():
        moved = np.abs(expected[name] - np.asarray(by_name(start)[name], np.float64)).max()
        np.testing.assert_allclose(actual, expected[name], atol=1e-5 * moved + 1e-6, rtol=0, err_msg=name)


@pytest.mark.slow
def test_time_decay_moves_twice_and_time_first_three_times_as_far():
    config = OptimConfig(lr=1e-3)
    params, gradient = random_params(0, 1.0), jax.tree.map(jnp.ones_like, random_params(0, 1.0))
    optimizer = make_optimizer(config, rwkv4.declare(MODEL), NUM_STEPS)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    # All gradients being equal, Adam's first step is lr for everyone, times the group's multiple.
    moved = {name: float(np.abs(x).mean()) / 1e-3 for name, x in by_name(updates).items()}
    expected = {name: {"att.time_decay": 2.0, "att.time_first": 3.0}.get(name, 1.0) for name in moved}
    assert moved == pytest.approx(expected, rel=1e-4)


def test_weight_decay_shrinks_matrices_and_nothing_else():
    config = OptimConfig(lr=1e-2, weight_decay=0.5)
    params = random_params(0, 1.0)
    optimizer = make_optimizer(config, rwkv4.declare(MODEL), NUM_STEPS)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for name, update in by_name(updates).items():
        expected = -0.005 * np.asarray(by_name(params)[name]) if is_matrix(name) else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0), ("lr", -1e-3), ("lr_final", -1e-9), ("constant_steps", -1), ("warmup_steps", -1),
        ("warmup_start", 0.0), ("warmup_start", 1.1), ("b1", 1.0), ("b1", -0.1), ("b2", 1.0), ("eps", 0.0),
        ("weight_decay", -0.1), ("clip_norm", 0.0), ("l2wrap", -1.0), ("accumulate", 0), ("lr", math.nan),
        ("weight_decay_final", 0.01),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"optim\.{name} is {value}"):
        dataclasses.replace(OptimConfig(), **{name: value})
