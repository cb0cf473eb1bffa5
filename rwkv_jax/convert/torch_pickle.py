"""Files of torch.save, zip and older, read without torch and without running anything that they name.

A pickle can name any function and have it called. The reader here knows the few names that stand for tensors, each of which it
replaces by a stand-in that only writes down where the tensor lies; any other name is refused. A pickle can also set attributes of
what it has named, so that stand-ins have none that can be set.
"""

import errno
import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .stored import FLOATS, Checkpoint, Stored, mapped

_MAGIC = 0x1950A86A20F9469CFC6C
"""First value of an older file (torch.serialization.MAGIC_NUMBER)."""
_PROTOCOL = 1001
"""Second value of an older file."""
_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": FLOATS["bfloat16"],
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LOCAL_HEADER = 30
"""Bytes of a zip entry's own header before its name."""


class _Refused(Exception):
    """The file asks for something that a reader of tensors must not do."""


class _Storage(NamedTuple):
    """A run of values in the file."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides in values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(NamedTuple):
    """Stands for a type of storage, or for a function that makes tensors."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        return _REBUILD[self.name](*arguments)


def begins(head: bytes) -> bool:
    """Returns whether a file's first bytes are those of a zip archive or of a pickle."""
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05")


def read(path: Path) -> Checkpoint:
    """Returns the tensors of a state dict saved by torch.

    Raises:
        OSError: It cannot be read.
        ValueError: It is truncated or damaged, names anything but tensors, or holds other things than tensors.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        try:
            content, offsets = (_read_zip if zipped else _read_older)(file)
            tensors = {
                key: _stored(path, offsets, tensor)
                for key, tensor in _state_dict(content).items()
                if key != "_metadata"
            }
        except _Refused as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # A damaged pickle can raise nearly anything.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise  # The disk's: the file may be sound. Seeking where damaged offsets point has EINVAL.
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path}: truncated, or not a checkpoint of torch.save ({reason}); fetch or convert it again"
            ) from None
    return Checkpoint("torch.save, zip" if zipped else "torch.save, older than zip", tensors)


def _read_zip(file: BinaryIO) -> tuple[Any, Callable[[_Storage], int]]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        names = [name for name in entries if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise _Refused(
                f"a zip archive with {len(names)} data.pkl in it, not one; it is no checkpoint of torch.save"
            )
        root = names[0].removesuffix("data.pkl")

        def small(name: str) -> bytes:
            if entries[name].compress_type != zipfile.ZIP_STORED:  # It could become any size.
                raise _Refused("its entries are compressed; save it again with torch.save")
            return archive.read(name)

        if f"{root}byteorder" in entries and small(f"{root}byteorder") != b"little":
            raise _Refused("its numbers are big-endian; save it again on another machine")
        content = _unpickle(io.BytesIO(small(names[0])))

    def offset(storage: _Storage) -> int:
        entry = entries[f"{root}data/{storage.key}"]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise _Refused("its tensors are compressed or encrypted; save it again with torch.save")
        if entry.file_size < storage.size * storage.dtype.itemsize:
            raise ValueError(f"storage {storage.key} has {entry.file_size} bytes, too few")
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER)
        name_length, extra_length = struct.unpack("<HH", header[26:])
        return entry.header_offset + _LOCAL_HEADER + name_length + extra_length

    return content, offset


def _read_older(file: BinaryIO) -> tuple[Any, Callable[[_Storage], int]]:
    magic, protocol, system = _unpickle(file), _unpickle(file), _unpickle(file)
    if magic != _MAGIC or protocol != _PROTOCOL:
        raise _Refused("a pickle, but not one of torch.save")
    if not system["little_endian"]:
        raise _Refused("its numbers are big-endian; save it again on another machine")
    storages: dict[str, _Storage] = {}
    content, keys = _unpickle(file, storages), _unpickle(file)
    offsets = {}
    for key in keys:
        (size,) = struct.unpack("<q", file.read(8))
        if size != storages[key].size:
            raise ValueError(f"storage {key} has {size} values, not {storages[key].size}")
        offsets[key] = file.tell()
        file.seek(size * storages[key].dtype.itemsize, io.SEEK_CUR)
    return content, lambda storage: offsets[storage.key]


def _unpickle(file: Any, storages: dict[str, _Storage] | None = None) -> Any:
    return _Unpickler(file, {} if storages is None else storages).load()


class _Unpickler(
    pickle._Unpickler
):  # The one in Python: the one in C makes room for as many entries as a file claims to have.
    """Gives `_Tensor`s for tensors, notes their storages, and refuses every name that is not needed for that."""

    def __init__(self, file: Any, storages: dict[str, _Storage]):
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module == "torch" and name in _STORAGES) or (module == "torch._utils" and name in _REBUILD):
            return _Name(name)
        raise _Refused(
            f"it asks for {module}.{name}, which no tensor needs and which was not run; it may be hostile, or hold more than "
            "tensors: fetch the weights from where they were published, or save only the state dict"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *_ = pid
        if kind != "storage" or not isinstance(dtype, _Name) or type(key) is not str or not _natural(size):
            raise ValueError("a storage without a type, a key or a size")
        return self._storages.setdefault(key, _Storage(key, _STORAGES[dtype.name], size))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *unused: Any) -> _Tensor:
    del unused  # requires_grad and backward hooks
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    if not _natural(offset, *shape, *strides) or len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {shape} with strides {strides} at {offset}")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.size:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {storage.size} values")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *unused: Any) -> Any:
    del unused  # requires_grad and backward hooks
    return tensor


_REBUILD = {"_rebuild_tensor_v2": _tensor, "_rebuild_parameter": _parameter}


def _natural(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _state_dict(content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, dict):
        raise _Refused(f"it holds a {type(content).__name__}, not a state dict; save the model's state_dict() instead")
    others = [key for key, value in content.items() if not isinstance(value, _Tensor) or not isinstance(key, str)]
    if others:
        raise _Refused(
            f"besides tensors it holds {', '.join(map(repr, others[:8]))}; save only the state dict (a file converted by the rwkv "
            "package, with _strategy in it, cannot be used: take the file that it was made from)"
        )
    return content


def _stored(path: Path, offset_of: Callable[[_Storage], int], tensor: _Tensor) -> Stored:
    dtype, shape = tensor.storage.dtype, tensor.shape
    offset = offset_of(tensor.storage) + tensor.offset * dtype.itemsize
    reach = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, tensor.strides, strict=True))
    if offset + reach * dtype.itemsize > path.stat().st_size:
        raise ValueError("a tensor lies beyond the end of the file")

    def view() -> np.ndarray:
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(mapped(path, offset, dtype, (reach,)), shape, strides, writeable=False)

    return Stored(shape, dtype, dtype.name, view)
