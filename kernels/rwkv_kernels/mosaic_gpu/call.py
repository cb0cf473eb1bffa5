"""Calls a kernel through Mosaic GPU or its interpreter, whichever JAX this is."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array

THREADS = 128
"""Of a program: one warpgroup."""


def like(x: Array) -> jax.ShapeDtypeStruct:
    """Returns the description of an output with the shape and dtype of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def call(
    kernel: Callable[..., None],
    name: str,
    inputs: Any,
    outputs: Any,
    grid: dict[str, int],
    interpret: bool,
    scratch: Any = None,
) -> Any:
    """Returns the outputs of kernel(inputs, outputs, scratch), called with trees of references, as a tree of arrays.

    Args:
        kernel: What a program does; its place in the grid is `lax.axis_index` of the axes' names.
        name: What a profiler and the compiler's dumps call it.
        inputs: A tree of arrays.
        outputs: A tree of `jax.ShapeDtypeStruct`.
        grid: Axes and their sizes.
        interpret: Whether to interpret it.
        scratch: A tree of shared memory and barriers.
    """
    structure = jax.tree.structure((inputs, outputs, scratch))

    def flat(*refs: Any) -> None:
        kernel(*jax.tree.unflatten(structure, refs))

    flat.__name__ = name
    written, treedef = jax.tree.flatten(outputs)
    renamed = "out_type" in inspect.signature(plgpu.kernel).parameters  # Since JAX 0.10.2.
    params: dict[str, Any] = {
        "out_type" if renamed else "out_shape": written,
        "scratch_types" if renamed else "scratch_shapes": jax.tree.leaves(scratch),
        "grid": tuple(grid.values()),
        "grid_names": tuple(grid),
        # The lane's, the default until JAX 0.11: the warpgroup's has no `where` of a scalar condition.
        "compiler_params": plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    }
    if interpret:
        params["interpret"] = _interpreter()
    return jax.tree.unflatten(treedef, plgpu.kernel(flat, **params)(*jax.tree.leaves(inputs)))


def lying(x: Any, layout: Any, interpret: bool) -> Any:
    """Returns x, in registers, lying over the threads in a layout, of which the interpreter knows nothing."""
    return x if interpret else plgpu.layout_cast(x, layout)


def written_out(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns function(*arguments) without the primitives of differentiation, which is done: Mosaic GPU does not lower them."""
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(jaxpr, jax.tree.leaves(arguments)))


def _evaluate(closed: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    values = dict(zip((*closed.jaxpr.constvars, *closed.jaxpr.invars), (*closed.consts, *arguments), strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    for equation in closed.jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        match equation.primitive.name:
            case "stop_gradient":
                outputs = inputs
            case "add_any":  # Of cotangents.
                outputs = [jnp.add(*inputs)]
            case "reshape":  # It names a sharding where a mesh is set.
                outputs = [jnp.reshape(inputs[0], equation.params["new_sizes"])]
            case "custom_jvp_call":
                outputs = _evaluate(equation.params["call_jaxpr"], inputs)
            case "jit":
                outputs = _evaluate(equation.params["jaxpr"], inputs)
            case _:
                outputs = equation.primitive.bind(*inputs, **equation.params)
                outputs = outputs if equation.primitive.multiple_results else [outputs]
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(x) for x in closed.jaxpr.outvars]


def _interpreter() -> Any:
    public = getattr(plgpu, "InterpretGPUParams", None)  # Since JAX 0.11.
    if public is not None:
        return public()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
