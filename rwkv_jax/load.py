"""Loads a model, or a tuned state, from disk or the Hugging Face hub, whatever its format."""

import dataclasses
from pathlib import Path
from typing import Any

from .convert.formats import is_huggingface, open_checkpoint
from .convert.hub import locate
from .convert.official import (
    Shardings,
    check_available,
    config_in,
    float_dtype,
    shardings_of,
    to_params,
    weights,
)
from .convert.tuned_state import to_state
from .models import Config


def load(
    path: str | Path, *, dtype: Any = None, sharding: Shardings | None = None, ln_x_eps: float | None = None
) -> tuple[Any, Config]:
    """Returns the parameters and config of a model; format and version are told by content, not by name.

    Files stay on disk, memory-mapped, and go to devices a parameter at a time.

    Args:
        path: A .safetensors or .pth file under BlinkDL's official names, a folder of Hugging Face's (RWKV-4 and GPT-NeoX, such as
            Pythia, of transformers, RWKV-7 of flash-linear-attention), a .bin of rwkv.cpp, or a checkpoint of ours: a run's folder,
            which means its newest checkpoint, or one of its checkpoints/STEP. hf://ORG/REPO[/FILE][@REVISION] fetches any of these
            from the hub.
        dtype: Of the parameters; None keeps the file's (float32 for what is quantised).
        sharding: Where the parameters go: a Sharding for all, a function from each `Param` to one, or a tree of them.
        ln_x_eps: Group norm's eps, which official files do not hold; None is what the format says, else 64e-5. RWKV-4 has none.

    Raises:
        FileNotFoundError: There is nothing there.
        ValueError: It is truncated, foreign, or not whole; the message lists what is wrong.
        ImportError: hf:// without the extra `hub`.
    """
    dtype = float_dtype(dtype)
    check_available(dtype, "every parameter")
    found = locate(path)
    if found.is_dir() and not is_huggingface(found):
        return _load_run(found, dtype, sharding, ln_x_eps)
    checkpoint = open_checkpoint(found)
    config = config_in(checkpoint, path, ln_x_eps)
    return to_params(weights(checkpoint.tensors), config, dtype, sharding), config


def load_state(path: str | Path, config: Config) -> Any:
    """Returns the tuned state in a file, for one sequence: `blocks.i.att.time_state`, all else being zeros.

    Args:
        path: A .pth or .safetensors file, or hf://; what else it holds is passed over.
        config: That of the model which the state was tuned for: RWKV-5, 6 or 7.

    Raises:
        FileNotFoundError, ValueError, ImportError: As in `load`.
    """
    return to_state(open_checkpoint(locate(path)).tensors, config, path)


def _load_run(path: Path, dtype: Any, sharding: Any, ln_x_eps: float | None) -> tuple[Any, Config]:
    from .checkpoint import load_checkpoint  # Orbax takes seconds to import, and a file does not need it.

    where = None if sharding is None else lambda config: shardings_of(sharding, config)
    params, config, _ = load_checkpoint(path, dtype, where)
    if ln_x_eps is not None and hasattr(config, "ln_x_eps"):
        config = dataclasses.replace(config, **{"ln_x_eps": ln_x_eps})
    return params, config
