"""Initialisation of RWKV-5 and RWKV-6 against the formulas of their code, written here in numpy, and their official keys."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax import RWKV5Config, RWKV6Config
from rwkv_jax import params as p
from rwkv_jax.models import config_of, module_of

SIZE = {"vocab_size": 40, "num_layers": 3, "embed_dim": 12, "head_dim": 4}
CONFIGS = {
    "5.0": RWKV5Config(**SIZE, variant="5.0"),
    "5.1": RWKV5Config(**SIZE, variant="5.1"),
    "5.1_raw": RWKV5Config(**SIZE, variant="5.1", raw_bonus=True),
    "5.2": RWKV5Config(**SIZE),
    "6": RWKV6Config(**SIZE, mix_rank=3, decay_rank=5),
    "5.2_one_layer": RWKV5Config(vocab_size=5, num_layers=1, embed_dim=8, head_dim=8),
    "6_one_layer": RWKV6Config(vocab_size=5, num_layers=1, embed_dim=8, head_dim=8, ffn_dim=9),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@cache
def official(config, seed=0):
    """Fresh parameters by their official keys."""
    params = rwkv_jax.init(jax.random.key(seed), config)
    return p.to_official(params, module_of(config).declare(config), config.num_layers)


def declared(config):
    """The declarations by their official name without the layer."""
    declaration = jax.tree.leaves(module_of(config).declare(config))
    return {param.key.removeprefix("blocks.{layer}."): param for param in declaration}


def vectors(config, layer):
    """The vectors of one layer by their formulas, in float64; a single layer counts as the first of many."""
    width, heads = config.embed_dim, config.embed_dim // config.head_dim
    i, h = np.arange(width, dtype=np.float64), np.arange(heads, dtype=np.float64)
    up = layer / (config.num_layers - 1) if config.num_layers > 1 else 0.0
    down = 1 - layer / config.num_layers
    mixes = {
        "k": (i / width) ** down,
        "v": (i / width) ** down + 0.3 * up,
        "r": (i / width) ** (0.5 * down),
        "g": (i / width) ** (0.5 * down),
    }
    vectors = {"att.ln_x.weight": np.full(width, ((1 + layer) / config.num_layers) ** 0.7)}
    per_channel = {
        "att.time_decay": -6 + 5 * (i / (width - 1)) ** (0.7 + 1.3 * up),
        "att.time_faaaa": up * (1 - i / (width - 1)) + 0.1 * ((i + 1) % 3 - 1),
    }
    if config.architecture == "rwkv6":
        vectors |= {f"att.time_maa_{name}": 1 - mix for name, mix in mixes.items()}
        vectors |= {f"att.time_maa_{name}": 1 - mixes["k"] for name in "xw"}
        vectors |= {f"ffn.time_maa_{name}": 1 - (i / width) ** (down**3) for name in "kr"}
        return vectors | per_channel
    vectors |= {f"ffn.time_mix_{name}": mixes["k"] for name in "kr"}
    vectors |= {f"att.time_mix_{name}": mix for name, mix in mixes.items() if name != "g" or config.variant != "5.0"}
    if config.variant == "5.2":
        return vectors | per_channel
    bonus = {"att.time_faaaa": np.full(heads, 0.05)} if config.raw_bonus else {"att.time_first": np.full(heads, -3.0)}
    return vectors | {"att.time_decay": -8 + 7 * (h / (heads - 1)) ** (0.7 + 1.3 * up)} | bonus


def official_shapes(config):
    """Every key of an official checkpoint and its shape, torch's Linear being [out, in]."""
    width, hidden, heads = config.embed_dim, config.hidden_dim, config.embed_dim // config.head_dim
    shapes = {"emb.weight": (config.vocab_size, width), "head.weight": (config.vocab_size, width)}
    norms = {f"{norm}.{part}": (width,) for norm in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")}
    square = {f"att.{name}.weight": (width, width) for name in ("key", "value", "receptance", "output", "gate")}
    ffn = {"key": (hidden, width), "receptance": (width, width), "value": (width, hidden)}
    block = norms | square | {f"ffn.{name}.weight": shape for name, shape in ffn.items()}
    if config.architecture == "rwkv6":
        block |= {f"att.time_maa_{name}": (1, 1, width) for name in "xwkvrg"}
        block |= {f"ffn.time_maa_{name}": (1, 1, width) for name in "kr"}
        block |= {
            "att.time_maa_w1": (width, 5 * config.mix_rank), "att.time_maa_w2": (5, config.mix_rank, width),
            "att.time_decay_w1": (width, config.decay_rank), "att.time_decay_w2": (config.decay_rank, width),
            "att.time_decay": (1, 1, width), "att.time_faaaa": (heads, config.head_dim),
        }  # fmt: skip
    else:
        block |= {f"att.time_mix_{name}": (1, 1, width) for name in "kvrg"}
        block |= {f"ffn.time_mix_{name}": (1, 1, width) for name in "kr"}
        rates = (heads, config.head_dim) if config.variant == "5.2" else (heads,)
        raw = config.raw_bonus or config.variant == "5.2"
        block |= {"att.time_decay": rates, "att.time_faaaa" if raw else "att.time_first": rates}
        if config.variant == "5.0":
            del block["att.gate.weight"], block["att.time_mix_g"]
    for norm in ("blocks.0.ln0", "ln_out"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return shapes | {f"blocks.{i}.{name}": s for i in range(config.num_layers) for name, s in block.items()}


def assert_scaled_orthogonal(matrix, gain):
    """Rows or columns, whichever are fewer, are orthogonal and as long as the gain."""
    matrix = np.asarray(matrix, np.float64)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=1e-5 * gain**2)


def test_vectors_follow_the_published_formulas_in_every_layer(config):
    tensors = official(config)
    for layer in range(config.num_layers):
        for name, expected in vectors(config, layer).items():
            actual = tensors[f"blocks.{layer}.{name}"].reshape(-1)
            np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6, err_msg=f"layer {layer}: {name}")


def test_matrices_are_orthogonal_with_the_published_gains(config):
    tensors, width = official(config), config.embed_dim
    assert_scaled_orthogonal(tensors["head.weight"], 0.5 * max(1, config.vocab_size / width) ** 0.5)
    gains = {"att.receptance": 1.0, "att.value": 1.0, "ffn.key": 1.0, "att.key": 0.1, "att.gate": 0.1}
    for layer in range(config.num_layers):
        for name, gain in gains.items():
            key = f"blocks.{layer}.{name}.weight"
            assert key in tensors or name == "att.gate"
            if key in tensors:
                assert_scaled_orthogonal(tensors[key], gain)


def test_the_other_matrices_and_offsets_start_at_zero(config):
    tensors = official(config)
    zero = r"(att\.output|ffn\.(value|receptance))\.weight$|ln\w+\.bias$|att\.time_(maa|decay)_w1$"
    assert {key for key in tensors if np.all(tensors[key] == 0)} == {key for key in tensors if re.search(zero, key)}


@pytest.mark.parametrize("name", ["time_maa_w2", "time_decay_w2"])
def test_the_second_low_rank_matrices_are_uniform_within_a_hundredth(name):
    values = official(RWKV6Config(vocab_size=3, num_layers=1, embed_dim=64, ffn_dim=8))[f"blocks.0.att.{name}"]
    assert np.abs(values).max() <= 0.01
    # Kolmogorov-Smirnov distance from the uniform distribution: above 1.95 / sqrt(n) once in a thousand.
    ordered = np.sort(values.reshape(-1)) / 0.01
    distance = np.abs((ordered + 1) / 2 - (np.arange(ordered.size) + 0.5) / ordered.size).max()
    assert distance < 1.95 / np.sqrt(ordered.size)


def test_official_keys_and_shapes_are_those_of_the_released_checkpoints(config):
    assert {key: tensor.shape for key, tensor in official(config).items()} == official_shapes(config)


def test_the_config_is_read_off_the_official_shapes(config):
    assert config_of(official_shapes(config)) == config


@pytest.mark.parametrize(
    ("config", "hidden"),
    [
        (RWKV5Config(embed_dim=768, variant="5.0"), 3072),
        (RWKV5Config(embed_dim=768, variant="5.1"), 3072),
        (RWKV5Config(embed_dim=768), 2688),
        (RWKV5Config(embed_dim=2560), 8960),
        (RWKV6Config(embed_dim=2048), 7168),
        (RWKV6Config(embed_dim=320), 1120),
        (RWKV6Config(embed_dim=192), 672),
        (RWKV6Config(embed_dim=8, head_dim=4), 32),
        (RWKV6Config(embed_dim=64, ffn_dim=7), 7),
    ],
)
def test_the_channel_mix_is_four_times_or_three_and_a_half_times_as_wide(config, hidden):
    assert config.hidden_dim == hidden


def test_only_time_decay_has_a_learning_rate_multiple(config):
    multiples = {name: param.lr_multiple for name, param in declared(config).items() if param.lr_multiple != 1}
    assert multiples == {"att.time_decay": 2.0}


def test_weight_decay_applies_to_projections_embedding_and_head_only(config):
    decaying = {name for name, param in declared(config).items() if param.decays}
    matrices = r"(emb|head|att\.(key|value|receptance|output|gate)|ffn\.(key|value|receptance))\.weight$"
    assert decaying == {name for name in declared(config) if re.match(matrices, name)}


@pytest.mark.slow
def test_one_layer_and_one_channel_divide_by_nothing():
    size = {"vocab_size": 3, "num_layers": 1, "embed_dim": 1, "head_dim": 1}
    for config in (RWKV5Config(**size), RWKV5Config(**size, variant="5.0"), RWKV6Config(**size)):
        params = rwkv_jax.init(jax.random.key(0), config)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_count_params_counts_the_scalars_of_init(config):
    assert rwkv_jax.count_params(config) == sum(tensor.size for tensor in official(config).values())


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (RWKV5Config, {"head_dim": 5}, "model.head_dim is 5; it must divide embed_dim, which is 12"),
        (RWKV6Config, {"head_dim": 0}, "model.head_dim is 0"),
        (RWKV5Config, {"ln_x_eps": 0.0}, "model.ln_x_eps is 0.0; it must be positive"),
        (RWKV6Config, {"mix_rank": 0}, "model.mix_rank is 0; it must be at least 1"),
        (RWKV6Config, {"decay_rank": -1}, "model.decay_rank is -1; it must be at least 1"),
    ],
)
def test_configs_out_of_range_are_refused_with_value_and_rule(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"embed_dim": 12, "head_dim": 4, **change})


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("5.2", "time_decay", (1, 1, 12)),
        ("6", "time_faaaa", (12,)),
        ("6", "time_maa_w2", (15, 12)),
        ("6", "time_decay_w1", None),
    ],
)
def test_shapes_that_no_config_has_are_refused_by_name(name, key, shape):
    shapes = official_shapes(CONFIGS[name])
    shapes[f"blocks.0.att.{key}"] = shape
    if shape is None:
        del shapes[f"blocks.0.att.{key}"]
    with pytest.raises(ValueError, match=rf"blocks\.0\.att\.{key} is {re.escape(str(shape or 'missing'))}"):
        config_of(shapes)
