"""The Triton kernels: in Triton's interpreter against the scan, and compiled for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rwkv_kernels import dispatch, hardware, triton_report, wkv4, wkv7
from rwkv_kernels.wkv7.api import BACKENDS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("op", ["wkv4", "wkv7"])
def test_interpreted_kernels_pass_every_test_of_a_backend(op):
    if reason := triton_report.why_not("torch"):
        pytest.skip(reason)
    # Triton reads the variable when it is imported, so this is a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests")}
    only = ["-p", "triton_interpreter", "-m", "", "-k", "triton_interpreted"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *only, f"tests/kernels/test_{op}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.aot
@pytest.mark.parametrize("case", triton_report.CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_kernels_of_an_op_compile_and_spill_nothing(case):
    if reason := triton_report.why_not():
        pytest.skip(reason)
    for launch in triton_report.launches(case):
        assert triton_report.compile_launch(launch, case.capability).spilled_bytes == 0, launch.kernel.__name__


def kernels_called(op, *inputs):
    """How many Triton kernels the gradient of an op calls when it is lowered for a GPU."""
    loss = lambda x: op(*x, backend="triton")[0].astype(jnp.float32).sum()
    return (
        jax.jit(jax.grad(loss)).trace(inputs).lower(lowering_platforms=("cuda",)).as_text().count("@triton_kernel_call")
    )


@pytest.mark.aot
@pytest.mark.parametrize("target", hardware.GPUS)
def test_a_gradient_calls_every_kernel_through_jax_triton(target):
    if reason := BACKENDS["triton"].why_not(dispatch.Call("gpu")):
        pytest.skip(reason)
    array = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)
    token, channel = array(2, 60, 100), array(100, dtype="float32")
    head, decay = array(2, 60, 2, 64), array(2, 60, 2, 64, dtype="float32")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    with jax.sharding.use_abstract_mesh(hardware.abstract(target, mesh)):
        assert kernels_called(wkv4, token, token, channel, channel) == 2
        assert kernels_called(wkv7, head, decay, head, head, head, head) == 3
