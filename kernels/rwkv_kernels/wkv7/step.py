"""RWKV-7's WKV operator as a kernel's step: one token of one head, the state a matrix [V, K], and its derivative.

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t        d = exp(w)

Nothing is divided by a decay, so it may be as strong as it likes. The state comes in pieces of its keys. What is taken of a token
again is read again, and what is made of it is handed over at once: beside two states, registers hold little.
"""

from typing import Any

import jax.numpy as jnp

from ..recurrence import Step

R, W, K, V, A, B = range(6)


def _forward(token, state, spread):
    found = spread(_times(state, token, A))
    state = tuple(_after(token, p, x, found) for p, x in enumerate(state))
    return _times(state, token, R), state


def _backward(token, state, gy, gstate, spread, put):
    found = spread(_times(state, token, A))
    for p, x in enumerate(state):
        put(R, (gy * _after(token, p, x, found)).sum(0), p)
    gstate = tuple(g + gy * token(R, p) for p, g in enumerate(gstate))
    for p, g in enumerate(gstate):
        put(B, (g * found).sum(0), p)
        put(K, (g * token(V)).sum(0), p)
    put(V, _times(gstate, token, K))
    gfound = spread(_times(gstate, token, B))
    before = []
    for p, (x, g) in enumerate(zip(state, gstate, strict=True)):
        put(A, (gfound * x).sum(0), p)
        decayed = g * jnp.exp(token(W, p))
        put(W, (decayed * x).sum(0), p)
        before.append(decayed + gfound * token(A, p))
    return tuple(before)


def _after(token, p, state, found):
    """A piece of the state after the token."""
    return state * jnp.exp(token(W, p)) + found * token(B, p) + token(V) * token(K, p)


def _times(state, token, i):
    """The state times the token's numbers from the i-th array, summed over the keys."""
    products: Any = sum(x * token(i, p) for p, x in enumerate(state))
    return products.sum(1)


STEP = Step(_forward, _backward)
