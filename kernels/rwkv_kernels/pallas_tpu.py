"""A recurrence as Pallas kernels for TPUs.

The grid is (B, H, blocks of chunks); its last axis runs in order, with the state in scratch memory from one block to the next, while
Pallas fetches the next block and writes the last. The backward kernel runs from the last block to the first. Tokens lie head by
head, [B, H, T, X], because a block's last two axes must be whole tiles.
"""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from .recurrence import Problem, Recurrence

MOST_CHUNKS = 8
"""Chunks in a block, at most: a step of the grid costs a fraction of a microsecond, however small its block."""


def run(op: Recurrence, problem: Problem, *, interpret: bool = False) -> tuple[Array, tuple[Array, ...]]:
    """Returns y [B, T, H, V] in the tokens' dtype, and the state after the last token.

    Args:
        op: The recurrence.
        problem: Its arrays, T being whole chunks.
        interpret: Whether to run in Pallas' interpreter, on any device, instead of compiling for a TPU.
    """
    tokens, shared, state, marks = problem
    dtype = tokens[0].dtype
    # Single rows of packed bfloat16 cannot be addressed.
    heads_first = tuple((x.astype(state[0].dtype) if op.by_row else x).swapaxes(1, 2) for x in tokens)
    if marks is not None:
        marks = marks[..., None], marks.reshape(marks.shape[0], -1, 1, op.num_tokens)
    y, final = _differentiable(op, interpret)(heads_first, shared, state, marks)
    return y.swapaxes(1, 2).astype(dtype), final


@functools.cache
def _differentiable(op: Recurrence, interpret: bool) -> Any:
    @jax.custom_vjp
    def walk(tokens, shared, state, marks):
        return _Kernels(op, tokens, shared, state, marks, interpret).forward(save=False)[:2]

    def walk_fwd(tokens, shared, state, marks):
        y, final, entries = _Kernels(op, tokens, shared, state, marks, interpret).forward(save=True)
        return (y, final), (tokens, shared, state, marks, entries)

    def walk_bwd(residuals, cotangents):
        tokens, shared, state, marks, entries = residuals
        gy, gfinal = cotangents
        return *_Kernels(op, tokens, shared, state, marks, interpret).backward(entries, gy, gfinal), None

    walk.defvjp(walk_fwd, walk_bwd)
    return walk


class _Kernels:
    """The two kernels for given arrays: tokens [B, H, T, X]; marks [B, T, 1] and [B, N, 1, C], or None; the rest as in `Problem`."""

    def __init__(self, op: Recurrence, tokens, shared, state, marks, interpret: bool):
        self.op, self.tokens, self.shared, self.state, self.interpret = op, tokens, shared, state, interpret
        self.marks = marks or ()
        batch_size, num_heads, num_tokens, _ = tokens[0].shape
        self.num_chunks = num_tokens // op.num_tokens
        self.size = max(n for n in range(1, MOST_CHUNKS + 1) if self.num_chunks % n == 0)
        self.grid = (batch_size, num_heads, self.num_chunks // self.size)
        self.y = tokens[-1 if op.split is None else op.split]

    def forward(self, *, save: bool):
        """Returns y, the final state, and the states at the chunks' starts, if they are to be saved."""

        def kernel(*refs):
            refs = iter(refs)
            tokens, shared, state = ([next(refs) for _ in group] for group in (self.tokens, self.shared, self.state))
            marks = [next(refs) for _ in self.marks]
            y, finals = next(refs), [next(refs) for _ in state]
            entries, carries = [next(refs) for _ in state] if save else [], [next(refs) for _ in state]
            weights = tuple(self.whole(ref[...]) for ref in shared)

            @pl.when(pl.program_id(2) == 0)
            def _():
                for carry, ref in zip(carries, state, strict=True):
                    carry[...] = ref[...]

            def body(i, carry):
                for ref, leaf in zip(entries, carry, strict=save):
                    ref[i] = self.bare(leaf)
                own, new = self.op.chunk(self.chunk(tokens, i), weights, carry, self.marks_of(marks, i))
                self.put(y, i, own)
                return new

            final = lax.fori_loop(0, self.size, body, tuple(self.whole(carry[...]) for carry in carries))
            for carry, ref, leaf in zip(carries, finals, final, strict=True):
                carry[...] = ref[...] = self.bare(leaf)

        entries = [jax.ShapeDtypeStruct((*s.shape[:2], self.num_chunks, *s.shape[2:]), s.dtype) for s in self.state]

        def order(n):
            return n

        inputs = [
            *self.of_tokens(self.tokens, order), *self.of_heads(self.shared), *self.of_rows(self.state), *self.of_marks(order),
        ]  # fmt: skip
        outputs = [
            *self.of_tokens([self.y], order),
            *self.of_rows(self.state),
            *(self.of_chunks(entries, order) if save else []),
        ]
        out = self.call(kernel, "forward", inputs, outputs, self.state)
        count = len(self.state)
        return out[0], tuple(out[1 : 1 + count]), tuple(out[1 + count :])

    def backward(self, entries, gy, gfinal):
        """Returns the cotangents of tokens, shared and state."""

        def kernel(*refs):
            refs = iter(refs)
            tokens, shared = ([next(refs) for _ in group] for group in (self.tokens, self.shared))
            marks = [next(refs) for _ in self.marks]
            starts, gy, gfinal = [next(refs) for _ in entries], next(refs), [next(refs) for _ in self.state]
            gtokens, gshared, gstate = ([next(refs) for _ in group] for group in (tokens, shared, gfinal))
            carries, sums = ([next(refs) for _ in group] for group in (gfinal, shared))
            weights = tuple(self.whole(ref[...]) for ref in shared)

            @pl.when(pl.program_id(2) == 0)
            def _():
                for carry, ref in zip(carries, gfinal, strict=True):
                    carry[...] = ref[...]
                for total in sums:
                    total[...] = jnp.zeros_like(total)

            def body(i, carry):
                gstate, gweights = carry
                i = self.size - 1 - i
                step = partial(self.op.chunk, marks=self.marks_of(marks, i))
                entry = tuple(self.whole(ref[i]) for ref in starts)
                _, pullback = jax.vjp(step, self.chunk(tokens, i), weights, entry)
                gchunk, own, gstate = pullback((self.values(gy, i), gstate))
                for ref, g in zip(gtokens, gchunk, strict=True):
                    self.put(ref, i, g)
                return gstate, jax.tree.map(jnp.add, gweights, own)

            start = (tuple(self.whole(ref[...]) for ref in group) for group in (carries, sums))
            gentry, gweights = lax.fori_loop(0, self.size, body, tuple(start))
            for kept, refs_, leaves in ((carries, gstate, gentry), (sums, gshared, gweights)):
                for carry, ref, leaf in zip(kept, refs_, leaves, strict=True):
                    carry[...] = ref[...] = self.bare(leaf)

        batch_size, num_heads, blocks = self.grid
        sums = [jax.ShapeDtypeStruct((batch_size, num_heads, *x.shape[1:]), x.dtype) for x in self.shared]

        def order(n):
            return blocks - 1 - n

        inputs = [
            *self.of_tokens(self.tokens, order), *self.of_heads(self.shared), *self.of_marks(order), *self.of_chunks(entries, order),
            *self.of_tokens([gy], order), *self.of_rows(gfinal),
        ]  # fmt: skip
        outputs = [*self.of_tokens(self.tokens, order), *self.of_rows(sums), *self.of_rows(self.state)]
        out = self.call(kernel, "backward", inputs, outputs, [*self.state, *sums])
        tokens, shared = len(self.tokens), len(self.shared)
        gshared = tuple(g.sum(0) for g in out[tokens : tokens + shared])
        return tuple(out[:tokens]), gshared, tuple(out[tokens + shared :])

    def call(self, kernel, name, inputs, outputs, scratch):
        """Runs a kernel on pairs of an array and its part; scratch is shaped as one program's part of a state."""
        params: dict[str, Any] = {"interpret": True}
        if not self.interpret:
            semantics = ("parallel", "parallel", "arbitrary")
            params = {"compiler_params": pltpu.CompilerParams(dimension_semantics=semantics)}
        call = pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
            grid=self.grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=[pltpu.VMEM(x.shape[-2:], x.dtype) for x in scratch],
            name=f"{self.op.name}_{name}",
            **params,
        )
        return call(*(x for x, _ in inputs))

    def of_tokens(self, arrays, order):
        """Arrays [B, H, T, X], of which a program sees a block of chunks: the `order(n)`-th at step n."""
        block = self.size * self.op.num_tokens
        return [(x, pl.BlockSpec((None, None, block, x.shape[3]), lambda b, h, n: (b, h, order(n), 0))) for x in arrays]

    def of_chunks(self, arrays, order):
        """Arrays [B, H, N, R, X], a state a chunk."""
        return [
            (x, pl.BlockSpec((None, None, self.size, *x.shape[3:]), lambda b, h, n: (b, h, order(n), 0, 0)))
            for x in arrays
        ]

    def of_heads(self, arrays):
        """Arrays [H, 1, X], the same for all rows of the batch."""
        return [(x, pl.BlockSpec((None, *x.shape[1:]), lambda b, h, n: (h, 0, 0))) for x in arrays]

    def of_rows(self, arrays):
        """Arrays [B, H, R, X], one for all of time."""
        return [(x, pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, n: (b, h, 0, 0))) for x in arrays]

    def of_marks(self, order):
        """The marks [B, T, 1] and [B, N, 1, C]."""
        if not self.marks:
            return []
        columns, rows = self.marks
        return [
            (columns, pl.BlockSpec((None, self.size * self.op.num_tokens, 1), lambda b, h, n: (b, order(n), 0))),
            (rows, pl.BlockSpec((None, self.size, 1, self.op.num_tokens), lambda b, h, n: (b, order(n), 0, 0))),
        ]

    def whole(self, values: Array) -> Any:
        """A state or shared parameter as a chunk takes it: one piece, or as it is if tokens come by row."""
        return values if self.op.by_row else (values,)

    def bare(self, leaf: Any) -> Array:
        """The reverse of `whole`."""
        return leaf if self.op.by_row else leaf[0]

    def chunk(self, refs, i) -> tuple[Any, ...]:
        """A chunk of every array of tokens."""
        return tuple(
            self.values(ref, i) if self.op.by_row or n == self.op.split else (self.values(ref, i),)
            for n, ref in enumerate(refs)
        )

    def values(self, ref, i) -> Any:
        """A chunk's rows, or all of it."""
        values = ref[self.rows(i), :].astype(self.state[0].dtype)
        return tuple(values[t : t + 1] for t in range(self.op.num_tokens)) if self.op.by_row else values

    def put(self, ref, i, value) -> None:
        """Stores a chunk's rows, its one piece or all of it, as it comes."""
        if self.op.by_row:
            value = jnp.concatenate(value)
        elif isinstance(value, tuple):
            (value,) = value
        ref[self.rows(i), :] = value.astype(ref.dtype)

    def marks_of(self, refs, i) -> Any:
        """A chunk's marks: [1, 1] each, or [C, 1] and [1, C]; None if there are none."""
        if not refs:
            return None
        columns, rows = refs
        if not self.op.by_row:
            return columns[self.rows(i), :], rows[i]
        values = columns[self.rows(i), :]
        return tuple(values[t : t + 1] for t in range(self.op.num_tokens))

    def rows(self, i) -> Any:
        """A chunk's tokens in a block."""
        return pl.ds(pl.multiple_of(i * self.op.num_tokens, self.op.num_tokens), self.op.num_tokens)
