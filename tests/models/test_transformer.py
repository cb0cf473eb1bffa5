"""What only the transformer has: a softmax over a window of keys and values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import transformer as oracle
from small_models import SMALL, forward

import rwkv_jax
from rwkv_jax import finetune, generate
from rwkv_jax import params as p
from rwkv_jax.models import module_of

CONFIG = SMALL["transformer"]
DECLARED = jax.tree.leaves(module_of(CONFIG).declare(CONFIG))
# Model cards of EleutherAI/pythia-*: layers, width, heads, rows of the embedding, all parameters.
PYTHIA = {
    "70m": (6, 512, 8, 50304, 70_426_624),
    "160m": (12, 768, 12, 50304, 162_322_944),
    "410m": (24, 1024, 16, 50304, 405_334_016),
    "1b": (16, 2048, 8, 50304, 1_011_781_632),
    "1.4b": (24, 2048, 16, 50304, 1_414_647_808),
    "2.8b": (32, 2560, 32, 50304, 2_775_208_960),
    "6.9b": (32, 4096, 32, 50432, 6_857_302_016),
    "12b": (36, 5120, 40, 50688, 11_846_072_320),
}


def random_params(config, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    fresh = rwkv_jax.init(jax.random.key(0), config)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), dtype), fresh)


def official(params, config):
    return p.to_official(params, module_of(config).declare(config), config.num_layers)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape), jnp.int32)


def by_oracle(weights, config, tokens):
    names = ("head_dim", "rotary_fraction", "context_length", "parallel_residual")
    return oracle.run(weights, np.asarray(tokens), **{name: getattr(config, name) for name in names})[0]


@pytest.mark.parametrize("name", PYTHIA)
def test_pythia_has_the_published_number_of_parameters(name):
    layers, width, heads, rows, parameters = PYTHIA[name]
    config = rwkv_jax.TransformerConfig(
        vocab_size=rows, num_layers=layers, embed_dim=width, head_dim=width // heads
    )  # fmt: skip
    assert rwkv_jax.count_params(config) == parameters


@pytest.mark.parametrize(("dtype", "parallel"), [("float32", True), ("float64", False)])
def test_logits_equal_the_numpy_oracle_in_float32_and_with_the_residual_in_turns(dtype, parallel, x64):
    config = dataclasses.replace(CONFIG, parallel_residual=parallel)
    params, tokens = random_params(config, dtype), draw((1, 40))
    logits, _ = forward(params, config, tokens)
    assert logits.dtype == dtype
    expected = by_oracle(official(params, config), config, tokens[0])
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4 if dtype == "float32" else 1e-9)


@pytest.mark.slow
def test_gradients_equal_central_differences_of_the_numpy_oracle(x64):
    params, tokens = random_params(CONFIG), draw((1, 30))
    weights, rng = official(params, CONFIG), np.random.default_rng(1)
    signs = np.cos(np.arange(30 * CONFIG.vocab_size)).reshape(30, -1)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(signs * rwkv_jax.forward(params, CONFIG, tokens)[0][0])))(params)
    for key, grad in official(grads, CONFIG).items():
        way = rng.normal(size=grad.shape)
        ahead, behind = (by_oracle(weights | {key: weights[key] + h * way}, CONFIG, tokens[0]) for h in (1e-5, -1e-5))
        slope = np.sum(signs * (ahead - behind)) / 2e-5
        assert abs(np.sum(grad * way) - slope) <= 1e-6 * np.linalg.norm(grad) * np.linalg.norm(way), key


@pytest.mark.slow
def test_gradients_through_the_state_token_by_token_equal_those_of_the_whole(x64):
    params, tokens = random_params(CONFIG), draw((3, 13))
    state = forward(params, CONFIG, draw((3, 20), seed=5))[1]
    reset = jnp.zeros((3, 13), bool).at[1, 4].set(True).at[2, 0].set(True)
    length = jnp.array([13, 9, 11])

    def whole(params, state):
        return rwkv_jax.forward(params, CONFIG, tokens, state, reset, length)

    def token_by_token(params, state):
        def step(state, inputs):
            t, token, reset = inputs
            valid = (t < length).astype(jnp.int32)
            logits, state = forward(params, CONFIG, token[:, None], state, reset[:, None], valid)
            return state, logits[:, 0]

        state, logits = jax.lax.scan(step, state, (jnp.arange(13), tokens.T, reset.T))
        return logits.swapaxes(0, 1), state

    def loss(run, params, state):
        logits, final = run(params, state)
        counts = (jnp.arange(13) < length[:, None])[..., None]
        return jnp.sum(jnp.where(counts, jnp.sin(logits), 0)) + sum(jnp.sum(jnp.sin(x) ** 2) for x in final)

    actual, expected = (
        jax.jit(jax.value_and_grad(lambda params, state, run=run: loss(run, params, state), argnums=(0, 1)))(
            params, state
        )
        for run in (whole, token_by_token)
    )
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-10 * (np.linalg.norm(e) + 1))


def test_a_token_is_seen_as_far_as_the_window_and_no_further(x64):
    config = dataclasses.replace(CONFIG, num_layers=1, context_length=5)
    params, tokens = random_params(config), draw((1, 12))
    run = jax.jit(lambda tokens: rwkv_jax.forward(params, config, tokens)[0][0])
    seen = np.abs(run(tokens) - run(tokens.at[0, 3].add(1) % config.vocab_size)).max(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(seen), np.arange(3, 8))


def test_a_call_without_a_state_attends_to_its_own_tokens_only():
    config = dataclasses.replace(CONFIG, context_length=1000)
    shapes = jax.eval_shape(lambda: rwkv_jax.init(jax.random.key(0), config))
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)

    def jaxpr(state):
        return str(jax.make_jaxpr(lambda *a: rwkv_jax.forward(a[0], config, *a[1:])[0])(shapes, tokens, state))

    assert "1007]" in jaxpr(jax.eval_shape(lambda: rwkv_jax.init_state(config, 2)))
    assert "7,7]" in jaxpr(None) and "1007]" not in jaxpr(None)


@pytest.mark.slow
def test_decoding_with_the_state_gives_the_argmax_of_the_whole_beyond_the_window():
    params, prompt = random_params(CONFIG, jnp.float32), draw((19,))
    logits, state = generate.prefill(params, CONFIG, np.asarray(prompt))
    greedy = generate.Sampling(temperature=0.0)
    tokens, _ = generate.decode(
        params, CONFIG, logits, state, jnp.zeros_like(logits), jax.random.key(0), sampling=greedy, num_tokens=12
    )
    text = jnp.concatenate([prompt[None], tokens], axis=1)
    whole, _ = forward(params, CONFIG, text)
    np.testing.assert_array_equal(tokens[0], jnp.argmax(whole[0, 18:-1], axis=-1))


def test_what_a_foreign_token_spoils_stays_not_a_number_until_a_reset():
    params = random_params(CONFIG, jnp.float32)
    run = jax.jit(lambda tokens, state, reset: rwkv_jax.forward(params, CONFIG, tokens, state, reset))
    none = jnp.zeros((1, 30), bool)
    _, state = run(draw((1, 30)).at[0, 5].set(CONFIG.vocab_size), None, none)
    logits, state = run(draw((1, 30)), state, none)
    assert np.isnan(logits).all() and np.isnan(state.held).all()
    logits, after = run(draw((1, 30)), state, none.at[0, 11].set(True))
    assert np.isnan(logits[0, :11]).all()
    fresh, _ = run(draw((1, 30))[:, 11:], None, none[:, 11:])
    np.testing.assert_allclose(logits[0, 11:], fresh[0], rtol=0, atol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in after)


def test_initialisation_is_that_of_gpt_neox():
    config = rwkv_jax.TransformerConfig(vocab_size=300, num_layers=3, embed_dim=64, head_dim=16)
    weights = official(rwkv_jax.init(jax.random.key(0), config), config)
    small, wang = np.sqrt(2 / (5 * 64)), 2 / (3 * np.sqrt(64))
    for key, tensor in weights.items():
        if tensor.ndim == 2:
            std = wang if key.endswith(("output.weight", "ffn.value.weight")) else small
            # The relative error of a standard deviation of n numbers is 1 / sqrt(2 n).
            assert abs(tensor.std() / std - 1) < 4 / np.sqrt(2 * tensor.size), key
        else:
            np.testing.assert_array_equal(tensor, float(".ln" in f".{key}" and key.endswith("weight")), err_msg=key)


def test_matrices_decay_and_nothing_else():
    assert {param.key for param in DECLARED if param.decays} == {
        param.key for param in DECLARED if len(param.shape) == 2
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 5}, "embed_dim is 12; it must be a multiple of model.head_dim, 5"),
        ({"rotary_fraction": 0.5}, "rotary_fraction is 0.5, 3 of the head's 6 channels"),
        ({"rotary_fraction": 1.5}, "9 of the head's 6"),
        ({"context_length": 0}, "context_length is 0"),
        ({"embed_init": 1e-3}, "embed_init is 0.001; .* leave it out"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("backend", ["scan", "parallel", "pallas_gpu"])
def test_backends_of_the_wkv_operator_are_refused(backend):
    params = rwkv_jax.init(jax.random.key(0), CONFIG)
    with pytest.raises(ValueError, match=f"backend='{backend}': .* a transformer does not have; leave it out"):
        rwkv_jax.forward(params, CONFIG, draw((1, 3)), backend=backend)


def test_its_state_cannot_be_tuned_and_its_matrices_can_be_adapted():
    with pytest.raises(ValueError, match="a transformer has no WKV state to learn; set it to 'lora' or 'all'"):
        finetune.declare(finetune.FinetuneConfig(init_from="base", method="state"), CONFIG)
    adapters = finetune.declare(finetune.FinetuneConfig(init_from="base", method="lora"), CONFIG)
    assert {mix: set(own) for mix, own in adapters.items()} == {
        "att": {"query", "key", "value", "output"}, "ffn": {"key", "value"},
    }  # fmt: skip
