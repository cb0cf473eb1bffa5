"""Measures how states go from part to part of a row cut over devices: `python experiments/sequence.py [--devices 8] [--tokens 4096]`.

Each WKV operator runs forward and backward on one device, and on a mesh of `sequence` parts: with the maps of parts composed at
doubling distances (tree, what the models do), and with the state handed along a ring. Greatest differences from one device are
relative. On a CPU the devices are virtual and share its cores: what is compared are work and exchanges, not a network.
"""

import argparse
import os
import time
from typing import Any

REPEATS = 5
"""Timed calls, of which the median is shown."""


def main() -> None:
    """Prints a line for each operator and way."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--devices", type=int, default=8, help="parts of a row; on a CPU they are made")
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--heads", type=int, default=8, help="of 64 channels")
    arguments = parser.parse_args()
    if arguments.tokens % arguments.devices:
        parser.error(f"--devices {arguments.devices} does not divide --tokens {arguments.tokens}")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={arguments.devices}"
    report(arguments.devices, arguments.tokens, arguments.heads)


def report(num_devices: int, num_tokens: int, heads: int) -> None:
    """Measures and prints; JAX is imported here, after its devices are made."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from hlo import collectives

    from rwkv_jax import sharding
    from rwkv_jax.nn import parts

    print(f"{'op':5s} {'way':11s} {'ms':>7s} {'error':>8s}  exchanges a device (executions, MB)")
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, sequence=num_devices))
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    for name, make in OPERATORS.items():
        run, arrays = make(np.random.default_rng(0), num_tokens, heads)
        arrays = jax.tree.map(jnp.asarray, arrays)

        def gradients(arrays: Any, prefix: Any, run: Any = run) -> Any:
            def total(arrays: Any) -> Any:
                return sum(jnp.sin(y).sum() for y in jax.tree.leaves(run(*arrays, prefix=prefix)))

            return jax.grad(total)(arrays)

        expected = None
        for way, prefix in (("one device", parts.tree), ("tree", parts.tree), ("ring", parts.ring)):
            with jax.set_mesh(mesh if expected is not None else one):
                compiled = jax.jit(gradients, static_argnums=1).lower(arrays, prefix).compile()
                found = jax.block_until_ready(compiled(arrays))
                times = []
                for _ in range(REPEATS):
                    start = time.perf_counter()
                    jax.block_until_ready(compiled(arrays))
                    times.append(time.perf_counter() - start)
            expected = found if expected is None else expected
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
            # A gradient that is zero, such as an empty state's, must be so in all.
            error = max(float(np.abs(np.subtract(a, b)).max() / (np.abs(b).max() or 1)) for a, b in pairs)
            exchanged = {
                kind: (n, round(size / 1e6, 2)) for kind, (n, size) in collectives(compiled.as_text() or "").items()
            }
            print(f"{name:5s} {way:11s} {1e3 * sorted(times)[REPEATS // 2]:7.0f} {error:8.0e}  {exchanged}", flush=True)


def of_wkv4(rng: Any, num_tokens: int, heads: int) -> tuple[Any, Any]:
    """Returns the operator and arrays of one row."""
    import numpy as np
    from rwkv_kernels import init_wkv4_state

    from rwkv_jax.nn.wkv import wkv4

    width = 64 * heads
    k, v = rng.standard_normal((2, 1, num_tokens, width)).astype(np.float32)
    w, u = -np.exp(rng.uniform(-6, 1, width)).astype(np.float32), rng.standard_normal(width).astype(np.float32)
    return wkv4, (k, v, w, u, init_wkv4_state(1, width))


def of_wkv6(rng: Any, num_tokens: int, heads: int) -> tuple[Any, Any]:
    """As `of_wkv4`."""
    import numpy as np

    from rwkv_jax.nn.wkv import wkv6

    r, k, v = rng.standard_normal((3, 1, num_tokens, heads, 64)).astype(np.float32) / 8
    w = -np.exp(rng.uniform(-6, 0, k.shape)).astype(np.float32)
    return wkv6, (
        r,
        k,
        v,
        w,
        rng.standard_normal((heads, 64)).astype(np.float32),
        np.zeros((1, heads, 64, 64), np.float32),
    )


def of_wkv7(rng: Any, num_tokens: int, heads: int) -> tuple[Any, Any]:
    """As `of_wkv4`."""
    import numpy as np

    from rwkv_jax.nn.wkv import wkv7

    r, k, v, a = rng.standard_normal((4, 1, num_tokens, heads, 64)).astype(np.float32) / 8
    w = rng.uniform(-0.6, 0, k.shape).astype(np.float32)
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    b = -a * rng.uniform(0, 1, k.shape).astype(np.float32)
    return wkv7, (r, w, k, v, a, b, np.zeros((1, heads, 64, 64), np.float32))


OPERATORS = {"wkv4": of_wkv4, "wkv6": of_wkv6, "wkv7": of_wkv7}


if __name__ == "__main__":
    main()
