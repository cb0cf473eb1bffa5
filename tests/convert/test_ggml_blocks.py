"""Quantised blocks against a decoder that follows the format's description value by value."""

import struct

import numpy as np
import pytest
from checkpoint_files import official, random_params, write_rwkv_cpp

import rwkv_jax
from rwkv_jax.convert.ggml_blocks import KINDS, decode

CONFIG = rwkv_jax.RWKV4Config(vocab_size=8, num_layers=1, embed_dim=64)


def half(data):
    return np.float64(struct.unpack("<e", data)[0])


def by_the_description(kind, block):
    """32 values of one block, in Python's floats."""
    scale, rest = half(block[:2]), block[2:]
    if kind == "Q8_0":
        return [byte * scale for byte in struct.unpack("<32b", rest)]
    offset = 0.0
    if kind.endswith("_1"):
        offset, rest = half(rest[:2]), rest[2:]
    fifth = 0
    if kind.startswith("Q5"):
        fifth, rest = struct.unpack("<I", rest[:4])[0], rest[4:]
    values = []
    for i in range(32):
        byte = rest[i % 16]
        nibble = byte & 15 if i < 16 else byte >> 4
        number = nibble | ((fifth >> i) & 1) << 4
        zero = {"Q4_0": 8, "Q5_0": 16}.get(kind, 0)
        values.append((number - zero) * scale + offset)
    return values


def random_blocks(kind, count):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (count, KINDS[kind].num_bytes), dtype=np.uint8)
    blocks[:, 0:2] = np.frombuffer(rng.normal(size=count).astype("<f2").tobytes(), np.uint8).reshape(-1, 2)
    if kind.endswith("_1"):
        blocks[:, 2:4] = np.frombuffer(rng.normal(size=count).astype("<f2").tobytes(), np.uint8).reshape(-1, 2)
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_random_blocks_decode_as_described(kind):
    blocks = random_blocks(kind, 50)
    expected = np.array([by_the_description(kind, block.tobytes()) for block in blocks])
    found = decode(KINDS[kind], blocks.reshape(-1)).reshape(-1, 32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_block_made_by_hand():
    # Scale 2; the low nibbles are 0 to 15, the high ones 15 to 0; values 3 and 20 have their fifth bit.
    nibbles = bytes(i | (15 - i) << 4 for i in range(16))
    block = struct.pack("<e", 2.0) + struct.pack("<I", 1 << 3 | 1 << 20) + nibbles
    numbers = [*range(16), *range(15, -1, -1)]
    numbers[3] += 16
    numbers[20] += 16
    found = decode(KINDS["Q5_0"], np.frombuffer(block, np.uint8))
    np.testing.assert_array_equal(found, [2.0 * (n - 16) for n in numbers])


def test_more_blocks_than_are_decoded_at_a_time():
    blocks = np.tile(random_blocks("Q4_1", 1), (70000, 1))
    found = decode(KINDS["Q4_1"], blocks.reshape(-1)).reshape(-1, 32)
    np.testing.assert_array_equal(found, np.broadcast_to(found[0], found.shape))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_file_loads_with_its_values(kind, dtype, tmp_path):
    params = random_params(CONFIG)
    written = {}

    def quantised(key, tensor):
        if tensor.ndim != 2 or key.startswith(("emb", "head")):
            return None
        written[key] = random_blocks(kind, tensor.size // 32), tensor.shape
        return kind, written[key][0].tobytes()

    write_rwkv_cpp(tmp_path / "m", official(params, CONFIG), quantised)
    loaded, config = rwkv_jax.load(tmp_path / "m", dtype=dtype)
    found = official(loaded, config)
    assert len(written) == 7
    for key, (blocks, shape) in written.items():
        values = np.array([by_the_description(kind, block.tobytes()) for block in blocks]).reshape(shape)
        tolerance = 1e-6 if dtype is None else 2**-8
        np.testing.assert_allclose(found[key].astype(np.float32), values, rtol=tolerance, atol=tolerance)
