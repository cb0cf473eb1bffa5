"""Writes files of torch.save, by torch itself, which the extra `torch` brings."""

from typing import Any, BinaryIO

import numpy as np

from .progress import progress
from .stored import FLOATS, Tensors


def write(file: BinaryIO, tensors: Tensors) -> None:
    """Writes a state dict. All tensors are in memory at once, as torch.save needs them.

    Raises:
        ImportError: torch is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            'writing .pth needs torch: pip install "rwkv-jax[torch]", or write .safetensors, which holds the same'
        ) from None
    state_dict = {}
    with progress("writing", tensors) as bar:
        for key, tensor in tensors.items():
            state_dict[key] = _tensor(torch, tensor.read())
            bar.update(tensor.num_bytes)
        torch.save(state_dict, file)


def _tensor(torch: Any, values: np.ndarray) -> Any:
    if values.dtype == FLOATS["bfloat16"]:  # torch takes no bfloat16 of numpy's, but its bits.
        return torch.from_numpy(np.array(values.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))  # A copy: torch wants to be able to write to it.
