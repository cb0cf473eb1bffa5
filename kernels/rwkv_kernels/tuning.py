"""Sizes of the kernels' blocks, by op, head size and GPU, chosen ahead of time and never by timing under jit.

No GPU has timed them: of the cuts tried, they are some that spill no registers by the compilers' reports (see kernels/README.md).
"""

from typing import NamedTuple


class Block(NamedTuple):
    """How a GPU kernel is cut."""

    warps: int
    """Of 32 threads, a program."""
    values: int = 64
    """Value channels of a head that one program holds, at most."""
    key_piece: int = 16
    """Key channels that one product of matrices takes at a time: its operands are in registers as a whole."""
    all_values: int = 256
    """Value channels of a program of the kernel that pulls back all chunks, at most; it works on `values` of them at a time."""


class Sizes(NamedTuple):
    """The cuts of an op's kernels."""

    forward: Block
    backward: Block
    """Of the walk from the last chunk to the first."""
    chunk: Block | None = None
    """Of the kernel that pulls back all chunks at once; None where the walk does so."""


_SIZES = {
    ("wkv4", 64): Sizes(Block(2), Block(2)),
    ("wkv6", 64): Sizes(Block(8, 64, 16), Block(8, 64, 16), Block(8, 64, 16)),
    ("wkv6", 128): Sizes(Block(8, 32, 16), Block(8, 32, 16), Block(8, 16, 16)),
    ("wkv6", 256): Sizes(Block(8, 16, 32), Block(8, 16, 16), Block(8, 16, 16)),
    ("wkv7", 64): Sizes(Block(8, 64, 16), Block(8, 32, 16), Block(8, 64, 16)),
    ("wkv7", 128): Sizes(Block(8, 32, 16), Block(8, 16, 16), Block(8, 16, 16)),
    ("wkv7", 256): Sizes(Block(8, 16, 64), Block(8, 16, 16), Block(8, 16, 16, 128)),
    ("wkv7_triton", 64): Sizes(Block(8, 32, 16), Block(8, 64, 16), Block(8, 64, 16)),
    ("wkv7_triton", 128): Sizes(Block(8, 32, 16), Block(8, 16, 16), Block(8, 16, 16)),
    ("wkv7_triton", 256): Sizes(Block(8, 16, 32), Block(8, 16, 16), Block(8, 16, 16)),
}

_HOPPER = {("wkv7", 256): _SIZES["wkv7", 256]._replace(forward=Block(8, 16, 32))}
"""For GPUs of compute capability 9 and later, where they are others."""


def sizes(op: str, key_dim: int, capability: float | None = None) -> Sizes:
    """Returns the sizes for heads of `key_dim` key channels (wkv4: channels of a block): those of the next larger entry.

    `capability` is the NVIDIA GPU's; None stands for another device, which has the sizes of an A100.
    """
    size = min(size for name, size in _SIZES if name == op and size >= key_dim)
    table = _SIZES if capability is None or capability < 9 else _SIZES | _HOPPER
    return table[op, size]
