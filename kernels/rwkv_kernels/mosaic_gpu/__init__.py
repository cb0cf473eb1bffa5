"""A recurrence as Pallas kernels for NVIDIA Hopper and later, lowered through Mosaic GPU, which outlives Pallas' Triton lowering.

A program is 128 threads that walk the tokens with the state in registers: of 128 channels, each its own recurrence (`channels.py`),
or of 64 value channels of a head, whose state is a matrix, and of a wide head 32 (`heads.py`). As in `pallas_gpu.py`, what is stored
for the backward pass is the state at each chunk's start, and only where a gradient is asked.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array

from ..recurrence import Problem, Recurrence
from . import channels, heads


def run(op: Recurrence, problem: Problem, *, interpret: bool = False) -> tuple[Array, tuple[Array, ...]]:
    """Returns y [B, T, H, V] in the tokens' dtype, and the state after the last token.

    Args:
        op: The recurrence: by row, of channels that do not mix, or with `step`.
        problem: Its arrays: T whole chunks.
        interpret: Whether to run in JAX's interpreter of GPU kernels, on any device, instead of compiling for a GPU.
    """
    return _form(op).run(op, problem, _differentiable(op, interpret))


def _form(op: Recurrence) -> Any:
    return channels if op.step is None else heads


@functools.cache
def _differentiable(op: Recurrence, interpret: bool) -> Any:
    form = _form(op)

    @jax.custom_vjp
    def walk(problem):
        y, final, _ = form.forward(op, problem, interpret, save=False)
        return y, final

    def walk_fwd(problem):
        y, final, entries = form.forward(op, problem, interpret, save=True)
        return (y, final), (problem, entries)

    def walk_bwd(residuals, cotangents):
        problem, entries = residuals
        gtokens, gshared, gstate = form.backward(op, problem, entries, *cotangents, interpret)
        return (Problem(gtokens, gshared, gstate, None),)

    walk.defvjp(walk_fwd, walk_bwd)
    return walk
