"""What a device can do at best."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PEAK_BF16_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
}
"""Dense bfloat16 1e12 FLOP/s by the start of `device_kind`, from the vendors' data sheets."""


def peak_flops(device: Any, dtype: str) -> float | None:
    """Returns a device's peak in FLOP/s: published in bfloat16, measured on CPU, None where neither is known.

    Args:
        device: Of JAX.
        dtype: What the CPU's matrix product is measured in.
    """
    if device.platform == "cpu":
        return measure_gemm(dtype)
    return published_peak(device.device_kind)


def published_peak(kind: str) -> float | None:
    """Returns the published peak in FLOP/s of a `device_kind`, in bfloat16; None where it is not known."""
    matches = [name for name in PEAK_BF16_TFLOPS if kind.startswith(name)]
    return PEAK_BF16_TFLOPS[max(matches, key=len)] * 1e12 if matches else None


def measure_gemm(dtype: str, size: int = 2048, repeats: int = 5) -> float:
    """Returns the best FLOP/s of `repeats` products of two size x size matrices on the default device."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.min(times))
