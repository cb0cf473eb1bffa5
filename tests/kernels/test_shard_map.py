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

jax.config.update("jax_enable_x64", True)
op = sys.argv[1]
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
arrays, reset = jax.tree.map(jnp.asarray, arrays), jnp.asarray(x.reset)
whole = lambda *y, backend: run(*y[:-1], reset=y[-1], backend=backend)
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("b", "h"))

def gradients(run):
    loss = lambda arrays: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(run(*arrays, reset)))
    return jax.jit(lambda arrays: (run(*arrays, reset), jax.grad(loss)(arrays)))(arrays)

expected = jax.tree.leaves(gradients(partial(whole, backend="parallel")))
for backend in sys.argv[2:]:
    one = partial(whole, backend=backend)
    parts = jax.shard_map(one, mesh=mesh, in_specs=(*specs, rows), out_specs=out, check_vma=False)
    for a, e in zip(jax.tree.leaves(gradients(parts)), expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-9, err_msg=backend)
"""


@pytest.mark.slow
@pytest.mark.parametrize("op", ["wkv4", "wkv6", "wkv7"])
def test_four_devices_give_the_numbers_of_one(op):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    kernels = str(Path(__file__).parents[2] / "kernels")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": kernels, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, op, "pallas_gpu_interpreted", "pallas_tpu_interpreted"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
