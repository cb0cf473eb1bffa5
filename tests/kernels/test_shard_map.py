"""Kernels under shard_map: rows of the batch and heads (or channels) on devices of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from rwkv_kernels import WKV4State, wkv4, wkv6, wkv7
from rwkv_kernels.wkv4.cases import Case as Case4, make as make4
from rwkv_kernels.wkv6.cases import Case as Case6, make as make6
from rwkv_kernels.wkv7.cases import Case as Case7, make as make7

op, backend = sys.argv[1:]
rows, token, heads, matrix, flat = P("b"), P("b", None, "h"), P("h"), P("b", "h"), P("b", None, "h")
if op == "wkv4":
    x, run, specs = make4(Case4(num_tokens=37, reset="random")), wkv4, (flat, flat, heads, heads, WKV4State(*[matrix] * 3))
    arrays, out = (*x[:4], WKV4State(*x.state)), (flat, WKV4State(*[matrix] * 3))
elif op == "wkv6":
    x, run, specs = make6(Case6(num_tokens=37, reset="random")), wkv6, (*[token] * 4, heads, matrix)
    arrays, out = x[:6], (token, matrix)
else:
    x, run, specs = make7(Case7(num_tokens=37, reset="random")), wkv7, (*[token] * 6, matrix)
    arrays, out = x[:7], (token, matrix)
arrays, reset = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), arrays), jnp.asarray(x.reset)
whole = lambda *y: run(*y[:-1], reset=y[-1], backend=backend)
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("b", "h"))
parts = jax.shard_map(whole, mesh=mesh, in_specs=(*specs, rows), out_specs=out, check_vma=False)

def gradients(run):
    loss = lambda arrays: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(run(*arrays, reset)))
    return jax.jit(lambda arrays: (run(*arrays, reset), jax.grad(loss)(arrays)))(arrays)

for a, e in zip(jax.tree.leaves(gradients(parts)), jax.tree.leaves(gradients(whole)), strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pallas_gpu_interpreted", "pallas_tpu_interpreted"])
@pytest.mark.parametrize("op", ["wkv4", "wkv6", "wkv7"])
def test_four_devices_give_the_numbers_of_one(op, backend):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    kernels = str(Path(__file__).parents[2] / "kernels")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": kernels, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, op, backend], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
