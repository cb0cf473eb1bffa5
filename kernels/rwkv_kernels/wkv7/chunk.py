"""RWKV-7's WKV operator as a kernel's recurrence: one chunk of one head, as products of matrices.

The mathematics is that of `parallel.py` (the WY form), with the state [V, K].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..recurrence import Factors, Problem, Products, Run, dot, grid, of_products, pad_channels, pad_tokens, sequence_of
from .step import STEP


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


def factors(tokens, shared) -> Factors:
    """A piece of r, w, k, a, b [C, P]; there is nothing shared."""
    del shared
    r, w, k, a, b = tokens
    row, column = grid(r.shape[0])
    summed, decay = dot((column <= row).astype(w.dtype), w), jnp.exp(w.sum(0, keepdims=True))
    a, r = a * jnp.exp(summed - w), r * jnp.exp(summed)
    b, k = (x * jnp.exp(-summed) for x in (b, k))
    scores = tuple(dot(x, y, (1, 1)) for x in (a, r) for y in (b, k))
    return Factors((a, r), (decay * b, decay * k), decay, scores)


def mix(scores, found, v, marks):
    """Solves for u, what the tokens find along their a; found is what a and r find in the state."""
    (ab, ak, rb, rk), (found, read) = scores, found
    row, column = grid(v.shape[0])
    earlier, present = column < row, column <= row
    if marks is not None:  # A reset cuts the pairs that it lies between.
        sequence, sequence_row = marks
        earlier, present = (mask & (sequence == sequence_row) for mask in (earlier, present))
    ab, ak = (jnp.where(earlier, x, 0) for x in (ab, ak))
    rb, rk = (jnp.where(present, x, 0) for x in (rb, rk))
    u = _solve(ab, found + dot(ak, v))
    return read + dot(rb, u) + dot(rk, v), (u, v)


@jax.custom_jvp
def _solve(lower: Float[Array, "C C"], x: Float[Array, "C V"]) -> Float[Array, "C V"]:
    """Returns (I - lower)^-1 x for a strictly lower triangular matrix."""
    return dot(_inverse(lower), x)


@_solve.defjvp
def _solve_jvp(primals, tangents):
    lower, x = primals
    lower_dot, x_dot = tangents
    inverse = _inverse(lower)
    solved = dot(inverse, x)
    return solved, dot(inverse, x_dot + dot(lower_dot, solved))


def _inverse(lower: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """Returns (I - lower)^-1, in blocks of doubled size: T_21 = T_22 M_21 T_11."""
    among = grid(lower.shape[0])
    inverse = jnp.where(among.row == among.column, 1, 0) + jnp.where(among.pairs(0), lower, 0)
    for level in range(1, lower.shape[0].bit_length() - 1):
        inverse += dot(dot(inverse, jnp.where(among.pairs(level), lower, 0)), inverse)
    return inverse


RECURRENCE = of_products("wkv7", Products(factors, mix, split=3), num_tokens=16, step=STEP)
"""16 is the least that a matrix unit multiplies; no factor exceeds e^{0.6066 * 16}."""
