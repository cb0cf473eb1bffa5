"""The WKV operator of RWKV-5 and RWKV-6 in chunks, as matrix products in XLA operations that run on any device.

Time is cut into chunks of C tokens, a power of two. Inside a chunk every output is a product with the state at its start and
with a [C, C] matrix of scores,

    y_i = (r_i e^{p_i}) S + sum_{j<i} a_ij v_j + (r_i . u k_i) v_i        a_ij = sum_k r_i k_j exp(sum_{j<s<i} w_s)
    S  <- diag(e^{sum w}) S + sum_j (k_j e^{q_j}) v_j^T                   p_i = sum_{s<i} w_s,  q_j = sum_{s>j} w_s

The decay is unbounded, so no exponent may be positive: exp(p_i) exp(-p_j) overflows. Every pair j < i first differs in one bit
of its indices, l, which i has and j has not: they lie in neighbouring blocks of 2^l tokens, and the decay between them factors
at the boundary of these blocks into two numbers of at most 1,

    exp(sum_{j<s<i} w_s) = exp(sum of i's block before i) exp(sum of j's block after j)

So log2(C) products of matrices give all scores, with one exponential a token, channel and level, and every sum of w starts at
its boundary: differences of long sums, which lose their digits where the decay is strong, are never formed.

The backward pass stores the state at every chunk's start only; it walks the chunks in reverse and recomputes each one.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

MAX_CHUNK = 16
"""Tokens in a chunk, at most: 32 is as fast forward and slower backward on a CPU."""
LEAST_LOG_DECAY = -1e4
"""What w is held above, so that sums stay finite; exp of it is 0 in float64 too."""

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def parallel(
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    w: Float[Array, "B T H K"] | Float[Array, "H K"],
    u: Float[Array, "H K"],
    state: Float[Array, "B H K V"],
    reset: Bool[Array, "B T"] | None,
    length: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Computes WKV in chunks; arguments and result as in `wkv6`, in the state's dtype.

    Its derivatives are reverse-mode only (a custom_vjp); use the scan for jvp and Hessians.
    """
    r, k, v, w = (x.astype(state.dtype) for x in (r, k, v, w))
    num_tokens = k.shape[1]
    chunk = chunk_length(num_tokens)
    if length is not None:  # r, k and v of other tokens are 0: without decay too they do nothing.
        valid = jnp.arange(num_tokens) < length[:, None]
        w = jnp.where(valid[..., None, None], w, 0)
        reset = None if reset is None else reset & valid
    bad = ~jnp.isfinite(sum(x.sum((2, 3)) for x in (r, k, v))) | jnp.isnan(w.sum((-2, -1)))
    if w.ndim == 2:  # All rows share one decay, and its exponentials.
        w = jnp.broadcast_to(w, (1, num_tokens, *w.shape))
    tokens = (_split(x, chunk).swapaxes(2, 3) for x in (r, k, v, w))
    marks = _split(bad, chunk), None if reset is None else _split(reset, chunk)
    y, state = _wkv(*tokens, u, state, *marks)
    y = y.transpose(1, 0, 3, 2, 4).reshape(*v.shape[:1], -1, *v.shape[2:])[:, :num_tokens]
    spoilt = _spoilt(bad, reset)[..., None, None]
    return jnp.where(spoilt, jnp.nan, y), jnp.where(spoilt[:, -1:], jnp.nan, state)


def chunk_length(num_tokens: int) -> int:
    """Returns the tokens in a chunk: a power of two, at most `MAX_CHUNK` and num_tokens."""
    return min(MAX_CHUNK, 1 << (num_tokens.bit_length() - 1))


@jax.custom_vjp
def _wkv(r, k, v, w, u, state, bad, reset):
    """WKV of N chunks: y [N, B, H, C, V] and the state; arguments as in `_chunk`, with a leading N but for u and state."""
    return _wkv_fwd(r, k, v, w, u, state, bad, reset)[0]


def _wkv_fwd(r, k, v, w, u, state, bad, reset):
    def step(state, inputs):
        r, k, v, w, bad, reset = inputs
        y, new = _chunk(r, k, v, w, u, state, bad, reset)
        return new, (y, state)

    final, (y, entries) = lax.scan(step, state, (r, k, v, w, bad, reset))
    return (y, final), (r, k, v, w, u, entries, bad, reset)


def _wkv_bwd(residuals, cotangents):
    r, k, v, w, u, entries, bad, reset = residuals
    gy, gfinal = cotangents

    def step(carry, inputs):
        gstate, gu = carry
        (r, k, v, w, bad, reset), state, gy = inputs
        _, pullback = jax.vjp(partial(_chunk, bad=bad, reset=reset), r, k, v, w, u, state)
        *gtokens, gu_here, gstate = pullback((gy, gstate))
        return (gstate, gu + gu_here), gtokens

    inputs = ((r, k, v, w, bad, reset), entries, gy)
    (gstate, gu), gtokens = lax.scan(step, (gfinal, jnp.zeros_like(u)), inputs, reverse=True)
    return *gtokens, gu, gstate, None, None


_wkv.defvjp(_wkv_fwd, _wkv_bwd)


def _chunk(r, k, v, w, u, state, bad, reset):
    """One chunk: r, k, v [B, H, C, *], w [B or 1, H, C, K], state [B, H, K, V], bad, reset [B, C] or None -> (y, state)."""
    chunk = r.shape[2]
    r, k, v = (jnp.where(bad[:, None, :, None], 0, x) for x in (r, k, v))
    w = jnp.where(jnp.isnan(w), 0, jnp.maximum(w, LEAST_LOG_DECAY))
    before, after, levels, pairs = _sums(chunk, w.dtype)
    past, future = (jnp.exp(_einsum("ts,bhsk->bhtk", sums, w)) for sums in (before, after))
    r_past, k_future, kept = r * past, k * future, jnp.exp(w.sum(2))[..., None]
    scores = jnp.where(np.eye(chunk, dtype=bool), (r * u[:, None] * k).sum(-1, keepdims=True), 0)
    if len(levels):
        decays = jnp.exp(_einsum("lts,bhsk->bhltk", levels, w))
        by_level = _einsum("bhltk,bhlsk->bhlts", r[:, :, None] * decays, k[:, :, None] * decays)
        scores = scores + jnp.where(pairs, by_level, 0).sum(2)
    if reset is not None:
        started = jnp.cumsum(reset, 1)[:, None]  # How many sequences have started in this chunk, at each token.
        scores = jnp.where(started[..., None] == started[..., None, :], scores, 0)
        k_future = jnp.where((started == started[..., -1:])[..., None], k_future, 0)
    y, added = _einsum("bhts,bhsv->bhtv", scores, v), _einsum("bhtk,bhtv->bhkv", k_future, v)
    of_state, kept = _einsum("bhtk,bhkv->bhtv", r_past, state), kept * state
    if reset is not None:
        of_state = jnp.where(started[..., None] == 0, of_state, 0)
        kept = jnp.where((started[..., -1:] == 0)[..., None], kept, 0)
    return y + of_state, kept + added


def _sums(chunk: int, dtype):
    """Which tokens s each token t sums w over: before it and after it [C, C], and to the boundary of its block at every level

    [levels, C, C]; and the pairs (i, j) whose scores a level gives [levels, C, C].
    """
    t, s = np.arange(chunk)[:, None], np.arange(chunk)
    level = np.arange(chunk.bit_length() - 1)[:, None, None]
    right = (t >> level) % 2 == 1
    same_block = t >> level == s >> level
    levels = same_block & np.where(right, s < t, s > t)
    pairs = right & ((t >> level) - 1 == s >> level)
    return (s < t).astype(dtype), (s > t).astype(dtype), levels.astype(dtype), pairs


def _spoilt(bad, reset) -> Bool[Array, "B T"]:
    """Whether a token comes at or after one that is not finite, in its sequence.

    In a product with a matrix of zeros such a token would reach those before it too, and those after a reset: so it takes no
    part in the products, and is put back in what depends on it.
    """

    def last(flags):
        return lax.cummax(jnp.where(flags, jnp.arange(flags.shape[1]), -1), axis=1)

    return last(bad) >= (0 if reset is None else jnp.maximum(last(reset), 0))


def _split(x: Array, chunk: int) -> Array:
    """[B, T, ...] as [N, B, C, ...], padded with tokens that do nothing."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
