"""A model with what it needs to read text: its tokenizer, and the state that it starts from."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import is_checkpoint, load_first_state, load_settings
from .load import load
from .models import Config
from .text import Tokenizer, get_tokenizer
from .text.tokenizers import TokenizerName


class Pretrained(NamedTuple):
    """What `load_pretrained` gives."""

    params: Any
    config: Config
    tokenizer: Tokenizer
    start: Any
    """The state of one row that every text starts from; None is the zero state."""


def load_pretrained(
    path: str | Path,
    *,
    tokenizer: TokenizerName | None = None,
    tokenizer_file: str | Path | None = None,
    dtype: str | None = None,
    ln_x_eps: float | None = None,
) -> Pretrained:
    """Returns a model, its tokenizer, and the state learned by a run of state tuning.

    Args:
        path: Whatever `load` reads.
        tokenizer: Its name; None is the one that the model was trained with, as far as the path tells.
        tokenizer_file: Its vocabulary; None is the one in the checkpoint, or an installed or downloaded one.
        dtype: "float32", "bfloat16" or "float64", of parameters and activations; None keeps the file's.
        ln_x_eps: As in `load`.

    Raises:
        FileNotFoundError, ValueError, ImportError: As in `load` and `get_tokenizer`; or nothing tells which tokenizer it wants.
    """
    params, config = load(path, dtype=dtype, ln_x_eps=ln_x_eps)
    if dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(config, dtype=dtype)
    start = None
    if is_checkpoint(path):
        _, settings = load_settings(path)
        start = load_first_state(path)
        if tokenizer is None:
            tokenizer, tokenizer_file = settings.data.tokenizer, tokenizer_file or settings.data.tokenizer_file
    name = tokenizer or config.tokenizer
    if name is None:
        raise ValueError(f"{path} does not say which tokenizer it wants; give --tokenizer bytes, 20b or world")
    return Pretrained(params, config, get_tokenizer(name, tokenizer_file), start)
