"""The public WKV operator of RWKV-4: checks, defaults and the choice of backend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .. import dispatch
from ..pallas import kernel_backends
from ..triton_gpu import backend as triton_backend
from .chunk import kernel
from .parallel import parallel
from .reference import EMPTY, WKV4State, scan

_COMPILED, _INTERPRETED = kernel_backends(kernel, mosaic=True)
BACKENDS = {
    **_COMPILED,
    "triton": triton_backend("wkv4", kernel),
    "parallel": dispatch.Backend(parallel, dispatch.anything),
    "scan": dispatch.Backend(scan, dispatch.anything),
    **_INTERPRETED,
}
"""In order of preference."""


def init_wkv4_state(batch_size: int, embed_dim: int, dtype=jnp.float32) -> WKV4State:
    """Returns the state that has seen nothing: [batch_size, embed_dim] each."""
    zeros = jnp.zeros((batch_size, embed_dim), dtype)
    return WKV4State(zeros, zeros, jnp.full_like(zeros, EMPTY))


def wkv4(
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    w: Float[Array, "D"],
    u: Float[Array, "D"],
    state: WKV4State | None = None,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "B T D"], WKV4State]:
    """Returns RWKV-4's exponentially decayed, normalised sum of values, and the state after the last token.

        y_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same with 1 in place of v)

    The state, the accumulation and all exponentials are float32, or float64 if any input is.

    Args:
        k: Keys, in any floating dtype.
        v: Values, in the same dtype.
        w: Log-decay a step and channel, < 0.
        u: Bonus of the present token, a channel (`time_first`).
        state: What came before; None is the empty state.
        reset: True where a token starts a new sequence: it sees nothing of what came before it.
        length: Tokens of each row that count, 0 to T; those after leave the state untouched and give 0. None is T.
        backend: A name that `explain_wkv4` lists, such as "pallas_gpu", "parallel" or "scan"; None is the best on the device in use.

    Returns:
        y in v's dtype, and the state, through which gradients flow too.

    Raises:
        ValueError: A shape or dtype does not fit, or the backend is unknown.

    Source: arXiv 2305.13048, equation 16.
    """
    _check(k, v, w, u, state, reset, length)
    batch_size, num_tokens, embed_dim = k.shape
    floats = (k, v, w, u, *(state or ()))
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in floats) else jnp.float32
    state = init_wkv4_state(batch_size, embed_dim, dtype) if state is None else state
    if length is not None:  # Padding may hold anything, and 0 * inf would reach gradients.
        valid = jnp.arange(num_tokens)[:, None] < length[:, None, None]
        k, v = jnp.where(valid, k, 0), jnp.where(valid, v, 0)
    run = dispatch.choose("wkv4", BACKENDS, backend, dispatch.here(0, num_tokens, dispatch.widest(k.dtype, dtype))).run
    w, u, state = jax.tree.map(lambda x: x.astype(dtype), (w, u, state))
    y, new = run(k, v, w, u, state, reset, length)
    return y.astype(v.dtype), new


def explain_wkv4(platform: str | None = None) -> str:
    """Returns every backend of wkv4 with its reason for or against on a platform (default: the one in use)."""
    return dispatch.explain("wkv4", BACKENDS, dispatch.Call(platform) if platform else dispatch.here())


def _check(k, v, w, u, state, reset, length):
    if k.ndim != 3 or 0 in k.shape:
        raise ValueError(f"wkv4: k has shape {k.shape}; it must be [B, T, D] with no empty axis")
    batch_size, num_tokens, embed_dim = k.shape
    row, channel = (batch_size, embed_dim), (embed_dim,)
    expected = {"v": (v, k.shape), "w": (w, channel), "u": (u, channel)}
    if state is not None:
        expected |= {f"state.{name}": (x, row) for name, x in state._asdict().items()}
    if reset is not None:
        expected["reset"] = (reset, (batch_size, num_tokens))
    if length is not None:
        expected["length"] = (length, (batch_size,))
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"wkv4: {name} has shape {x.shape}; with k of shape {k.shape} it must be {shape}")
    for name, x in {"k": k, "v": v, "w": w, "u": u}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"wkv4: {name} is {x.dtype}; it must be a floating dtype")
    if k.dtype != v.dtype:
        raise ValueError(f"wkv4: k is {k.dtype} and v is {v.dtype}; cast one so that they agree")
    if reset is not None and reset.dtype != jnp.bool_:
        raise ValueError(f"wkv4: reset is {reset.dtype}; it must be bool, True where a token starts a sequence")
    if length is not None and not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"wkv4: length is {length.dtype}; it must be an integer count of tokens")
