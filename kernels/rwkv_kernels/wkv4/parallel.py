"""RWKV-4's WKV operator in parallel over time, in XLA operations that run on any device.

Time is cut into about sqrt(T) chunks of C tokens. All chunks walk their C tokens at once, first from the empty state, which
gives what each adds to the state; a walk over the
chunks turns that into the state at each chunk's start; a second walk of all chunks at once gives the outputs. So the loops are
about sqrt(T) long, and nearly all the work is done on arrays of sqrt(T) tokens.

The backward pass is the same in the other direction and stores y, the log of the denominators and one state a chunk. With
lse_t = log(denominator_t) and the future's demand on the state after token s

    A_s = sum_{t>s} exp((t-1-s) w - lse_t) gy_t         B_s the same with gy_t y_t         A'_s, B'_s = dA_s/dw, dB_s/dw

the gradients are sums of terms with weights of at most 1, so there is no cancellation between large terms:

    gv_s = e^{k_s} A_s + e^{u+k_s-lse_s} gy_s
    gk_s = e^{k_s} (v_s A_s - B_s) + e^{u+k_s-lse_s} gy_s (v_s - y_s)
    gu   = sum_s e^{u+k_s-lse_s} gy_s (v_s - y_s)
    gw   = sum_s e^{k_s} (v_s A'_s - B'_s)

A is held as A e^q with a running maximum q, as `pp` does for the state. A' restarts at each chunk's end: the state at
the chunk's start stands for all tokens before it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from .reference import EMPTY, WKV4State


class _Demand(NamedTuple):
    """What outputs after a token ask of the state at that token: A, B and their scale q (log)."""

    a: Array
    b: Array
    q: Array


class _Chunks(NamedTuple):
    """Inputs cut into chunks: k, v [B, N, C, D]; reset, valid [B, N, C, 1]."""

    k: Array
    v: Array
    reset: Array
    valid: Array


def parallel(
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    w: Float[Array, "D"],
    u: Float[Array, "D"],
    state: WKV4State,
    reset: Bool[Array, "B T"],
    length: Int[Array, "B"],
) -> tuple[Float[Array, "B T D"], WKV4State]:
    """Computes WKV in parallel over time; arguments and result as in `wkv4`, in the state's dtype.

    Its derivatives are reverse-mode only (a custom_vjp); use the scan for jvp and Hessians.
    """
    return _wkv(k, v, w, u, state, reset, length)


def chunk_length(num_tokens: int) -> int:
    """Returns the power of two C at or below sqrt(T): about as many chunks as tokens in a chunk."""
    return 1 << ((num_tokens.bit_length() - 1) // 2)


@jax.custom_vjp
def _wkv(k, v, w, u, state, reset, length):
    y, _, state, _ = _forward(k, v, w, u, state, reset, length)
    return y, state


def _wkv_fwd(k, v, w, u, state, reset, length):
    k, v, w, u, state, reset, length = jax.tree.map(
        lambda x: x.value, (k, v, w, u, state, reset, length), is_leaf=lambda x: hasattr(x, "perturbed")
    )
    y, lse, final, entries = _forward(k, v, w, u, state, reset, length)
    return (y, final), (k, v, w, u, reset, length, y, lse, entries, final)


def _wkv_bwd(residuals, cotangents):
    k, v, w, u, reset, length, y, lse, entries, final = residuals
    gy, gfinal = cotangents
    gy = _dense(gy, y)
    gaa, gbb = _dense(gfinal.aa, final.aa), _dense(gfinal.bb, final.bb)
    inputs = _cut(k, v, reset, length)
    gy, y, lse = (_split(x, inputs.k.shape[2]) for x in (gy, y, lse))
    entry_of_first = jax.tree.map(lambda x: x[:, 0], entries)

    # From outside: what the final state's cotangents ask of it; p_T is treated as a constant here and routed below.
    last = _Demand(gaa, -gbb, -final.pp)
    exits, first = _demands_at_exits(inputs, w, gy, y, lse, last)
    gk, gv, gw, gu = _walk_back(inputs, w, u, gy, y, lse, exits, entries)

    weight = jnp.exp(entry_of_first.pp + first.q)
    gstate = WKV4State(
        weight * first.a,
        -weight * first.b,
        weight * (first.a * entry_of_first.aa - first.b * entry_of_first.bb),
    )
    gk, gv = (_join(x, k.shape[1]) for x in (gk, gv))
    if not isinstance(gfinal.pp, SymbolicZero) or not isinstance(gfinal.aa, SymbolicZero):
        gpp = _dense(gfinal.pp, final.pp) - gaa * final.aa - gbb * final.bb
        routed_gk, routed_gpp, routed_gw = _route_to_maximum(
            k, w, entry_of_first.pp, reset, length, gpp
        )
        gk, gw = gk + routed_gk, gw + routed_gw
        gstate = gstate._replace(pp=gstate.pp + routed_gpp)
    return gk, gv, gw, gu, gstate, None, None


_wkv.defvjp(_wkv_fwd, _wkv_bwd, symbolic_zeros=True)


def _forward(k, v, w, u, state, reset, length):
    """Returns y, lse [B, T, D], the final state and the state at every chunk's start [B, N, D]."""
    inputs = _cut(k, v, reset, length)
    entries, final = _states_at_entries(inputs, w, state)
    y, lse = _walk_outputs(inputs, w, u, entries)
    num_tokens = k.shape[1]
    return _join(y, num_tokens), _join(lse, num_tokens), final, entries


def _advance(state: WKV4State, k, v, w, reset, valid) -> WKV4State:
    """The state after one more token, with a single exponential: one of the two weights is always 1."""
    decayed = jnp.where(reset, EMPTY, state.pp + w)
    e = jnp.exp(-jnp.abs(decayed - k))
    keep, add = jnp.where(decayed > k, 1.0, e), jnp.where(decayed > k, e, 1.0)
    new = WKV4State(keep * state.aa + add * v, keep * state.bb + add, jnp.maximum(decayed, k))
    return jax.tree.map(lambda new, old: jnp.where(valid, new, old), new, state)


def _retreat(demand: _Demand, gy, y, lse, w, reset, valid) -> tuple[_Demand, Array]:
    """The demand one token earlier, and the factor that the old demand was scaled by."""
    decayed = demand.q + w
    e = jnp.exp(-jnp.abs(decayed + lse))
    keep, add = jnp.where(decayed > -lse, 1.0, e), jnp.where(decayed > -lse, e, 1.0)
    new = _Demand(keep * demand.a + add * gy, keep * demand.b + add * (gy * y), jnp.maximum(decayed, -lse))
    # A token that starts a sequence needs nothing from what came before it.
    new = jax.tree.map(lambda x, empty: jnp.where(reset, empty, x), new, _Demand(0.0, 0.0, EMPTY))
    return jax.tree.map(lambda new, old: jnp.where(valid, new, old), new, demand), jnp.where(reset, 0.0, keep)


def _states_at_entries(inputs: _Chunks, w, state: WKV4State) -> tuple[WKV4State, WKV4State]:
    batch, num_chunks, chunk, width = inputs.k.shape
    empty = _empty(batch, num_chunks, width, inputs.k.dtype)

    def body(i, carry):
        return _advance(carry, *_at(inputs, i)[:2], w, *_at(inputs, i)[2:])

    added = lax.fori_loop(0, chunk, body, WKV4State(*empty))
    return _compose(added, _log_decay(inputs, w), state)


def _demands_at_exits(inputs: _Chunks, w, gy, y, lse, last: _Demand) -> tuple[_Demand, _Demand]:
    batch, num_chunks, chunk, width = inputs.k.shape

    def body(i, carry):
        j = chunk - 1 - i
        return _retreat(carry, _at(gy, j), _at(y, j), _at(lse, j), w, _at(inputs.reset, j), _at(inputs.valid, j))[0]

    added = lax.fori_loop(0, chunk, body, _Demand(*_empty(batch, num_chunks, width, inputs.k.dtype)))
    exits, first = _compose(
        jax.tree.map(lambda x: x[:, ::-1], added), _log_decay(inputs, w)[:, ::-1], last
    )
    return jax.tree.map(lambda x: x[:, ::-1], exits), first


def _walk_outputs(inputs: _Chunks, w, u, entries: WKV4State) -> tuple[Array, Array]:
    def body(i, carry):
        state, y, lse = carry
        k, v, reset, valid = _at(inputs, i)
        pp = jnp.where(reset, EMPTY, state.pp)
        e = jnp.exp(-jnp.abs(pp - (u + k)))
        past, now = jnp.where(pp > u + k, 1.0, e), jnp.where(pp > u + k, e, 1.0)
        denominator = past * state.bb + now
        y_i = (past * state.aa + now * v) / denominator
        lse_i = jnp.maximum(pp, u + k) + jnp.log(denominator)
        return (
            _advance(state, k, v, w, reset, valid),
            _put(y, jnp.where(valid, y_i, 0), i),
            _put(lse, lse_i, i),
        )

    zeros = jnp.zeros_like(inputs.k)
    _, y, lse = lax.fori_loop(0, inputs.k.shape[2], body, (entries, zeros, zeros))
    return y, lse


def _walk_back(inputs: _Chunks, w, u, gy, y, lse, exits: _Demand, entries: WKV4State):
    """Returns gk, gv [B, N, C, D] and gw, gu [D] (all but the path through the final state's pp)."""
    chunk = inputs.k.shape[2]
    zeros, zero = jnp.zeros_like(inputs.k), jnp.zeros_like(exits.a)

    def body(i, carry):
        demand, da, db, gk, gv, gw, gu = carry
        j = chunk - 1 - i
        k, v, reset, valid = _at(inputs, j)
        gy_j, y_j, lse_j = _at(gy, j), _at(y, j), _at(lse, j)
        past = jnp.exp(k + demand.q)
        now = jnp.exp(u + k - lse_j) * gy_j
        gu_j = now * (v - y_j)
        gk = _put(gk, jnp.where(valid, past * (v * demand.a - demand.b) + gu_j, 0), j)
        gv = _put(gv, jnp.where(valid, past * demand.a + now, 0), j)
        gu = gu + jnp.where(valid, gu_j, 0)
        gw = gw + jnp.where(valid, past * (v * da - db), 0)
        earlier, keep = _retreat(demand, gy_j, y_j, lse_j, w, reset, valid)
        da = jnp.where(valid, keep * (da + demand.a), da)
        db = jnp.where(valid, keep * (db + demand.b), db)
        return earlier, da, db, gk, gv, gw, gu

    demand, da, db, gk, gv, gw, gu = lax.fori_loop(0, chunk, body, (exits, zero, zero, zeros, zeros, zero, zero))
    gw = gw + jnp.exp(entries.pp + demand.q) * (entries.aa * da - entries.bb * db)
    return gk, gv, gw.sum((0, 1)), gu.sum((0, 1))


def _route_to_maximum(k, w, pp, reset, length, gpp):
    """The gradient of the final pp, which is the maximum of decayed exponents: it goes to the one that attains it."""
    num_tokens = k.shape[1]
    valid = jnp.arange(num_tokens) < length[:, None]
    resets_after = _count_after(reset & valid)
    decays_after = _count_after(valid)
    exponents = k + w * decays_after[:, 1:, None].astype(k.dtype)
    exponents = jnp.where((valid & (resets_after[:, 1:] == 0))[..., None], exponents, -jnp.inf)
    initial = pp + w * decays_after[:, :1].astype(k.dtype)
    initial = jnp.where(resets_after[:, :1] == 0, initial, -jnp.inf)
    best = exponents.max(1)
    winner = jnp.argmax(exponents, 1)
    from_initial = initial >= best
    one_hot = (jnp.arange(num_tokens)[:, None] == winner[:, None]) & ~from_initial[:, None]
    count = jnp.take_along_axis(
        jnp.broadcast_to(decays_after[:, 1:, None], k.shape), winner[:, None], axis=1
    )[:, 0]
    count = jnp.where(from_initial, decays_after[:, :1], count)
    return jnp.where(one_hot, gpp[:, None], 0), jnp.where(from_initial, gpp, 0), (gpp * count).sum(0)


def _count_after(flags: Bool[Array, "B T"]) -> Int[Array, "B T+1"]:
    """At position t, how many of flags[t:] are set."""
    counts = jnp.cumsum(flags[:, ::-1].astype(jnp.int32), 1)[:, ::-1]
    return jnp.pad(counts, ((0, 0), (0, 1)))


def _compose(added: Any, log_decay: Array, start: Any) -> tuple[Any, Any]:
    """Walks over chunks: (what each starts from [B, N, D], what the last ends with [B, D])."""

    def step(carry, inputs):
        *sums, scale = carry
        (*added, added_scale), log_decay = inputs
        decayed = scale + log_decay
        q = jnp.maximum(decayed, added_scale)
        e1, e2 = jnp.exp(decayed - q), jnp.exp(added_scale - q)
        return type(carry)(*(e1 * x + e2 * y for x, y in zip(sums, added, strict=True)), q), carry

    by_chunk = jax.tree.map(lambda x: x.swapaxes(0, 1), (added, log_decay))
    end, starts = lax.scan(step, start, by_chunk)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), starts), end


def _log_decay(inputs: _Chunks, w) -> Float[Array, "B N D"]:
    """By how much a whole chunk decays what came before it."""
    decays = inputs.valid.sum(2).astype(w.dtype) * w
    return jnp.where((inputs.reset & inputs.valid).any(2), EMPTY, decays)


def _empty(batch, num_chunks, width, dtype):
    zero = jnp.zeros((batch, num_chunks, width), dtype)
    return zero, zero, jnp.full_like(zero, EMPTY)


def _dense(cotangent, like):
    return jnp.zeros_like(like) if isinstance(cotangent, SymbolicZero) else cotangent


def _cut(k, v, reset, length) -> _Chunks:
    num_tokens = k.shape[1]
    valid = jnp.arange(num_tokens) < length[:, None]
    split = partial(_split, chunk=chunk_length(num_tokens))
    return _Chunks(split(k), split(v), split(reset[..., None]), split(valid[..., None]))


def _split(x: Array, chunk: int) -> Array:
    padding = -x.shape[1] % chunk
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    return x.reshape(x.shape[0], -1, chunk, x.shape[2])


def _join(x: Array, num_tokens: int) -> Array:
    return x.reshape(x.shape[0], -1, x.shape[3])[:, :num_tokens]


def _at(x: Any, i) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 2, keepdims=False), x)


def _put(x: Array, value: Array, i) -> Array:
    return lax.dynamic_update_index_in_dim(x, value, i, 2)
