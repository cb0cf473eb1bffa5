"""A progress bar, for files that take a while."""

from typing import Any

from .stored import Tensors

_LARGE = 2**30
"""Bytes from which on a bar is shown."""


def progress(verb: str, tensors: Tensors) -> Any:
    """Returns a bar to use with `with`, whose `update` takes bytes; it shows on a terminal and for large tensors only."""
    from tqdm import tqdm  # Not with the package: it is slow to import.

    total = sum(tensor.num_bytes for tensor in tensors.values())
    hidden = None if total >= _LARGE else True  # None: hidden where there is no terminal.
    return tqdm(total=total, desc=verb, unit="B", unit_scale=True, unit_divisor=1024, disable=hidden)
