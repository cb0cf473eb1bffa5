"""A recurrence as Triton kernels for GPUs, called through jax-triton.

An op's `triton.py` gives both ways as functions that have their kernels launched: which, on which arrays, cut how. Here is what is
common: the derivative, vmap (rows of all problems become rows of one batch), and the call through jax-triton, which another
`Launcher` can take the place of.
"""

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from . import dispatch
from .pallas import LEAST_TOKENS
from .recurrence import Problem, Recurrence

FITS = {(0, 3): ((0, 10), (0, 13)), (0, 4): ((0, 11), (0, 12))}
"""Releases of jax-triton, and the JAX from which on and before which each lowers: 0.4's rule for dead code is not that of JAX 0.12."""


OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}
"""What all kernels are compiled with. Products and sums in one instruction are named because Triton 3.10 takes another default."""


class Launch(NamedTuple):
    """One run of a Triton kernel, whose parameters are the inputs, then the outputs, as pointers, then constants."""

    kernel: Any
    """A function decorated with `triton.jit`."""
    grid: tuple[int, int, int]
    inputs: tuple[Array, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    constants: Mapping[str, Any]
    """Values of its `constexpr` parameters."""
    warps: int
    """Of 32 threads, a program."""


Launcher = Callable[[Launch], tuple[Array, ...]]
"""Runs a launch and returns its outputs."""


class Kernels(NamedTuple):
    """An op's kernels; a shared parameter is [G, H, 1, X] here, for G groups of rows that follow one another."""

    forward: Callable[..., tuple[Array, ...]]
    """forward(launcher, problem, save): y, the final state and, with `save`, the states at the chunks' starts [B, H, N, ...]."""
    backward: Callable[..., tuple[Array, ...]]
    """backward(launcher, problem, entries, gy, gstate): the cotangents of tokens, of shared parameters [B, H, 1, X], and the state."""


def backend(op: str, kernel: Callable[..., Any]) -> dispatch.Backend:
    """Returns an op's backend.

    Args:
        op: Its name, whose `triton.py` has `KERNELS`.
        kernel: Its wrapper, as in `pallas.kernel_backends`.
    """

    def call(*arguments: Any, launcher: Launcher = through_jax_triton) -> Any:
        # Here, and nowhere else: Triton need not be installed.
        kernels = importlib.import_module(f"{__package__}.{op}.triton").KERNELS
        return kernel(partial(run, kernels=kernels, launcher=launcher), *arguments)

    return dispatch.Backend(call, why_not, least_tokens=LEAST_TOKENS)


def why_not(call: dispatch.Call) -> str | None:
    """The `why_not` of Triton kernels that jax-triton calls."""
    if reason := dispatch.ampere(call):
        return reason
    if call.dtype == "float64":
        return "holds the state in float32, and an input is float64"
    return _cannot_call() or dispatch.heads_fit("triton", call)


def _cannot_call() -> str | None:
    """Why jax-triton cannot be called with the JAX that is here, or None where it can."""
    try:
        version = importlib.metadata.version("jax-triton")
    except importlib.metadata.PackageNotFoundError:
        return "needs jax-triton, which is not installed: pip install 'rwkv-jax[triton]'"
    found = _release(version)
    least, below = FITS.get(found, ((0, 0), (1, 0)))
    if found < min(FITS) or not least <= _release(jax.__version__) < below:
        return (
            f"jax-triton {version} and JAX {jax.__version__} do not fit: jax-triton 0.3.1 takes JAX 0.10 to 0.12 (its build for "
            "GPUs), 0.4.1 takes JAX 0.11; install one that does"
        )
    try:
        importlib.import_module("jax_triton")
    except ImportError as error:
        return f"jax-triton {version} cannot be imported with JAX {jax.__version__}: {' '.join(str(error).split())}"
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def run(op: Recurrence, problem: Problem, *, kernels: Kernels, launcher: Launcher) -> tuple[Array, tuple[Array, ...]]:
    """Returns y [B, T, H, V] in the tokens' dtype, and the state after the last token.

    Args:
        op: The recurrence, whose mathematics the kernels have of their own.
        problem: Its arrays: T whole chunks, channels padded to powers of two (and to 16 or more where the op multiplies matrices).
        kernels: The op's.
        launcher: What runs them.
    """
    del op
    tokens, shared, state, marks = problem
    return _differentiable(kernels, launcher)(tokens, tuple(x[None] for x in shared), state, marks)


def through_jax_triton(launch: Launch) -> tuple[Array, ...]:
    """Runs a launch on the GPU in use, or lowers it for the one that is set as the abstract mesh's."""
    import jax_triton  # pyright: ignore[reportMissingImports]  It need not be installed.

    capability = dispatch.here().capability  # Where that is not known, jax-triton asks the device.
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
        options: dict[str, Any] = {"out_type": launch.outputs, "backend_options": OPTIONS}
    else:  # jax-triton 0.3
        options = {"out_shape": launch.outputs, **OPTIONS}
    outputs = jax_triton.triton_call(
        *launch.inputs, kernel=launch.kernel, grid=launch.grid, name=launch.kernel.__name__, num_warps=launch.warps,
        compute_capability=capability and round(10 * capability), **options, **launch.constants,
    )  # fmt: skip
    return tuple(outputs)


@functools.cache
def _differentiable(kernels: Kernels, launcher: Launcher) -> Any:
    def forward(problem, *, save):
        y, *states = kernels.forward(launcher, problem, save)
        size = len(problem.state)
        return y, tuple(states[:size]), tuple(states[size:]) if save else ()

    def backward(problem, entries, gy, gstate):
        tokens, shared, state, _ = problem
        out = kernels.backward(launcher, problem, entries, gy, gstate)
        gtokens, gshared, gstate = out[: len(tokens)], out[len(tokens) : -len(state)], out[-len(state) :]
        gshared = (g.reshape(x.shape[0], -1, *x.shape[1:]).sum(1) for g, x in zip(gshared, shared, strict=True))
        return gtokens, tuple(gshared), gstate

    infer, save = (_over_rows(partial(forward, save=save)) for save in (False, True))
    pull_back = _over_rows(backward)

    @jax.custom_vjp
    def walk(tokens, shared, state, marks):
        return infer(Problem(tokens, shared, state, marks))[:2]

    def walk_fwd(tokens, shared, state, marks):
        problem = Problem(tokens, shared, state, marks)
        y, final, entries = save(problem)
        return (y, final), (problem, entries)

    def walk_bwd(residuals, cotangents):
        return *pull_back(*residuals, *cotangents), None

    walk.defvjp(walk_fwd, walk_bwd)
    return walk


def _over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, whose arrays have rows of a batch as their first axis, with a rule for vmap: all rows are one batch's."""
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def one_batch(size, batched, *arguments):
        def rows(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = call(*jax.tree.map(rows, arguments, tuple(batched)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(lambda x: True, out)

    return call
