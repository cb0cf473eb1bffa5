"""Tuned states: in and out, with the axes that each version's runtime means."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import needs, official, random_params, write_torch
from small_models import RWKV, SMALL

import rwkv_jax

TUNABLE = [name for name in RWKV if name != "rwkv4"]


@pytest.fixture(params=TUNABLE)
def config(request):
    return SMALL[request.param]


def time_states(config):
    """What a file holds: [value, key]."""
    layers, _, *shape = rwkv_jax.init_state(config, 1).wkv.shape
    rng = np.random.default_rng(1)
    return {f"blocks.{i}.att.time_state": rng.normal(size=shape).astype(np.float32) for i in range(layers)}


@pytest.mark.parametrize(
    "write", [write_torch, lambda path, t: safetensors.numpy.save_file(t, path)], ids=["pth", "st"]
)
def test_a_file_becomes_a_state_with_our_axes(write, config, tmp_path):
    tensors = time_states(config)
    write(tmp_path / "s", tensors)
    state = rwkv_jax.load_state(tmp_path / "s", config)
    zero = rwkv_jax.init_state(config, 1)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, zero)
    for layer, tensor in enumerate(tensors.values()):
        wanted = tensor if config.architecture == "rwkv7" else tensor.transpose(0, 2, 1)
        np.testing.assert_array_equal(state.wkv[layer, 0], wanted)
    assert all(not np.any(leaf) for name, leaf in state._asdict().items() if name != "wkv")
    rwkv_jax.forward(random_params(config), config, jnp.zeros((1, 3), jnp.int32), state)


@pytest.mark.parametrize("file", ["s.pth", "s.safetensors"])
def test_a_saved_state_is_loaded_bit_for_bit(file, config, tmp_path):
    if file == "s.pth":
        needs("torch")
    safetensors.numpy.save_file(time_states(config), tmp_path / "original")
    state = rwkv_jax.load_state(tmp_path / "original", config)
    rwkv_jax.save_state(tmp_path / file, state, config)
    np.testing.assert_array_equal(rwkv_jax.load_state(tmp_path / file, config).wkv, state.wkv)


def test_a_model_with_a_state_in_it_gives_both(config, tmp_path):
    params = random_params(config)
    safetensors.numpy.save_file(official(params, config) | time_states(config), tmp_path / "m")
    loaded, _ = rwkv_jax.load(tmp_path / "m")
    np.testing.assert_array_equal(loaded.emb, params.emb)
    assert np.any(rwkv_jax.load_state(tmp_path / "m", config).wkv)


def test_a_state_is_not_a_model_and_says_what_to_call(config, tmp_path):
    safetensors.numpy.save_file(time_states(config), tmp_path / "s")
    with pytest.raises(ValueError, match=r"rwkv_jax\.load_state"):
        rwkv_jax.load(tmp_path / "s")


def test_missing_extra_and_misshaped_states_are_listed(config, tmp_path):
    tensors = time_states(config)
    first = tensors.pop("blocks.0.att.time_state")
    tensors |= {"blocks.9.att.time_state": first, "blocks.1.att.time_state": first[:1]}
    safetensors.numpy.save_file(tensors, tmp_path / "s")
    with pytest.raises(ValueError, match="not a tuned state") as error:
        rwkv_jax.load_state(tmp_path / "s", config)
    assert re.findall(r"(missing|extra|shape): blocks\.(\d)", str(error.value)) == [
        ("missing", "0"),
        ("extra", "9"),
        ("shape", "1"),
    ]


def test_only_the_state_of_one_sequence_is_saved(config, tmp_path):
    with pytest.raises(ValueError, match="one sequence"):
        rwkv_jax.save_state(tmp_path / "s.safetensors", rwkv_jax.init_state(config, 2), config)
    assert list(tmp_path.iterdir()) == []


def test_rwkv4_has_no_state_to_tune(tmp_path):
    config = SMALL["rwkv4"]
    safetensors.numpy.save_file({"blocks.0.att.time_state": np.zeros((1, 2, 2), np.float32)}, tmp_path / "s")
    with pytest.raises(ValueError, match="rwkv4 has no matrix state"):
        rwkv_jax.load_state(tmp_path / "s", config)
