"""The problems that every backend of wkv6 is tested and timed on."""

from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """One problem."""

    batch_size: int = 2
    num_tokens: int = 64
    num_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    time_decay: tuple[float, float] = (-8.0, 3.0)
    """Least and greatest raw decay; the log-decay is -exp of it."""
    constant: bool = False
    """Whether the decay is the same for all tokens, as in RWKV-5; otherwise each token draws its own."""
    reset: str = "none"
    """"none", "edges" (multiples of 8) or "random"."""
    ragged: bool = False
    """Whether rows have different lengths, 0 and T among them."""
    carried: bool = True
    """Whether a state comes in."""


CASES = {
    "one_token": Case(num_tokens=1),
    "one_token_constant_decay": Case(num_tokens=1, constant=True),
    "two_tokens": Case(num_tokens=2, carried=False),
    "shorter_than_a_chunk": Case(num_tokens=7),
    "whole_chunks": Case(num_tokens=64),
    "whole_chunks_constant_decay": Case(num_tokens=64, constant=True),
    "ragged_end": Case(num_tokens=101),
    "ragged_end_constant_decay": Case(num_tokens=101, constant=True),
    "empty_state": Case(num_tokens=101, carried=False),
    "weakest_decay": Case(num_tokens=101, time_decay=(-8.0, -8.0)),
    "strongest_decay": Case(num_tokens=101, time_decay=(3.0, 3.0)),
    "strongest_constant_decay": Case(num_tokens=101, time_decay=(3.0, 3.0), constant=True),
    "resets_at_chunk_edges": Case(num_tokens=64, reset="edges"),
    "resets_at_random": Case(num_tokens=101, reset="random"),
    "lengths": Case(batch_size=5, num_tokens=37, ragged=True),
    "lengths_constant_decay": Case(batch_size=5, num_tokens=37, ragged=True, constant=True),
    "lengths_and_resets": Case(batch_size=5, num_tokens=37, reset="random", ragged=True),
    "lengths_and_resets_constant_decay": Case(batch_size=5, num_tokens=37, reset="random", ragged=True, constant=True),
    "lengths_from_empty": Case(batch_size=5, num_tokens=37, ragged=True, carried=False),
    "one_row_one_head": Case(batch_size=1, num_tokens=33, num_heads=1),
    "more_keys_than_values": Case(num_tokens=33, key_dim=6, value_dim=3),
}
"""By name: quick enough for every backend and dtype."""

LONG = Case(num_tokens=4096, reset="random", ragged=True)
"""Once a backend."""


class Inputs(NamedTuple):
    """Arrays of a case, in float64: r, k [B, T, H, K]; v [B, T, H, V]; w as k or [H, K]; u [H, K]; state [B, H, K, V]."""

    r: Any
    k: Any
    v: Any
    w: Any
    u: Any
    state: Any
    reset: Any
    length: Any


def make(case: Case, seed: int = 0) -> Inputs:
    """Returns a case's arrays, drawn with numpy."""
    rng = np.random.default_rng(seed)
    tokens = (case.batch_size, case.num_tokens, case.num_heads)
    channel = (case.num_heads, case.key_dim)
    reset = np.zeros(tokens[:2], bool)
    if case.reset == "edges":
        reset[:, ::8] = rng.random((case.batch_size, -(-case.num_tokens // 8))) < 0.5
    elif case.reset == "random":
        reset = rng.random(tokens[:2]) < 0.1
    length = np.full(case.batch_size, case.num_tokens, np.int32)
    if case.ragged:
        length = rng.integers(1, case.num_tokens, case.batch_size).astype(np.int32)
        length[:2] = 0, case.num_tokens
    keys = (*tokens, case.key_dim)
    return Inputs(
        r=rng.normal(size=keys), k=rng.normal(size=keys), v=rng.normal(size=(*tokens, case.value_dim)),
        w=-np.exp(rng.uniform(*case.time_decay, channel if case.constant else keys)), u=rng.normal(size=channel),
        state=rng.normal(size=(case.batch_size, *channel, case.value_dim)) * case.carried, reset=reset, length=length,
    )  # fmt: skip
