"""Every container of the same weights gives the same parameters and logits; what is damaged or hostile is refused."""

import contextlib
import errno
import pickle
import re
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import (
    assert_same_bits,
    contiguous,
    official,
    random_params,
    state_dict,
    tensor_opcodes,
    text,
    torch_older,
    torch_zip,
    write_rwkv_cpp,
    write_torch,
)
from small_models import RWKV, SMALL, forward

import rwkv_jax
from rwkv_jax.convert import torch_pickle
from rwkv_jax.convert.formats import open_checkpoint

CONFIG = rwkv_jax.RWKV4Config(vocab_size=17, num_layers=2, embed_dim=6)
SOURCES = [
    *(f"tiny-rwkv-{version}" for version in ("4v0", "5v1", "5v2", "7v0")),
    *(f"synthetic-rwkv-{version}" for version in ("4v0", "5v1", "5v2", "6v0", "7v0")),
]
FEW = ("synthetic-rwkv-4v0", "synthetic-rwkv-7v0")
"""Those of the fast tests."""
CONTAINERS = [
    "synthetic-rwkv-4v0-legacy.pth",
    "tiny-rwkv-4v0-bfloat16.pth",
    "synthetic-rwkv-5v2-float32.pth",
    "synthetic-rwkv-6v0-float16.pth",
    "tiny-rwkv-7v0-bfloat16.pth",
    "hf-rwkv-4v0",
    "fla-rwkv-7v0",
]
TOLERANCE = 1e-4
"""Absolute, on float32 logits, against the float64 reference."""
WRITERS = {
    "zip": write_torch,
    "older": lambda path, tensors: write_torch(path, tensors, older=True),
    "rwkv.cpp": write_rwkv_cpp,
    "safetensors": lambda path, tensors: safetensors.numpy.save_file(tensors, path),
}


def original(shared, name):
    """The .safetensors with the weights of a container, and what is expected of them."""
    name = re.sub(r"^(hf|fla)-", "synthetic-", name)
    kind, version = re.match(r"(\w+)-rwkv-(\w+)", name).groups()
    expected = np.load(shared / f"reference/expected-{'synthetic-' if kind == 'synthetic' else ''}{version}.npz")
    return shared / f"reference/{kind}-rwkv-{version}.safetensors", expected


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_gives_the_parameters_and_logits_of_the_original(name, shared):
    file, expected = original(shared, name)
    eps = float(expected["ln_x_eps"])
    dtype = next((dtype for dtype in ("bfloat16", "float16") if dtype in name), "float32")
    params, config = rwkv_jax.load(shared / "reference" / name, ln_x_eps=eps)
    rounded, original_config = rwkv_jax.load(file, dtype=dtype, ln_x_eps=eps)
    assert config == original_config
    assert_same_bits(params, rounded)
    tokens = expected["tokens"][None, :64]
    logits, _ = forward(params, config, tokens)
    if dtype == "float32":
        np.testing.assert_allclose(logits[0], expected["logits"][:64], rtol=0, atol=TOLERANCE)
    else:
        np.testing.assert_allclose(logits, forward(rounded, config, tokens)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in SOURCES]
)
@pytest.mark.parametrize("container", WRITERS)
def test_weights_written_by_another_program_give_the_same_logits(container, name, shared, tmp_path):
    file, expected = original(shared, name)
    tensors = safetensors.numpy.load_file(file)
    WRITERS[container](tmp_path / "weights", tensors)
    params, config = rwkv_jax.load(tmp_path / "weights", ln_x_eps=float(expected["ln_x_eps"]))
    own = official(params, config)
    for key, tensor in tensors.items():
        tolerance = 1e-5 if container == "rwkv.cpp" and key.endswith(("time_decay", "time_first")) else 0
        np.testing.assert_allclose(own[key], tensor, rtol=tolerance, atol=tolerance, err_msg=key)
    logits, _ = forward(params, config, expected["tokens"][None, :64])
    np.testing.assert_allclose(logits[0], expected["logits"][:64], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", RWKV)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("container", ["zip", "older"])
def test_torch_files_load_bit_for_bit_without_torch(container, dtype, name, tmp_path):
    params = random_params(SMALL[name], dtype)
    WRITERS[container](tmp_path / "model", official(params, SMALL[name]))
    loaded, _ = rwkv_jax.load(tmp_path / "model")
    assert_same_bits(official(loaded, SMALL[name]), official(params, SMALL[name]))


def test_the_files_name_does_not_matter(tmp_path):
    tensors = official(random_params(CONFIG), CONFIG)
    for writer, name in zip(WRITERS.values(), ["a.safetensors", "b.bin", "c.pth", "rwkv7"], strict=True):
        writer(tmp_path / name, tensors)
        assert rwkv_jax.load(tmp_path / name)[1] == CONFIG


@pytest.mark.parametrize("container", ["zip", "older", "safetensors"])
def test_the_prefix_of_a_wrapped_module_is_taken_off(container, tmp_path):
    params = random_params(CONFIG)
    WRITERS[container](tmp_path / "m", {f"_forward_module.{k}": v for k, v in official(params, CONFIG).items()})
    assert_same_bits(rwkv_jax.load(tmp_path / "m")[0], params)


@pytest.mark.parametrize("container", WRITERS)
def test_missing_extra_and_misshaped_keys_are_listed_whatever_the_container(container, tmp_path):
    tensors = official(random_params(CONFIG), CONFIG)
    del tensors["head.weight"]
    tensors |= {"other": np.zeros(3, np.float32), "blocks.0.att.key.weight": np.zeros((6, 5), np.float32)}
    WRITERS[container](tmp_path / "m", tensors)
    with pytest.raises(ValueError, match="not a whole rwkv4 checkpoint") as error:
        rwkv_jax.load(tmp_path / "m")
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == {
        "missing: head.weight (17, 6)",
        "extra: other (3,)",
        "shape: blocks.0.att.key.weight is (6, 5), expected (6, 6)",
    }


def test_keys_of_two_versions_are_refused(tmp_path):
    tensors = official(random_params(CONFIG), CONFIG)
    tensors["blocks.0.att.r_k"] = np.zeros((2, 3), np.float32)
    tensors["blocks.0.att.time_maa_x"] = np.zeros((1, 1, 6), np.float32)
    write_torch(tmp_path / "m", tensors)
    with pytest.raises(ValueError, match=r"not a checkpoint|not a whole") as error:
        rwkv_jax.load(tmp_path / "m")
    assert str(tmp_path / "m") in str(error.value)


@pytest.mark.parametrize("container", WRITERS)
def test_a_file_cut_anywhere_is_refused_with_its_name(container, tmp_path):
    WRITERS[container](tmp_path / "whole", official(random_params(CONFIG), CONFIG))
    data = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    cuts = {*range(0, 200, 7), *np.linspace(0, len(data) - 1, 150).astype(int).tolist(), len(data) - 1}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            rwkv_jax.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("container", WRITERS)
def test_a_damaged_byte_never_gives_another_error_than_valueerror(container, tmp_path):
    WRITERS[container](tmp_path / "whole", official(random_params(CONFIG), CONFIG))
    data = bytearray((tmp_path / "whole").read_bytes())
    rng, path = np.random.default_rng(0), tmp_path / "damaged"
    for position in [*range(40), *rng.integers(0, len(data), 150)]:
        damaged = data.copy()
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            for tensor in open_checkpoint(path).tensors.values():
                tensor.read()


@pytest.mark.parametrize(
    "head", [b"GGUF\x03\x00\x00\x00", b"\x1f\x8b\x08", b"version https://git-lfs", b"\x80\x07abc", b"{}"]
)
def test_another_programs_file_is_refused_with_what_it_begins_with(head, tmp_path):
    (tmp_path / "model.pth").write_bytes(head + bytes(100))
    with pytest.raises(ValueError, match="no format that is known here") as error:
        rwkv_jax.load(tmp_path / "model.pth")
    assert repr(head)[2:-1][:6] in str(error.value)


def test_the_hostile_file_is_refused_by_name_and_nothing_runs(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"hostile\.pth: it asks for posix\.system"):
        rwkv_jax.load(shared / "reference/hostile.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("older", [False, True], ids=["zip", "older"])
@pytest.mark.parametrize(
    "name",
    ["os system", "builtins eval", "builtins getattr", "torch.storage _load_from_bytes", "numpy frombuffer", "torch load",
     "torch FloatStorage.__class__", "torch._utils _rebuild_tensor_v2.__globals__"],
)  # fmt: skip
def test_any_other_name_in_a_pickle_is_refused(name, older, tmp_path):
    module, attribute = name.split()
    call = f"c{module}\n{attribute}\n(".encode() + text("touch executed") + b"tR"
    (torch_older if older else torch_zip)(tmp_path / "m", state_dict([("emb.weight", call)]), {})
    with pytest.raises(ValueError, match=re.escape(f"it asks for {module}.{attribute}")):
        rwkv_jax.load(tmp_path / "m")


@pytest.mark.parametrize("name", ["torch BFloat16Storage", "torch._utils _rebuild_tensor_v2"])
@pytest.mark.parametrize(
    "state",
    [
        b"(K\x03" + text(">") + b"NNNK\x02K\x02K\x00t",  # of a dtype: big-endian
        b"(N}(" + text("__defaults__") + b"K\x01\x85ut",  # an attribute
        b"}(" + text("name") + text("FloatStorage") + b"u",
    ],
    ids=["dtype", "attribute", "dictionary"],
)
def test_a_pickle_cannot_alter_what_it_names(name, state, tmp_path):
    module, attribute = name.split()
    altered = f"c{module}\n{attribute}\n".encode() + state + b"b"
    torch_zip(tmp_path / "m", state_dict([("emb.weight", altered)]), {})
    with pytest.raises(ValueError, match="truncated, or not a checkpoint of torch"):
        rwkv_jax.load(tmp_path / "m")
    values = np.arange(6).astype(ml_dtypes.bfloat16)
    write_torch(tmp_path / "sound", {"x": values})
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "sound").tensors["x"].read().astype(np.float32), range(6))


def test_a_claim_of_many_entries_takes_no_memory(tmp_path):
    torch_zip(tmp_path / "m", b"\x80\x02}r" + struct.pack("<I", 200_000_000) + b".", {})
    tracemalloc.start()
    with pytest.raises(ValueError, match="not a checkpoint of RWKV"):
        rwkv_jax.load(tmp_path / "m")
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


def test_tensors_under_one_name_are_refused(tmp_path):
    tensors = official(random_params(CONFIG), CONFIG)
    both = tensors | {"_forward_module.emb.weight": tensors["emb.weight"]}
    safetensors.numpy.save_file(both, tmp_path / "m")
    with pytest.raises(ValueError, match=r"m: there is more than one tensor for emb\.weight"):
        rwkv_jax.load(tmp_path / "m")


def test_layers_of_two_half_precisions_become_float32(tmp_path):
    tensors = {key: value.astype(np.float16) for key, value in official(random_params(CONFIG), CONFIG).items()}
    key = "blocks.1.ffn.key.weight"
    write_torch(tmp_path / "m", tensors | {key: tensors[key].astype(ml_dtypes.bfloat16)})
    params, _ = rwkv_jax.load(tmp_path / "m")
    assert params.blocks.ffn.key.dtype == np.float32 and params.emb.dtype == np.float16


def test_a_value_beyond_float16_is_named_and_not_made_infinite(tmp_path):
    tensors = official(random_params(CONFIG), CONFIG)
    tensors["blocks.1.ffn.key.weight"][0, :2] = np.inf, 1e6  # What is infinite already hides nothing.
    write_torch(tmp_path / "m", {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()})
    with pytest.raises(
        ValueError, match=r"blocks\.1\.ffn\.key\.weight has a value of 999424, and float16 ends at 65504"
    ):
        rwkv_jax.load(tmp_path / "m", dtype="float16")
    rwkv_jax.load(tmp_path / "m", dtype="float32")


def test_a_stray_layer_is_one_extra_tensor(tmp_path):
    tensors = official(random_params(CONFIG), CONFIG)
    write_torch(tmp_path / "m", tensors | {"blocks.300000.foo": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"extra: blocks\.300000\.foo") as error:
        rwkv_jax.load(tmp_path / "m")
    assert "missing" not in str(error.value)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    (tmp_path / "m").write_bytes(pickle.dumps({"emb.weight": [1.0]}, protocol=2))
    with pytest.raises(ValueError, match=r"m: (a pickle, but not|truncated, or not)"):
        rwkv_jax.load(tmp_path / "m")


def test_views_with_offsets_and_strides_are_read_as_they_are_meant(tmp_path):
    values = np.arange(24, dtype=np.float32)
    views = {
        "part": (values[6:18].reshape(3, 4), (6, (3, 4), (4, 1))),
        "columns": (values[2:22].reshape(4, 5).T, (2, (5, 4), (1, 5))),
        "steps": (values[1::3], (1, (8,), (3,))),
        "repeated": (np.broadcast_to(values[7], (2, 3)), (7, (2, 3), (0, 0))),
        "scalar": (values[23].reshape(()), (23, (), ())),
        "empty": (values[:0].reshape(0, 3), (0, (0, 3), (3, 1))),
    }
    for older in (False, True):
        pickled = state_dict(
            [(key, tensor_opcodes("0", "FloatStorage", 24, *view, older=older)) for key, (_, view) in views.items()]
        )
        (torch_older if older else torch_zip)(tmp_path / "m", pickled, {"0": values})
        tensors = open_checkpoint(tmp_path / "m").tensors
        assert tensors.keys() == views.keys()
        for key, (expected, _) in views.items():
            np.testing.assert_array_equal(tensors[key].read(), expected)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (25,), (1,)),
        (20, (5,), (1,)),
        (0, (2, 13), (12, 1)),
        (-1, (2,), (1,)),
        (5, (2,), (-1,)),
        (0, (-1, 2), (1, 1)),
        (0, (2,), (1, 1)),
    ],
)
def test_a_view_beyond_its_storage_is_refused(offset, shape, strides, tmp_path):
    entry = ("emb.weight", tensor_opcodes("0", "FloatStorage", 24, offset, shape, strides))
    torch_zip(tmp_path / "m", state_dict([entry]), {"0": np.zeros(24, np.float32)})
    with pytest.raises(ValueError, match=r"m: truncated, or not a checkpoint of torch\.save"):
        open_checkpoint(tmp_path / "m")


def test_a_storage_larger_than_its_entry_is_refused(tmp_path):
    entry = ("emb.weight", tensor_opcodes("0", "FloatStorage", 24, 0, (24,), (1,)))
    torch_zip(tmp_path / "m", state_dict([entry]), {"0": np.zeros(23, np.float32)})
    with pytest.raises(ValueError, match="storage 0 has 92 bytes"):
        open_checkpoint(tmp_path / "m")


def test_compressed_and_big_endian_archives_are_refused(tmp_path):
    tensors = official(random_params(CONFIG), CONFIG)
    storages = {str(i): value for i, value in enumerate(tensors.values())}
    pickled = state_dict(contiguous(tensors))
    torch_zip(tmp_path / "m", pickled, storages, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        rwkv_jax.load(tmp_path / "m")
    torch_zip(tmp_path / "m", pickled, storages, byteorder=b"big")
    with pytest.raises(ValueError, match="big-endian"):
        rwkv_jax.load(tmp_path / "m")


def test_what_is_no_tensor_is_named(tmp_path):
    torch_zip(tmp_path / "m", state_dict([("_strategy", text("cpu fp32")), ("_version", b"K\x04")]), {})
    with pytest.raises(ValueError, match="'_strategy', '_version'") as error:
        rwkv_jax.load(tmp_path / "m")
    assert "rwkv package" in str(error.value)


def test_tensors_of_whole_numbers_are_refused(tmp_path):
    tensors = official(random_params(CONFIG), CONFIG)
    tensors["head.weight"] = tensors["head.weight"].astype(np.int32)
    safetensors.numpy.save_file(tensors, tmp_path / "m")
    with pytest.raises(ValueError, match=r"type: head\.weight is int32"):
        rwkv_jax.load(tmp_path / "m")


@pytest.mark.parametrize(("version", "kind"), [(99, None), (102, None), (100, "Q8_0")])
def test_versions_of_rwkv_cpp_that_cannot_be_read_are_named(version, kind, tmp_path):
    config = rwkv_jax.RWKV4Config(vocab_size=8, num_layers=1, embed_dim=32)
    tensors = official(random_params(config), config)
    encode = (
        (lambda key, x: ("Q8_0", bytes(x.size // 32 * 34)) if key.endswith("att.key.weight") else None)
        if kind
        else None
    )
    write_rwkv_cpp(tmp_path / "m", tensors, encode, version)
    with pytest.raises(ValueError, match=rf"version {version}"):
        rwkv_jax.load(tmp_path / "m")


def test_version_100_of_rwkv_cpp_in_float16_is_read(tmp_path):
    params = random_params(CONFIG)

    def half(key, tensor):
        return ("float16", tensor.astype("<f2").tobytes()) if tensor.ndim == 2 else None

    write_rwkv_cpp(tmp_path / "m", official(params, CONFIG), half, version=100)
    loaded, _ = rwkv_jax.load(tmp_path / "m")
    np.testing.assert_array_equal(loaded.blocks.att.key, params.blocks.att.key.astype(np.float16))
    np.testing.assert_array_equal(loaded.blocks.ln1.weight, params.blocks.ln1.weight)


def test_a_header_that_the_tensors_do_not_fit_is_refused(tmp_path):
    write_rwkv_cpp(tmp_path / "m", official(random_params(CONFIG), CONFIG))
    data = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(data[:16] + struct.pack("<i", 3) + data[20:])
    with pytest.raises(ValueError, match="header says 3 layers"):
        rwkv_jax.load(tmp_path / "m")


def test_a_disk_that_fails_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    write_torch(tmp_path / "sound", {"x": np.zeros(3, np.float32)})

    def fails(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch_pickle, "_read_zip", fails)
    with pytest.raises(OSError, match="Input/output error"):
        torch_pickle.read(tmp_path / "sound")
