"""Which backends of an op the tests run on the device in use."""

import jax
import jax.numpy as jnp
import pytest
from rwkv_kernels import dispatch, numerics

SLOWEST = "mosaic_gpu_interpreted"
"""It goes through Python for every access to memory."""


def on_this_device(backends, dtype=None):
    """Names of the backends that run here (on a dtype): kernels compiled where they can be, interpreted everywhere."""
    call = dispatch.here(dtype=dtype and jnp.dtype(dtype).name)
    return [name for name, backend in backends.items() if not backend.why_not(call)]


def beside_the_oracle(backends):
    """The same without the scan, which they are held against."""
    return [name for name in on_this_device(backends) if name != "scan"]


def holding(backends, head_dim):
    """The same that hold heads of so many channels."""
    call = dispatch.here(head_dim)
    return [name for name in beside_the_oracle(backends) if not backends[name].why_not(call)]


def interpreted(backends):
    """Those that an interpreter runs, which takes long."""
    return [name for name in on_this_device(backends) if backends[name].by_name]


def marked(backends, names):
    """The names, those of interpreters as slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in interpreted(backends) else name for name in names]


def each_case(backends, cases):
    """(case, backend, dtypes) for every backend beside the oracle; slow are all but QUICK.

    Where there is float64, the fast cases are in it; an interpreter has one.
    """
    low = [jnp.float32, jnp.bfloat16]
    params = []
    in_float64 = on_this_device(backends, jnp.float64)
    for backend in beside_the_oracle(backends):
        slowly = backend in interpreted(backends)
        for case in cases:
            fast = case in QUICK[slowly:]
            parts = [(low, fast)]
            if backend in in_float64:
                parts = [([jnp.float64], fast), (low, False)]
            for dtypes, is_fast in parts:
                name = f"{case}-{backend}-{'-'.join(jnp.dtype(dtype).name for dtype in dtypes)}"
                params.append(pytest.param(case, backend, dtypes, marks=() if is_fast else pytest.mark.slow, id=name))
    return params


QUICK = ("one_token", "lengths_and_resets")
"""The cases of the fast tests; an interpreter is given the second alone."""


def hold_against_the_scan(run, inputs, backend, dtypes):
    """Asserts that run(inputs, dtype, backend), outputs and gradients, is as near to the float64 scan as numerics.py asks.

    The inputs are exact in bfloat16, so that every dtype solves the same problem.
    """
    exact = run(inputs, jnp.float64, "scan")
    for dtype in dtypes:
        oracle = run(inputs, jnp.bfloat16, "scan") if dtype == jnp.bfloat16 else exact
        actual = run(inputs, dtype, backend)
        paths = jax.tree_util.tree_leaves_with_path(actual)
        for (path, a), e, o in zip(paths, jax.tree.leaves(exact), jax.tree.leaves(oracle), strict=True):
            bound = 1e-12 if dtype == jnp.float64 else numerics.tolerance(dtype, numerics.relative_error(o, e))
            error = numerics.relative_error(a, e)
            where = f"{jnp.dtype(dtype).name} {jax.tree_util.keystr(path)}"
            assert error <= bound, f"{where}: relative error {error:.2e}, allowed {bound:.2e}"
