"""Every kernel compiles, forward and backward, for A100, H200 and TPU v5e, none of which is here."""

import os
import subprocess
import sys

import pytest
from rwkv_kernels import compile_report, hardware


@pytest.mark.aot
@pytest.mark.parametrize("case", compile_report.CASES, ids=lambda case: "-".join(map(str, case)))
def test_all_kernels_of_an_op_compile_and_spill_nothing(case, monkeypatch):
    if reason := hardware.why_not():
        pytest.skip(reason)
    monkeypatch.delenv("XLA_FLAGS")  # conftest.py's make XLA compile without optimising, and that spills more.
    rows = compile_report.report(case)
    apart = case.backend == "pallas_gpu" and case.op != "wkv4"
    kernels = ["forward", *(["backward_state", "backward_chunks"] if apart else ["backward"])]
    assert [row["kernel"] for row in rows] == [f"{case.op}_{kernel}" for kernel in kernels]
    if case.target in hardware.GPUS:
        assert [row["spilled_bytes"] for row in rows] == [0] * len(rows)


SHARDED = """
import re, sys
from rwkv_kernels import hardware
hardware.prepare()
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rwkv_kernels import wkv7

target = sys.argv[1]
devices = hardware.devices(target, 8 if target in hardware.GPUS else 4)
mesh = jax.sharding.Mesh(np.array(devices).reshape(-1, 2), ("b", "h"))
token, matrix = P("b", None, "h"), P("b", "h")
place = lambda shape, spec, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
tokens = tuple(place((8, 1024, 16, 64), token, jnp.float32 if i == 1 else jnp.bfloat16) for i in range(6))
abstract = hardware.abstract(target, mesh)
op = jax.shard_map(wkv7, mesh=abstract, in_specs=(*[token] * 6, matrix), out_specs=(token, matrix), check_vma=False)
loss = lambda *x: op(*x)[0].astype(jnp.float32).sum()
with jax.sharding.use_abstract_mesh(abstract):
    gradient = jax.jit(jax.grad(loss, argnums=tuple(range(7))))
    text = gradient.lower(*tokens, place((8, 16, 64, 64), matrix, jnp.float32)).compile().as_text()
assert "wkv7_backward" in text, "the kernel is not in the program"
found = set(re.findall(r"= \\S+ (all-\\w+|reduce-scatter|collective-\\w+)", text))
assert not found, found
"""


@pytest.mark.aot
@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_kernels_on_parts_of_a_mesh_need_no_collectives(target):
    if reason := hardware.why_not():
        pytest.skip(reason)
    done = subprocess.run([sys.executable, "-c", SHARDED, target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.aot
def test_tpus_are_described_while_another_process_has_libtpu_loaded():
    if reason := hardware.why_not():
        pytest.skip(reason)
    loads = "import jax; jax.devices(); print('loaded', flush=True); input()"
    describes = "from rwkv_kernels import hardware; hardware.prepare(); print(len(hardware.devices('v5e', 4)))"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    with subprocess.Popen(
        [sys.executable, "-c", loads], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "loaded\n"
        done = subprocess.run([sys.executable, "-c", describes], capture_output=True, text=True)
        other.communicate("\n")
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr[-3000:]
