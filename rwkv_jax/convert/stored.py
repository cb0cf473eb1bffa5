"""Tensors in files: their shapes and types are known, their values stay on disk until they are read."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..models import Config

FLOATS = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(jnp.bfloat16),
}
"""The types that a model's tensors may have, by name."""


class Stored(NamedTuple):
    """One tensor that `read` gives."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """Of what `read` gives."""
    encoding: str
    """How the file holds it: the name of a type, or a kind of quantisation."""
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Size of what `read` gives."""
        return math.prod(self.shape) * self.dtype.itemsize

    def reshaped(self, shape: tuple[int, ...]) -> "Stored":
        """Returns this with another shape, if that holds as many values; unchanged if not, for whoever checks shapes to say."""
        if math.prod(shape) != math.prod(self.shape):
            return self
        return self._replace(shape=shape, read=lambda: self.read().reshape(shape))

    def transposed(self) -> "Stored":
        """Returns this with its last two axes swapped; unchanged if it has fewer."""
        if len(self.shape) < 2:
            return self
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return self._replace(shape=shape, read=lambda: self.read().swapaxes(-1, -2))

    def cast(self, dtype: np.dtype, name: str) -> "Stored":
        """Returns this, whose name is for errors, in another type."""

        def read() -> np.ndarray:
            values = self.read()
            with np.errstate(over="ignore"):
                cast = values.astype(dtype)
            check_range(values, cast, name)
            return cast

        return self._replace(dtype=dtype, encoding=dtype.name, read=read)


Tensors = Mapping[str, Stored]
"""Tensors by name."""


class Checkpoint(NamedTuple):
    """What a file or folder holds."""

    format: str
    """What kind of file it is, in words."""
    tensors: dict[str, Stored]
    ln_x_eps: float | None = None
    """Group norm's eps, where the format says it."""
    config: Config | None = None
    """The model's, where the format says all of it."""


def check_range(values: np.ndarray, cast: np.ndarray, name: str) -> None:
    """Raises ValueError if values of the tensor `name` are beyond the range of float16, to which they were cast."""
    if cast.dtype == np.float16 and (lost := np.isinf(cast) & ~np.isinf(values)).any():
        raise ValueError(
            f"{name} has a value of {values[lost][0]:g}, and float16 ends at 65504; take bfloat16 or float32"
        )


def unique(named: Iterable[tuple[str, Stored]]) -> dict[str, Stored]:
    """Returns tensors by name.

    Raises:
        ValueError: Names stand for more than one; they are listed.
    """
    pairs = list(named)
    tensors = dict(pairs)
    if len(tensors) < len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        more = f" and {len(twice) - 8} more" if len(twice) > 8 else ""
        raise ValueError(
            f"there is more than one tensor for {', '.join(twice[:8])}{more}; remove those that do not belong"
        )
    return tensors


def mapped(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a part of a file, memory-mapped for as long as the result lives."""
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))
