"""Chooses among the backends of an op, and says why."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import hardware

LARGEST_HEAD = {"pallas_gpu": 256, "mosaic_gpu": 256, "triton": 256, "pallas_tpu": 256}
"""Channels of a head that kernels hold, at most, by backend."""


class Call(NamedTuple):
    """What a backend is asked to do, as far as it may refuse."""

    platform: str
    """"cpu", "gpu", "tpu", ..."""
    capability: float | None = None
    """Compute capability of an NVIDIA GPU; None where it is not known."""
    head_dim: int = 0
    """Channels of the largest head; 0 where the op has none, or for any."""
    num_tokens: int | None = None
    """A row; None for any."""
    dtype: str | None = None
    """Of the tokens, or float64 where the state or a parameter is; None for any."""


class Backend(NamedTuple):
    """One way to run an op.

    `why_not(call)` returns why it cannot do that, or None where it can. A backend that is `by_name`, or is given fewer than its
    `least_tokens`, is not chosen unless named.
    """

    run: Callable[..., Any]
    why_not: Callable[[Call], str | None]
    by_name: bool = False
    least_tokens: int = 1


def here(head_dim: int = 0, num_tokens: int | None = None, dtype: str | None = None) -> Call:
    """Returns a call on the device in use: that of the abstract mesh that is set (to compile for it), else JAX's default device."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return Call(_platform(abstract), _capability(abstract), head_dim, num_tokens, dtype)
    default: Any = getattr(jax.config, "jax_default_device", None) or jax.default_backend()
    device: Any = jax.devices(default)[0] if isinstance(default, str) else default
    nvidia = "cuda" in device.client.platform_version
    return Call(_platform(device), float(device.compute_capability) if nvidia else None, head_dim, num_tokens, dtype)


def widest(tokens: Any, computed: Any) -> str:
    """Returns a call's dtype: float64 if it is computed in that, as it is for a float64 state of float32 tokens; else the tokens'."""
    return jnp.dtype(computed if jnp.dtype(computed) == jnp.float64 else tokens).name


def _platform(device: Any) -> str:
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def _capability(abstract: Any) -> float | None:
    """Of a GPU that is described here; JAX's own description does not say."""
    known = {gpu.name: float(".".join(map(str, gpu.capability))) for gpu in hardware.GPUS.values()}
    return known.get(abstract.device_kind)


def anything(call: Call) -> None:
    """The `why_not` of a backend that can do everything everywhere."""
    del call


def heads_fit(kernels: str, call: Call) -> str | None:
    """Returns why kernels (a key of LARGEST_HEAD) cannot hold a call's heads, or None where they can."""
    if call.head_dim > LARGEST_HEAD[kernels]:
        return f"a head has {call.head_dim} channels; this kernel holds at most {LARGEST_HEAD[kernels]}"
    return None


def ampere(call: Call) -> str | None:
    """Returns why the device is no GPU that Triton compiles for, or None where it is one."""
    if call.platform != "gpu":
        return f"needs a GPU, and the device in use is a {call.platform}"
    if call.capability is not None and call.capability < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later; this one has {call.capability}"
    return None


def triton_gpu(call: Call) -> str | None:
    """The `why_not` of Pallas kernels that Triton compiles."""
    return ampere(call) or _cannot_import("jax.experimental.pallas.triton") or heads_fit("pallas_gpu", call)


def mosaic_gpu(call: Call) -> str | None:
    """The `why_not` of Pallas kernels that Mosaic GPU compiles, which JAX keeps when it drops the lowering through Triton."""
    if call.platform != "gpu":
        return f"needs a GPU, and the device in use is a {call.platform}"
    if call.capability is None or not 9 <= call.capability < 12:
        found = "that of the one in use is not known" if call.capability is None else f"this one has {call.capability}"
        return f"needs the shared memory of an NVIDIA GPU of compute capability 9.0 (Hopper) to 11, and {found}"
    if call.dtype == "float64":
        return "holds tokens in bfloat16, float16 or float32, and an input is float64"
    return _cannot_import("jax.experimental.pallas.mosaic_gpu") or heads_fit("mosaic_gpu", call)


def mosaic_gpu_interpreted(call: Call) -> str | None:
    """The `why_not` of the same in JAX's interpreter of GPU kernels."""
    return _cannot_import("jax.experimental.pallas.mosaic_gpu") or heads_fit("mosaic_gpu", call)


def tpu(call: Call) -> str | None:
    """The `why_not` of Pallas kernels for TPUs."""
    if call.platform != "tpu":
        return f"needs a TPU, and the device in use is a {call.platform}"
    if call.dtype in ("float16", "float64"):
        return f"holds tokens in bfloat16 or float32, and an input is {call.dtype}"
    return _cannot_import("jax.experimental.pallas.tpu") or heads_fit("pallas_tpu", call)


def _cannot_import(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"needs {module}, which JAX {jax.__version__} does not give here: {error}"
    return None


def choose(op: str, backends: Mapping[str, Backend], requested: str | None, call: Call) -> Backend:
    """Returns the requested backend, or, for None, the first one in order that can do the call.

    Raises:
        ValueError: The requested backend does not exist or cannot do it, or none can; the message lists every backend with its
            reason.
    """
    if requested is not None and requested in backends and not backends[requested].why_not(call):
        return backends[requested]
    if requested is None:
        for backend in backends.values():
            enough = call.num_tokens is None or call.num_tokens >= backend.least_tokens
            if enough and not backend.by_name and not backend.why_not(call):
                return backend
    problem = "no backend runs here" if requested is None else f"backend={requested!r} cannot be used"
    raise ValueError(f"{op}: {problem}; choose one of these, or None for the best:\n{explain(op, backends, call)}")


def explain(op: str, backends: Mapping[str, Backend], call: Call) -> str:
    """Returns one line a backend, in order of preference: whether it can do the call, or why it cannot."""
    lines = [f"{op} on {call.platform}, in order of preference:"]
    for name, backend in backends.items():
        can = "runs here"
        if backend.by_name:
            can += ", if named"
        elif backend.least_tokens > 1:
            can += f"; for fewer than {backend.least_tokens} tokens the next one is chosen"
        lines.append(f"  {name}: {backend.why_not(call) or can}")
    return "\n".join(lines)
