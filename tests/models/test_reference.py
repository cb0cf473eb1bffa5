"""Every version against float64 programs that share no code with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import ORACLES
from small_models import BACKENDS as EACH_BACKEND
from small_models import FAST_PAIRS, SMALL, forward

import rwkv_jax
from rwkv_jax import params as p
from rwkv_jax.models import module_of

BACKENDS = ["scan", "parallel"]
NAMES = [
    "4v0",
    "synthetic-4v0",
    "5v1",
    "synthetic-5v1",
    "5v2",
    "synthetic-5v2",
    "synthetic-6v0",
    "7v0",
    "synthetic-7v0",
]
FLOAT32, FLOAT64 = 1e-4, 1e-9
"""Absolute, on logits and states; a float32 state is held to it relative to its size, where that is above 1."""
KINKED = {("synthetic-6v0", "blocks.1.ffn.key.weight")}
"""Where the file's central difference steps over kinks of relu(k)^2' and is 5e-5 off; a finer one of the oracle takes its place."""


def state_close(state, expected, tolerance):
    for name, leaf in state._asdict().items():
        np.testing.assert_allclose(leaf[:, 0], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def load_reference(shared, name, dtype):
    """(weights by official name, parameters, config, what is expected of them)"""
    from safetensors.numpy import load_file

    kind, version = name.split("-") if "-" in name else ("tiny", name)
    file = shared / f"reference/{kind}-rwkv-{version}.safetensors"
    expected = np.load(shared / f"reference/expected-{name}.npz")
    params, config = rwkv_jax.load(file, dtype=dtype)
    if hasattr(config, "ln_x_eps"):
        config = dataclasses.replace(config, ln_x_eps=float(expected["ln_x_eps"]))
    return load_file(file), params, config, expected


def options(config):
    sizes = ("head_dim", "rotary_fraction", "context_length", "parallel_residual")
    names = sizes if config.architecture == "transformer" else ("ln_x_eps",)
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


@pytest.mark.parametrize(
    ("name", "backend"),
    [pair if pair in FAST_PAIRS else pytest.param(*pair, marks=pytest.mark.slow) for pair in EACH_BACKEND],
)
def test_random_weights_equal_the_numpy_oracle(name, backend, x64):
    config = SMALL[name]
    rng = np.random.default_rng(0)
    fresh = rwkv_jax.init(jax.random.key(0), config)
    params = jax.tree.map(lambda x: jnp.asarray(x + rng.normal(size=x.shape) * 0.5, jnp.float64), fresh)
    weights = p.to_official(params, module_of(config).declare(config), config.num_layers)
    tokens = rng.integers(0, config.vocab_size, 60)
    expected, final = ORACLES[config.architecture](weights, tokens, **options(config))
    logits, state = forward(params, config, jnp.asarray(tokens[None]), backend=backend)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=FLOAT64)
    state_close(state, final, FLOAT64)


@pytest.mark.parametrize("name", NAMES)
def test_the_numpy_oracle_equals_the_reference(name, shared, x64):
    weights, _, config, expected = load_reference(shared, name, np.float64)
    logits, state = ORACLES[config.architecture](weights, expected["tokens"][:200], **options(config))
    np.testing.assert_allclose(logits, expected["logits"][:200], rtol=0, atol=FLOAT64)
    for leaf, value in state.items():
        np.testing.assert_allclose(value, expected[f"state_at_split.{leaf}"], rtol=0, atol=FLOAT64)


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (np.float64, "cut"),
        *(
            pytest.param(dtype, how, marks=pytest.mark.slow)
            for dtype, how in [
                (np.float64, "whole"),
                (np.float64, "token_by_token"),
                (np.float32, "whole"),
                (np.float32, "cut"),
                (np.float32, "token_by_token"),
            ]
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", [name if "synthetic" in name else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_reference_logits_and_states(name, backend, dtype, how, shared, x64):
    _, params, config, expected = load_reference(shared, name, dtype)
    tolerance = FLOAT32 if dtype == np.float32 else FLOAT64
    tokens = expected["tokens"]
    cuts = {"whole": [], "cut": [200], "token_by_token": range(1, len(tokens))}[how]
    state, logits, seen = None, [], 0
    for piece in np.split(tokens, cuts):
        out, state = forward(params, config, piece[None], state, backend=backend)
        logits.append(np.asarray(out[0]))
        seen += len(piece)
        if seen == expected["split"]:
            state_close(state, {k: expected[f"state_at_split.{k}"] for k in state._fields}, tolerance)
    state_close(state, {k: expected[f"final_state.{k}"] for k in state._fields}, tolerance)
    logits = np.concatenate(logits)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=tolerance)
    logprobs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits[:-1])))[np.arange(511), tokens[1:]]
    np.testing.assert_allclose(logprobs, expected["token_logprobs"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in NAMES if "synthetic" not in name])
def test_published_logits_of_another_program(name, shared):
    _, params, config, expected = load_reference(shared, name, np.float32)
    prompt = expected["tokens"][None, : int(expected["prompt_len"])]
    logits, _ = forward(params, config, prompt)
    np.testing.assert_allclose(logits[0, -1], expected["rwkvcpp_prompt_logits"], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_parameter_equal_autograd_of_transformers(backend, shared, x64):
    expected = np.load(shared / "reference/gradients-synthetic-4v0.npz")
    _, params, config, _ = load_reference(shared, "synthetic-4v0", np.float64)
    tokens = jnp.asarray(expected["tokens"])

    def loss(params):
        return mean_cost(forward(params, config, tokens[:, :-1], backend=backend)[0], tokens[:, 1:])

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-6)
    official = p.to_official(grads, module_of(config).declare(config), config.num_layers)
    assert {f"grad.{key}" for key in official} == {key for key in expected.files if key.startswith("grad.")}
    for key, grad in official.items():
        exact = expected[f"grad.{key}"]
        assert np.linalg.norm(grad - exact) <= 1e-5 * np.linalg.norm(exact), key


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in NAMES if "synthetic" in name and name != "synthetic-5v1"])
def test_directional_derivatives_through_both_ends_of_the_state(name, backend, shared, x64):
    expected = np.load(shared / f"reference/directional-{name}.npz")
    _, params, config, states = load_reference(shared, name, np.float64)
    tokens = jnp.asarray(expected["tokens"])[None]
    state_type = type(rwkv_jax.init_state(config, 1))
    initial = state_type(*(jnp.asarray(states[f"state_at_split.{k}"])[:, None] for k in state_type._fields))
    wave = lambda x: jnp.sin(1 + 0.37 * jnp.arange(x.size)).reshape(x.shape)

    def loss(params, state):
        logits, final = forward(params, config, tokens[:, :-1], state, backend=backend)
        return mean_cost(logits, tokens[:, 1:]) + 0.01 * sum(jnp.sum(wave(x) * x) for x in final)

    value, (grads, gstate) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, initial)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-12)
    official = p.to_official(grads, module_of(config).declare(config), config.num_layers)
    actual = {f"d.params.{k}": v for k, v in official.items()}
    actual |= {f"d.state.{k}": v for k, v in gstate._asdict().items()}
    assert actual.keys() == {key for key in expected.files if key.startswith("d.")}
    expected = dict(expected)
    for key in [key for reference, key in KINKED if reference == name]:
        expected[f"d.params.{key}"] = finer_difference(shared, name, key, expected["tokens"])
    for key, grad in actual.items():
        np.testing.assert_allclose(jnp.sum(wave(grad) * grad), expected[key], rtol=1e-5, err_msg=key)


def finer_difference(shared, name, key, tokens, step=1e-6):
    """The oracle's central difference of the directional files' loss along one tensor (their step is about 3e-5)."""
    weights, _, config, states = load_reference(shared, name, np.float64)
    wave = lambda x: np.sin(1 + 0.37 * np.arange(x.size)).reshape(x.shape)
    initial = {k.removeprefix("state_at_split."): states[k] for k in states.files if k.startswith("state_at_split.")}

    def loss(step):
        moved = {k: v.astype(np.float64) + step * wave(v) * (k == key) for k, v in weights.items()}
        logits, final = ORACLES[config.architecture](moved, tokens[:-1], initial, **options(config))
        cost = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), tokens[1:]]
        return cost.mean() + 0.01 * sum(np.sum(wave(x) * x) for x in final.values())

    return (loss(step) - loss(-step)) / (2 * step)


def mean_cost(logits, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()
