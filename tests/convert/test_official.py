"""Official checkpoints: what is written is read back bit for bit, and what is wrong is named, all of it."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import assert_same_bits
from checkpoint_files import random_params as random_of

from rwkv_jax import RWKV4Config, load, save
from rwkv_jax.convert import safetensors_file

CONFIG = RWKV4Config(vocab_size=17, num_layers=2, embed_dim=6)


def random_params(config=CONFIG, dtype=np.float32):
    return random_of(config, dtype)


def rewrite(path, change):
    """Applies `change` to the dict of tensors in a file."""
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


@pytest.fixture
def checkpoint(tmp_path):
    """A whole float32 checkpoint."""
    path = tmp_path / "model.safetensors"
    save(path, random_params(), CONFIG)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_saved_parameters_load_bit_for_bit_with_their_config(tmp_path, x64, dtype):
    params = random_params(dtype=dtype)
    save(tmp_path / "model.safetensors", params, CONFIG)
    loaded, config = load(tmp_path / "model.safetensors")
    assert_same_bits(loaded, params)
    assert config == CONFIG


def test_a_dtype_given_is_the_dtype_of_every_parameter(checkpoint):
    params, _ = load(checkpoint, dtype=jnp.bfloat16)
    assert_same_bits(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params()))


def test_bfloat16_files_load_as_float32_without_loss(tmp_path):
    params = random_params(dtype=ml_dtypes.bfloat16)
    save(tmp_path / "model.safetensors", params, CONFIG)
    loaded, _ = load(tmp_path / "model.safetensors", dtype="float32")
    assert_same_bits(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def test_a_file_holds_torchs_layout_under_the_official_names(checkpoint):
    tensors, params = safetensors.numpy.load_file(checkpoint), random_params()
    np.testing.assert_array_equal(tensors["emb.weight"], params.emb)
    np.testing.assert_array_equal(tensors["head.weight"], params.head.T)
    np.testing.assert_array_equal(tensors["blocks.1.ffn.key.weight"], params.blocks.ffn.key[1].T)
    np.testing.assert_array_equal(tensors["blocks.1.att.time_mix_v"], params.blocks.att.time_mix_v[1][None, None])
    np.testing.assert_array_equal(tensors["blocks.0.att.time_decay"], params.blocks.att.time_decay[0])


@pytest.mark.parametrize("ffn_dim", [None, 24, 7])
def test_the_width_of_the_channel_mix_is_read_from_its_shape(tmp_path, ffn_dim):
    config = RWKV4Config(vocab_size=5, num_layers=1, embed_dim=6, ffn_dim=ffn_dim)
    save(tmp_path / "model.safetensors", random_params(config), config)
    _, loaded = load(tmp_path / "model.safetensors")
    assert loaded.hidden_dim == config.hidden_dim
    assert loaded.ffn_dim == (None if ffn_dim == 24 else ffn_dim)  # 24 is 4 * embed_dim


def test_every_missing_extra_and_misshaped_key_is_listed(checkpoint):
    def damage(tensors):
        del tensors["head.weight"], tensors["blocks.1.ln2.bias"]
        tensors["optimizer.step"] = np.zeros(3, np.float32)
        tensors["blocks.1.att.extra"] = np.zeros(1, np.float32)
        tensors["blocks.0.att.key.weight"] = np.zeros((6, 5), np.float32)
        tensors["blocks.0.ffn.time_mix_k"] = np.zeros(6, np.float32)

    rewrite(checkpoint, damage)
    with pytest.raises(ValueError, match="not a whole rwkv4 checkpoint") as error:
        load(checkpoint)
    lines = sorted(line.strip() for line in str(error.value).splitlines()[1:])
    assert str(checkpoint) in str(error.value)
    assert lines == [
        "extra: blocks.1.att.extra (1,)",
        "extra: optimizer.step (3,)",
        "missing: blocks.1.ln2.bias (6,)",
        "missing: head.weight (17, 6)",
        "shape: blocks.0.att.key.weight is (6, 5), expected (6, 6)",
        "shape: blocks.0.ffn.time_mix_k is (6,), expected (1, 1, 6)",
    ]


def test_a_whole_missing_layer_is_listed(checkpoint):
    def remove_the_middle(tensors):
        for key in [key for key in tensors if key.startswith("blocks.1.")]:
            tensors[key.replace("blocks.1.", "blocks.2.")] = tensors.pop(key)

    rewrite(checkpoint, remove_the_middle)
    with pytest.raises(ValueError, match="not a whole") as error:
        load(checkpoint)
    missing = re.findall(r"missing: (\S+)", str(error.value))
    assert len(missing) == 18  # 2 layer norms of two, 9 of the time mix, 5 of the channel mix
    assert all(key.startswith("blocks.1.") for key in missing)


@pytest.mark.parametrize("kept", [0.0, 0.0005, 0.001, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_by_name(checkpoint, kept):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=rf"{re.escape(str(checkpoint))}: truncated, or no"):
        load(checkpoint)


def test_another_architecture_is_refused_with_the_names_it_has(tmp_path):
    path, names = tmp_path / "other.safetensors", ("model.embed_tokens.weight", "lm_head.weight")
    safetensors.numpy.save_file({name: np.zeros((4, 4), np.float32) for name in names}, path)
    with pytest.raises(ValueError, match="not a checkpoint of RWKV under the official names") as error:
        load(path)
    assert "rwkv4" in str(error.value)
    assert names[0] in str(error.value)


def test_official_names_on_foreign_shapes_are_refused(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"emb.weight": np.zeros(4, np.float32)}))
    with pytest.raises(ValueError, match=r"emb\.weight is \(4,\); it must be a matrix"):
        load(checkpoint)


def test_a_path_with_nothing_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "absent.safetensors"))):
        load(tmp_path / "absent.safetensors")


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load(tmp_path)


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def interrupted(file, *rest):
        file.write(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_file, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoint, jax.tree.map(jnp.zeros_like, random_params()), CONFIG)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_saving_again_replaces_the_file(checkpoint):
    params = jax.tree.map(jnp.zeros_like, random_params())
    save(checkpoint, params, CONFIG)
    assert_same_bits(load(checkpoint)[0], params)


def test_parameters_of_another_config_are_not_saved(tmp_path):
    other = RWKV4Config(vocab_size=18, num_layers=2, embed_dim=6)
    with pytest.raises(ValueError, match=r"emb\.weight: shape \(17, 6\), the config asks for \(18, 6\)") as error:
        save(tmp_path / "model.safetensors", random_params(), other)
    assert "head.weight: shape (6, 17)" in str(error.value)
    assert not list(tmp_path.iterdir())
