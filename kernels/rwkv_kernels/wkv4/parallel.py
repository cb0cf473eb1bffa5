"""RWKV-4's WKV operator in parallel over time, in XLA operations that run on any device.

Time is cut into about sqrt(T) chunks of C tokens. A walk of all chunks at once, token by token, sums what each adds to the state; a
walk over the chunks turns that into the state at each chunk's start; another walk of all chunks at once gives the outputs. So the
loops are about sqrt(T) long, and nearly all the work is done on arrays of sqrt(T) tokens. The backward pass is the same in the
other direction.

Exponentials of small keys are summed as they are (`bounded`), which takes about half the time of sums with a running maximum
(`scaled`). Which of the two runs is decided on the device, by the greatest key, bonus and scale of the whole call; under `vmap`
both run.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from . import bounded, scaled
from .cutting import count_after, cut, join, split
from .reference import WKV4State


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


@jax.custom_vjp
def _wkv(k, v, w, u, state, reset, length):
    return _forward(k, v, w, u, state, reset, length)[0]


def _forward(k, v, w, u, state, reset, length):
    fits = bounded.fits(k, w, u, state)
    inputs = cut(k, v, reset, length)
    y, final, saved = lax.cond(fits, bounded.forward, scaled.forward, inputs, w, u, state)
    return (join(y, k.shape[1]), final), (fits, saved)


def _wkv_fwd(*arguments):
    k, v, w, u, state, reset, length = jax.tree.map(
        lambda x: x.value, arguments, is_leaf=lambda x: hasattr(x, "perturbed")
    )
    (y, final), (fits, saved) = _forward(k, v, w, u, state, reset, length)
    return (y, final), (k, v, w, u, state, reset, length, y, final, fits, saved)


def _wkv_bwd(residuals, cotangents):
    k, v, w, u, state, reset, length, y, final, fits, saved = residuals
    gy, gfinal = cotangents
    inputs = cut(k, v, reset, length)
    y, gy = (split(x, inputs.k.shape[2]) for x in (y, _dense(gy, y)))
    gk, gv, gw, gu, gaa, gbb = lax.cond(fits, bounded.backward, scaled.backward, inputs, w, u, state, y, saved, gy)
    gk, gv = join(gk, k.shape[1]), join(gv, k.shape[1])
    gstate = WKV4State(gaa, gbb, gaa * state.aa + gbb * state.bb)
    if not all(
        isinstance(g, SymbolicZero) for g in gfinal
    ):  # Training on whole sequences asks nothing of the final state.
        gfinal = WKV4State(*map(_dense, gfinal, final))
        through_final = _final_state_gradients(k, v, w, state, reset, length, final, gfinal)
        gk, gv, gw, gstate = jax.tree.map(jnp.add, (gk, gv, gw, gstate), through_final)
    return gk, gv, gw, gu, gstate, None, None


_wkv.defvjp(_wkv_fwd, _wkv_bwd, symbolic_zeros=True)


def _final_state_gradients(k, v, w, state: WKV4State, reset, length, final: WKV4State, gfinal: WKV4State):
    """Returns gk, gv, gw and gstate of what the final state's cotangents give.

    The final pp is the maximum of the exponents e_i = k_i + n_i w, n_i being the decays after token i, and the sums are those of
    e^{e_i - pp} (v_i, 1). So the token that attains the maximum also gets all that flows through pp, and gw counts decays from
    that token's: the terms that depend on no decay cancel before they are formed.
    """
    batch, num_tokens, _ = k.shape
    valid = jnp.arange(num_tokens) < (jnp.full(batch, num_tokens) if length is None else length)[:, None]
    reset = jnp.zeros_like(valid) if reset is None else reset
    forgotten = count_after(reset & valid) > 0
    decays = count_after(valid).astype(k.dtype)[..., None]
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


def _dense(cotangent, like):
    return jnp.zeros_like(like) if isinstance(cotangent, SymbolicZero) else cotangent
