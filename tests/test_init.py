"""Initialisation of RWKV-4 against the formulas of RWKV-v4neo's code, written here in numpy."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax import RWKV4Config
from rwkv_jax import params as p
from rwkv_jax.models import rwkv4

SMALL = RWKV4Config(vocab_size=40, num_layers=3, embed_dim=12, embed_init=3e-4)
ONE_LAYER = RWKV4Config(vocab_size=5, num_layers=1, embed_dim=8)
WIDE_FFN = RWKV4Config(vocab_size=20, num_layers=2, embed_dim=8, ffn_dim=24)


def vectors(layer, num_layers, width):
    """The vectors of one layer by their formulas, in float64; a single layer counts as the first of many."""
    i = np.arange(width, dtype=np.float64)
    up = layer / (num_layers - 1) if num_layers > 1 else 0.0
    down = 1 - layer / num_layers
    return {
        "att.time_mix_k": (i / width) ** down,
        "att.time_mix_v": (i / width) ** down + 0.3 * up,
        "att.time_mix_r": (i / width) ** (0.5 * down),
        "att.time_decay": -5 + 8 * (i / (width - 1)) ** (0.7 + 1.3 * up),
        "att.time_first": np.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
        "ffn.time_mix_k": (i / width) ** down,
        "ffn.time_mix_r": (i / width) ** down,
    }


def official_shapes(vocab_size, num_layers, width, hidden):
    """Every key of an RWKV-4 .pth and its shape, torch's Linear being [out, in]."""
    shapes = {"emb.weight": (vocab_size, width), "head.weight": (vocab_size, width)}
    for norm in ("blocks.0.ln0", "ln_out"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for layer in range(num_layers):
        block = {f"{norm}.{part}": (width,) for norm in ("ln1", "ln2") for part in ("weight", "bias")}
        block |= {"att.time_decay": (width,), "att.time_first": (width,)}
        block |= {f"att.time_mix_{name}": (1, 1, width) for name in "kvr"}
        block |= {f"ffn.time_mix_{name}": (1, 1, width) for name in "kr"}
        block |= {f"att.{name}.weight": (width, width) for name in ("key", "value", "receptance", "output")}
        block |= {
            "ffn.key.weight": (hidden, width),
            "ffn.receptance.weight": (width, width),
            "ffn.value.weight": (width, hidden),
        }  # fmt: skip
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


@cache
def official(config, seed=0):
    """Fresh parameters by their official keys."""
    params = rwkv_jax.init(jax.random.key(seed), config)
    return p.to_official(params, rwkv4.declare(config), config.num_layers)


def declared(config):
    """The declarations by their official name without the layer."""
    return {param.key.removeprefix("blocks.{layer}."): param for param in jax.tree.leaves(rwkv4.declare(config))}


def assert_scaled_orthogonal(matrix, gain):
    """Rows or columns, whichever are fewer, are orthogonal and as long as the gain."""
    matrix = np.asarray(matrix, np.float64)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=1e-5 * gain**2)


@pytest.mark.parametrize("config", [SMALL, ONE_LAYER, WIDE_FFN], ids=["three_layers", "one_layer", "two_layers"])
def test_vectors_follow_the_published_formulas_in_every_layer(config):
    tensors = official(config)
    for layer in range(config.num_layers):
        for name, expected in vectors(layer, config.num_layers, config.embed_dim).items():
            actual = tensors[f"blocks.{layer}.{name}"].reshape(-1)
            np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6, err_msg=f"layer {layer}: {name}")


def test_one_layer_and_one_channel_divide_by_nothing():
    params = rwkv_jax.init(jax.random.key(0), RWKV4Config(vocab_size=3, num_layers=1, embed_dim=1))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("bound", [1e-4, 6e-4])
def test_embedding_is_uniform_within_the_bound(bound):
    config = RWKV4Config(vocab_size=400, num_layers=1, embed_dim=50, embed_init=bound)
    table = np.asarray(rwkv_jax.init(jax.random.key(1), config).emb, np.float64) / bound
    assert np.abs(table).max() <= 1
    # Kolmogorov-Smirnov distance from the uniform distribution: above 1.95 / sqrt(n) once in a thousand.
    ordered = np.sort(table.reshape(-1))
    distance = np.abs((ordered + 1) / 2 - (np.arange(ordered.size) + 0.5) / ordered.size).max()
    assert distance < 1.95 / np.sqrt(ordered.size)


@pytest.mark.parametrize(
    ("vocab_size", "embed_dim", "gain"),
    [(48, 12, 0.5 * 2.0), (12, 12, 0.5), (7, 12, 0.5)],
    ids=["vocabulary_above_width", "vocabulary_equal_to_width", "vocabulary_below_width"],
)
def test_head_is_orthogonal_with_gain_by_vocabulary_over_width(vocab_size, embed_dim, gain):
    config = RWKV4Config(vocab_size=vocab_size, num_layers=1, embed_dim=embed_dim)
    assert_scaled_orthogonal(official(config)["head.weight"], gain)


@pytest.mark.parametrize(("ffn_dim", "gain"), [(None, 2.0), (24, np.sqrt(3.0)), (5, 1.0)])
def test_attention_values_and_channel_mix_keys_are_orthogonal(ffn_dim, gain):
    config = RWKV4Config(vocab_size=10, num_layers=2, embed_dim=8, ffn_dim=ffn_dim)
    tensors = official(config)
    for layer in range(2):
        assert_scaled_orthogonal(tensors[f"blocks.{layer}.att.value.weight"], 1.0)
        assert_scaled_orthogonal(tensors[f"blocks.{layer}.ffn.key.weight"], gain)


def test_the_other_matrices_and_layer_norm_offsets_start_at_zero_and_gains_at_one():
    tensors = official(SMALL)
    zero = r"(att\.(key|receptance|output)|ffn\.(value|receptance))\.weight$|ln\w+\.bias$"
    one = r"ln\w+\.weight$"
    assert {key for key in tensors if np.all(tensors[key] == 0)} == {key for key in tensors if re.search(zero, key)}
    assert {key for key in tensors if np.all(tensors[key] == 1)} == {key for key in tensors if re.search(one, key)}


@pytest.mark.parametrize("config", [SMALL, ONE_LAYER, WIDE_FFN], ids=["three_layers", "one_layer", "ffn_of_24"])
def test_official_keys_and_shapes_are_those_of_the_released_checkpoints(config):
    shapes = {key: tensor.shape for key, tensor in official(config).items()}
    assert shapes == official_shapes(config.vocab_size, config.num_layers, config.embed_dim, config.hidden_dim)


def test_official_matrices_are_ours_transposed_and_the_embedding_is_not():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: rwkv_jax.init(jax.random.key(0), SMALL))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    tensors = p.to_official(params, rwkv4.declare(SMALL), SMALL.num_layers)
    np.testing.assert_array_equal(tensors["emb.weight"], params.emb)
    np.testing.assert_array_equal(tensors["head.weight"], params.head.T)
    np.testing.assert_array_equal(tensors["blocks.0.ln0.bias"], params.ln0.bias)
    for layer in range(SMALL.num_layers):
        block = f"blocks.{layer}"
        np.testing.assert_array_equal(tensors[f"{block}.att.output.weight"], params.blocks.att.output[layer].T)
        np.testing.assert_array_equal(tensors[f"{block}.ffn.value.weight"], params.blocks.ffn.value[layer].T)
        np.testing.assert_array_equal(tensors[f"{block}.att.time_mix_r"][0, 0], params.blocks.att.time_mix_r[layer])
        np.testing.assert_array_equal(tensors[f"{block}.ln2.weight"], params.blocks.ln2.weight[layer])


def test_only_time_decay_and_time_first_have_learning_rate_multiples():
    multiples = {name: param.lr_multiple for name, param in declared(SMALL).items() if param.lr_multiple != 1}
    assert multiples == {"att.time_decay": 2.0, "att.time_first": 3.0}


def test_weight_decay_applies_to_every_matrix_and_to_nothing_else():
    tensors = official(SMALL)
    matrices = {key for key, tensor in tensors.items() if np.squeeze(tensor).ndim >= 2}
    decaying = {key for param in declared(SMALL).values() if param.decays for key in param.keys(SMALL.num_layers)}
    assert decaying == matrices


def test_the_same_key_gives_the_same_parameters_and_another_key_others():
    first, again, other = official(SMALL, seed=4), official(SMALL, seed=4), official(SMALL, seed=5)
    drawn = r"(emb|head|att\.value|ffn\.key)\.weight$"
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
        assert np.array_equal(first[key], other[key]) == (re.search(drawn, key) is None), key


def test_layers_and_names_draw_differently():
    # With width 8 and ffn_dim 8 all of these matrices have one shape and would be equal if they shared a key.
    tensors = official(RWKV4Config(vocab_size=8, num_layers=2, embed_dim=8, ffn_dim=8))
    drawn = [tensors[f"blocks.{layer}.{name}.weight"] for layer in range(2) for name in ("att.value", "ffn.key")]
    drawn.append(2 * tensors["head.weight"])
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert np.abs(a - b).max() > 0.1


def test_adding_layers_leaves_the_draws_of_the_earlier_ones():
    shallow = official(SMALL)
    deep = official(RWKV4Config(vocab_size=40, num_layers=5, embed_dim=12, embed_init=3e-4))
    for key in shallow:
        if re.search(r"(emb|head|att\.value|ffn\.key)\.weight$", key):
            np.testing.assert_array_equal(shallow[key], deep[key])


def test_parameters_are_float32_even_with_x64_on(x64):
    params = jax.eval_shape(lambda: rwkv_jax.init(jax.random.key(0), SMALL))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_init_works_under_jit_and_vmap_over_keys():
    keys = jax.random.split(jax.random.key(2), 3)
    jitted = jax.jit(rwkv_jax.init, static_argnums=1)(keys[1], ONE_LAYER)
    stacked = jax.vmap(lambda key: rwkv_jax.init(key, ONE_LAYER))(keys)
    plain = rwkv_jax.init(keys[1], ONE_LAYER)
    for a, b, many in zip(*map(jax.tree.leaves, (plain, jitted, stacked)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(a, many[1], rtol=2e-6, atol=2e-6)
    assert not np.array_equal(stacked.head[0], stacked.head[1])


@pytest.mark.parametrize("config", [SMALL, ONE_LAYER, WIDE_FFN], ids=["three_layers", "one_layer", "ffn_of_24"])
def test_count_params_counts_the_scalars_of_init(config):
    sizes = [tensor.size for tensor in official(config).values()]
    assert rwkv_jax.count_params(config) == sum(sizes)
