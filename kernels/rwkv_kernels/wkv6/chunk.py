"""The WKV operator of RWKV-5 and RWKV-6 as a kernel's recurrence: one chunk of one head, as products of matrices.

The mathematics is that of `parallel.py`: no exponent is positive, because the decay between two tokens is factored at the boundary
of the blocks of 2^l tokens that they lie side by side in. The state is [V, K] here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..recurrence import Problem, Recurrence, Run, dot, grid, pad_channels, pad_tokens, sequence_of
from .parallel import LEAST_LOG_DECAY


def kernel(run: Run, r, k, v, w, u, state, reset, length) -> tuple[Array, Array]:
    """Computes WKV through `run`; arguments and result as in `wkv6`, tokens in their own dtype."""
    size = RECURRENCE.num_tokens
    w = w.astype(state.dtype) if w.ndim == 2 else w
    num_tokens, key_dim, value_dim = k.shape[1], k.shape[3], v.shape[3]
    if w.ndim == 2 and (length is not None or num_tokens % size):  # Past its length a row does not decay.
        w = jnp.broadcast_to(w, k.shape)
    if length is not None:
        valid = jnp.arange(num_tokens) < length[:, None]
        w = jnp.where(valid[..., None, None], w, 0)
        reset = None if reset is None else reset & valid
    keys, values = (max(16, 1 << (x - 1).bit_length()) for x in (key_dim, value_dim))
    r, k, w = (pad_channels(x, x.ndim - 1, keys) for x in (r, k, w))
    tokens = [pad_tokens(x, size) for x in (r, k, pad_channels(v, 3, values))]
    shared = [pad_channels(u, 1, keys)[:, None]]
    (shared if w.ndim == 2 else tokens).append(w[:, None] if w.ndim == 2 else pad_tokens(w, size))
    marks = None if reset is None else sequence_of(pad_tokens(reset, size, False), size)
    state = pad_channels(pad_channels(state.swapaxes(2, 3), 2, values), 3, keys)
    y, (state,) = run(RECURRENCE, Problem(tuple(tokens), tuple(shared), (state,), marks))
    return y[:, :num_tokens, :, :value_dim], state[:, :, :value_dim, :key_dim].swapaxes(2, 3)


def chunk(tokens, shared, state, marks):
    """Tokens (r, k, v, w) or, if all have one decay, (r, k, v); shared (u,) or (u, w); state (S,); marks or None."""
    r, k, v = tokens[:3]
    u, (state,) = shared[0], state
    size = v.shape[0]
    row, column = among = grid(size)
    # A token that is not finite would reach all others in the products. It takes no part in them, and is put back in the end.
    # They are counted, since a GPU's maximum drops NaN.
    sound = sum(jnp.where(jnp.abs(x) < jnp.inf, 0, 1).sum(1, keepdims=True) for x in (v, *r, *k)) == 0
    r, k = (tuple(jnp.where(sound, piece, 0) for piece in x) for x in (r, k))
    v = jnp.where(sound, v, 0)
    w = (
        tokens[3]
        if len(tokens) == 4
        else tuple(jnp.broadcast_to(x, y.shape) for x, y in zip(shared[1], k, strict=True))
    )
    w = tuple(jnp.where(piece < LEAST_LOG_DECAY, LEAST_LOG_DECAY, piece) for piece in w)
    seen, to_end, sequence, end = column <= row, sound == sound, None, None
    if marks is not None:  # A reset cuts the pairs that it lies between.
        sequence, sequence_row = marks
        end = sequence.max()
        seen, to_end = seen & (sequence == sequence_row), sequence == end

    scores, of_state, new = jnp.zeros(row.shape, v.dtype), jnp.zeros_like(v), []
    for r_p, k_p, w_p, u_p, state_p in zip(r, k, w, u, state, strict=True):
        scores += jnp.where(row == column, (r_p * u_p * k_p).sum(1, keepdims=True), 0)
        for level in range(size.bit_length() - 1):
            right = (row >> level) & 1 == 1
            to_edge = (right & (column < row)) | (~right & (column > row))
            decay = _decay(to_edge & (row >> level == column >> level), w_p)
            scores += jnp.where(among.pairs(level), dot(r_p * decay, k_p * decay, (1, 1)), 0)
        kept = jnp.exp(w_p.sum(0, keepdims=True)) * state_p
        of_state += dot(r_p * _decay(column < row, w_p), state_p, (1, 1))
        k_p = jnp.where(to_end, k_p * _decay(column > row, w_p), 0)
        new.append((kept if marks is None else jnp.where(end == 0, kept, 0)) + dot(v, k_p, (0, 0)))
    if marks is not None:
        scores, of_state = jnp.where(seen, scores, 0), jnp.where(sequence == 0, of_state, 0)

    spoils = jnp.where((row == column) & ~sound, 1, 0).max(0, keepdims=True)
    spoilt = jnp.where(seen, spoils, 0).max(1, keepdims=True) > 0
    y = jnp.where(spoilt, jnp.nan, dot(scores, v) + of_state)
    spoils_end = jnp.where(to_end & ~sound, 1, 0).max() > 0
    return y, (tuple(jnp.where(spoils_end, jnp.nan, piece) for piece in new),)


def _decay(tokens: Bool[Array, "C C"], w: Float[Array, "C P"]) -> Float[Array, "C P"]:
    """e^(the sum of w over each row's tokens)."""
    return jnp.exp(dot(tokens.astype(w.dtype), w))


RECURRENCE = Recurrence("wkv6", chunk, num_tokens=16, by_row=False, split=2)
"""16 is the least that a matrix unit multiplies."""
