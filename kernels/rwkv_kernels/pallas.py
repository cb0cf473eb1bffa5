"""The Pallas kernels of an op as backends: compiled for GPU and TPU, and interpreted on any device."""

from collections.abc import Callable
from functools import partial
from typing import Any

from . import dispatch

LEAST_TOKENS = 16
"""Fewer, such as a step of generation, do not pay: a row is padded to whole chunks, of 8 (wkv4) or 16."""


def kernel_backends(
    kernel: Callable[..., Any], *, mosaic: bool = False
) -> tuple[dict[str, dispatch.Backend], dict[str, dispatch.Backend]]:
    """Returns an op's kernels by name: those that are compiled, in order of preference, and the same interpreted, on any device.

    Args:
        kernel: The op's wrapper: kernel(run, *arguments of the op) -> (y, state); it forms the `Problem` and calls run.
        mosaic: Whether `mosaic_gpu` can run it.
    """

    def gpu(*arguments: Any, interpret: bool = False) -> Any:
        from .pallas_gpu import run  # Pallas takes longer to import than all the rest.

        return kernel(partial(run, interpret=interpret), *arguments)

    def tpu(*arguments: Any, interpret: bool = False) -> Any:
        from .pallas_tpu import run

        return kernel(partial(run, interpret=interpret), *arguments)

    def mosaic_gpu(*arguments: Any, interpret: bool = False) -> Any:
        from .mosaic_gpu import run

        return kernel(partial(run, interpret=interpret), *arguments)

    compiled, interpreted = {}, {}
    if mosaic:
        compiled["mosaic_gpu"] = dispatch.Backend(mosaic_gpu, dispatch.mosaic_gpu, least_tokens=LEAST_TOKENS)
        interpreted["mosaic_gpu_interpreted"] = dispatch.Backend(
            partial(mosaic_gpu, interpret=True), dispatch.mosaic_gpu_interpreted, by_name=True
        )
    return {
        "pallas_gpu": dispatch.Backend(gpu, dispatch.triton_gpu, least_tokens=LEAST_TOKENS),
        **compiled,
        "pallas_tpu": dispatch.Backend(tpu, dispatch.tpu, least_tokens=LEAST_TOKENS),
    }, {
        "pallas_gpu_interpreted": dispatch.Backend(
            partial(gpu, interpret=True), partial(dispatch.heads_fit, "pallas_gpu"), by_name=True
        ),
        **interpreted,
        "pallas_tpu_interpreted": dispatch.Backend(
            partial(tpu, interpret=True), partial(dispatch.heads_fit, "pallas_tpu"), by_name=True
        ),
    }
