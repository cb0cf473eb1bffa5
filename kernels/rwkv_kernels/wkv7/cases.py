"""The problems that every backend of wkv7 is tested and timed on."""

from typing import Any, NamedTuple

import numpy as np

STRONGEST = -np.exp(-0.5)
"""The least log-decay that RWKV-7 can form."""


class Case(NamedTuple):
    """One problem."""

    batch_size: int = 2
    num_tokens: int = 64
    num_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    log_decay: tuple[float, float] = (STRONGEST, 0.0)
    """Bounds that log-decays are drawn between."""
    reset: str = "none"
    """"none", "edges" (multiples of 16) or "random"."""
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
    "no_decay": Case(num_tokens=101, log_decay=(0.0, 0.0)),
    "strongest_decay": Case(num_tokens=101, log_decay=(STRONGEST, STRONGEST)),
    "resets_at_chunk_edges": Case(num_tokens=101, reset="edges"),
    "resets_at_random": Case(num_tokens=101, reset="random"),
    "lengths": Case(batch_size=5, num_tokens=37, ragged=True),
    "lengths_and_resets": Case(batch_size=5, num_tokens=37, reset="random", ragged=True),
    "lengths_from_empty": Case(batch_size=5, num_tokens=37, ragged=True, carried=False),
    "values_of_another_width": Case(batch_size=1, num_tokens=33, num_heads=1, key_dim=5, value_dim=3),
    "several_blocks": Case(num_tokens=21, num_heads=3, key_dim=32, value_dim=128, reset="random"),
    "released_head_size": Case(batch_size=1, num_tokens=70, num_heads=1, key_dim=64, value_dim=64),
}
"""By name: quick enough for every backend and dtype."""

LONG = Case(num_tokens=4096, reset="random", ragged=True)
"""Once a backend."""


class Inputs(NamedTuple):
    """Arrays of a case, in float64: r, w, k, a, b [B, T, H, K]; v [B, T, H, V]; state [B, H, V, K]."""

    r: Any
    w: Any
    k: Any
    v: Any
    a: Any
    b: Any
    state: Any
    reset: Any
    length: Any


def make(case: Case, seed: int = 0) -> Inputs:
    """Returns a case's arrays, drawn with numpy as the model forms them: a = -kk, b = kk * iclr with |kk| = 1."""
    rng = np.random.default_rng(seed)
    shape = (case.batch_size, case.num_tokens, case.num_heads, case.key_dim)
    kk = rng.normal(size=shape)
    kk /= np.linalg.norm(kk, axis=-1, keepdims=True)
    reset = np.zeros(shape[:2], bool)
    if case.reset == "edges":
        reset[:, ::16] = rng.random((case.batch_size, -(-case.num_tokens // 16))) < 0.5
    elif case.reset == "random":
        reset = rng.random(shape[:2]) < 0.1
    length = np.full(case.batch_size, case.num_tokens, np.int32)
    if case.ragged:
        length = rng.integers(1, case.num_tokens, case.batch_size).astype(np.int32)
        length[:2] = 0, case.num_tokens
    state = rng.normal(size=(case.batch_size, case.num_heads, case.value_dim, case.key_dim))
    return Inputs(
        r=rng.normal(size=shape), w=rng.uniform(*case.log_decay, size=shape), k=rng.normal(size=shape),
        v=rng.normal(size=(*shape[:3], case.value_dim)), a=-kk, b=kk * rng.random(shape),
        state=state * case.carried, reset=reset, length=length,
    )  # fmt: skip
