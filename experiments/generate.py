"""Continues a prompt: `python experiments/generate.py --checkpoint runs/quickstart --prompt "def "`.

Text appears as it is drawn. The model's tokenizer is the one it was trained with, which a file of weights tells by its vocabulary's
size.
"""

import sys
import time
from dataclasses import dataclass, fields
from typing import Literal

import jax
from jsonargparse import ArgumentParser, set_parsing_settings

from rwkv_jax import count_params, generate, unstack
from rwkv_jax.pretrained import load_pretrained


@dataclass(frozen=True)
class GenerateConfig:
    """What to continue, with which model."""

    checkpoint: str
    """A run's folder, one of its checkpoints/STEP, or whatever else rwkv_jax.load reads."""
    prompt: str = ""
    """Text to continue; empty: the start of a document."""
    max_tokens: int = 512
    """At most this many tokens are drawn."""
    stop: list[str] | None = None
    """Strings that end the text, such as '["\\n\\n"]'."""
    seed: int = 0
    """The same seed gives the same text."""
    tokenizer: Literal["bytes", "20b", "world"] | None = None
    """none: the one that the model was trained with."""
    tokenizer_file: str | None = None
    """Vocabulary of the 20b or world tokenizer; none: the one in the checkpoint, or an installed or downloaded one."""


def main() -> None:
    """Reads the command line and streams the text."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="generate.py", description=__doc__, allow_abbrev=False)
    parser.add_class_arguments(GenerateConfig)
    parser.add_class_arguments(generate.Sampling)
    values = vars(parser.parse_args())
    try:
        config = GenerateConfig(**{field.name: values[field.name] for field in fields(GenerateConfig)})
        sampling = generate.Sampling(**{field.name: values[field.name] for field in fields(generate.Sampling)})
        run(config, sampling)
    except (ValueError, OSError, ImportError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def run(config: GenerateConfig, sampling: generate.Sampling) -> None:
    """Prints the prompt and its continuation."""
    params, model, tokenizer, state = load_pretrained(
        config.checkpoint, tokenizer=config.tokenizer, tokenizer_file=config.tokenizer_file
    )
    # Below, what a token gains makes up for compiling every layer only after some thousand tokens.
    if jax.default_backend() == "cpu" and count_params(model) >= 100_000_000:
        params = unstack(params, donate=True)
    pieces = generate.stream(
        params, model, tokenizer, config.prompt,
        max_tokens=config.max_tokens, sampling=sampling, stop=config.stop or (), seed=config.seed,
        state=state,
    )  # fmt: skip
    print(config.prompt, end="", flush=True)
    start = time.perf_counter()
    for piece in pieces:
        print(piece, end="", flush=True)
    print(f"\n[{time.perf_counter() - start:.1f} s, compilation included]", file=sys.stderr)


if __name__ == "__main__":
    main()
