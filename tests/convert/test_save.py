"""What is saved is loaded bit for bit, whole or not at all."""

import dataclasses
import importlib
import json
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import assert_same_bits, needs, official, random_params, with_eps
from small_models import RWKV, SMALL

import rwkv_jax
from rwkv_jax.convert import safetensors_file
from rwkv_jax.convert.formats import open_checkpoint

CONFIG = rwkv_jax.RWKV4Config(vocab_size=17, num_layers=2, embed_dim=6)
DTYPES = ["float32", "float16", "bfloat16"]
FOLDERS = [name for name, config in SMALL.items() if config.architecture in ("rwkv4", "rwkv7", "transformer")]


def expressible(config):
    """The config with the one group-norm eps that flash-linear-attention's layout can say."""
    return with_eps(config, getattr(config, "head_dim", 1) * 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("file", ["m.safetensors", pytest.param("m.st", marks=pytest.mark.slow)])
def test_safetensors_give_back_every_bit_and_the_config(file, name, dtype, tmp_path):
    config, params = with_eps(SMALL[name], 3e-5), random_params(SMALL[name], jnp.dtype(dtype))
    rwkv_jax.save(tmp_path / file, params, config)
    loaded, loaded_config = rwkv_jax.load(tmp_path / file)
    assert_same_bits(loaded, params)
    assert loaded_config == config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RWKV)
def test_pth_gives_back_every_bit_and_torch_reads_it(name, dtype, tmp_path):
    needs("torch")
    torch: Any = importlib.import_module("torch")
    config, params = with_eps(SMALL[name], 3e-5), random_params(SMALL[name], jnp.dtype(dtype))
    rwkv_jax.save(tmp_path / "m.pth", params, config)
    loaded, loaded_config = rwkv_jax.load(tmp_path / "m.pth", ln_x_eps=3e-5)
    assert_same_bits(loaded, params)
    assert loaded_config == config
    by_torch = torch.load(tmp_path / "m.pth", weights_only=True)
    for key, tensor in official(params, config).items():
        assert by_torch[key].dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(by_torch[key].float().numpy(), tensor.astype(np.float32))


@pytest.mark.parametrize("name", RWKV)
def test_pth_is_ordered_layer_by_layer_as_official_files_are(name, tmp_path):
    needs("torch")
    rwkv_jax.save(tmp_path / "m.pth", random_params(SMALL[name]), SMALL[name])
    keys = list(open_checkpoint(tmp_path / "m.pth").tensors)
    layers = [int(key.split(".")[1]) for key in keys if key.startswith("blocks.")]
    assert layers == sorted(layers)
    assert keys[0] == "emb.weight" and keys[-1] == "head.weight"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FOLDERS)
def test_hugging_face_folders_give_back_every_bit_and_the_config(name, dtype, tmp_path):
    config, params = expressible(SMALL[name]), random_params(SMALL[name], jnp.dtype(dtype))
    rwkv_jax.save(tmp_path / "folder", params, config)
    loaded, loaded_config = rwkv_jax.load(tmp_path / "folder")
    expected, found = official(params, config), official(loaded, config)
    assert found.keys() == expected.keys()
    assert all(found[key].tobytes() == tensor.tobytes() for key, tensor in expected.items())
    assert loaded_config == config
    assert json.loads((tmp_path / "folder/config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("name", ["hf-rwkv-4v0", "fla-rwkv-7v0"])
def test_a_folder_is_what_the_other_program_makes(name, shared, tmp_path):
    import safetensors.numpy

    theirs = shared / "reference" / name
    rwkv_jax.save(tmp_path / "ours", *rwkv_jax.load(theirs))
    expected = safetensors.numpy.load_file(theirs / "model.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "ours/model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], tensor)
    settings, wanted = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "ours", theirs))
    wanted["torch_dtype"] = wanted.pop("dtype", wanted.get("torch_dtype"))
    wanted.pop("transformers_version", None)
    assert wanted.items() <= settings.items()


@pytest.mark.parametrize("name", ["fla-rwkv-7v0"])
def test_the_folders_eps_follows_from_the_head_unless_given(name, shared, tmp_path):
    path = shared / "reference" / name
    assert rwkv_jax.load(path)[1].ln_x_eps == pytest.approx(16e-5)
    params, config = rwkv_jax.load(path, ln_x_eps=64e-5)
    assert config.ln_x_eps == 64e-5
    with pytest.raises(ValueError, match=r"ln_x_eps is 0\.00064, and this layout can only say .* = 0\.00016"):
        rwkv_jax.save(tmp_path / "folder", params, config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fla-rwkv-7v0"])
def test_the_older_packing_of_the_token_shift_is_read(name, shared, tmp_path):
    import safetensors.numpy

    theirs = shared / "reference" / name
    tensors = safetensors.numpy.load_file(theirs / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.attn.x_"
        tensors[f"{prefix}x"] = np.stack([tensors.pop(prefix + letter).reshape(-1) for letter in "rwkvag"])
    folder = tmp_path / "older"
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((theirs / "config.json").read_bytes())
    assert_same_bits(rwkv_jax.load(folder)[0], rwkv_jax.load(theirs)[0])


def test_a_folder_in_several_files_is_read_and_a_missing_one_named(tmp_path):
    import safetensors.numpy

    params, folder = random_params(CONFIG), tmp_path / "folder"
    rwkv_jax.save(folder, params, CONFIG)
    tensors = list(safetensors.numpy.load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    names = {}
    for part, chunk in {"a.safetensors": tensors[:9], "b.safetensors": tensors[9:]}.items():
        safetensors.numpy.save_file(dict(chunk), folder / part)
        names |= {key: part for key, _ in chunk}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert_same_bits(rwkv_jax.load(folder)[0], params)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: b\.safetensors"):
        rwkv_jax.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"layer_norm_epsilon": 1e-6}, "layer norms with eps 1e-06"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message, tmp_path):
    rwkv_jax.save(tmp_path / "folder", random_params(CONFIG), CONFIG)
    file = tmp_path / "folder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        rwkv_jax.load(tmp_path / "folder")
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=r"config\.json: truncated, or not JSON"):
        rwkv_jax.load(tmp_path / "folder")


@pytest.mark.parametrize("name", [name for name in SMALL if name not in FOLDERS])
def test_versions_without_a_hugging_face_layout_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"not for {SMALL[name].architecture}"):
        rwkv_jax.save(tmp_path / "folder", random_params(SMALL[name]), SMALL[name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("path", "format"), [("m.bin", None), ("m.safetensors", "gguf"), ("m.pt", None)])
def test_a_format_that_cannot_be_written_is_refused(path, format, tmp_path):
    with pytest.raises(ValueError, match=r"\.safetensors, \.st, \.pth"):
        rwkv_jax.save(tmp_path / path, random_params(CONFIG), CONFIG, format)


def test_the_format_given_beats_the_suffix(tmp_path):
    rwkv_jax.save(tmp_path / "m.bin", random_params(CONFIG), CONFIG, "safetensors")
    assert rwkv_jax.load(tmp_path / "m.bin")[1] == CONFIG


def test_without_torch_pth_names_the_extra_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"rwkv-jax\[torch\]"):
        rwkv_jax.save(tmp_path / "m.pth", random_params(CONFIG), CONFIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_folder_leaves_what_was_there(existing, tmp_path, monkeypatch):
    folder, params = tmp_path / "folder", random_params(CONFIG)
    if existing:
        rwkv_jax.save(folder, params, CONFIG)

    def interrupted(file, *rest):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_file, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rwkv_jax.save(folder, random_params(CONFIG, np.float16), CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == (["folder"] if existing else [])
    if existing:
        assert_same_bits(rwkv_jax.load(folder)[0], params)


def test_a_folder_is_replaced_only_if_it_is_a_saved_model(tmp_path):
    folder = tmp_path / "folder"
    rwkv_jax.save(folder, random_params(CONFIG, np.float16), CONFIG)
    rwkv_jax.save(folder, random_params(CONFIG), CONFIG)
    assert_same_bits(rwkv_jax.load(folder)[0], random_params(CONFIG))
    (folder / "thesis.txt").write_text("the only copy")
    with pytest.raises(FileExistsError, match="holds other things"):
        rwkv_jax.save(folder, random_params(CONFIG), CONFIG)
    assert (folder / "thesis.txt").exists()


def test_a_folder_to_save_in_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        rwkv_jax.save(tmp_path / "absent/m.safetensors", random_params(CONFIG), CONFIG)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("format", ["safetensors", "pth", "huggingface"])
def test_a_fresh_rwkv7_comes_back_whole_and_with_its_ranks(layers, format, tmp_path):
    if format == "pth":
        needs("torch")
    config = expressible(dataclasses.replace(SMALL["rwkv7"], num_layers=layers))
    params = rwkv_jax.init(jax.random.key(0), config)
    rwkv_jax.save(tmp_path / "m", params, config, format)
    loaded, found = rwkv_jax.load(tmp_path / "m")
    assert_same_bits(loaded, params)
    assert found.ranks == config.ranks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, the tensors' 3"),
        ({"hidden_size": 99}, "hidden_size is 99, the tensors' 12"),
        ({"norm_eps": None}, "layer norms with eps None"),
        ({"model_type": []}, r"model_type is \[\]"),
    ],
)
def test_a_config_json_of_another_model_is_refused(change, message, tmp_path):
    config = dataclasses.replace(SMALL["rwkv7"], ln_x_eps=4e-5)
    rwkv_jax.save(tmp_path / "m", rwkv_jax.init(jax.random.key(0), config), config, "huggingface")
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        rwkv_jax.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({}, ValueError, "no weight_map of names"),
        ({"weight_map": {}}, ValueError, "no weight_map of names"),
        ({"weight_map": {"emb.weight": "../m.safetensors"}}, ValueError, r"names \.\./m\.safetensors; a part must be"),
        ({"weight_map": {"emb.weight": "gone.safetensors"}}, FileNotFoundError, r"missing: gone\.safetensors"),
        (
            {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}},
            ValueError,
            r"more than one tensor for head\.weight, .* and 34 more",
        ),
    ],
)
def test_an_index_that_does_not_fit_its_parts_is_refused(content, error, message, tmp_path):
    config = rwkv_jax.RWKV4Config(vocab_size=17, num_layers=2, embed_dim=6)
    folder = tmp_path / "m"
    rwkv_jax.save(folder, rwkv_jax.init(jax.random.key(0), config), config, "huggingface")
    for name in ("a", "b"):
        shutil.copy(folder / "model.safetensors", folder / f"{name}.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "m.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        rwkv_jax.load(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_shards_are_told_by_what_they_hold_together(name, tmp_path):
    """One shard has no layer in it, and another nothing but one."""
    config, folder = expressible(SMALL[name]), tmp_path / "m"
    params = random_params(config)
    rwkv_jax.save(folder, params, config, "huggingface")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    of = {key: "b.safetensors" if ".1." in key else "a.safetensors" if "ers.0" in key or "cks.0" in key else "c.safetensors"
          for key in tensors}  # fmt: skip
    for file in set(of.values()):
        safetensors.numpy.save_file({key: tensors[key] for key in tensors if of[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of}))
    loaded, found = rwkv_jax.load(folder)
    assert len(set(of.values())) == 3 and found == config
    assert_same_bits(loaded, params)
