"""RWKV-7's WKV operator in chunks of time (the WY form), in XLA operations that run on any device.

In a chunk of C tokens with c_t the log-decays summed up to token t and S the state before it, let

    A_t = a_t e^{c_{t-1}}     R_t = r_t e^{c_t}     B_t = b_t e^{-c_t}     K_t = k_t e^{-c_t}

be the rows of Q = [A; R] and P = [B; K]. With M = Q P^T, its A rows masked to earlier tokens and its R rows to the same token
too, what the tokens find along their a, U, obeys one triangular system, and the rest is matrix products:

    (I - M_AB) U = A S^T + M_AK V        X = [U; V]        Y = R S^T + M_R X        S' = (S + X^T P) e^{c_C}

No factor exceeds e^{0.6066 C}, so that float32 holds them with room to spare, and none depends on a later token. The system's
inverse is formed by halves, T_21 = T_22 M_21 T_11. A reset at a token cuts the pairs that it lies between out of M, and the state
before it out of Y, U and S'.

The backward pass stores the state before every chunk and redoes each chunk from it, last to first. With g the cotangents,

    gX = M_R^T gY + P e^{c_C} gS'^T      G = (I - M_AB)^{-T} gU      Z = [G; gY]      gM = Z X^T, masked
    gQ = gM P + Z S                      gP = gM^T Q + X gS' e^{c_C}                   gV = gX_V + M_AK^T G
    gS = gS' e^{c_C} + Z^T Q             gc_t = gQ_t Q_t - gP_t P_t, and at the chunk's end also the row sum of S' gS'

Loops are T/C long and hold one chunk at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LONGEST_CHUNK = 16
"""Tokens in a chunk, a power of two."""


class _Chunk(NamedTuple):
    """One chunk's tokens, heads before time: r, w, k, a, b [B, H, C, K]; v [B, H, C, V]."""

    r: Array
    w: Array
    k: Array
    v: Array
    a: Array
    b: Array


class _Factors(NamedTuple):
    """What a chunk's products are made of."""

    q: Array
    """[A; R] [B, H, 2C, K]."""
    p: Array
    """[B; K] [B, H, 2C, K]."""
    scale_q: Array
    """What a and r were multiplied by [B, H, 2C, K]."""
    scale_p: Array
    """What b and k were multiplied by [B, H, C, K]."""
    decay: Array
    """e^{c_C} [B, H, K, 1]."""


class _Masks(NamedTuple):
    """Which tokens see which: of pairs [2C, 2C], and, with resets, of states at either end."""

    pairs: Array
    from_start: Array | None
    """Rows of Q that see the state before the chunk [B, 1, 2C, 1]; None: all."""
    to_end: Array | None
    """Rows of P that the state after the chunk sees."""
    through: Array | None
    """Whether the state before the chunk reaches its end [B, 1, 1, 1]."""


def parallel(
    r: Float[Array, "B T H K"],
    w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    state: Float[Array, "B H V K"],
    reset: Bool[Array, "B T"] | None,
    length: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H V K"]]:
    """Computes WKV a chunk of tokens at a time; arguments and result as in `wkv7`, in the state's dtype.

    Its derivatives are reverse-mode only (a custom_vjp); use the scan for jvp and Hessians.
    """
    del length  # Tokens past it come in as zeros, and those change nothing.
    r, w, k, v, a, b = (x.astype(state.dtype) for x in (r, w, k, v, a, b))
    num_tokens = r.shape[1]
    padding = -num_tokens % chunk_length(num_tokens)
    if padding:
        r, w, k, v, a, b = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (r, w, k, v, a, b))
        reset = None if reset is None else jnp.pad(reset, ((0, 0), (0, padding)))
    y, state = _wkv(_Chunk(r, w, k, v, a, b), state.swapaxes(2, 3), reset)
    return y[:, :num_tokens], state.swapaxes(2, 3)


def chunk_length(num_tokens: int) -> int:
    """Returns the tokens in a chunk: the power of two that holds num_tokens, at most LONGEST_CHUNK."""
    return min(LONGEST_CHUNK, 1 << (num_tokens - 1).bit_length())


@jax.custom_vjp
def _wkv(tokens: _Chunk, state, reset):
    y, state, _ = _forward(tokens, state, reset)
    return y, state


def _wkv_fwd(tokens: _Chunk, state, reset):
    y, final, entries = _forward(tokens, state, reset)
    return (y, final), (tokens, reset, entries, final)


def _wkv_bwd(residuals, cotangents):
    tokens, reset, entries, final = residuals
    gy, gstate = cotangents
    num_chunks, size = _count(tokens)

    def body(i, carry):
        gtokens, gstate, after = carry
        i = num_chunks - 1 - i
        state = lax.dynamic_index_in_dim(entries, i, 0, keepdims=False)
        gchunk, gstate = _chunk_gradients(
            _at(tokens, i, size), _heads_first(_slice(gy, i, size)), state, after, gstate, _masks(reset, i, size)
        )
        return _Chunk(*(_put(g, own, i) for g, own in zip(gtokens, gchunk, strict=True))), gstate, state

    zeros = jax.tree.map(jnp.zeros_like, tokens)
    gtokens, gstate, _ = lax.fori_loop(0, num_chunks, body, (zeros, gstate, final))
    return gtokens, gstate, None


_wkv.defvjp(_wkv_fwd, _wkv_bwd)


def _forward(tokens: _Chunk, state: Float[Array, "B H K V"], reset):
    """Returns y, the final state, and the state before every chunk [N, B, H, K, V]."""
    num_chunks, size = _count(tokens)

    def body(i, carry):
        y, state, entries = carry
        own, new = _chunk(_at(tokens, i, size), state, _masks(reset, i, size))
        return _put(y, own, i), new, lax.dynamic_update_index_in_dim(entries, state, i, 0)

    entries = jnp.zeros((num_chunks, *state.shape), state.dtype)
    return lax.fori_loop(0, num_chunks, body, (jnp.zeros_like(tokens.v), state, entries))


def _chunk(chunk: _Chunk, state: Float[Array, "B H K V"], masks: _Masks):
    """Returns a chunk's y [B, H, C, V] and the state after it."""
    factors = _factors(chunk)
    x, m, _, found = _solve(chunk, factors, state, masks)
    size = chunk.r.shape[2]
    y = found[:, :, size:] + m[:, :, size:] @ x
    added = factors.p.swapaxes(2, 3) @ _masked(masks.to_end, x)
    new = factors.decay * (_masked(masks.through, state) + added)
    return y, new


def _solve(chunk: _Chunk, factors: _Factors, state, masks: _Masks):
    """Returns X = [U; V], M, the inverse T of I - M_AB, and what the rows of Q find in the state before the chunk."""
    size = chunk.r.shape[2]
    m = jnp.where(masks.pairs, factors.q @ factors.p.swapaxes(2, 3), 0)
    inverse = _inverse(m[:, :, :size, :size])
    found = _masked(masks.from_start, factors.q @ state)
    u = inverse @ (found[:, :, :size] + m[:, :, :size, size:] @ chunk.v)
    return jnp.concatenate([u, chunk.v], 2), m, inverse, found


def _chunk_gradients(chunk: _Chunk, gy, state, after, gafter, masks: _Masks):
    """Returns the cotangents of a chunk's tokens and of the state before it, given that of y and of the state after it."""
    size = chunk.r.shape[2]
    factors = _factors(chunk)
    x, m, inverse, _ = _solve(chunk, factors, state, masks)
    gadded = factors.decay * gafter
    gx = m[:, :, size:].swapaxes(2, 3) @ gy + _masked(masks.to_end, factors.p @ gadded)
    gu = inverse.swapaxes(2, 3) @ gx[:, :, :size]
    gv = gx[:, :, size:] + m[:, :, :size, size:].swapaxes(2, 3) @ gu
    z = jnp.concatenate([gu, gy], 2)
    gm = jnp.where(masks.pairs, z @ x.swapaxes(2, 3), 0)
    z = _masked(masks.from_start, z)
    gq = gm @ factors.p + z @ state.swapaxes(2, 3)
    gp = gm.swapaxes(2, 3) @ factors.q + _masked(masks.to_end, x) @ gadded.swapaxes(2, 3)
    gstate = _masked(masks.through, gadded) + factors.q.swapaxes(2, 3) @ z

    through_q, through_p = gq * factors.q, gp * factors.p
    gc = through_q[:, :, :size] + through_q[:, :, size:] - through_p[:, :, :size] - through_p[:, :, size:]
    gc = gc.at[:, :, -1].add((after * gafter).sum(-1))
    gw = lax.cumsum(gc, 2, reverse=True) - through_q[:, :, :size]
    gq = gq * factors.scale_q
    gb, gk = gp[:, :, :size] * factors.scale_p, gp[:, :, size:] * factors.scale_p
    return _Chunk(gq[:, :, size:], gw, gk, gv, gq[:, :, :size], gb), gstate


def _factors(chunk: _Chunk) -> _Factors:
    c = lax.cumsum(chunk.w, 2)
    scale_q = jnp.exp(jnp.concatenate([c - chunk.w, c], 2))
    scale_p = jnp.exp(-c)
    q = jnp.concatenate([chunk.a, chunk.r], 2) * scale_q
    p = jnp.concatenate([chunk.b * scale_p, chunk.k * scale_p], 2)
    return _Factors(q, p, scale_q, scale_p, scale_q[:, :, -1, :, None])


def _inverse(lower: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """Returns (I - lower)^-1 of strictly lower triangular matrices, halving them."""
    size = lower.shape[-1]
    if size == 1:
        return jnp.ones_like(lower)
    half = size // 2
    halves = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]])
    first, second = _inverse(halves)
    corner = second @ (lower[..., half:, :half] @ first)
    rows = jnp.concatenate([first, jnp.zeros_like(first)], -1), jnp.concatenate([corner, second], -1)
    return jnp.concatenate(rows, -2)


def _masks(reset: Bool[Array, "B T"] | None, i, size: int) -> _Masks:
    later = jnp.tri(size, k=-1, dtype=bool)
    pairs = jnp.concatenate([jnp.tile(later, (1, 2)), jnp.tile(later | jnp.eye(size, dtype=bool), (1, 2))])
    if reset is None:
        return _Masks(pairs, None, None, None)
    sequence = jnp.cumsum(_slice(reset, i, size), 1)  # 0 is that of the state before the chunk
    same = jnp.tile(sequence[:, :, None] == sequence[:, None], (1, 2, 2))[:, None]
    tiled = jnp.tile(sequence, (1, 2))[:, None, :, None]
    end = sequence[:, -1, None, None, None]
    return _Masks(pairs & same, tiled == 0, tiled == end, end == 0)


def _masked(mask: Array | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask, x, 0)


def _count(tokens: _Chunk) -> tuple[int, int]:
    """How many chunks there are, and the tokens in each."""
    size = chunk_length(tokens.r.shape[1])
    return tokens.r.shape[1] // size, size


def _at(tokens: _Chunk, i, size: int) -> _Chunk:
    return _Chunk(*(_heads_first(_slice(x, i, size)) for x in tokens))


def _slice(x: Array, i, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, 1)


def _put(x: Float[Array, "B T H K"], chunk: Float[Array, "B H C K"], i) -> Float[Array, "B T H K"]:
    return lax.dynamic_update_slice_in_dim(x, chunk.swapaxes(1, 2), i * chunk.shape[2], 1)


def _heads_first(x: Array) -> Array:
    return x.swapaxes(1, 2)
