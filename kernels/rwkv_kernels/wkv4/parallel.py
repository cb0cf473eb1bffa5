"""RWKV-4's WKV operator in parallel over time, in XLA operations that run on any device.

Time is cut into about sqrt(T) chunks of C tokens. All chunks walk their C tokens at once, first from the empty state, which
gives what each adds to the state; a walk over the
chunks turns that into the state at each chunk's start; a second walk of all chunks at once gives the outputs. So the loops are
about sqrt(T) long, and nearly all the work is done on arrays of sqrt(T) tokens.

The backward pass is the same in the other direction and stores y, the denominators and one state a chunk. With
lse_t = log(denominator_t) and the future's demand on the state after token s

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
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

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


class _Chunks(NamedTuple):
    """Inputs cut into chunks: k, v [B, N, C, D]; reset, valid [B, N, C, 1], None where no token is reset or all are valid."""

    k: Array
    v: Array
    reset: Array | None
    valid: Array | None


def parallel(
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    w: Float[Array, "D"],
    u: Float[Array, "D"],
    state: WKV4State,
    reset: Bool[Array, "B T"] | None,
    length: Int[Array, "B"] | None,
) -> tuple[Float[Array, "B T D"], WKV4State]:
    """Computes WKV in parallel over time; arguments and result as in `wkv4`, in the state's dtype.

    Its derivatives are reverse-mode only (a custom_vjp); use the scan for jvp and Hessians.
    """
    k, v = (x.astype(state.aa.dtype) for x in (k, v))
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
    y, denominators, final, entries = _forward(k, v, w, u, state, reset, length)
    return (y, final), (k, v, w, u, reset, length, y, denominators, entries, final)


def _wkv_bwd(residuals, cotangents):
    k, v, w, u, reset, length, y, (denominator, scale), entries, final = residuals
    gy, gfinal = cotangents
    inputs = _cut(k, v, reset, length)
    chunk = inputs.k.shape[2]
    first = jax.tree.map(lambda x: x[:, 0], entries)

    asks = _Asks(*(_split(x, chunk) for x in (_dense(gy, y) / denominator, y, scale)))
    exits, demand = _demands_at_exits(inputs, w, asks)
    gk, gv, gw, gu = _walk_back(inputs, w, u, asks, exits, entries)
    gk, gv = _join(gk, k.shape[1]), _join(gv, k.shape[1])
    weight = jnp.exp(first.pp + demand.q)
    gaa, gbb = weight * demand.a, -weight * demand.b
    gstate = WKV4State(gaa, gbb, gaa * first.aa + gbb * first.bb)

    if not all(
        isinstance(g, SymbolicZero) for g in gfinal
    ):  # Training on whole sequences asks nothing of the final state.
        gfinal = WKV4State(*map(_dense, gfinal, final))
        through_final = _final_state_gradients(k, v, w, first, reset, length, final, gfinal)
        gk, gv, gw, gstate = jax.tree.map(jnp.add, (gk, gv, gw, gstate), through_final)
    return gk, gv, gw, gu, gstate, None, None


_wkv.defvjp(_wkv_fwd, _wkv_bwd, symbolic_zeros=True)


def _forward(k, v, w, u, state, reset, length):
    """Returns y and (denominators, their log-scales) [B, T, D], the final state, and the state at every chunk's start [B, N, D]."""
    inputs = _cut(k, v, reset, length)
    entries, final = _states_at_entries(inputs, w, state)
    y, denominator, scale = (_join(x, k.shape[1]) for x in _walk_outputs(inputs, w, u, entries))
    return y, (denominator, scale), final, entries


def _advance(state: WKV4State, k, v, w, reset, valid) -> WKV4State:
    """The state after one more token, with a single exponential: one of the two weights is always 1."""
    decayed = _forget(reset, state.pp + w)
    e = jnp.exp(-jnp.abs(decayed - k))
    keep, add = jnp.where(decayed > k, 1.0, e), jnp.where(decayed > k, e, 1.0)
    new = WKV4State(keep * state.aa + add * v, keep * state.bb + add, jnp.maximum(decayed, k))
    return _where(valid, new, state)


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
    return _where(valid, new, demand), keep


def _states_at_entries(inputs: _Chunks, w, state: WKV4State) -> tuple[WKV4State, WKV4State]:
    batch, num_chunks, chunk, width = inputs.k.shape
    empty = _empty(batch, num_chunks, width, inputs.k.dtype)

    def body(i, carry):
        k, v, reset, valid = _at(inputs, i)
        return _advance(carry, k, v, w, reset, valid)

    added = lax.fori_loop(0, chunk, body, WKV4State(*empty))
    return _compose(added, _log_decay(inputs, w), state)


def _demands_at_exits(inputs: _Chunks, w, asks: _Asks) -> tuple[_Demand, _Demand]:
    batch, num_chunks, chunk, width = inputs.k.shape
    empty = _Demand(*_empty(batch, num_chunks, width, inputs.k.dtype))

    def body(i, carry):
        j = chunk - 1 - i
        return _retreat(carry, _at(asks, j), w, _at(inputs.reset, j), _at(inputs.valid, j))[0]

    added = lax.fori_loop(0, chunk, body, empty)
    reverse = partial(jax.tree.map, lambda x: x[:, ::-1])
    nothing = jax.tree.map(lambda x: x[:, 0], empty)
    exits, demand = _compose(reverse(added), reverse(_log_decay(inputs, w)), nothing)
    return reverse(exits), demand


def _walk_outputs(inputs: _Chunks, w, u, entries: WKV4State) -> tuple[Array, Array, Array]:
    """Returns y, denominators and their log-scales [B, N, C, D]."""

    def body(i, carry):
        state, y, denominators, scales = carry
        k, v, reset, valid = _at(inputs, i)
        pp = _forget(reset, state.pp)
        e = jnp.exp(-jnp.abs(pp - (u + k)))
        past, now = jnp.where(pp > u + k, 1.0, e), jnp.where(pp > u + k, e, 1.0)
        denominator = past * state.bb + now
        y_i = (past * state.aa + now * v) / denominator
        return (
            _advance(state, k, v, w, reset, valid),
            _put(y, _where(valid, y_i, 0.0), i),
            _put(denominators, denominator, i),
            _put(scales, jnp.maximum(pp, u + k), i),
        )

    zeros = jnp.zeros_like(inputs.k)
    return lax.fori_loop(0, inputs.k.shape[2], body, (entries, zeros, zeros, zeros))[1:]


def _walk_back(inputs: _Chunks, w, u, asks: _Asks, exits: _Demand, entries: WKV4State):
    """Returns gk, gv [B, N, C, D] and gw, gu [D] (all but the path through the final state's pp)."""
    chunk = inputs.k.shape[2]
    zeros, zero = jnp.zeros_like(inputs.k), jnp.zeros_like(exits.a)

    def body(i, carry):
        demand, da, db, gk, gv, gw, gu = carry
        j = chunk - 1 - i
        k, v, reset, valid = _at(inputs, j)
        own = _at(asks, j)
        past = jnp.exp(k + demand.q)
        now = jnp.exp(u + k - own.scale) * own.g
        gu_j = now * (v - own.y)
        gk = _put(gk, _where(valid, past * (v * demand.a - demand.b) + gu_j, 0.0), j)
        gv = _put(gv, _where(valid, past * demand.a + now, 0.0), j)
        gu = gu + _where(valid, gu_j, 0.0)
        gw = gw + _where(valid, past * (v * da - db), 0.0)
        earlier, keep = _retreat(demand, own, w, reset, valid)
        da = _where(valid, keep * (da + demand.a), da)
        db = _where(valid, keep * (db + demand.b), db)
        return earlier, da, db, gk, gv, gw, gu

    demand, da, db, gk, gv, gw, gu = lax.fori_loop(0, chunk, body, (exits, zero, zero, zeros, zeros, zero, zero))
    gw = gw + jnp.exp(entries.pp + demand.q) * (entries.aa * da - entries.bb * db)
    return gk, gv, gw.sum((0, 1)), gu.sum((0, 1))


def _final_state_gradients(k, v, w, state: WKV4State, reset, length, final: WKV4State, gfinal: WKV4State):
    """Returns gk, gv, gw and gstate of what the final state's cotangents give.

    The final pp is the maximum of the exponents e_i = k_i + n_i w, n_i being the decays after token i, and the sums are those of
    e^{e_i - pp} (v_i, 1). So the token that attains the maximum also gets all that flows through pp, and gw counts decays from
    that token's: the terms that depend on no decay cancel before they are formed.
    """
    batch, num_tokens, _ = k.shape
    valid = jnp.arange(num_tokens) < (jnp.full(batch, num_tokens) if length is None else length)[:, None]
    reset = jnp.zeros_like(valid) if reset is None else reset
    forgotten = _count_after(reset & valid) > 0
    decays = _count_after(valid).astype(k.dtype)[..., None]
    exponents = jnp.concatenate([state.pp[:, None], k], 1) + w * decays
    seen = ~forgotten & jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
    exponents = jnp.where(seen[..., None], exponents, -jnp.inf)
    winner = jnp.argmax(exponents, 1)[:, None]
    wins = jnp.arange(num_tokens + 1)[:, None] == winner
    weights = jnp.exp(exponents - jnp.take_along_axis(exponents, winner, 1))
    decays_of_winner = jnp.take_along_axis(jnp.broadcast_to(decays, exponents.shape), winner, 1)

    values = jnp.concatenate([state.aa[:, None], v], 1)
    ones = jnp.concatenate([state.bb[:, None], jnp.ones_like(v)], 1)
    gaa, gbb, gpp = (g[:, None] for g in gfinal)
    flow = weights * (gaa * values + gbb * ones)
    through_pp = gpp - gaa * final.aa[:, None] - gbb * final.bb[:, None]
    gexponents = flow + jnp.where(wins, through_pp, 0)
    gw = (flow * (decays - decays_of_winner)).sum((0, 1)) + (gpp * decays_of_winner).sum((0, 1))
    gstate = WKV4State((weights * gaa)[:, 0], (weights * gbb)[:, 0], gexponents[:, 0])
    return gexponents[:, 1:], (weights * gaa)[:, 1:], gw, gstate


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
    batch, num_chunks, chunk, width = inputs.k.shape
    decays = chunk * w if inputs.valid is None else inputs.valid.sum(2).astype(w.dtype) * w
    if inputs.reset is not None:
        reset = inputs.reset if inputs.valid is None else inputs.reset & inputs.valid
        decays = jnp.where(reset.any(2), EMPTY, decays)
    return jnp.broadcast_to(decays, (batch, num_chunks, width))


def _empty(batch, num_chunks, width, dtype):
    zero = jnp.zeros((batch, num_chunks, width), dtype)
    return zero, zero, jnp.full_like(zero, EMPTY)


def _forget(reset, pp):
    return pp if reset is None else jnp.where(reset, EMPTY, pp)


def _where(valid, new: Any, old: Any) -> Any:
    return new if valid is None else jax.tree.map(lambda x, y: jnp.where(valid, x, y), new, old)


def _dense(cotangent, like):
    return jnp.zeros_like(like) if isinstance(cotangent, SymbolicZero) else cotangent


def _cut(k, v, reset, length) -> _Chunks:
    batch, num_tokens, _ = k.shape
    split = partial(_split, chunk=chunk_length(num_tokens))
    if length is not None:
        valid = jnp.arange(num_tokens) < length[:, None]
    else:  # Only the padding of the last chunk is not.
        valid = None if num_tokens % chunk_length(num_tokens) == 0 else jnp.ones((batch, num_tokens), bool)
    reset, valid = (None if mask is None else split(mask[..., None]) for mask in (reset, valid))
    return _Chunks(split(k), split(v), reset, valid)


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
