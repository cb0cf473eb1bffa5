"""ggml's quantised blocks of 32 values, as rwkv.cpp's version 101 has them, to float32.

Source: ggml, src/ggml-common.h (block_q4_0 and its siblings) and the functions dequantize_row_* of ggml-quants.c.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BLOCK = 32
"""Values in a block."""
_CHUNK = 2**15
"""Blocks decoded at a time, so that the working memory stays small."""


class Kind(NamedTuple):
    """One kind of quantisation."""

    num_bytes: int
    """Of a block."""
    decode: Callable[[np.ndarray], np.ndarray]
    """uint8 [n, num_bytes] -> float32 [n, 32]."""


def decode(kind: Kind, data: np.ndarray) -> np.ndarray:
    """Returns the float32 values of whole blocks, given their bytes."""
    blocks = data.reshape(-1, kind.num_bytes)
    values = np.empty((len(blocks), BLOCK), np.float32)
    for start in range(0, len(blocks), _CHUNK):
        values[start : start + _CHUNK] = kind.decode(blocks[start : start + _CHUNK])
    return values.reshape(-1)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    # The low nibbles are values 0 to 15, the high ones 16 to 31.
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    # Bit i of a little-endian uint32 belongs to value i.
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * _half(blocks, 0)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    values = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (values.astype(np.float32) - 16) * _half(blocks, 0)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    values = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return values.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _half(blocks, 0)


KINDS = {
    "Q4_0": Kind(18, _q4_0),
    "Q4_1": Kind(20, _q4_1),
    "Q5_0": Kind(22, _q5_0),
    "Q5_1": Kind(24, _q5_1),
    "Q8_0": Kind(34, _q8_0),
}
"""By ggml's name."""
