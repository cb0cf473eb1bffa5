"""Compiles the Triton kernels for NVIDIA GPUs that are not here: `python -m rwkv_kernels.triton_report`.

It takes Triton's own compiler and ptxas, without jax-triton or CUDA, and says how many registers a thread takes, how many bytes
it spills, and how much shared memory a program takes.
"""

# pyright: reportMissingImports=false
# Triton need not be installed where types are checked.

import importlib.util
import itertools
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .triton_gpu import OPTIONS, Launch
from .wkv4.api import BACKENDS as WKV4
from .wkv4.api import init_wkv4_state
from .wkv7.api import BACKENDS as WKV7

ENVIRONMENT = 'pip install -e ".[test,triton,torch]"'
"""Installs what compiles the Triton kernels, and what runs their tests in Triton's interpreter."""
_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
"""Triton's names of pointers."""


class Case(NamedTuple):
    """An op's kernels, with resets, at B 8, T 4096, D 4096."""

    op: str
    capability: int
    """Of the GPU, as Triton counts: 80 is an A100's, 90 an H100's or H200's."""
    head_dim: int
    dtype: str


CASES = [
    Case(op, capability, head_dim, dtype)
    for op, head_dim in (("wkv4", 64), ("wkv7", 16), ("wkv7", 64), ("wkv7", 128), ("wkv7", 256))
    for capability, dtype in itertools.product((80, 90), ("bfloat16", "float32"))
]
"""wkv4 has no heads; 64 is the block that its channels are cut into."""


class Usage(NamedTuple):
    """What ptxas says of a kernel, and Triton of its shared memory."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def why_not(*modules: str) -> str | None:
    """Returns why the kernels cannot be compiled, or what takes further modules cannot be done, or None where it can."""
    missing = [name for name in ("triton", *modules) if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}: {ENVIRONMENT}" if missing else None


def main() -> None:
    """Compiles the cases and prints a line for each kernel."""
    if reason := why_not():
        sys.exit(reason)
    print(
        f"{'kernel':27s} {'sm':>2s} {'head':>5s} {'dtype':9s} {'registers':>9s} {'spilled bytes':>13s} {'shared bytes':>12s}"
    )
    for case in CASES:
        for launch in launches(case):
            registers, spilled, shared = compile_launch(launch, case.capability)
            name, sm, head, dtype = case.op + launch.kernel.__name__, case.capability, case.head_dim, case.dtype
            print(f"{name:27s} {sm} {head:5d} {dtype:9s} {registers:9d} {spilled:13d} {shared:12d}", flush=True)


def launches(case: Case) -> list[Launch]:
    """Returns what the gradient of an op launches: its forward kernel, which stores states, and the backward ones."""
    found: list[Launch] = []

    def record(launch: Launch) -> tuple[Any, ...]:
        found.append(launch)
        return tuple(jnp.zeros(x.shape, x.dtype) for x in launch.outputs)

    def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    rows, width = (8, 4096), 4096
    heads = width // case.head_dim, case.head_dim
    if case.op == "wkv4":
        backend, token = WKV4["triton"], array(*rows, width, dtype=case.dtype)
        state = jax.eval_shape(lambda: init_wkv4_state(rows[0], width))
        inputs = token, token, array(width), array(width), state
    else:
        backend, token = WKV7["triton"], array(*rows, *heads, dtype=case.dtype)
        inputs = token, array(*rows, *heads), *[token] * 4, array(rows[0], *heads, case.head_dim)

    def total(inputs: Any, reset: Any) -> Any:
        y, state = backend.run(*inputs, reset, None, launcher=record)
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves((y, state)))

    jax.eval_shape(jax.grad(total), inputs, array(*rows, dtype="bool"))
    return found


def compile_launch(launch: Launch, capability: int) -> Usage:
    """Compiles a launch for a GPU of some compute capability.

    Raises:
        RuntimeError: Triton or ptxas cannot; the message is theirs.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arrays = (*launch.inputs, *launch.outputs)
    pointers = dict(zip(launch.kernel.arg_names, (_TYPES[x.dtype.name] for x in arrays), strict=False))
    source = ASTSource(
        fn=launch.kernel, signature=pointers | dict.fromkeys(launch.constants, "constexpr"), constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(arrays))},
    )  # fmt: skip
    options = {"num_warps": launch.warps, **OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Usage(*_assemble(compiled.asm["ptx"], capability), compiled.metadata.shared)


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """What Triton's ptxas says of its PTX: registers and spilled bytes."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = re.search(r"\.target (\w+)", ptx)
    if arch is None:
        raise RuntimeError(f"Triton's PTX names no target:\n{ptx[:500]}")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"-arch={arch[1]}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    if registers is None or spilled is None:
        raise RuntimeError(f"ptxas did not say what the kernel takes:\n{said[-3000:]}")
    return int(registers[1]), int(spilled[1])


if __name__ == "__main__":
    main()
