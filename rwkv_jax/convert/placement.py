"""Puts a parameter on its devices straight from a file: on the host there is one copy of it, and one tensor of the file."""

import jax
import numpy as np
from jax.sharding import Sharding

from .. import params as p
from .stored import Stored, check_range

_ALIGNMENT = 64
"""Bytes; JAX's CPU backend takes over a numpy array that is aligned to this without copying it."""


def placed(
    param: p.Param, layers: list[Stored | None], num_layers: int, dtype: np.dtype, sharding: Sharding | None
) -> jax.Array:
    """Returns a parameter on its devices, having read each of its tensors once, whatever the number of devices.

    Args:
        param: Its declaration.
        layers: Its tensors, as official checkpoints have them; None is zeros.
        num_layers: The model's.
        dtype: Of the result.
        sharding: Of the result; None is JAX's default device.
    """
    shape = param.stacked_shape(num_layers)
    if sharding is None:
        whole = _buffer(shape, dtype)
        _fill([(whole, tuple(slice(size) for size in shape))], param, layers)
        return jax.block_until_ready(jax.device_put(whole, may_alias=True))
    where = {device: _part(index, shape) for device, index in sharding.addressable_devices_indices_map(shape).items()}
    shards = {part: _buffer(tuple(stop - start for start, stop in part), dtype) for part in where.values()}
    _fill([(shard, tuple(slice(*span) for span in part)) for part, shard in shards.items()], param, layers)
    on_devices = [
        jax.block_until_ready(jax.device_put(shards[part], device, may_alias=True)) for device, part in where.items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, on_devices)


def _part(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Where a device's part starts and stops along each axis; as slices cannot be, a key of a dict."""
    return tuple(span.indices(size)[:2] for span, size in zip(index or (), shape, strict=True))


def _fill(pieces: list[tuple[np.ndarray, tuple[slice, ...]]], param: p.Param, layers: list[Stored | None]) -> None:
    """Writes each piece, a buffer and the part of the parameter that it is."""
    for layer, stored in enumerate(layers):
        # None: a tensor that the model does not use, and that checkpoints may leave out.
        tensor = np.zeros(param.shape, np.float32) if stored is None else param.from_official(stored.read())
        for buffer, index in pieces:
            if not param.stacked:
                own, part = buffer, tensor[index]
            elif layer in range(*index[0].indices(len(layers))):
                own, part = buffer[layer - (index[0].start or 0)], tensor[index[1:]]
            else:
                continue
            with np.errstate(over="ignore"):
                own[...] = part
            check_range(part, own, param.key.format(layer=layer))


def _buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
