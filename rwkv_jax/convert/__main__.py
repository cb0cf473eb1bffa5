"""Converts a checkpoint: python -m rwkv_jax.convert IN OUT [--dtype DTYPE] [--format FORMAT]."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ..command import errors_in_words
from .formats import is_huggingface, open_checkpoint
from .hub import locate
from .official import LN_X_EPS, config_in, from_params, weights
from .stored import FLOATS, Checkpoint
from .write import Format, format_of, write_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake of the user's ends it with a line of words and status 2."""
    parser = argparse.ArgumentParser(prog="python -m rwkv_jax.convert", description="Converts a checkpoint of RWKV.")
    parser.add_argument(
        "source", metavar="IN", help="a file, a folder or hf://ORG/REPO[/FILE][@REVISION], of any known format"
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="the file or folder to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as each tensor is")
    parser.add_argument("--format", choices=get_args(Format), help="default: what OUT ends in; a folder if in nothing")
    parser.add_argument("--ln_x_eps", type=float, help="group norm's eps, where IN does not say it (default: 64e-5)")
    options = parser.parse_args(arguments)
    with errors_in_words(parser):
        convert(options.source, options.target, options.dtype, options.format, options.ln_x_eps)
        print(f"wrote {options.target}")


def convert(source: str, target: Path, dtype: str | None, format: str | None, ln_x_eps: float | None) -> None:
    """Reads and writes a tensor at a time, without JAX's devices; tensors keep their types where `dtype` is None."""
    chosen = format_of(target, format)
    found = locate(source)
    if found.is_dir() and not is_huggingface(found):
        from ..load import load

        params, config = load(found, ln_x_eps=ln_x_eps)
        tensors = from_params(params, config)
    else:
        checkpoint = open_checkpoint(found)
        config = config_in(checkpoint, source, ln_x_eps)
        tensors = weights(checkpoint.tensors)
    if dtype is not None:
        tensors = {key: tensor.cast(FLOATS[dtype], key) for key, tensor in tensors.items()}
    eps = getattr(config, "ln_x_eps", LN_X_EPS)
    write_checkpoint(target, Checkpoint(chosen, tensors, eps), config, chosen)
    if chosen == "pth" and eps != LN_X_EPS:
        print(f"{target} cannot hold ln_x_eps={eps}, and is read with {LN_X_EPS}: give it whenever you load the file")


if __name__ == "__main__":
    main()
