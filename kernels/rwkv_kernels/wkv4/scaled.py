"""wkv4 in parallel over time for any keys: sums are held with a running maximum of their exponents.

What each chunk adds to the state comes from a first walk of all chunks at once, from the empty state. The backward pass needs y, the
denominators and one state a chunk. With lse_t = log(denominator_t) and the future's demand on the
state after token s

    A_s = sum_{t>s} exp((t-1-s) w - lse_t) gy_t         B_s the same with gy_t y_t         A'_s, B'_s = dA_s/dw, dB_s/dw

the gradients are sums of terms with weights of at most 1, so there is no cancellation between large terms:

    gv_s = e^{k_s} A_s + e^{u+k_s-lse_s} gy_s
    gk_s = e^{k_s} (v_s A_s - B_s) + e^{u+k_s-lse_s} gy_s (v_s - y_s)
    gu   = sum_s e^{u+k_s-lse_s} gy_s (v_s - y_s)
    gw   = sum_s e^{k_s} (v_s A'_s - B'_s)

A is held as A e^q with a running maximum q, as `pp` does for the state, and a denominator as a number and the logarithm of its
scale: their sum, lse, would lose the digits that keys of +-80 leave no room for. A' restarts at each chunk's end: the state at
the chunk's start stands for all tokens before it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .cutting import Chunks, Saved, at, log_decay, put, where
from .reference import EMPTY, WKV4State


class _Demand(NamedTuple):
    """What outputs after a token ask of the state at that token: A, B and their scale q (log)."""

    a: Array
    b: Array
    q: Array


class _Asks(NamedTuple):
    """What each output asks: its cotangent over its denominator, itself, and the denominator's log-scale [B, N, C, D]."""

    g: Array
    y: Array
    scale: Array


def forward(inputs: Chunks, w: Array, u: Array, state: WKV4State) -> tuple[Array, WKV4State, Saved]:
    """Returns y [B, N, C, D], the final state, and for `backward` the denominators and their log-scales."""
    entries, final = _states_at_entries(inputs, w, state)
    y, denominators, scales = _walk_outputs(inputs, w, u, entries)
    return y, final, Saved(denominators, scales, entries)


def backward(inputs: Chunks, w: Array, u: Array, state: WKV4State, y: Array, saved: Saved, gy: Array):
    """Returns gk, gv [B, N, C, D], gw, gu [D], and the gradients of the state's aa and bb, all for y's cotangent gy."""
    asks = _Asks(gy / saved.first, y, saved.second)
    exits, demand = _demands_at_exits(inputs, w, asks)
    gk, gv, gw, gu = _walk_back(inputs, w, u, asks, exits, saved.entries)
    weight = jnp.exp(state.pp + demand.q)
    return gk, gv, gw, gu, weight * demand.a, -weight * demand.b


def _advance(state: WKV4State, k, v, w, reset, valid) -> WKV4State:
    """The state after one more token, with a single exponential: one of the two weights is always 1."""
    decayed = _forget(reset, state.pp + w)
    e = jnp.exp(-jnp.abs(decayed - k))
    keep, add = jnp.where(decayed > k, 1.0, e), jnp.where(decayed > k, e, 1.0)
    new = WKV4State(keep * state.aa + add * v, keep * state.bb + add, jnp.maximum(decayed, k))
    return where(valid, new, state)


def _retreat(demand: _Demand, asks: _Asks, w, reset, valid) -> tuple[_Demand, Array]:
    """The demand one token earlier, and the factor that the old demand was scaled by."""
    decayed = demand.q + w
    e = jnp.exp(-jnp.abs(decayed + asks.scale))
    keep, add = jnp.where(decayed > -asks.scale, 1.0, e), jnp.where(decayed > -asks.scale, e, 1.0)
    new = _Demand(
        keep * demand.a + add * asks.g,
        keep * demand.b + add * (asks.g * asks.y),
        jnp.maximum(decayed, -asks.scale),
    )
    if reset is not None:  # A token that starts a sequence needs nothing from what came before it.
        new = _Demand(*(jnp.where(reset, empty, x) for x, empty in zip(new, (0.0, 0.0, EMPTY), strict=True)))
        keep = jnp.where(reset, 0.0, keep)
    return where(valid, new, demand), keep


def _states_at_entries(inputs: Chunks, w, state: WKV4State) -> tuple[WKV4State, WKV4State]:
    batch, num_chunks, chunk, width = inputs.k.shape
    empty = _empty(batch, num_chunks, width, inputs.k.dtype)

    def body(i, carry):
        k, v, reset, valid = at(inputs, i)
        return _advance(carry, k, v, w, reset, valid)

    added = lax.fori_loop(0, chunk, body, WKV4State(*empty))
    return _compose(added, log_decay(inputs, w, EMPTY), state)


def _demands_at_exits(inputs: Chunks, w, asks: _Asks) -> tuple[_Demand, _Demand]:
    batch, num_chunks, chunk, width = inputs.k.shape
    empty = _Demand(*_empty(batch, num_chunks, width, inputs.k.dtype))

    def body(i, carry):
        j = chunk - 1 - i
        return _retreat(carry, at(asks, j), w, at(inputs.reset, j), at(inputs.valid, j))[0]

    added = lax.fori_loop(0, chunk, body, empty)
    reverse = partial(jax.tree.map, lambda x: x[:, ::-1])
    nothing = jax.tree.map(lambda x: x[:, 0], empty)
    exits, demand = _compose(reverse(added), reverse(log_decay(inputs, w, EMPTY)), nothing)
    return reverse(exits), demand


def _walk_outputs(inputs: Chunks, w, u, entries: WKV4State) -> tuple[Array, Array, Array]:
    """Returns y, denominators and their log-scales [B, N, C, D]."""

    def body(i, carry):
        state, y, denominators, scales = carry
        k, v, reset, valid = at(inputs, i)
        pp = _forget(reset, state.pp)
        e = jnp.exp(-jnp.abs(pp - (u + k)))
        past, now = jnp.where(pp > u + k, 1.0, e), jnp.where(pp > u + k, e, 1.0)
        denominator = past * state.bb + now
        y_i = (past * state.aa + now * v) / denominator
        return (
            _advance(state, k, v, w, reset, valid),
            put(y, where(valid, y_i, 0.0), i),
            put(denominators, denominator, i),
            put(scales, jnp.maximum(pp, u + k), i),
        )

    zeros = jnp.zeros_like(inputs.k)
    return lax.fori_loop(0, inputs.k.shape[2], body, (entries, zeros, zeros, zeros))[1:]


def _walk_back(inputs: Chunks, w, u, asks: _Asks, exits: _Demand, entries: WKV4State):
    """Returns gk, gv [B, N, C, D] and gw, gu [D] (all but the path through the final state's pp)."""
    chunk = inputs.k.shape[2]
    zeros, zero = jnp.zeros_like(inputs.k), jnp.zeros_like(exits.a)

    def body(i, carry):
        demand, da, db, gk, gv, gw, gu = carry
        j = chunk - 1 - i
        k, v, reset, valid = at(inputs, j)
        own = at(asks, j)
        past = jnp.exp(k + demand.q)
        now = jnp.exp(u + k - own.scale) * own.g
        gu_j = now * (v - own.y)
        gk = put(gk, where(valid, past * (v * demand.a - demand.b) + gu_j, 0.0), j)
        gv = put(gv, where(valid, past * demand.a + now, 0.0), j)
        gu = gu + where(valid, gu_j, 0.0)
        gw = gw + where(valid, past * (v * da - db), 0.0)
        earlier, keep = _retreat(demand, own, w, reset, valid)
        da = where(valid, keep * (da + demand.a), da)
        db = where(valid, keep * (db + demand.b), db)
        return earlier, da, db, gk, gv, gw, gu

    demand, da, db, gk, gv, gw, gu = lax.fori_loop(0, chunk, body, (exits, zero, zero, zeros, zeros, zero, zero))
    gw = gw + jnp.exp(entries.pp + demand.q) * (entries.aa * da - entries.bb * db)
    return gk, gv, gw.sum((0, 1)), gu.sum((0, 1))


def _compose(added: Any, log_decays: Array, start: Any) -> tuple[Any, Any]:
    """Walks over chunks: (what each starts from [B, N, D], what the last ends with [B, D])."""

    def step(carry, inputs):
        *sums, scale = carry
        (*added, added_scale), own_decay = inputs
        decayed = scale + own_decay
        q = jnp.maximum(decayed, added_scale)
        e1, e2 = jnp.exp(decayed - q), jnp.exp(added_scale - q)
        return type(carry)(*(e1 * x + e2 * y for x, y in zip(sums, added, strict=True)), q), carry

    by_chunk = jax.tree.map(lambda x: x.swapaxes(0, 1), (added, log_decays))
    end, starts = lax.scan(step, start, by_chunk)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), starts), end


def _empty(batch, num_chunks, width, dtype):
    zero = jnp.zeros((batch, num_chunks, width), dtype)
    return zero, zero, jnp.full_like(zero, EMPTY)


def _forget(reset, pp):
    return pp if reset is None else jnp.where(reset, EMPTY, pp)
