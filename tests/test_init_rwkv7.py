"""Initialisation of RWKV-7 against the formulas of RWKV-v7's training code, written here in numpy."""

import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import rwkv_jax
from rwkv_jax import RWKV7Config
from rwkv_jax import params as p
from rwkv_jax.models import rwkv7
from rwkv_jax.models.rwkv7 import released_ranks

RANKS = {"decay_rank": 3, "iclr_rank": 5, "value_rank": 2, "gate_rank": 7}
SMALL = RWKV7Config(vocab_size=40, num_layers=3, embed_dim=12, head_dim=4, **RANKS)
ONE_LAYER = RWKV7Config(vocab_size=5, num_layers=1, embed_dim=8, head_dim=8)
TWO_LAYERS = RWKV7Config(vocab_size=20, num_layers=2, embed_dim=8, head_dim=2, ffn_dim=24)
CONFIGS = {"three_layers": SMALL, "one_layer": ONE_LAYER, "two_layers": TWO_LAYERS}


def vectors(layer, num_layers, width, size):
    """The vectors of one layer by their formulas, one channel after the other; a single layer counts as the first of many."""
    up = layer / (num_layers - 1) if num_layers > 1 else 0.0
    down = 1 - layer / num_layers
    rows = []
    for i in range(width):
        line = i / (width - 1) - 0.5
        z = (i % size - (size - 1) / 2) / ((size - 1) / 2)
        mix = lambda power, i=i: 1 - (i / width) ** power
        rows.append(
            {
                "att.x_r": mix(0.2 * down), "att.x_w": mix(0.9 * down), "att.x_k": mix(0.7 * down), "att.x_v": mix(0.7 * down),
                "att.x_a": mix(0.9 * down), "att.x_g": mix(0.2 * down), "ffn.x_k": mix(down**4),
                "att.w0": -6 + 6 * (i / (width - 1)) ** (1 + up**0.3) + 0.5 + 2.5 * z * abs(z),
                "att.a0": -0.19 + 0.3 * z * abs(z) + 0.4 * line, "att.v0": 0.73 - 0.4 * line, "att.k_k": 0.71 - 0.1 * line,
                "att.k_a": 1.02, "att.r_k": -0.04, "att.ln_x.weight": ((1 + layer) / num_layers) ** 0.7, "att.ln_x.bias": 0.0,
            }
        )  # fmt: skip
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def official_shapes(vocab_size, num_layers, width, size, hidden, ranks):
    """Every key of an RWKV-7 .pth and its shape, torch's Linear being [out, in]."""
    shapes = {"emb.weight": (vocab_size, width), "head.weight": (vocab_size, width)}
    for norm in ("blocks.0.ln0", "ln_out"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for layer in range(num_layers):
        block = {f"{norm}.{part}": (width,) for norm in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")}
        names = [f"att.x_{z}" for z in "rwkvag"] + ["att.w0", "att.a0", "att.k_k", "att.k_a", "ffn.x_k"]
        block |= dict.fromkeys(names + ["att.v0"] * (layer > 0), (1, 1, width))
        for name, rank in zip("wavg", ranks, strict=True):
            if name != "v" or layer > 0:
                block |= {f"att.{name}1": (width, rank), f"att.{name}2": (rank, width)}
        block["att.r_k"] = (width // size, size)
        block |= {f"att.{name}.weight": (width, width) for name in ("key", "value", "receptance", "output")}
        block |= {"ffn.key.weight": (hidden, width), "ffn.value.weight": (width, hidden)}
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


@cache
def official(config, seed=0):
    """Fresh parameters by their official keys."""
    params = rwkv_jax.init(jax.random.key(seed), config)
    return p.to_official(params, rwkv7.declare(config), config.num_layers)


def assert_scaled_orthogonal(matrix, gain):
    """Rows or columns, whichever are fewer, are orthogonal and as long as the gain."""
    matrix = np.asarray(matrix, np.float64)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=1e-5 * gain**2)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_vectors_follow_the_published_formulas_in_every_layer(config):
    tensors = official(config)
    for layer in range(config.num_layers):
        for name, expected in vectors(layer, config.num_layers, config.embed_dim, config.head_dim).items():
            key = f"blocks.{layer}.{name}"
            if (layer, name) == (0, "att.v0"):
                assert key not in tensors
                continue
            np.testing.assert_allclose(tensors[key].reshape(-1), expected, rtol=2e-6, atol=2e-6, err_msg=key)


def test_one_layer_and_one_channel_divide_by_nothing():
    config = RWKV7Config(vocab_size=3, num_layers=1, embed_dim=1, head_dim=1)
    params = rwkv_jax.init(jax.random.key(0), config)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_matrices_are_orthogonal_or_zero(config):
    tensors, ranks = official(config), config.ranks
    for layer in range(config.num_layers):
        block = {k.removeprefix(f"blocks.{layer}."): v for k, v in tensors.items() if k.startswith(f"blocks.{layer}.")}
        gains = {"att.receptance": 1.0, "att.value": 1.0, "att.key": 0.1, "ffn.key": 1.0}
        for name, gain in gains.items():
            assert_scaled_orthogonal(block[f"{name}.weight"], gain)
        for name, rank in zip("wavg", ranks, strict=True):
            if name == "v" and layer == 0:
                continue
            assert not np.any(block[f"att.{name}1"])
            assert_scaled_orthogonal(block[f"att.{name}2"], 0.1 * math.sqrt(max(1, rank / config.embed_dim)))
        assert not np.any(block["att.output.weight"]) and not np.any(block["ffn.value.weight"])
    gain = 0.5 * math.sqrt(max(1, config.vocab_size / config.embed_dim))
    assert_scaled_orthogonal(tensors["head.weight"], gain)
    assert 0.9e-4 < np.abs(tensors["emb.weight"]).max() <= 1e-4


def test_official_keys_and_shapes_are_upstreams_and_layer_0_has_no_value_residual():
    shapes = {key: tensor.shape for key, tensor in official(SMALL).items()}
    assert shapes == official_shapes(40, 3, 12, 4, 48, (3, 5, 2, 7))


def test_only_w0_has_a_learning_rate_multiple():
    multiples = {
        param.key: param.lr_multiple for param in jax.tree.leaves(rwkv7.declare(SMALL)) if param.lr_multiple != 1
    }
    assert multiples == {"blocks.{layer}.att.w0": 2.0}


def test_weight_decay_applies_to_the_projections_the_embedding_and_the_head_and_to_nothing_else():
    matrices = {key for key, x in official(SMALL).items() if key.endswith(".weight") and x.ndim == 2}
    declared = jax.tree.leaves(rwkv7.declare(SMALL))
    assert {key for param in declared if param.decays for key in param.keys(SMALL.num_layers)} == matrices
    assert len(matrices) == 2 + 6 * SMALL.num_layers


@pytest.mark.parametrize(
    ("embed_dim", "ranks"),
    [
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 32, 160)),
        (2048, (96, 96, 64, 256)),
        (2560, (96, 96, 64, 320)),
        (12, (32,) * 4),
    ],
)
def test_low_rank_widths_are_those_of_released_models_unless_given(embed_dim, ranks):
    assert released_ranks(embed_dim) == ranks
    assert RWKV7Config(embed_dim=embed_dim, head_dim=4).ranks == ranks
    assert RWKV7Config(embed_dim=embed_dim, head_dim=4, gate_rank=9).ranks == (*ranks[:3], 9)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_config_is_read_from_the_shapes(config):
    shapes = {key: tensor.shape for key, tensor in official(config).items()}
    found = rwkv7.config_of(shapes)
    assert (found.embed_dim, found.num_layers, found.head_dim) == (config.embed_dim, config.num_layers, config.head_dim)
    assert (found.ranks, found.hidden_dim) == (config.ranks, config.hidden_dim)
    assert not p.official_problems(shapes, rwkv7.declare(found), found.num_layers)


def test_a_checkpoint_may_hold_layer_0s_value_residual_which_is_not_used(tmp_path):
    tensors = official(SMALL)
    extra = {
        key.replace("blocks.1", "blocks.0"): tensors[key]
        for key in tensors
        if re.search(r"blocks\.1\.att\.v[012]$", key)
    }
    assert len(extra) == 3
    declaration, logits = rwkv7.declare(SMALL), []
    for held in (tensors, tensors | extra):
        assert not p.official_problems({key: tensor.shape for key, tensor in held.items()}, declaration, 3)
        save_file(held, tmp_path / "model.safetensors")
        params, config = rwkv_jax.load(tmp_path / "model.safetensors")
        logits.append(rwkv_jax.forward(params, config, jnp.array([[1, 2, 3]]))[0])
    np.testing.assert_array_equal(*logits)
    shapes = {key: tensor.shape for key, tensor in tensors.items() if key != "blocks.1.att.v1"}
    shapes["blocks.0.att.v1"] = (12, 3)
    problems = p.official_problems(shapes, declaration, 3)
    assert problems == ["missing: blocks.1.att.v1 (12, 2)", "shape: blocks.0.att.v1 is (12, 3), expected (12, 2)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 5}, "embed_dim is 12; it must be a multiple of model.head_dim, 5"),
        ({"head_dim": 0}, "head_dim is 0; it must be at least 1"),
        ({"gate_rank": 0}, "gate_rank is 0"),
        ({"ln_x_eps": 0.0}, "ln_x_eps is 0.0; it must be positive"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RWKV7Config(**{"embed_dim": 12, "head_dim": 4} | change)


def test_count_params_counts_the_scalars_of_init():
    sizes = [leaf.size for leaf in jax.tree.leaves(rwkv_jax.init(jax.random.key(0), SMALL))]
    assert rwkv_jax.count_params(SMALL) == sum(sizes)
