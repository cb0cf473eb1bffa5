"""RWKV-7's WKV operator as a kernel's step: one token of one head, the state a matrix [V, K], and its derivative.

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t        d = exp(w)

Nothing is divided by a decay, so it may be as strong as it likes.
"""

import jax.numpy as jnp

from ..recurrence import Step


def _forward(tokens, state, spread):
    r, w, k, v, a, b = tokens
    state = state * jnp.exp(w) + spread((state * a).sum(1)) * b + v * k
    return (state * r).sum(1), state


def _backward(tokens, state, gy, gstate, spread):
    r, w, k, v, a, b = tokens
    decayed, found = state * jnp.exp(w), spread((state * a).sum(1))
    gstate = gstate + gy * r
    gfound = spread((gstate * b).sum(1))
    gtokens = (
        (gy * (decayed + found * b + v * k)).sum(0),
        (gstate * decayed).sum(0),
        (gstate * v).sum(0),
        (gstate * k).sum(1),
        (gfound * state).sum(0),
        (gstate * found).sum(0),
    )
    return gtokens, gstate * jnp.exp(w) + gfound * a


STEP = Step(_forward, _backward)
