"""Loads a model from disk, whatever its format."""

from pathlib import Path
from typing import Any

from .convert import load_safetensors
from .models import Config


def load(path: str | Path, *, dtype: Any = None) -> tuple[Any, Config]:
    """Returns the parameters and config of a model on disk.

    Args:
        path: A .safetensors file under the official key names (RWKV-4), or a checkpoint of ours: a run's folder, which means
            its newest checkpoint, or one of its checkpoints/STEP.
        dtype: Of the parameters; None keeps the file's.

    Raises:
        FileNotFoundError: There is nothing there.
        ValueError: It is truncated, foreign, or does not fit its config; the message lists what is wrong.
    """
    path = Path(path)
    if path.is_dir():
        from .checkpoint import load_checkpoint  # Orbax takes seconds to import, and a file does not need it.

        params, config, _ = load_checkpoint(path, dtype)
        return params, config
    return load_safetensors(path, dtype)
