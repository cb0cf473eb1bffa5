"""The WKV operator of RWKV-5 and RWKV-6 as a kernel's recurrence: one chunk of one head, as products of matrices.

The mathematics is that of `parallel.py`: no exponent is positive, because the decay between two tokens is factored at the boundary
of the blocks of 2^l tokens that they lie side by side in. The state is [V, K] here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..recurrence import Factors, Problem, Products, Run, dot, grid, of_products, pad_channels, pad_tokens, sequence_of
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


def factors(tokens, shared) -> Factors:
    """A piece of r, k, w or, if all tokens have one decay, r, k [C, P]; shared u or u, w [1, P]."""
    r, k = tokens[:2]
    u, size = shared[0], r.shape[0]
    row, column = among = grid(size)
    # A token that is not finite would reach all others in the products. It takes no part in them, and `mix` puts it back.
    sound = _finite(r) & _finite(k)
    r, k = (jnp.where(sound, x, 0) for x in (r, k))
    w = tokens[2] if len(tokens) == 3 else jnp.broadcast_to(shared[1], k.shape)
    w = jnp.where(w < LEAST_LOG_DECAY, LEAST_LOG_DECAY, w)

    own, unsound = (r * u * k).sum(1, keepdims=True), jnp.where(sound, 0, 1).astype(k.dtype)
    scores = jnp.where(among.pairs(0), dot(r, k, (1, 1)), 0)  # Nothing lies between neighbours and their boundary.
    for level in range(1, size.bit_length() - 1):
        right = (row >> level) & 1 == 1
        to_edge = (right & (column < row)) | (~right & (column > row))
        decay = _decay(to_edge & (row >> level == column >> level), w)
        scores += jnp.where(among.pairs(level), dot(r * decay, k * decay, (1, 1)), 0)
    reads, writes = r * _decay(column < row, w), k * _decay(column > row, w)
    return Factors((reads,), (writes,), jnp.exp(w.sum(0, keepdims=True)), (scores, own, unsound))


def mix(scores, found, v, marks):
    """y, from each other and from the state, and what is written, the values: NaN where a token that is not finite reaches."""
    (scores, own, unsound), (found,) = scores, found
    row, column = grid(v.shape[0])
    seen, to_end = column <= row, None
    if marks is not None:  # A reset cuts the pairs that it lies between.
        sequence, sequence_row = marks
        seen, to_end = seen & (sequence == sequence_row), sequence == sequence.max()
    sound = _finite(v) & (unsound == 0)
    v = jnp.where(sound, v, 0)
    y = dot(jnp.where(seen, scores, 0) + jnp.where(row == column, own, 0), v) + found
    spoils = jnp.where((row == column) & ~sound, 1, 0).max(0, keepdims=True)
    y = jnp.where(jnp.where(seen, spoils, 0).max(1, keepdims=True) > 0, jnp.nan, y)
    return y, (jnp.where(sound if to_end is None else sound | ~to_end, v, jnp.nan),)


def _finite(x: Float[Array, "C X"]) -> Bool[Array, "C 1"]:
    """Which rows are finite. What is not is counted, since a GPU's maximum drops NaN."""
    return jnp.where(jnp.abs(x) < jnp.inf, 0, 1).sum(1, keepdims=True) == 0


def _decay(tokens: Bool[Array, "C C"], w: Float[Array, "C P"]) -> Float[Array, "C P"]:
    """e^(the sum of w over each row's tokens)."""
    return jnp.exp(dot(tokens.astype(w.dtype), w))


RECURRENCE = of_products("wkv6", Products(factors, mix, split=2), num_tokens=16)
"""16 is the least that a matrix unit multiplies."""
