"""The problems that every backend of wkv4 is tested and timed on."""

from typing import Any, NamedTuple

import numpy as np

from .reference import EMPTY


class Case(NamedTuple):
    """One problem."""

    batch_size: int = 2
    num_tokens: int = 64
    embed_dim: int = 16
    time_decay: tuple[float, float] = (-8.0, 3.0)
    """Least and greatest raw decay over the channels; the log-decay is -exp of it."""
    key_scale: float = 1.0
    reset: str = "none"
    """"none", "edges" (multiples of 8) or "random"."""
    ragged: bool = False
    """Whether rows have different lengths, 0 and T among them."""
    carried: bool = True
    """Whether a state comes in."""


CASES = {
    "one_token": Case(num_tokens=1),
    "two_tokens": Case(num_tokens=2, carried=False),
    "shorter_than_a_chunk": Case(num_tokens=7),
    "whole_chunks": Case(num_tokens=64),
    "ragged_end": Case(num_tokens=101),
    "empty_state": Case(num_tokens=101, carried=False),
    "weakest_decay": Case(num_tokens=101, time_decay=(-8.0, -8.0)),
    "strongest_decay": Case(num_tokens=101, time_decay=(3.0, 3.0)),
    "resets_at_chunk_edges": Case(num_tokens=64, reset="edges"),
    "resets_at_random": Case(num_tokens=101, reset="random"),
    "lengths": Case(batch_size=5, num_tokens=37, ragged=True),
    "lengths_and_resets": Case(batch_size=5, num_tokens=37, reset="random", ragged=True),
    "lengths_from_empty": Case(batch_size=5, num_tokens=37, ragged=True, carried=False),
    "one_row_few_channels": Case(batch_size=1, num_tokens=33, embed_dim=3),
}
"""By name: quick enough for every backend and dtype."""

EXTREME_KEYS = Case(num_tokens=101, key_scale=80.0)
"""Exponents of +-80 leave float32 few digits after the point; a backend must stay finite and err no more than the scan."""

LONG = Case(num_tokens=4096, reset="random", ragged=True)
"""Once a backend."""


class Inputs(NamedTuple):
    """Arrays of a case, in float64: k, v [B, T, D]; w, u [D]; state (aa, bb, pp) [B, D]."""

    k: Any
    v: Any
    w: Any
    u: Any
    state: tuple[Any, Any, Any]
    reset: Any
    length: Any


def make(case: Case, seed: int = 0) -> Inputs:
    """Returns a case's arrays, drawn with numpy."""
    rng = np.random.default_rng(seed)
    shape, row = (case.batch_size, case.num_tokens, case.embed_dim), (case.batch_size, case.embed_dim)
    keys = rng.normal(size=shape) if case.key_scale == 1 else rng.uniform(-1, 1, size=shape)
    reset = np.zeros(shape[:2], bool)
    if case.reset == "edges":
        reset[:, ::8] = rng.random((case.batch_size, -(-case.num_tokens // 8))) < 0.5
    elif case.reset == "random":
        reset = rng.random(shape[:2]) < 0.1
    length = np.full(case.batch_size, case.num_tokens, np.int32)
    if case.ragged:
        length = rng.integers(1, case.num_tokens, case.batch_size).astype(np.int32)
        length[:2] = 0, case.num_tokens
    if case.carried:
        state = (rng.normal(size=row), 1 + rng.random(row), rng.normal(size=row))
    else:
        state = (np.zeros(row), np.zeros(row), np.full(row, EMPTY))
    return Inputs(
        k=keys * case.key_scale, v=rng.normal(size=shape), w=-np.exp(np.linspace(*case.time_decay, case.embed_dim)),
        u=rng.normal(size=case.embed_dim), state=state, reset=reset, length=length,
    )  # fmt: skip
