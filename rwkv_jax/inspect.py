"""Describes a checkpoint without reading its weights: python -m rwkv_jax.inspect FILE."""

import argparse
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .command import errors_in_words
from .convert.formats import is_huggingface, open_checkpoint
from .convert.hub import locate
from .convert.official import TIME_STATE, config_in
from .lm import count_params
from .models import Config

_NOT_SIZES = ("architecture", "tokenizer", "dtype", "remat", "embed_init")
"""Fields of a config that say how to compute or to begin, or that have a line of their own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake of the user's ends it with a line of words and status 2."""
    parser = argparse.ArgumentParser(prog="python -m rwkv_jax.inspect", description="Describes a checkpoint of RWKV.")
    parser.add_argument("file", metavar="FILE", help="a file, a folder or hf://ORG/REPO[/FILE][@REVISION]")
    options = parser.parse_args(arguments)
    with errors_in_words(parser):
        print(describe(options.file))


def describe(path: str | Path) -> str:
    """Returns lines on a checkpoint: format, version, sizes, types, number of parameters, tokenizer.

    Raises:
        FileNotFoundError, ValueError, ImportError: As in `load`.
    """
    found = locate(path)
    if found.is_dir() and not is_huggingface(found):
        from .checkpoint import load_settings

        format, config, types, tuned = "run of rwkv_jax", load_settings(found)[0], "float32", False
    else:
        checkpoint = open_checkpoint(found)
        format, config = checkpoint.format, config_in(checkpoint, path)
        tuned = any(TIME_STATE.fullmatch(key) for key in checkpoint.tensors)
        values = Counter[str]()
        for tensor in checkpoint.tensors.values():
            values[tensor.encoding] += math.prod(tensor.shape)
        types = ", ".join(f"{encoding} ({share / values.total():.1%})" for encoding, share in values.most_common())
    lines = {
        "format": format,
        "version": config.architecture,
        **_sizes(config),
        "types": types,
        "parameters": f"{count_params(config):,}",
        "tokenizer": config.tokenizer or f"not known (a vocabulary of {config.vocab_size})",
    }
    if tuned:
        lines["also has"] = "a tuned state, which rwkv_jax.load_state reads"
    return "\n".join(f"{name:12} {value}" for name, value in lines.items())


def _sizes(config: Config) -> dict[str, object]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _NOT_SIZES}
    return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    main()
