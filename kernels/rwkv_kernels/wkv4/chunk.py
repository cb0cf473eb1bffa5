"""RWKV-4's WKV operator as a kernel's recurrence: a few tokens of a block of channels, one after the other.

    q = max(pp, u + k)       y = (e^{pp-q} aa + e^{u+k-q} v) / (e^{pp-q} bb + e^{u+k-q})
    q = max(pp + w, k)      aa <- e^{pp+w-q} aa + e^{k-q} v      bb <- e^{pp+w-q} bb + e^{k-q}      pp <- q

A state is the pair of numbers aa e^pp and bb e^pp, and `pp` only how they are written down. So what is differentiated here takes the
scales in the weights as given, which leaves sums of terms with weights of at most 1; pp has the derivative of the maxima, and outside
of the kernel the states' aa and bb get the derivative of their scale.

Source: arXiv 2305.13048, equations 16 and 21 to 28.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..recurrence import Problem, Recurrence, Run, pad_channels, pad_tokens
from .reference import EMPTY, WKV4State

BLOCK = 64
"""Channels in a block."""
_LEAST = -1e30
"""What w is held above; exp of it is 0."""
STARTS, COUNTS = 1, 2
"""Bits of a token's mark: it starts a sequence; it lies before its row's length."""


def kernel(run: Run, k, v, w, u, state: WKV4State, reset, length) -> tuple[Array, WKV4State]:
    """Computes WKV through `run`; arguments and result as in `wkv4`, k and v in their own dtype."""
    batch_size, num_tokens, width = k.shape
    block = min(BLOCK, 1 << (width - 1).bit_length())
    heads = -(-width // block)
    marks = None
    if reset is not None or length is not None or num_tokens % RECURRENCE.num_tokens:
        counts = jnp.arange(num_tokens) < (jnp.full(batch_size, num_tokens) if length is None else length)[:, None]
        starts = False if reset is None else reset & counts
        marks = pad_tokens(jnp.where(starts, STARTS, 0) + jnp.where(counts, COUNTS, 0), RECURRENCE.num_tokens)

    def blocks(x):
        return pad_channels(x, x.ndim - 1, heads * block).reshape(*x.shape[:-1], heads, block)

    tokens = tuple(blocks(pad_tokens(x, RECURRENCE.num_tokens)) for x in (k, v))

    # Infinite exponents would take part in differences.
    w = jnp.where(w < _LEAST, _LEAST, w)
    state = state._replace(pp=jnp.where(state.pp < EMPTY, EMPTY, state.pp))
    aa, bb, pp = (blocks(x)[:, :, None] for x in state)
    start = aa * jnp.exp(_zero(pp)), bb * jnp.exp(_zero(pp)), pp
    y, (aa, bb, pp) = run(RECURRENCE, Problem(tokens, (blocks(w)[:, None], blocks(u)[:, None]), start, marks))
    final = (x.reshape(batch_size, -1)[:, :width] for x in (aa * jnp.exp(-_zero(pp)), bb * jnp.exp(-_zero(pp)), pp))
    return y.reshape(*y.shape[:2], -1)[:, :num_tokens, :width], WKV4State(*final)


def chunk(tokens, shared, state, marks):
    """Walks a few tokens: tokens (k, v), each a tuple of rows [1, X]; shared (w, u); state (aa, bb, pp); marks a row's or None."""
    w, u = shared
    aa, bb, pp = state
    # The scale is pp, but as the exponent of one earlier token and a count of decays since: adding them up would add roundings up.
    peak, decays = lax.stop_gradient(pp), jnp.zeros_like(pp)
    rows = []
    for t, (k, v) in enumerate(zip(*tokens, strict=True)):
        old = aa, bb, pp, peak, decays
        if marks is not None:
            starts = (marks[t] & STARTS) != 0
            pp, peak = (jnp.where(starts, EMPTY, x) for x in (pp, peak))
        y = _read(aa, bb, lax.stop_gradient(pp), u + k, v)
        decayed = lax.stop_gradient(peak + (decays + 1) * w) + _zero(w)
        keep, add, _ = _weights(decayed, k)
        stays = decayed > k
        new = (
            keep * aa + add * v,
            keep * bb + add,
            jnp.where(stays, decayed + _zero(pp), k),
            jnp.where(stays, peak, lax.stop_gradient(k)),
            jnp.where(stays, decays + 1, 0),
        )
        if marks is not None:
            counts = (marks[t] & COUNTS) != 0
            y = jnp.where(counts, y, 0)
            new = tuple(jnp.where(counts, x, before) for x, before in zip(new, old, strict=True))
        aa, bb, pp, peak, decays = new
        rows.append(y)
    return tuple(rows), (aa, bb, pp)


def _zero(x: Array) -> Array:
    """0, with x's derivative."""
    return x - lax.stop_gradient(x)


@jax.custom_jvp
def _read(aa: Array, bb: Array, scale: Array, x: Array, v: Array) -> Array:
    """Returns the mean of what aa e^scale sums up, with its weight bb e^scale, and v, with its weight e^x."""
    past, now, _ = _weights(scale, x)
    return (past * aa + now * v) / (past * bb + now)


@_read.defjvp
def _read_jvp(primals, tangents):
    """In this form nothing large cancels: what x asks for is in proportion to v - y. The scale is taken as given."""
    _, bb, scale, x, v = primals
    daa, dbb, _, dx, dv = tangents
    y = _read(*primals)
    past, now, _ = _weights(scale, x)
    share = 1 / (past * bb + now)
    return y, past * share * (daa - y * dbb) + now * share * (dv + (v - y) * dx)


@jax.custom_jvp
def _weights(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Returns e^{x-q}, e^{y-q} and q = max(x, y), from one exponential: one of the weights is 1."""
    e = jnp.exp(-jnp.abs(x - y))
    return jnp.where(x > y, 1.0, e), jnp.where(x > y, e, 1.0), jnp.maximum(x, y)


@_weights.defjvp
def _weights_jvp(primals, tangents):
    """The scale q is taken as given."""
    first, second, q = _weights(*primals)
    return (first, second, q), (first * tangents[0], second * tangents[1], jnp.zeros_like(q))


RECURRENCE = Recurrence("wkv4", chunk, num_tokens=8, by_row=True, split=None)
"""A chunk's rows are in registers at once, loaded ahead of their turn."""
