"""Safetensors files: a length, a header in JSON, and the tensors' bytes.

Read and written here rather than by the safetensors package so that one tensor at a time is in memory.

Source: https://github.com/huggingface/safetensors, section Format.
"""

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..models import ARCHITECTURES, Config
from .progress import progress
from .stored import FLOATS, Checkpoint, Stored, Tensors, mapped

_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": FLOATS["bfloat16"],
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _TYPES.items() if dtype in FLOATS.values()}
_ALIGNMENT = 8
"""Of the first tensor, as the safetensors package pads its header."""
_EPS = "ln_x_eps"
_CONFIG = "rwkv_jax_config"
"""Our own entries in the metadata, which other readers pass over."""


def begins(head: bytes) -> bool:
    """Returns whether a file's first bytes are those of this format."""
    return head[8:9] == b"{"


def read(path: Path) -> Checkpoint:
    """Returns what is in a file.

    Raises:
        ValueError: It is truncated or damaged.
    """
    try:
        header, start = _header(path)
        metadata = header.pop("__metadata__", {})
        room = path.stat().st_size - start
        tensors = {key: _stored(path, start, room, entry) for key, entry in header.items()}
        eps = float(metadata[_EPS]) if _EPS in metadata else None
        config = _config(json.loads(metadata[_CONFIG])) if _CONFIG in metadata else None
        return Checkpoint("safetensors", tensors, eps, config)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error}); fetch or convert it again") from None


def write(file: BinaryIO, tensors: Tensors, ln_x_eps: float | None = None, config: Config | None = None) -> None:
    """Writes tensors one at a time, in the types they have, and in the metadata what is to be found there again."""
    metadata = {"format": "pt"} | ({} if ln_x_eps is None else {_EPS: repr(ln_x_eps)})
    metadata |= {} if config is None else {_CONFIG: json.dumps(dataclasses.asdict(config))}
    header: dict[str, Any] = {"__metadata__": metadata}
    # Widest types first, as the safetensors package orders them, so that every tensor is aligned to its type.
    order = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
    end = 0
    for key in order:
        begin, end = end, end + tensors[key].num_bytes
        header[key] = {
            "dtype": _NAMES[tensors[key].dtype],
            "shape": tensors[key].shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    with progress("writing", tensors) as bar:
        for key in order:
            file.write(np.ascontiguousarray(tensors[key].read()).reshape(-1).view(np.uint8).data)
            bar.update(tensors[key].num_bytes)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if 8 + length > path.stat().st_size:
            raise ValueError(f"its header has {length} bytes, the file only {path.stat().st_size}")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    return header, 8 + length


def _config(values: dict[str, Any]) -> Config:
    return ARCHITECTURES[values["architecture"]](**values)


def _stored(path: Path, start: int, room: int, entry: dict[str, Any]) -> Stored:
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"a tensor has type {entry['dtype']}, which cannot be read here")
    dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"a tensor has shape {shape} and lies from {begin} to {end}")
    if end - begin != math.prod(shape) * dtype.itemsize or end > room:
        raise ValueError(f"a tensor of shape {shape} lies from {begin} to {end} of {room} bytes")
    return Stored(shape, dtype, dtype.name, lambda: mapped(path, start + begin, dtype, shape))
