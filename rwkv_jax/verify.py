"""Checks a model's numbers, layer by layer, against a float64 run: python -m rwkv_jax.verify FILE."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .command import errors_in_words
from .lm import forward
from .load import load
from .models import Config, module_of
from .text.tokenizers import get_tokenizer

DTYPES = ("float32", "bfloat16", "float64")
ALLOWANCE = 4.0
"""How many times what rounding explains an error may be.

What rounding explains is measured: the float64 run again, with every weight, input and output moved at random by up to one unit of
rounding. The run that is checked also rounds on the way, which this stands for and does not follow step by step.
"""
_TRIALS = 4
_FLOOR = 1e-13
"""Of what rounding explains; float64 against float64 is held to a little more than its own rounding."""


class Row(NamedTuple):
    """How far a layer's contribution, or the logits, are from the float64 run's: norm of the difference over norm."""

    name: str
    error: float
    explained: float
    """What rounding of the dtype explains, measured."""

    @property
    def diverges(self) -> bool:
        """Whether the error is more than rounding explains, or not a number."""
        return not self.error <= ALLOWANCE * max(self.explained, _FLOOR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; status 1 if the model diverges, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_jax.verify",
        description="Runs a model in a dtype and backend against a float64 run of the scan, layer by layer.",
    )
    parser.add_argument("file", metavar="FILE", help="whatever rwkv_jax.load reads")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of activations and weights (default: %(default)s)"
    )
    parser.add_argument("--backend", help="of the WKV operator (default: the best here)")
    parser.add_argument("--text", help="what to run it on, in the model's tokenizer (default: random tokens)")
    parser.add_argument("--tokens", type=int, default=128, help="how many random tokens (default: %(default)s)")
    parser.add_argument("--ln_x_eps", type=float, help="group norm's eps, where FILE does not say it (default: 64e-5)")
    options = parser.parse_args(arguments)
    with errors_in_words(parser), jax.enable_x64(True):
        params, config = load(options.file, ln_x_eps=options.ln_x_eps)
        tokens = _tokens(config, options.text, options.tokens)
        print(f"{config.architecture}, {options.dtype}, {options.backend or 'default backend'}, {tokens.size} tokens")
        print(f"{'':10} {'relative error':>15} {'rounding explains':>18}")
        rows = []
        for row in verify(params, config, tokens, options.dtype, options.backend):
            rows.append(row)
            mark = "DIVERGES" if row.diverges else "ok"
            print(f"{row.name:10} {row.error:15.2e} {row.explained:18.2e}  {mark}", flush=True)
    wrong = [row.name for row in rows if row.diverges]
    if wrong:
        print(f"diverges beyond the rounding of {options.dtype}, first in {wrong[0]}")
        raise SystemExit(1)
    print(f"within the rounding of {options.dtype}")


def verify(params: Any, config: Config, tokens: np.ndarray, dtype: str, backend: str | None = None) -> Iterator[Row]:
    """Yields a `Row` for each layer and one for the logits. To be used with jax_enable_x64.

    Each layer is given what the float64 run has there, so that its error is its own; the logits are those of whole runs.

    Args:
        params: The model's.
        config: The model's; its dtype is not used.
        tokens: Ids [1, T].
        dtype: "float32", "bfloat16" or "float64", of activations and weights.
        backend: Of the WKV operator in the run that is checked.
    """
    model, kind = module_of(config), jnp.dtype(dtype)
    # float64 parameters compute everything in float64, whatever the config says.
    checked = dataclasses.replace(config, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    unit = float(jnp.finfo(kind).eps)
    wide, narrow = partial(_cast, dtype=jnp.float64), partial(_cast, dtype=kind)
    state_dtype = jnp.promote_types(kind, jnp.float32)

    @jax.jit
    def exact(own, inputs):
        state = _layer(model.init_state(config, 1, jnp.float64), 0)
        return model.block(own, config, inputs, state, backend=config.reference_backend)[0]

    @jax.jit
    def rounded(own, inputs):
        state = _layer(model.init_state(config, 1, state_dtype), 0)
        return model.block(own, checked, inputs, state, backend=backend)[0]

    x = model.embed_tokens(params, jnp.asarray(tokens), jnp.float64)
    inputs = (x, model.init_depth(config, x))
    key = jax.random.key(0)
    for layer in range(config.num_layers):
        own = wide(_layer(params.blocks, layer))
        outputs = exact(own, inputs)
        actual = rounded(narrow(own), narrow(inputs))

        def error(found, outputs=outputs, before=inputs[0]):
            return _relative(found[0], outputs[0], outputs[0] - before, unit)

        keys = jax.random.split(jax.random.fold_in(key, layer), _TRIALS)
        moved = [_moved(k, exact(*_moved(k, (own, inputs), unit)), unit) for k in keys]
        yield Row(f"layer {layer}", error(actual), max(error(found) for found in moved))
        inputs = outputs

    run = jax.jit(forward, static_argnames=("config", "backend"))
    expected = run(wide(params), config, tokens, backend=config.reference_backend)[0]
    found = run(narrow(params), checked, tokens, backend=backend)[0]
    keys = jax.random.split(jax.random.fold_in(key, config.num_layers), _TRIALS)
    moved = [run(_moved(k, wide(params), unit), config, tokens, backend=config.reference_backend)[0] for k in keys]
    explained = max(_relative(one, expected, expected, unit) for one in moved)
    yield Row("logits", _relative(found, expected, expected, unit), explained)


def _layer(tree: Any, layer: int) -> Any:
    return jax.tree.map(lambda x: x[layer], tree)


def _cast(tree: Any, dtype: Any) -> Any:
    """The tree with its real numbers in another type; the depth may hold an index beside them."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _moved(key: jax.Array, tree: Any, unit: float) -> Any:
    """The tree with every real number moved at random by up to one unit of rounding."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))

    def one(own_key: jax.Array, x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x * (1 + unit * jax.random.uniform(own_key, x.shape, x.dtype, -1, 1))

    return structure.unflatten([one(k, x) for k, x in zip(keys, leaves, strict=True)])


def _relative(found: Any, expected: Any, contribution: Any, unit: float) -> float:
    """Norm of the difference over the norm of the contribution, or of the last bit of what it is added to, if that is more."""
    difference = np.linalg.norm(np.asarray(found, np.float64) - np.asarray(expected))
    size = max(np.linalg.norm(np.asarray(contribution)), unit * np.linalg.norm(np.asarray(expected)))
    return float(difference / size)


def _tokens(config: Config, text: str | None, count: int) -> np.ndarray:
    if text is None:
        if count < 1:
            raise ValueError(f"--tokens is {count}; it must be at least 1")
        return np.random.default_rng(0).integers(0, config.vocab_size, (1, count), dtype=np.int32)
    if config.tokenizer is None:
        raise ValueError(f"no tokenizer is known for a vocabulary of {config.vocab_size}; leave out --text")
    ids = get_tokenizer(config.tokenizer).encode(text)
    if not len(ids):
        raise ValueError("--text is empty; give some, or leave it out")
    return np.asarray(ids, np.int32)[None]


if __name__ == "__main__":
    main()
