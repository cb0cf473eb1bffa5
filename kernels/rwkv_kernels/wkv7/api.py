"""The public WKV operator of RWKV-7: checks, defaults and the choice of backend."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .. import dispatch
from ..pallas import kernel_backends
from ..triton_gpu import backend as triton_backend
from .chunk import kernel
from .parallel import parallel
from .reference import scan

_COMPILED, _INTERPRETED = kernel_backends(kernel, mosaic=True)
BACKENDS = {
    **_COMPILED,
    "triton": triton_backend("wkv7", kernel),
    "parallel": dispatch.Backend(parallel, dispatch.anything),
    "scan": dispatch.Backend(scan, dispatch.anything),
    **_INTERPRETED,
}
"""In order of preference."""


def init_wkv7_state(
    batch_size: int, num_heads: int, value_dim: int, key_dim: int, dtype=jnp.float32
) -> Float[Array, "B H V K"]:
    """Returns the state that has seen nothing: zeros."""
    return jnp.zeros((batch_size, num_heads, value_dim, key_dim), dtype)


def wkv7(
    r: Float[Array, "B T H K"],
    w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    state: Float[Array, "B H V K"] | None = None,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H V K"]]:
    """Returns what each token reads from RWKV-7's state, a matrix a head, and the state after the last token.

        S_t = S_{t-1} diag(exp w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

    The state, the accumulation and all exponentials are float32, or float64 if any input is.

    Args:
        r: Receptance, in any floating dtype.
        w: Log-decay a step and key channel, < 0. All but "scan" and "mosaic_gpu" divide by the decay of a whole chunk of 16: that is
            safe in RWKV-7's range, -0.6066 to 0, but gradients lose digits below -4 a step, and from -5.5 on it overflows to NaN.
        k: Keys, in r's dtype.
        v: Values, in r's dtype.
        a: Which direction of the state a token removes (RWKV-7: minus the normalised key), in r's dtype.
        b: What it puts in that direction's place (RWKV-7: the normalised key times the in-context learning rate), in r's dtype.
        state: What came before, [value, key]; None is the empty state.
        reset: True where a token starts a new sequence: it sees nothing of what came before it.
        length: Tokens of each row that count, 0 to T; those after leave the state untouched and give 0. None is T.
        backend: A name that `explain_wkv7` lists, such as "pallas_gpu", "parallel" or "scan"; None is the best on the device in use.

    Returns:
        y in v's dtype, and the state, through which gradients flow too.

    Raises:
        ValueError: A shape or dtype does not fit, or the backend is unknown.

    Source: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_demo.py.
    """
    _check(r, w, k, v, a, b, state, reset, length)
    batch_size, num_tokens, num_heads, key_dim = r.shape
    tokens = (r, w, k, v, a, b)
    floats = tokens if state is None else (*tokens, state)
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in floats) else jnp.float32
    state = init_wkv7_state(batch_size, num_heads, v.shape[3], key_dim, dtype) if state is None else state
    if length is not None:  # Padding may hold anything; zeros keep the state as it is.
        valid = jnp.arange(num_tokens) < length[:, None]
        tokens = tuple(jnp.where(valid[..., None, None], x, 0) for x in tokens)
        reset = None if reset is None else reset & valid
    run = dispatch.choose(
        "wkv7", BACKENDS, backend, dispatch.here(max(key_dim, v.shape[-1]), num_tokens, dispatch.widest(r.dtype, dtype))
    ).run
    y, new = run(*tokens, state.astype(dtype), reset, length)
    return y.astype(v.dtype), new


def explain_wkv7(platform: str | None = None) -> str:
    """Returns every backend of wkv7 with its reason for or against on a platform (default: the one in use)."""
    return dispatch.explain("wkv7", BACKENDS, dispatch.Call(platform) if platform else dispatch.here())


def _check(r, w, k, v, a, b, state, reset, length):
    if r.ndim != 4 or 0 in r.shape:
        raise ValueError(f"wkv7: r has shape {r.shape}; it must be [B, T, H, K] with no empty axis")
    if v.ndim != 4 or v.shape[:3] != r.shape[:3] or v.shape[3] == 0:
        raise ValueError(f"wkv7: v has shape {v.shape}; with r of shape {r.shape} it must be {(*r.shape[:3], 'V')}")
    batch_size, num_tokens, num_heads, key_dim = r.shape
    expected = {"w": (w, r.shape), "k": (k, r.shape), "a": (a, r.shape), "b": (b, r.shape)}
    if state is not None:
        expected["state"] = (state, (batch_size, num_heads, v.shape[3], key_dim))
    if reset is not None:
        expected["reset"] = (reset, (batch_size, num_tokens))
    if length is not None:
        expected["length"] = (length, (batch_size,))
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"wkv7: {name} has shape {x.shape}; with r of shape {r.shape} it must be {shape}")
    for name, x in {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"wkv7: {name} is {x.dtype}; it must be a floating dtype")
        if name != "w" and x.dtype != r.dtype:
            raise ValueError(f"wkv7: r is {r.dtype} and {name} is {x.dtype}; cast one so that they agree")
    if reset is not None and reset.dtype != jnp.bool_:
        raise ValueError(f"wkv7: reset is {reset.dtype}; it must be bool, True where a token starts a sequence")
    if length is not None and not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"wkv7: length is {length.dtype}; it must be an integer count of tokens")
