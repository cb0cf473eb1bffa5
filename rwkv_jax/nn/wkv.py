"""The WKV operators on the mesh in use: heads and rows on devices of their own, and a row's tokens cut over the axis `sequence`.

Without a mesh (`jax.set_mesh`) these are the operators of rwkv_kernels. On one, each device runs its part under `jax.shard_map`, which
any backend fits. Tokens are cut so: a part of a row maps the state before it to the state after it by an affine map, which it can tell
without knowing the state. The maps are composed along the axis, and the part then runs from the state that it enters with.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rwkv_kernels
from jaxtyping import Array
from rwkv_kernels import WKV4State
from rwkv_kernels.wkv4 import init_wkv4_state

from ..sharding import fitting, in_use
from .parts import Map, Prefix, from_last, local_length, tree

TOKENS = ("batch", "time", "heads", None)
MATRIX = ("batch", "heads", None, None)
CHANNELS = ("batch", "time", "att")


class _Op(NamedTuple):
    """An operator: its arrays' logical axes and, for a row cut into parts, the map of a part."""

    run: Callable[..., tuple[Array, Any]]
    """run(*arrays, state, reset=, length=, backend=) -> (y, state)."""
    state: tuple[str | None, ...]
    map_of: Callable[..., Any]
    """map_of(run, arrays, state, reset, length) -> the map of these tokens; of `state` only shape and dtype count."""
    maps: Map


def wkv4(k, v, w, u, state: WKV4State, *, reset=None, length=None, backend=None, prefix: Prefix = tree):
    """As `rwkv_kernels.wkv4`, on the mesh in use; `prefix` says how states go along the axis `sequence`."""
    arrays = {"k": (k, CHANNELS), "v": (v, CHANNELS), "w": (w, ("att",)), "u": (u, ("att",))}
    return _on_mesh(_WKV4, arrays, state, reset, length, backend, prefix)


def wkv6(r, k, v, w, u, state, *, reset=None, length=None, backend=None, prefix: Prefix = tree):
    """As `rwkv_kernels.wkv6`, on the mesh in use; `prefix` as in `wkv4`."""
    decay = ("heads", None) if w.ndim == 2 else TOKENS
    arrays = {"r": (r, TOKENS), "k": (k, TOKENS), "v": (v, TOKENS), "w": (w, decay), "u": (u, ("heads", None))}
    return _on_mesh(_WKV6, arrays, state, reset, length, backend, prefix)


def wkv7(r, w, k, v, a, b, state, *, reset=None, length=None, backend=None, prefix: Prefix = tree):
    """As `rwkv_kernels.wkv7`, on the mesh in use; `prefix` as in `wkv4`."""
    arrays = {name: (x, TOKENS) for name, x in zip("rwkvab", (r, w, k, v, a, b), strict=True)}
    return _on_mesh(_WKV7, arrays, state, reset, length, backend, prefix)


def _on_mesh(op: _Op, arrays: dict[str, Any], state, reset, length, backend, prefix: Prefix):
    values = tuple(x for x, _ in arrays.values())
    run = partial(op.run, backend=backend)
    if not in_use():
        return run(*values, state, reset=reset, length=length)
    tokens = values[0]
    specs = tuple(fitting(x.shape, axes) for x, axes in arrays.values())
    of_state = jax.tree.map(lambda leaf: fitting(leaf.shape, op.state), state)
    of_marks = fitting(tokens.shape[:2], ("batch", "time"))
    cut = of_marks[1] is not None

    def local(values, state, reset, length):
        if not cut:
            return run(*values, state, reset=reset, length=length)
        num_tokens = values[0].shape[1]
        own_length = None if length is None else local_length(length, num_tokens)
        own = op.map_of(run, values, state, reset, own_length)
        entry = prefix(own, state, op.maps)
        y, final = run(*values, entry, reset=reset, length=own_length)
        return y, jax.tree.map(from_last, final)

    parts = jax.shard_map(
        local,
        in_specs=(specs, of_state, None if reset is None else of_marks, None if length is None else jax.P(of_marks[0])),
        out_specs=(specs[0], of_state),
        check_vma=False,
    )
    return parts(values, state, reset, length)


def _counts(reset: Array | None, length: Array | None, batch_size: int, num_tokens: int) -> tuple[Array, Array]:
    """How many tokens of each row count, int32 [B], and whether a sequence starts among them, bool [B]."""
    count = jnp.full((batch_size,), num_tokens) if length is None else length
    if reset is None:
        return count, jnp.zeros((batch_size,), bool)
    return count, (reset & (jnp.arange(num_tokens) < count[:, None])).any(1)


class _Map4(NamedTuple):
    """(sums, scale) -> the sums decayed by e^log_decay, plus own sums."""

    log_decay: Array
    """[B, D]; at most -1e38 where a sequence starts."""
    own: WKV4State


_CUT = -1e38
"""A log-decay of which nothing is left; WKV-4's exponent of an empty state."""


def _map4(run, arrays, state: WKV4State, reset, length) -> _Map4:
    k, _, w, _ = arrays
    count, starts = _counts(reset, length, k.shape[0], k.shape[1])
    _, own = run(*arrays, init_wkv4_state(k.shape[0], k.shape[2], state.aa.dtype), reset=reset, length=length)
    log_decay = count[:, None].astype(state.aa.dtype) * w.astype(state.aa.dtype)
    return _Map4(jnp.where(starts[:, None], _CUT, log_decay), own)


def _apply4(one: _Map4, state: WKV4State) -> WKV4State:
    decayed = jnp.maximum(state.pp + one.log_decay, _CUT)
    pp = jnp.maximum(decayed, one.own.pp)
    before, own = jnp.exp(decayed - pp), jnp.exp(one.own.pp - pp)
    return WKV4State(before * state.aa + own * one.own.aa, before * state.bb + own * one.own.bb, pp)


def _compose4(first: _Map4, second: _Map4) -> _Map4:
    return _Map4(jnp.maximum(first.log_decay + second.log_decay, _CUT), _apply4(second, first.own))


class _Map6(NamedTuple):
    """S -> diag(decay) S + own."""

    decay: Array
    """[B, H, K]; 0 where a sequence starts."""
    own: Array
    """[B, H, K, V]."""


def _map6(run, arrays, state, reset, length) -> _Map6:
    k, w = arrays[1], arrays[3].astype(state.dtype)
    batch_size, num_tokens = k.shape[:2]
    count, starts = _counts(reset, length, batch_size, num_tokens)
    if w.ndim == 2:
        total = count[:, None, None].astype(state.dtype) * w
    else:
        valid = jnp.arange(num_tokens) < count[:, None]
        total = jnp.where(valid[..., None, None], w, 0).sum(1)
    _, own = run(*arrays, jnp.zeros_like(state), reset=reset, length=length)
    return _Map6(jnp.where(starts[:, None, None], 0, jnp.exp(total)), own)


def _apply6(one: _Map6, state: Array) -> Array:
    return one.decay[..., None] * state + one.own


def _compose6(first: _Map6, second: _Map6) -> _Map6:
    return _Map6(first.decay * second.decay, _apply6(second, first.own))


class _Map7(NamedTuple):
    """S -> S transition + own."""

    transition: Array
    """[B, H, K, K]."""
    own: Array
    """[B, H, V, K]."""


def _map7(run, arrays, state, reset, length) -> _Map7:
    """The rows of the state do not mix: the transition is what becomes of the identity's rows, which take no values."""
    r, w, k, v, a, b = arrays
    values, keys = state.shape[-2:]
    identity = jnp.broadcast_to(jnp.eye(keys, dtype=state.dtype), (*state.shape[:2], keys, keys))
    start = jnp.concatenate([jnp.zeros_like(state), identity], axis=2)
    none = jnp.zeros((*v.shape[:3], keys), v.dtype)
    _, both = run(r, w, k, jnp.concatenate([v, none], axis=3), a, b, start, reset=reset, length=length)
    return _Map7(both[:, :, values:], both[:, :, :values])


def _apply7(one: _Map7, state: Array) -> Array:
    return jnp.matmul(state, one.transition, precision="highest") + one.own


def _compose7(first: _Map7, second: _Map7) -> _Map7:
    return _Map7(jnp.matmul(first.transition, second.transition, precision="highest"), _apply7(second, first.own))


_WKV4 = _Op(rwkv_kernels.wkv4, ("batch", "att"), _map4, Map(_apply4, _compose4))
_WKV6 = _Op(rwkv_kernels.wkv6, MATRIX, _map6, Map(_apply6, _compose6))
_WKV7 = _Op(rwkv_kernels.wkv7, MATRIX, _map7, Map(_apply7, _compose7))
