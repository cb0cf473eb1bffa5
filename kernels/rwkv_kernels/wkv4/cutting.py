"""Cutting time into chunks for the forms of wkv4 that are parallel over time, and what masks do to a chunk's decay."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .reference import WKV4State


class Chunks(NamedTuple):
    """Inputs cut into chunks: k, v [B, N, C, D]; reset, valid [B, N, C, 1], None where no token is reset or all are valid."""

    k: Array
    v: Array
    reset: Array | None
    valid: Array | None

    def starts(self) -> Array | None:
        """The tokens that count and start a sequence [B, N, C, 1]; None: none does."""
        return self.reset if self.reset is None or self.valid is None else self.reset & self.valid


class Saved(NamedTuple):
    """What a forward walk leaves to its own backward one; `lax.cond` wants the same arrays of both."""

    first: Array
    """`scaled`: each token's denominator; `bounded`: the sum a before it [B, N, C, D]."""
    second: Array
    """`scaled`: the denominator's log-scale; `bounded`: the sum b before it [B, N, C, D]."""
    entries: WKV4State
    """The state before each chunk [B, N, D], which only `scaled` reads."""


def chunk_length(num_tokens: int) -> int:
    """Returns the power of two C at or below sqrt(T): about as many chunks as tokens in a chunk."""
    return 1 << ((num_tokens.bit_length() - 1) // 2)


def cut(k: Array, v: Array, reset: Bool[Array, "B T"] | None, length: Array | None) -> Chunks:
    """Returns the inputs in chunks; the last one is padded with tokens that do not count."""
    batch, num_tokens, _ = k.shape
    own = partial(split, chunk=chunk_length(num_tokens))
    if length is not None:
        valid = jnp.arange(num_tokens) < length[:, None]
    else:  # Only the padding of the last chunk is not.
        valid = None if num_tokens % chunk_length(num_tokens) == 0 else jnp.ones((batch, num_tokens), bool)
    reset, valid = (None if mask is None else own(mask[..., None]) for mask in (reset, valid))
    return Chunks(own(k), own(v), reset, valid)


def split(x: Array, chunk: int) -> Array:
    """[B, T, D] to [B, N, C, D], zeros at the end."""
    padding = -x.shape[1] % chunk
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    return x.reshape(x.shape[0], -1, chunk, x.shape[2])


def join(x: Array, num_tokens: int) -> Array:
    """[B, N, C, D] to [B, T, D]."""
    return x.reshape(x.shape[0], -1, x.shape[3])[:, :num_tokens]


def at(x: Any, i) -> Any:
    """The i-th token of every chunk, of each array."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 2, keepdims=False), x)


def put(x: Array, value: Array, i) -> Array:
    """x with another i-th token in every chunk."""
    return lax.dynamic_update_index_in_dim(x, value, i, 2)


def where(valid: Array | None, new: Any, old: Any) -> Any:
    """`new` where a token counts."""
    return new if valid is None else jax.tree.map(lambda x, y: jnp.where(valid, x, y), new, old)


def log_decay(inputs: Chunks, w: Float[Array, "D"], nothing_left: float) -> Float[Array, "B N D"]:
    """By how much a whole chunk decays what came before it; `nothing_left` where a sequence starts in it."""
    batch, num_chunks, chunk, width = inputs.k.shape
    decays = chunk * w if inputs.valid is None else inputs.valid.sum(2).astype(w.dtype) * w
    if (starts := inputs.starts()) is not None:
        decays = jnp.where(starts.any(2), nothing_left, decays)
    return jnp.broadcast_to(decays, (batch, num_chunks, width))


def count_after(flags: Bool[Array, "B T"]) -> Int[Array, "B T+1"]:
    """At position t, how many of flags[t:] are set."""
    counts = jnp.cumsum(flags[:, ::-1].astype(jnp.int32), 1)[:, ::-1]
    return jnp.pad(counts, ((0, 0), (0, 1)))
