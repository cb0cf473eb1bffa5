"""RWKV-4 against float64 programs that share no code with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import rwkv4 as oracle

import rwkv_jax
from rwkv_jax import params as p
from rwkv_jax.models import rwkv4

BACKENDS = ["scan", "parallel"]
FLOAT32, FLOAT64 = 1e-4, 1e-9
"""Absolute, on logits and states; a float32 state is held to it relative to its size, where that is above 1."""

forward = jax.jit(rwkv_jax.forward, static_argnames=("config", "backend", "positions"))


def state_close(state, expected, tolerance):
    for name, leaf in state._asdict().items():
        np.testing.assert_allclose(leaf[:, 0], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def pieces(tokens, how):
    cuts = {"whole": [], "cut": [200], "token_by_token": range(1, len(tokens))}[how]
    return np.split(tokens, cuts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_weights_equal_the_numpy_oracle(backend, x64):
    config = rwkv_jax.RWKV4Config(vocab_size=17, num_layers=3, embed_dim=8)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.7), rwkv_jax.init(jax.random.key(0), config)
    )
    weights = p.to_official(params, rwkv4.declare(config), config.num_layers)
    tokens = rng.integers(0, 17, 60)
    expected, final = oracle(weights, tokens)
    logits, state = forward(params, config, jnp.asarray(tokens[None]), backend=backend)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=FLOAT64)
    state_close(state, final, FLOAT64)


@pytest.mark.parametrize("name", ["4v0", "synthetic-4v0"])
def test_the_numpy_oracle_equals_the_reference(name, shared):
    expected = np.load(shared / f"reference/expected-{name}.npz")
    weights, _ = load_reference(shared, name, np.float64)
    logits, state = oracle(weights, expected["tokens"][:200])
    np.testing.assert_allclose(logits, expected["logits"][:200], rtol=0, atol=FLOAT64)
    for leaf, value in state.items():
        np.testing.assert_allclose(value, expected[f"state_at_split.{leaf}"], rtol=0, atol=FLOAT64)


def load_reference(shared, name, dtype):
    from safetensors.numpy import load_file

    file = shared / "reference" / (f"{name}.safetensors" if "rwkv" in name else reference_file(name))
    return load_file(file), rwkv_jax.load(file, dtype=dtype)


def reference_file(name):
    return (
        f"synthetic-rwkv-{name.removeprefix('synthetic-')}.safetensors"
        if "synthetic" in name
        else f"tiny-rwkv-{name}.safetensors"
    )


@pytest.mark.parametrize("how", ["whole", "cut", "token_by_token"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["4v0", "synthetic-4v0"])
def test_reference_logits_and_states(name, backend, dtype, how, shared, x64):
    expected = np.load(shared / f"reference/expected-{name}.npz")
    _, (params, config) = load_reference(shared, name, dtype)
    tolerance = FLOAT32 if dtype == np.float32 else FLOAT64
    state, logits, seen = None, [], 0
    for piece in pieces(expected["tokens"], how):
        out, state = forward(params, config, piece[None], state, backend=backend)
        logits.append(np.asarray(out[0]))
        seen += len(piece)
        if seen == expected["split"]:
            state_close(state, {k: expected[f"state_at_split.{k}"] for k in state._fields}, tolerance)
    state_close(state, {k: expected[f"final_state.{k}"] for k in state._fields}, tolerance)
    logits = np.concatenate(logits)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=tolerance)
    logprobs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits[:-1])))[np.arange(511), expected["tokens"][1:]]
    np.testing.assert_allclose(logprobs, expected["token_logprobs"], rtol=0, atol=tolerance)


def test_published_logits_of_another_program(shared):
    expected = np.load(shared / "reference/expected-4v0.npz")
    _, (params, config) = load_reference(shared, "4v0", np.float32)
    prompt = expected["tokens"][None, : int(expected["prompt_len"])]
    logits, _ = forward(params, config, prompt)
    np.testing.assert_allclose(logits[0, -1], expected["rwkvcpp_prompt_logits"], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_parameter_equal_autograd_of_transformers(backend, shared, x64):
    expected = np.load(shared / "reference/gradients-synthetic-4v0.npz")
    _, (params, config) = load_reference(shared, "synthetic-4v0", np.float64)
    tokens = jnp.asarray(expected["tokens"])

    def loss(params):
        return mean_cost(rwkv_jax.forward(params, config, tokens[:, :-1], backend=backend)[0], tokens[:, 1:])

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-6)
    official = p.to_official(grads, rwkv4.declare(config), config.num_layers)
    assert {f"grad.{key}" for key in official} == {key for key in expected.files if key.startswith("grad.")}
    for key, grad in official.items():
        exact = expected[f"grad.{key}"]
        assert np.linalg.norm(grad - exact) <= 1e-5 * np.linalg.norm(exact), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_directional_derivatives_through_both_ends_of_the_state(backend, shared, x64):
    expected = np.load(shared / "reference/directional-synthetic-4v0.npz")
    states = np.load(shared / "reference/expected-synthetic-4v0.npz")
    _, (params, config) = load_reference(shared, "synthetic-4v0", np.float64)
    tokens = jnp.asarray(expected["tokens"])[None]
    initial = rwkv4.State(*(jnp.asarray(states[f"state_at_split.{k}"])[:, None] for k in rwkv4.State._fields))
    wave = lambda x: jnp.sin(1 + 0.37 * jnp.arange(x.size)).reshape(x.shape)  # noqa: E731

    def loss(params, state):
        logits, final = rwkv_jax.forward(params, config, tokens[:, :-1], state, backend=backend)
        return mean_cost(logits, tokens[:, 1:]) + 0.01 * sum(jnp.sum(wave(x) * x) for x in final)

    value, (grads, gstate) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, initial)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-12)
    official = p.to_official(grads, rwkv4.declare(config), config.num_layers)
    actual = {f"d.params.{k}": v for k, v in official.items()} | {
        f"d.state.{k}": v for k, v in gstate._asdict().items()
    }
    assert actual.keys() == {key for key in expected.files if key.startswith("d.")}
    for key, grad in actual.items():
        np.testing.assert_allclose(jnp.sum(wave(grad) * grad), expected[key], rtol=1e-5, err_msg=key)


def mean_cost(logits, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time_decay", [-8.0, 3.0])
def test_extreme_decays_and_keys_stay_finite(time_decay, backend):
    config = rwkv_jax.RWKV4Config(vocab_size=11, num_layers=1, embed_dim=8)
    params = jax.tree.map(lambda x: x + 0.1, rwkv_jax.init(jax.random.key(0), config))
    att = params.blocks.att
    att = att._replace(
        time_decay=jnp.full_like(att.time_decay, time_decay),
        key=40 * jax.random.normal(jax.random.key(1), att.key.shape),
    )
    params = params._replace(blocks=params.blocks._replace(att=att))
    tokens = jax.random.randint(jax.random.key(2), (2, 300), 0, 11)
    loss = lambda p: mean_cost(rwkv_jax.forward(p, config, tokens, backend=backend)[0], tokens)  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
