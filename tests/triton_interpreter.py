"""A pytest plugin: the Triton kernels of wkv4 and wkv7 in Triton's interpreter, on torch's CPU tensors, as one more backend.

`TRITON_INTERPRET=1 pytest -p triton_interpreter -k triton_interpreted`: Triton reads the variable when it is imported.
"""

from functools import partial

import jax
import numpy as np
from rwkv_kernels import dispatch

NAME = "triton_interpreted"


def pytest_collection():
    from rwkv_kernels.wkv4 import api as api4
    from rwkv_kernels.wkv7 import api as api7

    for backends in (api4.BACKENDS, api7.BACKENDS):
        backend = backends["triton"]
        backends[NAME] = dispatch.Backend(partial(backend.run, launcher=interpret), why_not, by_name=True)


def why_not(call):
    return "holds the state in float32, and an input is float64" if call.dtype == "float64" else None


def interpret(launch):
    """Runs a launch on the host, while XLA waits."""
    return jax.pure_callback(partial(run, launch), launch.outputs, *launch.inputs)


def run(launch, *inputs):
    import torch  # pyright: ignore[reportMissingImports]  An optional test needs it.

    def tensor(x):
        x = np.array(x)
        low = x.dtype.name == "bfloat16"  # torch does not take numpy's.
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if low else torch.from_numpy(x)

    inputs = [tensor(x) for x in inputs]
    # Triton's interpreter truncates to bfloat16, where a GPU rounds: it is given float32 to write, which is rounded here.
    wide = [np.float32 if x.dtype == "bfloat16" else x.dtype for x in launch.outputs]
    outputs = [tensor(np.zeros(x.shape, dtype)) for x, dtype in zip(launch.outputs, wide, strict=True)]
    launch.kernel[launch.grid](*inputs, *outputs, **launch.constants)
    return tuple(x.numpy().astype(y.dtype) for x, y in zip(outputs, launch.outputs, strict=True))
