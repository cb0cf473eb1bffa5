"""Saves a model, or a tuned state, in the formats that other programs read."""

from pathlib import Path
from typing import Any

from .convert.official import from_params
from .convert.stored import Checkpoint
from .convert.tuned_state import from_state
from .convert.write import format_of, write_checkpoint
from .models import Config


def save(path: str | Path, params: Any, config: Config, format: str | None = None) -> None:
    """Writes parameters in their dtype, so that `load` gives the same bits; what was at `path` is replaced at the end or not at all.

    Args:
        path: Of the file or folder.
        params: The model's.
        config: The model's.
        format: "safetensors" (official names), "pth" (the same, by torch: the extra `torch`; an ln_x_eps other than 64e-5 is not
            in it, and must be given to `load`; not for a transformer), "huggingface" (a folder that transformers reads for RWKV-4
            and the transformer, flash-linear-attention for RWKV-7), or None for what the path's suffix says:
            .safetensors or .st, .pth, or none for a folder.

    Raises:
        ValueError: The parameters do not fit the config, or the format cannot hold them: Hugging Face's layouts do not exist for
            other versions, and RWKV-7's cannot say every group norm's eps.
        ImportError: .pth without torch.
        OSError: The path cannot be written, or a folder there holds other things.
    """
    path = Path(path)
    chosen = format_of(path, format)
    checkpoint = Checkpoint(chosen, from_params(params, config), getattr(config, "ln_x_eps", None))
    write_checkpoint(path, checkpoint, config, chosen)


def save_state(path: str | Path, state: Any, config: Config, format: str | None = None) -> None:
    """Writes the wkv part of a state of one sequence as a tuned state, in the form that RWKV runtimes load.

    Args:
        path: Of the file, .safetensors or .pth.
        state: Of one sequence, of RWKV-5, 6 or 7; its token shifts are not a part of the format.
        config: The model's.
        format: "safetensors", "pth", or None for what the suffix says.

    Raises:
        ValueError, ImportError, OSError: As in `save`.
    """
    path = Path(path)
    chosen = format_of(path, format)
    if chosen == "huggingface":
        raise ValueError(f"{path}: a tuned state is a file; give a path that ends in .safetensors or .pth")
    write_checkpoint(path, Checkpoint(chosen, from_state(state, config)), config, chosen)
