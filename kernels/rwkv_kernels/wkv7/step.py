"""RWKV-7's WKV operator as a kernel's step: one token of one head, the state a matrix [V, K], and its derivative.

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t        d = exp(w)

Nothing is divided by a decay, so it may be as strong as it likes. What is taken of a token again is read again, and what is made of
it is handed over at once: beside two states, registers hold little.
"""

import jax.numpy as jnp

from ..recurrence import Step

R, W, K, V, A, B = range(6)


def _forward(token, state, spread):
    found = spread((state * token(A)).sum(1))
    state = state * jnp.exp(token(W)) + found * token(B) + token(V) * token(K)
    return (state * token(R)).sum(1), state


def _backward(token, state, gy, gstate, spread, put):
    found = spread((state * token(A)).sum(1))
    put(R, (gy * (state * jnp.exp(token(W)) + found * token(B) + token(V) * token(K))).sum(0))
    gstate = gstate + gy * token(R)
    put(B, (gstate * found).sum(0))
    put(K, (gstate * token(V)).sum(0))
    put(V, (gstate * token(K)).sum(1))
    gfound = spread((gstate * token(B)).sum(1))
    put(A, (gfound * state).sum(0))
    gstate = gstate * jnp.exp(token(W))
    put(W, (gstate * state).sum(0))
    return gstate + gfound * token(A)


STEP = Step(_forward, _backward)
