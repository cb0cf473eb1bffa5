"""wkv4 in parallel over time for keys whose exponentials neither overflow nor vanish: sums are held as they are.

With x_t = e^{k_t} v_t and z_t = e^{k_t}, the sums before a token and the future's demands on those after it are recurrences with a
constant factor and no exponential:

    a_{t+1} = e^w a_t + x_t             A_{s-1} = e^w A_s + g_s                g_t = gy_t / (b_t + e^u z_t)
    b_{t+1} = e^w b_t + z_t             B_{s-1} = e^w B_s + g_s y_s
    y_t     = (a_t + e^u x_t) / (b_t + e^u z_t)

    gv_s = z_s (A_s + e^u g_s)          gk_s = z_s (v_s A_s - B_s + e^u g_s (v_s - y_s))
    gu   = sum_s e^u z_s g_s (v_s - y_s)                       gw = e^w sum_t (a_t A_t - b_t B_t)

The same exponents in float32 run from e^-87 to e^88, so BOUND leaves room for values and cotangents of 1e-20 to 1e20.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from .cutting import Chunks, Saved, at, count_after, log_decay, put, where
from .reference import EMPTY, WKV4State

BOUND = 30.0
"""Of |k| + |u|, and of |pp| in a state that is not empty."""
UNROLL = 4
"""Steps of a walk that are compiled as one, since the sums then pass through memory less often."""


def fits(k: Array, w: Array, u: Array, state: WKV4State) -> Bool[Array, ""]:
    """Returns whether all of these inputs are bounded so, and decays finite; NaN is not."""
    keys = jnp.abs(k).max() + jnp.abs(u).max()
    scale = jnp.where(state.pp <= EMPTY, 0.0, jnp.abs(state.pp)).max()
    return (keys <= BOUND) & (scale <= BOUND) & (w.max() <= 0) & jnp.isfinite(w).all()


def forward(inputs: Chunks, w: Array, u: Array, state: WKV4State) -> tuple[Array, WKV4State, Saved]:
    """Returns y [B, N, C, D], the final state, and for `backward` the sums a and b before every token."""
    z = jnp.exp(inputs.k)
    x = z * inputs.v
    scale = jnp.exp(state.pp)
    entries, (a_end, b_end) = _entries(inputs, w, (x, z), (scale * state.aa, scale * state.bb), later=True)
    a, b = _walk(inputs, w, (x, z), entries, later=True)
    bonus = jnp.exp(u)
    y = where(inputs.valid, (a + bonus * x) / (b + bonus * z), 0.0)

    pp = _greatest_exponent(inputs, w, state.pp)  # Rounded once: the sums are scaled by it.
    scale = jnp.exp(-pp)
    final = WKV4State(scale * a_end, scale * b_end, pp)
    if inputs.valid is not None:  # A row of which no token counts keeps its state, which may be empty.
        final = where(inputs.valid.any((1, 2)), final, state)
    a_entry, b_entry = entries
    return y, final, Saved(a, b, WKV4State(a_entry, b_entry, jnp.zeros_like(a_entry)))


def backward(inputs: Chunks, w: Array, u: Array, state: WKV4State, y: Array, saved: Saved, gy: Array):
    """Returns gk, gv [B, N, C, D], gw, gu [D], and the gradients of the state's aa and bb, all for y's cotangent gy."""
    v, a, b = inputs.v, saved.first, saved.second
    z = jnp.exp(inputs.k)
    now = jnp.exp(u) * z
    g = where(inputs.valid, gy / (b + now), 0.0)  # Whatever the cotangent is where no token counts.
    gh = g * y
    nothing = jnp.zeros_like(state.aa)
    exits, (a_start, b_start) = _entries(inputs, w, (g, gh), (nothing, nothing), later=False)
    asked_a, asked_b = _walk(inputs, w, (g, gh), exits, later=False)
    own = now * g * (v - y)
    gv = where(inputs.valid, z * asked_a, 0.0) + now * g
    gk = where(inputs.valid, z * (v * asked_a - asked_b), 0.0) + own
    gw = where(inputs.valid, a * asked_a - b * asked_b, 0.0).sum((0, 1, 2)) * jnp.exp(w)
    scale = jnp.exp(state.pp)
    return gk, gv, gw, own.sum((0, 1, 2)), scale * a_start, -scale * b_start


def _entries(
    inputs: Chunks, w: Array, terms: tuple[Array, Array], start: tuple[Array, Array], *, later: bool
) -> tuple[Any, Any]:
    """Walks over chunks, from the first or the last: (the two sums that each begins with [B, N, D], what the end is left with)."""
    zero = jnp.zeros_like(inputs.k[:, :, 0])
    chunk, decay = inputs.k.shape[2], jnp.exp(w)
    added = lax.fori_loop(
        0, chunk, lambda i, sums: _advance(inputs, decay, terms, sums, i, later=later)[1], (zero, zero), unroll=UNROLL
    )
    decay_of_chunk = jnp.exp(log_decay(inputs, w, -jnp.inf))

    def step(carry, one):
        decay, *own = one
        return tuple(decay * x + y for x, y in zip(carry, own, strict=True)), carry

    over_chunks = tuple(x.swapaxes(0, 1) for x in (decay_of_chunk, *added))
    end, begins = lax.scan(step, start, over_chunks, reverse=not later)
    return tuple(x.swapaxes(0, 1) for x in begins), end


def _walk(inputs: Chunks, w: Array, terms: tuple[Array, Array], begins: tuple[Array, Array], *, later: bool):
    """Walks through all chunks at once: what each token finds of the two sums, of the past or of the future [B, N, C, D]."""
    chunk, decay = inputs.k.shape[2], jnp.exp(w)

    def body(i, carry):
        sums, kept = carry
        found, sums = _advance(inputs, decay, terms, sums, i, later=later)
        j = i if later else chunk - 1 - i
        return sums, tuple(put(x, y, j) for x, y in zip(kept, found, strict=True))

    return lax.fori_loop(0, chunk, body, (begins, tuple(map(jnp.zeros_like, terms))), unroll=UNROLL)[1]


def _advance(inputs: Chunks, decay: Array, terms: tuple[Array, Array], sums: tuple[Array, Array], i, *, later: bool):
    """The two sums [B, N, D] that the i-th token of every chunk finds, from its start or its end, and those that it leaves."""
    j = i if later else inputs.k.shape[2] - 1 - i
    reset, valid = at((inputs.reset, inputs.valid), j)

    def forget(sums):
        return sums if reset is None else jnp.where(reset, 0.0, sums)

    # A token that starts a sequence finds nothing of the past, and leaves nothing to what came before it.
    found = tuple(where(valid, forget(x), x) if later else x for x in sums)
    new = tuple(decay * x + at(y, j) for x, y in zip(found, terms, strict=True))
    return found, where(valid, new if later else tuple(map(forget, new)), sums)


def _greatest_exponent(inputs: Chunks, w: Array, start: Array) -> Array:
    """The final pp: the greatest exponent among those that the final sums are of [B, D]."""
    batch, num_chunks, chunk, width = inputs.k.shape
    valid = jnp.ones((batch, num_chunks * chunk), bool) if inputs.valid is None else inputs.valid.reshape(batch, -1)
    starts = inputs.starts()
    starts = jnp.zeros_like(valid) if starts is None else starts.reshape(batch, -1)
    decays, cuts = (count_after(flags)[..., None] for flags in (valid, starts))
    own = inputs.k.reshape(batch, -1, width) + decays[:, 1:] * w
    own = jnp.where(valid[..., None] & (cuts[:, 1:] == 0), own, -jnp.inf).max(1)
    return jnp.maximum(own, jnp.where(cuts[:, 0] == 0, start + decays[:, 0] * w, -jnp.inf))
