"""Megatron's .bin/.idx pair, which RWKV's Pile and World corpora come in: already tokenised, memory-mapped.

Layout of .idx, little-endian: magic, uint64 version 1, uint8 dtype code, uint64 sequences, uint64 documents, then int32 lengths
of sequences, int64 byte offsets of sequences, int64 first sequence of each document (and their number). Source: Megatron-LM's
indexed_dataset; BlinkDL/RWKV-LM, RWKV-v4neo/src/binidx.py.
"""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def read_binidx(prefix: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens [n], memory-mapped, and where sequences start, int64.

    Args:
        prefix: The path without .bin or .idx (either is accepted).

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: The magic, version, dtype or a size is wrong.
    """
    bin_path, idx_path = binidx_paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; data.path is the prefix of a .bin and an .idx")
    content = idx_path.read_bytes()
    if len(content) < _HEADER.size or content[:9] != MAGIC:
        raise ValueError(f"{idx_path}: does not begin with {MAGIC!r}; it is not a Megatron index")
    _, version, code, num_sequences, num_documents = _HEADER.unpack_from(content)
    if version != 1 or code not in _DTYPES:
        raise ValueError(
            f"{idx_path}: version {version}, dtype code {code}; read are version 1 and codes {sorted(_DTYPES)}"
        )
    expected = _HEADER.size + 12 * num_sequences + 8 * num_documents
    if len(content) != expected:
        raise ValueError(
            f"{idx_path}: {len(content)} bytes, its header means {expected}; it is truncated, fetch it again"
        )
    lengths = np.frombuffer(content, np.int32, num_sequences, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(content, np.int64, num_sequences, _HEADER.size + 4 * num_sequences)
    dtype = np.dtype(_DTYPES[code])
    starts = np.cumsum(lengths) - lengths
    if (lengths < 0).any() or not np.array_equal(pointers, starts * dtype.itemsize):
        raise ValueError(f"{idx_path}: its sequences do not follow one another in the .bin; write it anew")
    num_tokens, size = int(lengths.sum()), bin_path.stat().st_size
    if size != num_tokens * dtype.itemsize:
        raise ValueError(
            f"{bin_path}: {size} bytes, its index means {num_tokens * dtype.itemsize}; one of them is truncated"
        )
    if not num_tokens:
        raise ValueError(f"{bin_path}: no tokens")
    return np.memmap(bin_path, dtype, mode="r"), starts[lengths > 0]


def write_binidx(prefix: str | Path, documents: Iterable[np.ndarray], dtype: Any = np.uint16) -> None:
    """Writes documents of ids as PREFIX.bin and PREFIX.idx, one sequence a document.

    Raises:
        ValueError: An id does not fit the dtype.
    """
    bin_path, idx_path = binidx_paths(prefix)
    dtype = np.dtype(dtype)
    codes = {np.dtype(kind): code for code, kind in _DTYPES.items()}
    lengths = []
    with bin_path.open("wb") as file:
        for ids in documents:
            narrow = np.asarray(ids).astype(dtype)
            if not np.array_equal(narrow, ids):
                raise ValueError(
                    f"{bin_path}: document {len(lengths)} has ids that {dtype} cannot hold; give a wider dtype"
                )
            file.write(narrow.tobytes())
            lengths.append(len(narrow))
    sizes = np.array(lengths, np.int32)
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * dtype.itemsize
    documents_first = np.arange(len(sizes) + 1, dtype=np.int64)
    header = _HEADER.pack(MAGIC, 1, codes[dtype], len(sizes), len(documents_first))
    idx_path.write_bytes(header + sizes.tobytes() + pointers.tobytes() + documents_first.tobytes())


def binidx_paths(prefix: str | Path) -> tuple[Path, Path]:
    """Returns the paths of the .bin and the .idx, given their prefix or either."""
    text = str(Path(prefix).expanduser())
    text = text[:-4] if text.endswith((".bin", ".idx")) else text
    return Path(f"{text}.bin"), Path(f"{text}.idx")
