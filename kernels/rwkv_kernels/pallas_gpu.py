"""A recurrence as Pallas kernels for GPUs, lowered through Triton: NVIDIA Ampere and later, and ROCm.

A program walks the chunks of one head (and of a block of its value channels) with the state in registers. The backward kernel does
so from the last chunk to the first. What is stored for it is the state at each chunk's start, and only where a gradient is asked.
"""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from .recurrence import Problem, Recurrence
from .tuning import Block, sizes


def run(op: Recurrence, problem: Problem, *, interpret: bool = False) -> tuple[Array, tuple[Array, ...]]:
    """Returns y [B, T, H, V] in the tokens' dtype, and the state after the last token.

    Args:
        op: The recurrence.
        problem: Its arrays: T whole chunks, channels padded to powers of two (and to 16 or more where the op multiplies matrices).
        interpret: Whether to run in Pallas' interpreter, on any device, instead of compiling for a GPU.
    """
    return _differentiable(op, interpret)(problem.tokens, problem.shared, problem.state, problem.marks)


@functools.cache
def _differentiable(op: Recurrence, interpret: bool) -> Any:
    @jax.custom_vjp
    def walk(tokens, shared, state, marks):
        y, final, _ = _forward(op, Problem(tokens, shared, state, marks), interpret, save=False)
        return y, final

    def walk_fwd(tokens, shared, state, marks):
        problem = Problem(tokens, shared, state, marks)
        y, final, entries = _forward(op, problem, interpret, save=True)
        return (y, final), (problem, entries)

    def walk_bwd(residuals, cotangents):
        problem, entries = residuals
        gy, gfinal = cotangents
        return *_backward(op, problem, entries, gy, gfinal, interpret), None

    walk.defvjp(walk_fwd, walk_bwd)
    return walk


def _forward(op: Recurrence, problem: Problem, interpret: bool, *, save: bool):
    tokens, shared, state, marks = problem
    num_chunks = tokens[0].shape[1] // op.num_tokens
    block = sizes(op.name, tokens[0].shape[3]).forward
    specs = _Specs(op, problem, block)

    def kernel(*refs):
        refs = iter(refs)
        token_refs, shared_refs, state_refs = ([next(refs) for _ in group] for group in (tokens, shared, state))
        mark_ref = None if marks is None else next(refs)
        y_ref, *final_refs = (next(refs) for _ in range(1 + len(state)))
        entry_refs = [*refs]
        weights = tuple(specs.whole(ref) for ref in shared_refs)

        def body(i, carry):
            for ref, leaf in zip(entry_refs, carry, strict=save):
                specs.put(ref, leaf, i)
            y, new = op.chunk(specs.chunk(token_refs, i), weights, carry, specs.marks_of(mark_ref, i))
            specs.put_tokens(y_ref, i, y)
            return new

        final = lax.fori_loop(0, num_chunks, body, tuple(specs.whole(ref) for ref in state_refs))
        for ref, leaf in zip(final_refs, final, strict=True):
            specs.put(ref, leaf)

    y = tokens[-1 if op.split is None else op.split]
    entries = [jax.ShapeDtypeStruct((*s.shape[:2], num_chunks, *s.shape[2:]), s.dtype) for s in state] if save else []
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (y, *state)] + entries
    out_specs = [specs.y(), *specs.states(), *(specs.entries() if save else [])]
    y, *states = _call(
        kernel, f"{op.name}_forward", specs.inputs(), out_specs, out, specs.grid, block.warps, interpret
    )(*tokens, *shared, *state, *(() if marks is None else (marks,)))
    return y, tuple(states[: len(state)]), tuple(states[len(state) :])


def _backward(op: Recurrence, problem: Problem, entries, gy, gstate, interpret: bool):
    """Returns the cotangents of tokens, shared and state."""
    tokens, shared, state, marks = problem
    batch_size, num_tokens = tokens[0].shape[:2]
    num_chunks = num_tokens // op.num_tokens
    block = sizes(op.name, tokens[0].shape[3]).backward
    specs = _Specs(op, problem, block)

    def kernel(*refs):
        refs = iter(refs)
        token_refs, shared_refs = ([next(refs) for _ in group] for group in (tokens, shared))
        mark_ref = None if marks is None else next(refs)
        entry_refs, gy_ref, gfinal_refs = [next(refs) for _ in state], next(refs), [next(refs) for _ in state]
        gtoken_refs, gshared_refs, gstate_refs = ([next(refs) for _ in group] for group in (tokens, shared, state))
        weights = tuple(specs.whole(ref) for ref in shared_refs)

        def body(i, carry):
            gstate, gshared = carry
            i = num_chunks - 1 - i
            step = partial(op.chunk, marks=specs.marks_of(mark_ref, i))
            entry = tuple(specs.whole(ref, i) for ref in entry_refs)
            _, pullback = jax.vjp(step, specs.chunk(token_refs, i), weights, entry)
            gchunk, gweights, gstate = pullback((specs.values_of(gy_ref, i), gstate))
            for ref, g in zip(gtoken_refs, gchunk, strict=True):
                specs.put_tokens(ref, i, g)
            return gstate, jax.tree.map(jnp.add, gshared, gweights)

        gfinal = tuple(specs.whole(ref) for ref in gfinal_refs)
        gentry, gshared = lax.fori_loop(0, num_chunks, body, (gfinal, jax.tree.map(jnp.zeros_like, weights)))
        for ref, g in zip((*gshared_refs, *gstate_refs), (*gshared, *gentry), strict=True):
            specs.put(ref, g)

    parts = specs.grid[2]
    # What is not a value is summed over the blocks of value channels.
    alone = [parts == 1 or i == op.split for i in range(len(tokens))]
    gtokens = [
        jax.ShapeDtypeStruct(x.shape, x.dtype) if whole else jax.ShapeDtypeStruct((parts, *x.shape), state[0].dtype)
        for x, whole in zip(tokens, alone, strict=True)
    ]
    gshared = [jax.ShapeDtypeStruct((parts, batch_size, *x.shape), x.dtype) for x in shared]
    gstates = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state]
    inputs = [*specs.tokens(), *specs.shared(), *specs.marks(), *specs.entries(), specs.y(), *specs.states()]
    out_specs = [
        *(spec if whole else specs.part(x) for spec, whole, x in zip(specs.tokens(), alone, tokens, strict=True)),
        *specs.gshared(),
        *specs.states(),
    ]
    out = _call(
        kernel, f"{op.name}_backward", inputs, out_specs, [*gtokens, *gshared, *gstates], specs.grid,
        block.warps, interpret,
    )(*tokens, *shared, *(() if marks is None else (marks,)), *entries, gy, *gstate)  # fmt: skip
    gtokens, gshared, gstates = out[: len(tokens)], out[len(tokens) : -len(state)], out[-len(state) :]
    gtokens = tuple(
        g if whole else g.sum(0).astype(x.dtype) for g, whole, x in zip(gtokens, alone, tokens, strict=True)
    )
    return gtokens, tuple(g.sum((0, 1)) for g in gshared), tuple(gstates)


class _Specs:
    """Which part of each array a program sees, and in what form; the grid is (B, H, blocks of value channels)."""

    def __init__(self, op: Recurrence, problem: Problem, block: Block):
        self.op, self.problem, self.wide = op, problem, problem.state[0].dtype
        batch_size, self.num_tokens, num_heads, keys = problem.tokens[0].shape
        values = problem.tokens[-1 if op.split is None else op.split].shape[3]
        self.piece = keys if op.by_row else min(block.key_piece, keys)
        self.values = values if op.split is None else min(values, block.values)
        self.grid = (batch_size, num_heads, values // self.values)

    def inputs(self) -> list[pl.BlockSpec]:
        return [*self.tokens(), *self.shared(), *self.states(), *self.marks()]

    def tokens(self) -> list[pl.BlockSpec]:
        return [
            self.y()
            if i == self.op.split
            else pl.BlockSpec((None, self.num_tokens, None, x.shape[3]), lambda b, h, n: (b, 0, h, 0))
            for i, x in enumerate(self.problem.tokens)
        ]

    def y(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.num_tokens, None, self.values), lambda b, h, n: (b, 0, h, n))

    def part(self, x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.num_tokens, None, x.shape[3]), lambda b, h, n: (n, b, 0, h, 0))

    def shared(self) -> list[pl.BlockSpec]:
        return [pl.BlockSpec((None, 1, x.shape[2]), lambda b, h, n: (h, 0, 0)) for x in self.problem.shared]

    def gshared(self) -> list[pl.BlockSpec]:
        return [
            pl.BlockSpec((None, None, None, 1, x.shape[2]), lambda b, h, n: (n, b, h, 0, 0))
            for x in self.problem.shared
        ]

    def marks(self) -> list[pl.BlockSpec]:
        return [] if self.problem.marks is None else [pl.BlockSpec((None, self.num_tokens), lambda b, h, n: (b, 0))]

    def states(self) -> list[pl.BlockSpec]:
        rows = 1 if self.op.split is None else self.values
        return [pl.BlockSpec((None, None, rows, x.shape[3]), lambda b, h, n: (b, h, n, 0)) for x in self.problem.state]

    def entries(self) -> list[pl.BlockSpec]:
        rows, chunks = 1 if self.op.split is None else self.values, self.num_tokens // self.op.num_tokens
        return [
            pl.BlockSpec((None, None, chunks, rows, x.shape[3]), lambda b, h, n: (b, h, 0, n, 0))
            for x in self.problem.state
        ]

    def whole(self, ref: Any, *entry: Any) -> Any:
        """A state's (that at a chunk's start) or shared parameter's numbers: pieces of key channels, or all if tokens come by row."""
        if self.op.by_row:
            return ref[(*entry, ...)]
        return tuple(ref[(*entry, slice(None), pl.ds(at, self.piece))] for at in range(0, ref.shape[-1], self.piece))

    def put(self, ref: Any, value: Any, *entry: Any) -> None:
        """The reverse of `whole`."""
        if self.op.by_row:
            ref[(*entry, ...)] = value
        else:
            for n, piece in enumerate(value):
                ref[(*entry, slice(None), pl.ds(n * self.piece, self.piece))] = piece

    def chunk(self, refs: list[Any], i: Any) -> tuple[Any, ...]:
        """A chunk of every array of tokens."""
        return tuple(
            self.values_of(ref, i) if self.op.by_row or n == self.op.split else self.pieces_of(ref, i)
            for n, ref in enumerate(refs)
        )

    def values_of(self, ref: Any, i: Any) -> Any:
        """A chunk's rows, or all of it."""
        if self.op.by_row:
            rows = (pl.ds(i * self.op.num_tokens + t, 1) for t in range(self.op.num_tokens))
            return tuple(ref[row, :].astype(self.wide) for row in rows)
        return ref[self._tokens(i), :].astype(self.wide)

    def pieces_of(self, ref: Any, i: Any) -> Any:
        """A chunk in pieces of its key channels."""
        pieces = (pl.ds(at, self.piece) for at in range(0, ref.shape[1], self.piece))
        return tuple(ref[self._tokens(i), piece].astype(self.wide) for piece in pieces)

    def put_tokens(self, ref: Any, i: Any, value: Any) -> None:
        """Stores a chunk's rows, pieces or all of it, as it comes."""
        if self.op.by_row:
            for t, row in enumerate(value):
                ref[pl.ds(i * self.op.num_tokens + t, 1), :] = row.astype(ref.dtype)
        elif isinstance(value, tuple):
            for n, piece in enumerate(value):
                ref[self._tokens(i), pl.ds(n * self.piece, self.piece)] = piece.astype(ref.dtype)
        else:
            ref[self._tokens(i), :] = value.astype(ref.dtype)

    def marks_of(self, ref: Any, i: Any) -> Any:
        """A chunk's marks: scalars, or [C, 1] and [1, C]; None if there are none."""
        if ref is None:
            return None
        if self.op.by_row:
            return tuple(ref[i * self.op.num_tokens + t] for t in range(self.op.num_tokens))
        marks = ref[self._tokens(i)]
        return marks[:, None], marks[None, :]

    def _tokens(self, i: Any) -> Any:
        return pl.ds(i * self.op.num_tokens, self.op.num_tokens)


def _call(kernel, name, in_specs, out_specs, out_shape, grid, num_warps, interpret):
    params: dict[str, Any] = {"interpret": interpret}
    if not interpret:
        from jax.experimental.pallas import triton

        params |= {"compiler_params": triton.CompilerParams(num_warps=num_warps, num_stages=1)}
    return pl.pallas_call(
        kernel, out_shape=out_shape, grid=grid, in_specs=in_specs, out_specs=out_specs, name=name, **params
    )  # fmt: skip
