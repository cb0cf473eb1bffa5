"""The public WKV operator of RWKV-5 and RWKV-6: checks, defaults and the choice of backend."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .. import dispatch
from ..pallas import kernel_backends
from .chunk import kernel
from .parallel import parallel
from .reference import scan

_COMPILED, _INTERPRETED = kernel_backends(kernel)
BACKENDS = {
    **_COMPILED,
    "parallel": dispatch.Backend(parallel, dispatch.anything),
    "scan": dispatch.Backend(scan, dispatch.anything),
    **_INTERPRETED,
}
"""In order of preference."""


def init_wkv6_state(
    batch_size: int, num_heads: int, key_dim: int, value_dim: int, dtype=jnp.float32
) -> Float[Array, "B H K V"]:
    """Returns the state that has seen nothing: zeros [batch_size, num_heads, key_dim, value_dim]."""
    return jnp.zeros((batch_size, num_heads, key_dim, value_dim), dtype)


def wkv6(
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    w: Float[Array, "B T H K"] | Float[Array, "H K"],
    u: Float[Array, "H K"],
    state: Float[Array, "B H K V"] | None = None,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Returns what each token's receptance reads from a decaying sum of k v^T, and the state after the last token.

        y_t = r_t (S_{t-1} + diag(u) k_t v_t^T)        S_t = diag(exp w_t) S_{t-1} + k_t v_t^T

    The state, the accumulation and all exponentials are float32, or float64 if any input is.

    Args:
        r: Receptances, in any floating dtype.
        k: Keys, in the same dtype.
        v: Values, in the same dtype.
        w: Log-decay a key channel, < 0 and unbounded below: of each token (RWKV-6), or [H, K] for all tokens (RWKV-5).
        u: Bonus of the present token, a key channel (`time_faaaa`).
        state: What came before, [key, value] in each head; None is zeros.
        reset: True where a token starts a new sequence: it sees nothing of what came before it.
        length: Tokens of each row that count, 0 to T; those after leave the state untouched and give 0. None is T.
        backend: A name that `explain_wkv6` lists, such as "pallas_gpu", "parallel" or "scan"; None is the best on the device in use.

    Returns:
        y in v's dtype, and the state, through which gradients flow too.

    Raises:
        ValueError: A shape or dtype does not fit, or the backend is unknown.

    Source: arXiv 2404.05892, equations 8 and 19.
    """
    _check(r, k, v, w, u, state, reset, length)
    batch_size, num_tokens, num_heads, key_dim = k.shape
    floats = (r, k, v, w, u, *(() if state is None else (state,)))
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in floats) else jnp.float32
    if state is None:
        state = init_wkv6_state(batch_size, num_heads, key_dim, v.shape[-1], dtype)
    if length is not None:  # Padding may hold anything, and 0 * inf would reach gradients.
        valid = (jnp.arange(num_tokens) < length[:, None])[..., None, None]
        r, k, v = (jnp.where(valid, x, 0) for x in (r, k, v))
        w = w if w.ndim == 2 else jnp.where(valid, w, 0)
    run = dispatch.choose(
        "wkv6", BACKENDS, backend, dispatch.here(max(key_dim, v.shape[-1]), num_tokens, dispatch.widest(r.dtype, dtype))
    ).run
    y, new = run(r, k, v, w, u.astype(dtype), state.astype(dtype), reset, length)
    return y.astype(v.dtype), new


def explain_wkv6(platform: str | None = None) -> str:
    """Returns every backend of wkv6 with its reason for or against on a platform (default: the one in use)."""
    return dispatch.explain("wkv6", BACKENDS, dispatch.Call(platform) if platform else dispatch.here())


def _check(r, k, v, w, u, state, reset, length):
    if k.ndim != 4 or 0 in k.shape:
        raise ValueError(f"wkv6: k has shape {k.shape}; it must be [B, T, H, K] with no empty axis")
    if v.ndim != 4 or 0 in v.shape or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"wkv6: v has shape {v.shape}; with k of shape {k.shape} it must be {k.shape[:3]} and V values"
        )
    batch_size, num_tokens, num_heads, key_dim = k.shape
    channel = (num_heads, key_dim)
    expected = {"r": (r, k.shape), "w": (w, channel if w.ndim == 2 else k.shape), "u": (u, channel)}
    if state is not None:
        expected["state"] = (state, (batch_size, *channel, v.shape[-1]))
    if reset is not None:
        expected["reset"] = (reset, (batch_size, num_tokens))
    if length is not None:
        expected["length"] = (length, (batch_size,))
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"wkv6: {name} has shape {x.shape}; with k of shape {k.shape} it must be {shape}")
    for name, x in {"r": r, "k": k, "v": v, "w": w, "u": u}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"wkv6: {name} is {x.dtype}; it must be a floating dtype")
    if not r.dtype == k.dtype == v.dtype:
        raise ValueError(f"wkv6: r is {r.dtype}, k is {k.dtype} and v is {v.dtype}; cast them so that they agree")
    if reset is not None and reset.dtype != jnp.bool_:
        raise ValueError(f"wkv6: reset is {reset.dtype}; it must be bool, True where a token starts a sequence")
    if length is not None and not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"wkv6: length is {length.dtype}; it must be an integer count of tokens")
