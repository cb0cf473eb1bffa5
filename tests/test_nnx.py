"""Flax modules: the same parameters and numbers as the pure functions, and trainable with nnx's own optimiser."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_models import FAST, SMALL

import rwkv_jax
from rwkv_jax.loss import language_model_loss
from rwkv_jax.models import module_of
from rwkv_jax.nnx import RWKV, Block, ChannelMix, TimeMix


@pytest.fixture(params=FAST)
def config(request):
    return SMALL[request.param]


@pytest.fixture
def params(config):
    rng = np.random.default_rng(0)
    fresh = rwkv_jax.init(jax.random.key(0), config)
    return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), fresh)


def tokens(config, shape=(2, 7)):
    return jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, shape), jnp.int32)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_leaf_is_one_param_at_the_same_path_both_ways(config, params):
    model = RWKV(config, params)
    _, state = nnx.split(model, nnx.Param)
    own = {tuple(map(str, path)): value[...] for path, value in nnx.to_flat_state(state)}
    expected = {tuple(key.name for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert own.keys() == expected.keys()
    equal(own, expected)
    equal(model.to_params(), params)


def test_a_model_survives_split_and_merge_with_other_values(config, params):
    graph, state = nnx.split(RWKV(config, params))
    doubled = nnx.merge(graph, jax.tree.map(lambda x: 2 * x, state))
    equal(doubled.to_params(), jax.tree.map(lambda x: 2 * x, params))


def test_fresh_parameters_are_those_of_init(config):
    rngs = nnx.Rngs(5)
    expected = rwkv_jax.init(rngs.params(), config)
    equal(RWKV(config, rngs=nnx.Rngs(5)).to_params(), expected)
    with pytest.raises(ValueError, match="either params, or rngs"):
        RWKV(config)


@pytest.mark.slow
def test_a_model_gives_the_numbers_of_forward_and_goes_on_from_its_state(config, params):
    model, ids = RWKV(config, params), tokens(config)
    reset, length = jnp.zeros(ids.shape, bool).at[0, 3].set(True), jnp.array([7, 4])
    state = model.init_state(2)
    for options in [{}, {"reset": reset, "length": length, "backend": "scan"}, {"positions": "last"}]:
        got = nnx.jit(lambda model, state, options=options: model(ids, state, **options))(model, state)
        equal(got, jax.jit(lambda p, s, options=options: rwkv_jax.forward(p, config, ids, s, **options))(params, state))
        state = got[1]


@pytest.mark.parametrize("part", ["att", "ffn", "block"])
def test_the_parts_give_the_numbers_of_the_pure_functions(config, params, part):
    version = module_of(config)
    layer = jax.tree.map(lambda x: x[0], params.blocks)
    state = jax.tree.map(lambda x: x[0], rwkv_jax.init_state(config, 2))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, config.embed_dim)), jnp.float32)
    inputs = (x, version.init_depth(config, x))
    if part == "block":
        equal(Block(config, layer)(inputs, state), version.block(layer, config, inputs, state))
    elif part == "ffn":
        equal(ChannelMix(config, layer.ffn)(x, state), version.channel_mix(layer.ffn, config, x, state))
    else:  # The time mix of a version that hands something from layer to layer takes it and gives it back.
        inputs = inputs if "inputs" in inspect.signature(version.time_mix).parameters else x
        equal(TimeMix(config, layer.att)(inputs, state), version.time_mix(layer.att, config, inputs, state))


@pytest.mark.slow
def test_training_with_nnx_gives_the_parameters_of_training_with_optax(config, params):
    ids, transform = tokens(config), optax.adam(1e-2)
    model = RWKV(config, params)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    def loss(logits):
        return language_model_loss(logits, ids[:, 1:]).total

    @nnx.jit
    def module_step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda model: loss(model(ids[:, :-1])[0]))(model)
        optimizer.update(model, grads)
        return value

    @jax.jit
    def pure_step(params, state):
        grads = jax.grad(lambda p: loss(rwkv_jax.forward(p, config, ids[:, :-1])[0]))(params)
        updates, state = transform.update(grads, state)
        return optax.apply_updates(params, updates), state

    losses = [float(module_step(model, optimizer)) for _ in range(4)]
    opt_state = transform.init(params)
    for _ in range(4):
        params, opt_state = pure_step(params, opt_state)
    assert losses[-1] < losses[0]
    for own, expected in zip(jax.tree.leaves(model.to_params()), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-5 * (float(jnp.linalg.norm(expected)) + 1))
