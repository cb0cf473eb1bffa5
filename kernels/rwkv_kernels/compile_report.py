"""Compiles every kernel for hardware that is not here: `python -m rwkv_kernels.compile_report [--json FILE]`.

For a GPU, ptxas says how many registers a thread takes and how many bytes it spills, and the compiler how much shared memory a program
takes; for a TPU there is only whether it compiles. `memory_mb` is what the whole gradient takes on the device: its inputs, outputs and
temporaries. The environment is that of `hardware.py`. Every case compiles in a process of its own, since XLA takes its dump folder at
its start.
"""

import argparse
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from . import hardware
from .dispatch import LARGEST_HEAD

OPS = ("wkv4", "wkv6", "wkv7")


class Case(NamedTuple):
    """One op, forward and backward, by one backend for one device."""

    op: str
    backend: str
    target: str
    head_dim: int = 64
    dtype: str = "bfloat16"


_KERNELS = [
    *itertools.product(OPS, ["pallas_gpu"], hardware.GPUS),
    *itertools.product(["wkv4", "wkv7"], ["mosaic_gpu"], ["h200"]),
    *itertools.product(OPS, ["pallas_tpu"], hardware.TPUS),
]
CASES = [
    Case(op, backend, target, head_dim, dtype)
    for (op, backend, target), head_dim, dtype in itertools.product(_KERNELS, (64, 128, 256), ("bfloat16", "float32"))
    # wkv4 has no heads; its channels are cut into blocks of one size.
    if head_dim <= (64 if op == "wkv4" else LARGEST_HEAD[backend])
]
BACKENDS = tuple(dict.fromkeys(backend for _, backend, _ in _KERNELS))


def main() -> None:
    """Compiles the cases, prints a line for each kernel, and writes them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=[*OPS, *BACKENDS, *hardware.TARGETS],
        default=[],
        help="ops, backends and targets; all if none",
    )
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if reason := hardware.why_not():
        parser.error(reason)
    if arguments.worker:
        op, backend, target, head_dim, dtype, dump = arguments.worker
        compile_case(Case(op, backend, target, int(head_dim), dtype), dump)
        return
    rows = []
    print(
        f"{'kernel':20s} {'backend':10s} {'target':7s} {'head':>5s} {'dtype':9s} {'registers':>9s} {'spilled bytes':>13s} "
        f"{'shared bytes':>12s} {'memory MB':>9s}"
    )
    for case in CASES:
        if all(
            not {*names} & {*arguments.only} or value in arguments.only
            for names, value in ((OPS, case.op), (BACKENDS, case.backend), (hardware.TARGETS, case.target))
        ):
            for row in report(case):
                rows.append(row)
                registers, spilled, shared = (row.get(x, "-") for x in ("registers", "spilled_bytes", "shared_bytes"))
                where = f"{row['kernel']:20s} {case.backend:10s} {case.target:7s} {case.head_dim:5d} {case.dtype:9s}"
                print(f"{where} {registers:>9} {spilled:>13} {shared:>12} {row['memory_mb']:9.0f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def report(case: Case) -> list[dict[str, Any]]:
    """Compiles a case in a process of its own and returns a row a kernel.

    Raises:
        RuntimeError: It does not compile; the message is the compiler's.
    """
    with tempfile.TemporaryDirectory() as dump:
        command = [sys.executable, "-m", __spec__.name, "--worker", *map(str, case), dump]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case} does not compile:\n{done.stderr[-3000:]}")
        whole = {**case._asdict(), "memory_mb": float(done.stdout)}
        if case.target in hardware.TPUS:
            return [{"kernel": f"{case.op}_{direction}", **whole} for direction in ("forward", "backward")]
        found = [row for file in sorted(Path(dump).glob("*.ptx")) if (row := _assemble(file)) is not None]
    return [{"kernel": kernel, **whole, **figures} for kernel, figures in sorted(found, reverse=True)]


def compile_case(case: Case, dump: str) -> None:
    """Compiles the gradient of an op, which holds all of its kernels, at T 4096, D 4096, and B 8 (on a TPU, with less memory, 1).

    Prints how many megabytes it takes on the device.
    """
    import os

    hardware.prepare()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump}"
    os.environ["MOSAIC_GPU_DUMP_TO"] = dump
    import jax
    import jax.numpy as jnp
    import numpy as np

    from . import WKV4State, wkv4, wkv6, wkv7

    jax.config.update("jax_enable_compilation_cache", False)  # Of what comes from there the compilers say nothing.
    mesh = jax.sharding.Mesh(np.array(hardware.devices(case.target)), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(*shape: int, dtype: Any = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch_size, num_tokens = 8 if case.target in hardware.GPUS else 1, 4096
    heads, size = 4096 // case.head_dim, case.head_dim
    token, wide = (array(batch_size, num_tokens, heads, size, dtype=dtype) for dtype in (case.dtype, "float32"))
    matrix = array(batch_size, heads, size, size)
    if case.op == "wkv4":
        flat, row = array(batch_size, num_tokens, heads * size, dtype=case.dtype), array(batch_size, heads * size)
        run, inputs = wkv4, (flat, flat, array(heads * size), array(heads * size), WKV4State(row, row, row))
    elif case.op == "wkv6":
        run, inputs = wkv6, (token, token, token, wide, array(heads, size), matrix)
    else:
        run, inputs = wkv7, (token, wide, token, token, token, token, matrix)

    def total(inputs: Any, reset: Any) -> Any:
        y, state = run(*inputs, reset=reset, backend=case.backend)
        return y.astype(jnp.float32).sum() + sum(x.sum() for x in jax.tree.leaves(state))

    with jax.sharding.use_abstract_mesh(hardware.abstract(case.target, mesh)):
        program = jax.jit(jax.grad(total)).lower(inputs, array(batch_size, num_tokens, dtype="bool")).compile()
    memory: Any = program.memory_analysis()
    print((memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes) / 1e6)


def _assemble(file: Path) -> tuple[str, dict[str, int]] | None:
    """A WKV kernel's name and what ptxas says of it; None for XLA's own kernels."""
    text = file.read_text()
    name, arch = (
        re.search(r"\.entry (wkv\d_(?:forward|backward(?:_state|_chunks)?))", text),
        re.search(r"\.target (\w+)", text),
    )
    if name is None or arch is None:
        return None
    report = file.with_suffix(".ptxas")  # Mosaic GPU has a newer ptxas of its own, and writes down what that said.
    said = report.read_text() if report.exists() else _ptxas(file, arch[1])
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    if registers is None or spilled is None:
        raise RuntimeError(f"ptxas did not say what {name[1]} takes:\n{said}")
    figures = {"registers": int(registers[1]), "spilled_bytes": int(spilled[1])}
    return name[1], {**figures, "shared_bytes": _shared_bytes(file, name[1])}


def _shared_bytes(file: Path, kernel: str) -> int:
    """The shared memory of a program, of which PTX does not tell: from Mosaic GPU's log of its passes, or XLA's list of launches."""
    passes = file.with_suffix(".mlir-passes.log")
    if passes.exists():
        found = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", passes.read_text())
    else:
        (launches,) = file.parent.glob("*.thunk_sequence.txt")
        found = re.search(rf"\b{kernel} .* shared_memory: (\d+) bytes", launches.read_text())
    if found is None:
        raise RuntimeError(f"the compiler did not say what shared memory {kernel} takes")
    return int(found[1])


def _ptxas(file: Path, arch: str) -> str:
    package = importlib.util.find_spec("nvidia.cuda_nvcc")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError(f"ptxas is not here: {hardware.ENVIRONMENT}")
    ptxas = Path(package.submodule_search_locations[0]) / "bin/ptxas"
    command = [ptxas, "-v", f"-arch={arch}", file, "-o", "/dev/null"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


if __name__ == "__main__":
    main()
