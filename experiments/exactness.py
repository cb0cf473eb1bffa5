"""How exact the models are: `python experiments/exactness.py REFERENCE_FOLDER`.

The folder holds weights under the official names and, for 512 tokens each, float64 logits and states of a program that shares no
code with this one (`NAME.safetensors` and `expected-NAME.npz`). A table gives, for every model, backend and dtype, the greatest
absolute error of any logit, of a token's log-probability, and of the states after 200 and 512 tokens (relative where above 1).
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rwkv_jax
from rwkv_jax.models import ARCHITECTURES

BACKENDS = ("parallel", "scan")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="reference weights and expected values")
    folder = parser.parse_args().folder
    files = sorted(folder.glob("expected-*.npz"))
    if not files:
        parser.error(f"{folder}: no expected-*.npz here")
    jax.config.update("jax_enable_x64", True)
    print("| model | backend | dtype | logits | log-probabilities | states |\n|---|---|---|---|---|---|")
    for file in files:
        name = file.stem.removeprefix("expected-")
        kind, version = name.split("-") if "-" in name else ("tiny", name)
        if f"rwkv{version[0]}" not in ARCHITECTURES:
            continue
        for dtype in (np.float64, np.float32):
            params, config = rwkv_jax.load(folder / f"{kind}-rwkv-{version}.safetensors", dtype=dtype)
            for backend in BACKENDS:
                errors = measure(params, config, np.load(file), backend)
                print(
                    f"| {kind} {version} | {backend} | {np.dtype(dtype).name} | {' | '.join(f'{e:.0e}' for e in errors)} |"
                )


def measure(params: Any, config: Any, expected: Any, backend: str) -> tuple[float, float, float]:
    """Returns the greatest errors of logits, log-probabilities and states, the tokens being given in two pieces."""
    if hasattr(config, "ln_x_eps"):
        config = dataclasses.replace(config, ln_x_eps=float(expected["ln_x_eps"]))
    forward = jax.jit(rwkv_jax.forward, static_argnames=("config", "backend"))
    tokens, cut = expected["tokens"][None], int(expected["split"])
    head, middle = forward(params, config, tokens[:, :cut], backend=backend)
    tail, final = forward(params, config, tokens[:, cut:], middle, backend=backend)
    logits = np.concatenate([head[0], tail[0]])
    log_probabilities = np.asarray(jax.nn.log_softmax(logits[:-1]))[np.arange(511), tokens[0, 1:]]
    states = [
        np.max(np.abs(leaf[:, 0] - exact) / np.maximum(1, np.abs(exact)))
        for state, when in ((middle, "state_at_split"), (final, "final_state"))
        for leaf, exact in ((leaf, expected[f"{when}.{name}"]) for name, leaf in state._asdict().items())
    ]
    return (
        float(np.abs(logits - expected["logits"]).max()),
        float(np.abs(log_probabilities - expected["token_logprobs"]).max()),
        float(max(states)),
    )


if __name__ == "__main__":
    main()
