"""rwkv.cpp's .bin files: a header, then one tensor after another, some of them changed on the way in.

Source: RWKV/rwkv.cpp, docs/FILE_FORMAT.md and python/convert_pytorch_to_ggml.py.
"""

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .ggml_blocks import BLOCK, KINDS, decode
from .stored import FLOATS, Checkpoint, Stored, Tensors, mapped

_MAGIC = b"fmgg"
"""0x67676d66, little-endian."""
_VERSIONS = (100, 101)
_QUANTISED_SINCE = 101
"""ggml changed its blocks between the versions, and rwkv.cpp itself refuses the old ones."""
_TYPES = {0: "float32", 1: "float16", 2: "Q4_0", 3: "Q4_1", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}
_MAX_DIMS = 4
_MAX_KEY = 512
_VECTORS = re.compile(r"\.(time_mix_\w|time_maa_[xwkvrg]|x_\w|w0|a0|v0|k_k|k_a)$")
"""What official checkpoints have as [1, 1, D] and rwkv.cpp as [D]."""
_LOW_RANK = re.compile(r"\.(time_maa_w[12]|time_decay_w[12]|[wavg][12])$")
"""What rwkv.cpp has transposed."""
_SHIFTS = "rwkvag"
"""Order of RWKV-7's token-shift weights in `x_rwkvag`."""
_SMALLEST, _BELOW_ONE = 2.0**-149, 1 - 2.0**-25
"""Where a decay was rounded to 0 or 1 in float32, the values nearest to it that have a logarithm."""


def begins(head: bytes) -> bool:
    """Returns whether a file's first bytes are those of this format."""
    return head[:4] == _MAGIC


def read(path: Path) -> Checkpoint:
    """Returns the tensors of a file, under the official names and as official checkpoints have them.

    Raises:
        ValueError: It is truncated or damaged, or of a version that cannot be read.
    """
    with path.open("rb") as file:
        try:
            version, tensors = _read(path, file)
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: truncated, or not a file of rwkv.cpp ({error}); fetch or convert it again"
            ) from None
    return Checkpoint(f"rwkv.cpp, version {version}", _official(tensors))


def _read(path: Path, file: BinaryIO) -> tuple[int, dict[str, Stored]]:
    _, version, vocab_size, width, layers, _ = struct.unpack("<4s5i", file.read(24))
    if version not in _VERSIONS:
        raise ValueError(f"{path}: version {version} of rwkv.cpp's format; only {_VERSIONS} can be read")
    tensors: dict[str, Stored] = {}
    size = path.stat().st_size
    while file.tell() < size:
        num_dims, key_length, type_number = struct.unpack("<3i", file.read(12))
        encoding = _TYPES.get(type_number)
        if not 1 <= num_dims <= _MAX_DIMS or not 1 <= key_length <= _MAX_KEY or encoding is None:
            raise ValueError(
                f"{path}: damaged: before byte {file.tell()} a tensor with {num_dims} axes, a name of {key_length} bytes and type "
                f"{type_number}; fetch or convert it again"
            )
        shape = struct.unpack(f"<{num_dims}i", file.read(4 * num_dims))[::-1]
        key = file.read(key_length).decode()
        if encoding in KINDS and version < _QUANTISED_SINCE:
            raise ValueError(
                f"{path}: {key} is {encoding} in version {version}, whose blocks rwkv.cpp itself no longer reads; quantise it again"
            )
        if min(shape) < 1 or (encoding in KINDS and shape[-1] % BLOCK):
            raise ValueError(f"{path}: damaged: {key} has shape {shape} in {encoding}; fetch or convert it again")
        stored, num_bytes = _stored(path, file.tell(), shape, encoding)
        if file.tell() + num_bytes > size:
            raise ValueError(f"{path}: truncated within {key}, at {size} bytes; fetch it again")
        file.seek(num_bytes, 1)
        tensors[key] = stored
    found = tensors["emb.weight"].shape if "emb.weight" in tensors else None
    if found != (vocab_size, width) or f"blocks.{layers - 1}.ln1.weight" not in tensors:
        raise ValueError(
            f"{path}: the header says {layers} layers, width {width} and vocabulary {vocab_size}, which the tensors do not have "
            f"(emb.weight is {found}): truncated, or damaged; fetch or convert it again"
        )
    return version, tensors


def _stored(path: Path, offset: int, shape: tuple[int, ...], encoding: str) -> tuple[Stored, int]:
    """The tensor, and how many bytes of the file it takes."""
    if encoding in FLOATS:
        dtype = FLOATS[encoding]
        stored = Stored(shape, dtype, encoding, lambda: mapped(path, offset, dtype, shape))
        return stored, stored.num_bytes
    kind = KINDS[encoding]
    num_bytes = math.prod(shape) // BLOCK * kind.num_bytes

    def values() -> np.ndarray:
        return decode(kind, mapped(path, offset, np.dtype(np.uint8), (num_bytes,))).reshape(shape)

    return Stored(shape, np.dtype(np.float32), encoding, values), num_bytes


def _official(tensors: Tensors) -> dict[str, Stored]:
    """What rwkv.cpp's converter does, undone; which version's it was shows in the names."""

    def has(name: str) -> bool:
        return f"blocks.0.att.{name}" in tensors

    if has("r_k") or has("time_maa_x"):
        change_decay = change_first = _same
    elif has("ln_x.weight"):
        change_decay, change_first = _log_log_decay, np.log
    else:
        change_decay, change_first = _log_negated, _same
    official = {}
    for key, tensor in tensors.items():
        if key.endswith(".x_rwkvag"):
            official |= _shifts(key, tensor)
        elif key.endswith(".time_decay"):
            official[key] = _changed(_unpadded(tensor), change_decay)
            if has("time_maa_x"):
                official[key] = official[key].reshaped((1, 1, math.prod(tensor.shape)))
        elif key.endswith((".time_first", ".time_faaaa")):
            official[key] = _changed(_unpadded(tensor), change_first if key.endswith("first") else _same)
        elif _LOW_RANK.search(key):
            official[key] = tensor.transposed()
        elif _VECTORS.search(key):
            official[key] = tensor.reshaped((1, 1, math.prod(tensor.shape)))
        else:
            official[key] = tensor
    return official


def _shifts(key: str, tensor: Stored) -> dict[str, Stored]:
    """RWKV-7's six vectors, from one tensor of all."""
    if tensor.shape[0] != len(_SHIFTS):
        return {key: tensor}

    def part(i: int) -> Stored:
        width = math.prod(tensor.shape[1:])
        return tensor._replace(shape=(1, 1, width), read=lambda: tensor.read()[i].reshape(1, 1, width))

    return {key.replace("x_rwkvag", f"x_{name}"): part(i) for i, name in enumerate(_SHIFTS)}


def _unpadded(tensor: Stored) -> Stored:
    """Without the axes of length 1 that ggml needs at the end: [H, 1, 1] is [H], [H, N, 1] is [H, N], [D] stays."""
    shape = tensor.shape
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return tensor.reshaped(shape)


def _changed(tensor: Stored, change: Callable[[np.ndarray], np.ndarray]) -> Stored:
    """The tensor after a function, computed in float64."""
    if change is _same:
        return tensor
    return tensor._replace(read=lambda: change(tensor.read().astype(np.float64)).astype(tensor.dtype))


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _log_negated(x: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(-x, _SMALLEST))


def _log_log_decay(x: np.ndarray) -> np.ndarray:
    return np.log(-np.log(np.clip(x, _SMALLEST, _BELOW_ONE)))
