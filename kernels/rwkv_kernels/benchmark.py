"""Times the WKV operators: `python -m rwkv_kernels.benchmark [--ops OP ...] [--backends NAME ...] [--shapes SHAPE ...] [--json FILE]`.

Every row is one op, backend, shape, dtype and direction: the median time of a call, the bytes that it must read and write (inputs,
outputs, cotangents and gradients, once each) over that time, and that as a share of what copying a large array reaches in the same
run; for ops with heads also the floating-point operations of the chunked form against a product of two large matrices. The error is
that of the outputs, or of all gradients, against the scan in float32 on the first 64 tokens of one row.

Peers are other libraries' kernels (flash-linear-attention's, the `rwkv` package's), given the same inputs, converted to their layout
before the clock starts; `--peers` names which, all by default. One that cannot run is printed with the reason, and so is a workload
that it does not take. torch needs room on the GPU beside JAX, so XLA_PYTHON_CLIENT_PREALLOCATE is false then, unless it is set.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import WKV4State, dispatch, numerics, peers, wkv4, wkv6, wkv7
from .wkv4.api import BACKENDS as WKV4
from .wkv6.api import BACKENDS as WKV6
from .wkv7.api import BACKENDS as WKV7

OPS = {"wkv4": (wkv4, WKV4), "wkv6": (wkv6, WKV6), "wkv7": (wkv7, WKV7)}
CHUNK = 16
"""Tokens in the chunks that floating-point operations are counted for."""


class Shape(NamedTuple):
    """A workload's sizes."""

    batch_size: int
    num_tokens: int
    embed_dim: int
    head_dim: int = 64


SHAPES = {
    "tiny": Shape(2, 256, 256),
    "small": Shape(8, 1024, 768),
    "long": Shape(1, 16384, 2048),
    "large": Shape(8, 4096, 4096),
}


def main() -> None:
    """Measures what is asked for, prints a line a row, and writes rows and machine as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=[*OPS])
    parser.add_argument(
        "--backends", nargs="+", help="by name; default: all that run here but the scan and interpreters"
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, help="default: tiny on a CPU, else small, long and large"
    )
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument(
        "--peers", nargs="*", choices=peers.PACKAGES, default=[*peers.PACKAGES], help="default: all; none: no peers"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of measurement a row, at least")
    parser.add_argument("--json", type=Path, help="write rows, what was left out, device, versions and commit here")
    arguments = parser.parse_args()
    if arguments.peers:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    reasons = {package: peers.why_not(package) for package in arguments.peers}
    here = [package for package, reason in reasons.items() if reason is None]
    bandwidth, flops = measure_bandwidth(), measure_flops()
    machine = {
        "device": jax.devices()[0].device_kind, "python": platform.python_version(), "commit": commit(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        **{name: version for package in here for name, version in peers.versions(package).items()},
        "copy_gb_per_second": bandwidth / 1e9, "matmul_gflop_per_second": flops / 1e9,
    }  # fmt: skip
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    left_out = [{"backend": package, "left_out": reason} for package, reason in reasons.items() if reason]
    for row in left_out:
        print(f"{row['backend']}: {row['left_out']}")
    print(
        f"{'op':5s} {'backend':13s} {'shape':6s} {'dtype':9s} {'direction':9s} {'ms':>9s} {'GB/s':>8s} {'of copy':>8s} ",
        end="",
    )
    print(f"{'of dot':>7s} {'error':>8s}")
    rows = []
    try:
        for row in measure_all(arguments, here):
            case = f"{row['op']:5s} {row['backend']:13s} {row['shape']:6s} {row['dtype']:9s} {row['direction']:9s} "
            if "left_out" in row:
                left_out.append(row)
                print(f"{case}left out: {row['left_out']}", flush=True)
                continue
            row |= {"of_copy": row["bytes_per_second"] / bandwidth, "of_dot": row["flops_per_second"] / flops}
            rows.append(row)
            print(
                f"{case}{row['ms']:9.3f} {row['bytes_per_second'] / 1e9:8.1f} {row['of_copy']:8.2f} "
                f"{row['of_dot']:7.2f} {row['error']:8.1e}",
                flush=True,
            )
    finally:  # What has been measured is kept, whatever stops the rest.
        if arguments.json:
            report = {"machine": machine, "rows": rows, "left_out": left_out}
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def measure_all(arguments: argparse.Namespace, packages: list[str]) -> Iterator[dict[str, Any]]:
    """Yields a row for each direction of what is asked for, peers of `packages` included; one not measured says why in "left_out"."""
    shapes = arguments.shapes or (["tiny"] if jax.default_backend() == "cpu" else ["small", "long", "large"])
    for op in arguments.ops:
        run, known = OPS[op]
        call = dispatch.here(0 if op == "wkv4" else 64)
        default = [
            name
            for name, backend in known.items()
            if name != "scan" and not backend.by_name and not backend.why_not(call)
        ]
        ways: dict[str, Callable[..., list[dict[str, Any]]]] = {
            name: partial(measure, op, partial(run, backend=name)) for name in arguments.backends or default
        }
        ways |= {peer.name: partial(measure_peer, op, peer) for peer in peers.PEERS[op] if peer.package in packages}
        for name, way in ways.items():
            for shape in shapes:
                for dtype in arguments.dtypes:
                    for row in way(SHAPES[shape], dtype, arguments.seconds):
                        yield {"op": op, "backend": name, "shape": shape, "dtype": dtype, **row}


def measure(op: str, run: Callable[..., Any], shape: Shape, dtype: str, seconds: float) -> list[dict[str, Any]]:
    """Returns a row of the forward pass and one of forward and backward."""
    inputs = make(op, shape, dtype)
    weights = jax.tree.map(jnp.ones_like, jax.eval_shape(run, *inputs))
    forward = jax.jit(run)

    @jax.jit
    def both(inputs, cotangents):
        outputs, pullback = jax.vjp(run, *inputs)
        return outputs, pullback(cotangents)

    calls = {"forward": lambda: forward(*inputs), "both": lambda: both(inputs, weights)}
    actual = outputs_and_gradients(run, _first(op, shape, dtype))
    return _account(op, shape, dtype, inputs, calls, actual, partial(_time, seconds=seconds))


def measure_peer(
    op: str, peer: peers.Peer, shape: Shape, dtype: str, seconds: float, device: str = "cuda"
) -> list[dict[str, Any]]:
    """Returns what `measure` does, of a peer on one of torch's devices; a row that it has none of says why in "left_out"."""
    if reason := peer.refuses(shape.batch_size, shape.head_dim, dtype):
        return [{"direction": direction, "left_out": reason} for direction in ("forward", "both")]
    inputs = make(op, shape, dtype)
    calls = peers.calls(peer, inputs, device)
    actual = peers.results(peer, _first(op, shape, dtype), device)
    rows = _account(op, shape, dtype, inputs, calls, actual, partial(_time, seconds=seconds, wait=peers.synchronize))
    return rows + ([{"direction": "both", "left_out": peer.no_backward}] if peer.no_backward else [])


def _first(op: str, shape: Shape, dtype: str) -> tuple[Any, ...]:
    """The inputs that errors are measured on."""
    return make(op, shape._replace(batch_size=1, num_tokens=min(64, shape.num_tokens)), dtype)


def outputs_and_gradients(run: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """Outputs, and the gradients for cotangents of 1."""
    outputs, pullback = jax.vjp(run, *inputs)
    return outputs, pullback(jax.tree.map(jnp.ones_like, outputs))


def _account(
    op: str,
    shape: Shape,
    dtype: str,
    inputs: tuple[Any, ...],
    calls: dict[str, Callable[[], Any]],
    actual: tuple[Any, Any],
    time_call: Callable[[Callable[[], Any]], float],
) -> list[dict[str, Any]]:
    """A row for each direction's call; `actual` has the outputs and gradients for `_first`."""
    scan = partial(OPS[op][0], backend="scan")
    exact = outputs_and_gradients(scan, jax.tree.map(lambda x: x.astype(jnp.float32), _first(op, shape, dtype)))
    read, written = _bytes(inputs), _bytes(jax.eval_shape(scan, *inputs))
    work = flops(op, shape)
    costs = {"forward": (read + written, work, 0), "both": (3 * read + 2 * written, 4 * work, 1)}
    rows = []
    for direction, call in calls.items():
        num_bytes, num_flops, part = costs[direction]
        took = time_call(call)
        errors = map(numerics.relative_error, jax.tree.leaves(actual[part]), jax.tree.leaves(exact[part]))
        rows.append(
            {"direction": direction, "ms": took * 1e3, "bytes_per_second": num_bytes / took,
             "flops_per_second": num_flops / took, "error": max(errors)}
        )  # fmt: skip
    return rows


def make(op: str, shape: Shape, dtype: str) -> tuple[Any, ...]:
    """Returns random inputs of an op, with decays as the models form them."""
    rng = np.random.default_rng(0)
    heads = shape.embed_dim // shape.head_dim

    def draw(*sizes: int, dtype: str = "float32") -> Any:
        return jnp.asarray(rng.standard_normal(sizes, np.float32), dtype)

    rows, channels = (shape.batch_size, shape.num_tokens), (heads, shape.head_dim)
    if op == "wkv4":
        k, v = (draw(*rows, shape.embed_dim, dtype=dtype) for _ in range(2))
        state = WKV4State(*(jnp.ones((shape.batch_size, shape.embed_dim)) for _ in range(3)))
        return k, v, -jnp.exp(draw(shape.embed_dim)), draw(shape.embed_dim), state
    state = draw(shape.batch_size, *channels, shape.head_dim)
    r, k, v = (draw(*rows, *channels, dtype=dtype) for _ in range(3))
    if op == "wkv6":
        return r, k, v, -jnp.exp(draw(*rows, *channels)), draw(*channels), state
    direction = draw(*rows, *channels)
    direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True)
    w = -0.6065 * jax.nn.sigmoid(draw(*rows, *channels))
    return r, w, k, v, (-direction).astype(dtype), (0.5 * direction).astype(dtype), state


def flops(op: str, shape: Shape) -> int:
    """Returns the floating-point operations of a forward pass: of the chunked form for ops with heads, of the recurrence for wkv4."""
    tokens = shape.batch_size * shape.num_tokens
    if op == "wkv4":
        return 12 * tokens * shape.embed_dim
    products_with_state, products_in_chunk = (2, 2) if op == "wkv6" else (4, 7)
    return 2 * tokens * shape.embed_dim * (products_with_state * shape.head_dim + products_in_chunk * CHUNK)


def measure_bandwidth() -> float:
    """Returns the bytes a second at which a large array is read and written."""
    x = jnp.ones((1 << 26 if jax.default_backend() != "cpu" else 1 << 24,))
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _time(lambda: copy(x), 0.5)


def measure_flops() -> float:
    """Returns the floating-point operations a second of a product of two large matrices, in float32 as the kernels multiply."""
    size = 4096 if jax.default_backend() != "cpu" else 1024
    x = jnp.ones((size, size))
    product = jax.jit(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    return 2 * size**3 / _time(lambda: product(x, x), 0.5)


def commit() -> str:
    """Returns the commit that this file is of, with a + if files differ from it; "unknown" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _time(call: Callable[[], Any], seconds: float, wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    wait(call())
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        wait(call())
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
