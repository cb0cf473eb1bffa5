"""RWKV-7's WKV operator as a kernel's recurrence: one chunk of one head, as products of matrices.

The mathematics is that of `parallel.py` (the WY form), with the state [V, K].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..recurrence import Problem, Recurrence, Run, dot, grid, pad_channels, pad_tokens, sequence_of


def kernel(run: Run, r, w, k, v, a, b, state, reset, length) -> tuple[Array, Array]:
    """Computes WKV through `run`; arguments and result as in `wkv7`, tokens in their own dtype."""
    del length  # Tokens past it come in as zeros, and those change nothing.
    size = RECURRENCE.num_tokens
    num_tokens, key_dim, value_dim = r.shape[1], r.shape[3], v.shape[3]
    keys, values = (max(16, 1 << (x - 1).bit_length()) for x in (key_dim, value_dim))
    tokens = (r, w, k, v, a, b)
    tokens = tuple(pad_channels(pad_tokens(x, size), 3, values if x is v else keys) for x in tokens)
    marks = None if reset is None else sequence_of(pad_tokens(reset, size, False), size)
    state = pad_channels(pad_channels(state, 2, values), 3, keys)
    y, (state,) = run(RECURRENCE, Problem(tokens, (), (state,), marks))
    return y[:, :num_tokens, :, :value_dim], state[:, :, :value_dim, :key_dim]


def chunk(tokens, shared, state, marks):
    """Tokens (r, w, k, v, a, b); shared (); state (S,); marks or None."""
    del shared
    r, w, k, v, a, b = tokens
    (state,) = state
    row, column = grid(v.shape[0])
    earlier, present, sequence, end = column < row, column <= row, None, None
    if marks is not None:  # A reset cuts the pairs that it lies between.
        sequence, sequence_row = marks
        end = sequence.max()
        earlier, present = (mask & (sequence == sequence_row) for mask in (earlier, present))
    ab, ak, rb, rk, found, read, to_end = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, []
    for r_p, w_p, k_p, a_p, b_p, state_p in zip(r, w, k, a, b, state, strict=True):
        summed = dot((column <= row).astype(v.dtype), w_p)
        a_p, r_p = a_p * jnp.exp(summed - w_p), r_p * jnp.exp(summed)
        b_p, k_p = b_p * jnp.exp(-summed), k_p * jnp.exp(-summed)
        ab, ak = ab + dot(a_p, b_p, (1, 1)), ak + dot(a_p, k_p, (1, 1))
        rb, rk = rb + dot(r_p, b_p, (1, 1)), rk + dot(r_p, k_p, (1, 1))
        found, read = found + dot(a_p, state_p, (1, 1)), read + dot(r_p, state_p, (1, 1))
        if marks is not None:
            b_p, k_p = (jnp.where(sequence == end, x, 0) for x in (b_p, k_p))
            state_p = jnp.where(end == 0, state_p, 0)
        to_end.append((jnp.exp(w_p.sum(0, keepdims=True)), state_p, b_p, k_p))
    if marks is not None:
        found, read = (jnp.where(sequence == 0, x, 0) for x in (found, read))
    ab, ak = (jnp.where(earlier, x, 0) for x in (ab, ak))
    rb, rk = (jnp.where(present, x, 0) for x in (rb, rk))

    u = dot(_inverse(ab), found + dot(ak, v))
    y = read + dot(rb, u) + dot(rk, v)
    new = tuple(kept * (state_p + dot(u, b_p, (0, 0)) + dot(v, k_p, (0, 0))) for kept, state_p, b_p, k_p in to_end)
    return y, (new,)


@jax.custom_jvp
def _inverse(lower: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """Returns (I - lower)^-1 of a strictly lower triangular matrix, in blocks of doubled size: T_21 = T_22 M_21 T_11."""
    among = grid(lower.shape[0])
    inverse = jnp.where(among.row == among.column, 1, 0) + jnp.where(among.pairs(0), lower, 0)
    for level in range(1, lower.shape[0].bit_length() - 1):
        inverse += dot(dot(inverse, jnp.where(among.pairs(level), lower, 0)), inverse)
    return inverse


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    inverse = _inverse(*primals)
    return inverse, dot(dot(inverse, *tangents), inverse)


RECURRENCE = Recurrence("wkv7", chunk, num_tokens=16, by_row=False, split=3)
"""16 is the least that a matrix unit multiplies; no factor exceeds e^{0.6066 * 16}."""
