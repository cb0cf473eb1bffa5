"""Writers of other programs' files, from their descriptions, for what the readers must read; and what tests of both share."""

import dataclasses
import importlib.util
import struct
import zipfile
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax import params as p
from rwkv_jax.models import module_of


def needs(*packages):
    """Skips the test where a package that the project does not install is absent: torch, and programs that check ours."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}: pip install {package}")


def random_params(config, dtype: Any = np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(dtype)), _shapes(config))


@cache
def _shapes(config):
    return jax.eval_shape(lambda: rwkv_jax.init(jax.random.key(0), config))


def official(params, config):
    """The tensors that an official checkpoint holds."""
    return p.to_official(params, module_of(config).declare(config), config.num_layers)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def with_eps(config, eps):
    return dataclasses.replace(config, ln_x_eps=eps) if hasattr(config, "ln_x_eps") else config


STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
}


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integers(values):
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def tensor_opcodes(key, kind, size, offset, shape, strides, *, older=False):
    """The pickle of one tensor: a call of _rebuild_tensor_v2 on a storage of `size` values."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    storage += b"J" + struct.pack("<i", size) + (b"N" if older else b"") + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    view = b"J" + struct.pack("<i", offset) + integers(shape) + integers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + hooks + b"tR"


def state_dict(entries):
    """A pickle of a dict, given (key, opcodes of the value)."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in entries) + b"u."


def contiguous(tensors, *, older=False):
    """(key, opcodes) of whole tensors, each in a storage of its own named by its position."""
    for i, (key, value) in enumerate(tensors.items()):
        strides = [int(np.prod(value.shape[axis + 1 :])) for axis in range(value.ndim)]
        kind = STORAGES[value.dtype.name]
        yield key, tensor_opcodes(str(i), kind, value.size, 0, value.shape, strides, older=older)


def torch_zip(path, pickled, storages, compression=zipfile.ZIP_STORED, byteorder=b"little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/byteorder", byteorder)
        for key, values in storages.items():
            archive.writestr(f"model/data/{key}", values.tobytes())


def torch_older(path, pickled, storages):
    magic = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
    system = b"\x80\x02}(" + text("little_endian") + b"\x88u."
    keys = b"\x80\x02](" + b"".join(text(key) for key in storages) + b"e."
    data = b"".join(struct.pack("<q", values.size) + values.tobytes() for values in storages.values())
    path.write_bytes(magic + b"\x80\x02M\xe9\x03." + system + pickled + keys + data)


def write_torch(path, tensors, *, older=False):
    pickled = state_dict(contiguous(tensors, older=older))
    storages = {str(i): value for i, value in enumerate(tensors.values())}
    (torch_older if older else torch_zip)(path, pickled, storages)


RWKV_CPP_TYPES = {"float32": 0, "float16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 7, "Q5_1": 8, "Q8_0": 9}


def as_rwkv_cpp_has_it(tensors):
    """What RWKV/rwkv.cpp's converter makes of official tensors of any version."""
    has = lambda name: f"blocks.0.att.{name}" in tensors
    five = has("ln_x.weight") and not has("time_maa_x") and not has("r_k")
    changed = {}
    for key, x in tensors.items():
        name = key.rpartition(".")[2]
        if has("r_k"):
            if name.startswith("x_") and ".att." in key:
                if name == "x_r":
                    parts = [tensors[key.replace("x_r", f"x_{letter}")] for letter in "rwkvag"]
                    changed[key.replace("x_r", "x_rwkvag")] = np.concatenate(parts).reshape(6, 1, -1)
                continue
            x = x.T if name in {"w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"} else x
            x = x.squeeze() if x.shape[:2] == (1, 1) else x
        elif ".time_" in key:
            x = x.squeeze()
            if name == "time_decay" and not has("time_maa_x"):
                x = np.exp(-np.exp(x)) if five else -np.exp(x)
                x = (x[..., None] if x.ndim == 2 else x.reshape(-1, 1, 1)) if five else x
            if name == "time_first" and five:
                x = np.exp(x).reshape(-1, 1, 1)
            x = x[..., None] if name == "time_faaaa" else x
            x = x.T if name in {"time_maa_w1", "time_decay_w1", "time_decay_w2"} else x
            x = x.transpose(0, 2, 1) if name == "time_maa_w2" else x
        changed[key] = np.ascontiguousarray(x)
    return changed


def write_rwkv_cpp(path, tensors, encode=None, version=101):
    """A .bin of official tensors; `encode(key, tensor)` gives (type, bytes) or None for float32."""
    vocab_size, width = tensors["emb.weight"].shape
    layers = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    with path.open("wb") as file:
        file.write(struct.pack("<6i", 0x67676D66, version, vocab_size, width, layers, 0))
        for key, tensor in as_rwkv_cpp_has_it(tensors).items():
            kind, data = (encode and encode(key, tensor)) or ("float32", tensor.astype("<f4").tobytes())
            file.write(struct.pack("<3i", tensor.ndim, len(key), RWKV_CPP_TYPES[kind]))
            file.write(struct.pack(f"<{tensor.ndim}i", *tensor.shape[::-1]) + key.encode() + data)
