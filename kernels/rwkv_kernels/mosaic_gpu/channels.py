"""Kernels of recurrences of channels that do not mix, such as wkv4's: a thread walks one channel, its state in registers.

They compute what an op's `chunk.py` says of a chunk, and pull back through it with `jax.vjp`, in the kernel.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..recurrence import Problem, Recurrence, pad_channels
from .call import THREADS, call, like, lying, written_out


def run(op: Recurrence, problem: Problem, walk: Any) -> tuple[Array, tuple[Array, ...]]:
    """Returns walk(problem), with the channels cut into blocks of as many as there are threads."""
    del op
    tokens, shared, state, marks = problem
    blocks = Problem(
        tuple(_blocks(x, 2) for x in tokens),
        tuple(_blocks(x, 0) for x in shared),
        tuple(_blocks(x, 1) for x in state),
        marks,
    )
    y, final = walk(blocks)
    return _heads(y, tokens[0], 2), tuple(_heads(x, before, 1) for x, before in zip(final, state, strict=True))


def _blocks(x: Array, axis: int) -> Array:
    """Heads at an axis, of X channels at the last one, as blocks of 128."""
    flat = x.reshape(*x.shape[:axis], -1)
    flat = pad_channels(flat, axis, -(-flat.shape[axis] // THREADS) * THREADS)
    return flat.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 : -1], THREADS)


def _heads(x: Array, before: Array, axis: int) -> Array:
    """The reverse of `_blocks`."""
    return x.reshape(*x.shape[:axis], -1)[..., : before[(0,) * axis].size].reshape(before.shape)


def forward(op: Recurrence, problem: Problem, interpret: bool, *, save: bool) -> tuple[Array, tuple, tuple]:
    """Returns y, the state after it, and, to `save`, the states at the chunks' starts [B, H, N, 1, X]."""
    num_chunks = problem.tokens[0].shape[1] // op.num_tokens

    def kernel(inputs, outputs, scratch):
        del scratch
        y_ref, final_refs, entry_refs = outputs
        b, h = lax.axis_index("b"), lax.axis_index("h")
        weights = tuple(ref[h] for ref in inputs.shared)

        def body(i, state):
            for ref, leaf in zip(entry_refs, state, strict=save):
                ref[b, h, i] = leaf
            rows, new = written_out(*_chunk(op, inputs, weights, state, i))
            _put(op, y_ref, rows, i)
            return new

        final = lax.fori_loop(0, num_chunks, body, tuple(ref[b, h] for ref in inputs.state))
        for ref, leaf in zip(final_refs, final, strict=True):
            ref[b, h] = leaf

    states = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem.state)
    entries = _entries(problem, num_chunks) if save else ()
    return call(
        kernel, f"{op.name}_forward", problem, (like(problem.tokens[0]), states, entries), _grid(problem), interpret
    )


def backward(
    op: Recurrence, problem: Problem, entries: tuple[Array, ...], gy: Array, gfinal: tuple[Array, ...], interpret: bool
) -> tuple[tuple, tuple, tuple]:
    """Returns the cotangents of tokens, shared and state."""
    num_chunks = problem.tokens[0].shape[1] // op.num_tokens

    def kernel(inputs, outputs, scratch):
        del scratch
        inputs, entry_refs, gy_ref, gfinal_refs = inputs
        gtoken_refs, gshared_refs, gstate_refs = outputs
        b, h = lax.axis_index("b"), lax.axis_index("h")
        weights = tuple(ref[h] for ref in inputs.shared)

        def body(i, carry):
            gstate, gshared = carry
            i = num_chunks - 1 - i
            entry = tuple(ref[b, h, i] for ref in entry_refs)
            cotangents = _rows(op, gy_ref, i, gstate[0].dtype), gstate
            chunk, *arguments = _chunk(op, inputs, weights, entry, i)
            gtokens, gweights, gstate = written_out(partial(_pull, chunk), cotangents, *arguments)
            for ref, rows in zip(gtoken_refs, gtokens, strict=True):
                _put(op, ref, rows, i)
            return gstate, jax.tree.map(jnp.add, gshared, gweights)

        by_thread = plgpu.Layout.WG_STRIDED((1, THREADS), vec_size=1)
        zeros = tuple(lying(jnp.zeros_like(x), by_thread, interpret) for x in weights)
        gstate, gshared = lax.fori_loop(0, num_chunks, body, (tuple(ref[b, h] for ref in gfinal_refs), zeros))
        for ref, g in zip((*gshared_refs, *gstate_refs), (*gshared, *gstate), strict=True):
            ref[b, h] = g

    gshared = tuple(jax.ShapeDtypeStruct((gy.shape[0], *x.shape), x.dtype) for x in problem.shared)
    outputs = jax.tree.map(like, problem.tokens), gshared, jax.tree.map(like, problem.state)
    inputs = problem, entries, gy, gfinal
    gtokens, gshared, gstate = call(kernel, f"{op.name}_backward", inputs, outputs, _grid(problem), interpret)
    return gtokens, tuple(g.sum(0) for g in gshared), gstate


def _chunk(op: Recurrence, refs: Problem, weights: Any, state: Any, i: Any) -> tuple[Any, ...]:
    """The function that computes a chunk, and its arguments."""
    marks = None
    if refs.marks is not None:
        marks = tuple(refs.marks[lax.axis_index("b"), i * op.num_tokens + t] for t in range(op.num_tokens))
    tokens = tuple(_rows(op, ref, i, state[0].dtype) for ref in refs.tokens)
    return partial(op.chunk, marks=marks), tokens, weights, state


def _pull(function: Any, cotangents: Any, *arguments: Any) -> Any:
    """The arguments' cotangents."""
    return jax.vjp(function, *arguments)[1](cotangents)


def _rows(op: Recurrence, ref: Any, i: Any, dtype: Any) -> tuple[Array, ...]:
    """A chunk's tokens, [1, X] each."""
    b, h = lax.axis_index("b"), lax.axis_index("h")
    return tuple(ref[b, pl.ds(i * op.num_tokens + t, 1), h].astype(dtype) for t in range(op.num_tokens))


def _put(op: Recurrence, ref: Any, rows: tuple[Array, ...], i: Any) -> None:
    """The reverse of `_rows`."""
    b, h = lax.axis_index("b"), lax.axis_index("h")
    for t, row in enumerate(rows):
        ref[b, pl.ds(i * op.num_tokens + t, 1), h] = row.astype(ref.dtype)


def _grid(problem: Problem) -> dict[str, int]:
    return {"b": problem.tokens[0].shape[0], "h": problem.tokens[0].shape[2]}


def _entries(problem: Problem, num_chunks: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((*x.shape[:2], num_chunks, *x.shape[2:]), x.dtype) for x in problem.state)
