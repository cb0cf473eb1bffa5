"""A recurrence as Pallas kernels for GPUs, lowered through Triton: NVIDIA Ampere and later, and ROCm.

A program walks the chunks of one head (and of a block of its value channels) with the state in registers. The backward kernel does
so from the last chunk to the first. What is stored for it is the state at each chunk's start, and only where a gradient is asked.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from .recurrence import Factors, Problem, Recurrence, dot, masked, masks
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
    """Returns y, the final state, and the states at the chunks' starts, if they are to be saved."""
    tokens, shared, state, marks = problem
    block = sizes(op.name, tokens[0].shape[3]).forward
    parts = _Parts(op, problem, block)

    def kernel(*refs):
        refs, n = iter(refs), pl.program_id(2)
        token_refs, shared_refs, state_refs = ([next(refs) for _ in group] for group in (tokens, shared, state))
        mark_ref = None if marks is None else next(refs)
        y_ref, *final_refs = (next(refs) for _ in range(1 + len(state)))
        entry_refs = [*refs]
        weights = tuple(parts.shared(ref) for ref in shared_refs)

        def body(i, carry):
            for ref, leaf in zip(entry_refs, carry, strict=save):
                parts.put_state(ref, n, leaf, i)
            y, new = op.chunk(parts.chunk(token_refs, i, n), weights, carry, parts.marks(mark_ref, i))
            parts.put_values(y_ref, i, n, y)
            return new

        start = tuple(parts.state(ref, n) for ref in state_refs)
        for ref, leaf in zip(final_refs, lax.fori_loop(0, parts.chunks, body, start), strict=True):
            parts.put_state(ref, n, leaf)

    y = tokens[-1 if op.split is None else op.split]
    entries = [jax.ShapeDtypeStruct((*s.shape[:2], parts.chunks, *s.shape[2:]), s.dtype) for s in state]
    outputs = [(y, _of_tokens), *((x, _of_heads) for x in (*state, *(entries if save else [])))]
    grid = (*parts.heads, parts.blocks)
    y, *states = _call(kernel, f"{op.name}_forward", grid, block.warps, interpret, _inputs(problem), outputs)
    return y, tuple(states[: len(state)]), tuple(states[len(state) :])


def _backward(op: Recurrence, problem: Problem, entries, gy, gfinal, interpret: bool):
    """Returns the cotangents of tokens, shared and state."""
    tokens, shared, state, marks = problem
    block = sizes(op.name, tokens[0].shape[3]).backward
    parts = _Parts(op, problem, block)

    def kernel(*refs):
        refs = iter(refs)
        token_refs, shared_refs = ([next(refs) for _ in group] for group in (tokens, shared))
        mark_ref = None if marks is None else next(refs)
        entry_refs, gy_ref, _ = [next(refs) for _ in state], next(refs), [next(refs) for _ in state]
        gtoken_refs, gshared_refs, gstate_refs = ([next(refs) for _ in group] for group in (tokens, shared, state))
        walk = _walk_rows if op.by_row else _walk_factors
        walk(
            op, parts, _Refs(token_refs, shared_refs, mark_ref, entry_refs, gy_ref),
            _Refs(gtoken_refs, gshared_refs, None, gstate_refs, None), interpret,
        )  # fmt: skip

    sums = [jax.ShapeDtypeStruct((*parts.heads, *x.shape[1:]), x.dtype) for x in shared]
    inputs = [*_inputs(problem, with_state=False), *((x, _of_heads) for x in entries), (gy, _of_tokens)]
    # The state's cotangent is walked where the result lies, from that of the final state on.
    aliases = {len(inputs) + n: len(tokens) + len(shared) + n for n in range(len(state))}
    inputs += [(x, _of_heads) for x in gfinal]
    outputs = [*((x, _of_tokens) for x in tokens), *((x, _of_heads) for x in (*sums, *state))]
    out = _call(kernel, f"{op.name}_backward", parts.heads, block.warps, interpret, inputs, outputs, aliases)
    gtokens, gshared, gstate = out[: len(tokens)], out[len(tokens) : -len(state)], out[-len(state) :]
    return tuple(gtokens), tuple(g.sum(0) for g in gshared), tuple(gstate)


class _Refs(NamedTuple):
    tokens: Any
    shared: Any
    marks: Any
    states: Any
    y: Any


def _walk_rows(op, parts, refs, grefs, interpret):
    weights = tuple(ref[...] for ref in refs.shared)

    def body(i, carry):
        i, (gstate, gshared) = parts.chunks - 1 - i, carry
        entry = tuple(parts.state(ref, 0, i) for ref in refs.states)
        step = partial(op.chunk, marks=parts.marks(refs.marks, i))
        _, pullback = jax.vjp(step, parts.chunk(refs.tokens, i, 0), weights, entry)
        gchunk, gweights, gstate = pullback((parts.values(refs.y, i, 0), gstate))
        for ref, g in zip(grefs.tokens, gchunk, strict=True):
            parts.put_values(ref, i, 0, g)
        return gstate, jax.tree.map(jnp.add, gshared, gweights)

    start = tuple(ref[...] for ref in grefs.states), jax.tree.map(jnp.zeros_like, weights)
    gstate, gshared = lax.fori_loop(0, parts.chunks, body, start)
    for ref, g in zip((*grefs.states, *grefs.shared), (*gstate, *gshared), strict=True):
        ref[...] = g


def _walk_factors(op, parts, refs, grefs, interpret):
    keys, gkeys = ([*x[: op.split], *x[op.split + 1 :]] for x in (refs.tokens, grefs.tokens))
    (entry,), (gstate) = refs.states, grefs.states[0]
    blocks = range(parts.blocks)

    def piece_of(i, p):
        return tuple(parts.piece_of(ref, i, p) for ref in keys), tuple(parts.shared_piece(ref, p) for ref in refs.shared)

    def body(i, _):
        i = parts.chunks - 1 - i
        marks = parts.marks(refs.marks, i)
        at_ends = masks(marks)

        def first(p, carry):
            scores, found, gwritten = carry
            own = op.factors(*piece_of(i, p))
            scores = jax.tree.map(jnp.add, scores, own.scores)
            writes = [masked(at_ends.to_end, x) for x in own.writes]
            found = [tuple(f + dot(x, parts.tile(entry, n, p, i), (1, 1)) for f, x in zip(found[n], own.reads)) for n in blocks]
            gwritten = [tuple(f + dot(x, parts.tile(gstate, n, p), (1, 1)) for f, x in zip(gwritten[n], writes)) for n in blocks]
            return scores, found, gwritten

        example = jax.eval_shape(op.factors, *jax.eval_shape(lambda: piece_of(0, 0)))
        pair = jnp.zeros((op.num_tokens, op.num_tokens), parts.wide)
        row = jnp.zeros((op.num_tokens, parts.block), parts.wide)
        zeros = (
            (pair,) * len(example.scores),
            [(row,) * len(example.reads) for _ in blocks],
            [(row,) * len(example.writes) for _ in blocks],
        )
        scores, found, gwritten = lax.fori_loop(0, parts.num_pieces, first, zeros)
        gscores, gfound, written = zeros[0], [], []
        for n in blocks:
            mix = partial(op.mix, marks=marks)
            f = tuple(masked(at_ends.from_start, x) for x in found[n])
            (_, x), pull = jax.vjp(mix, scores, f, parts.values(refs.tokens[op.split], i, n))
            gs, gf, gv = pull((parts.values(refs.y, i, n), gwritten[n]))
            gscores = jax.tree.map(jnp.add, gscores, gs)
            gfound.append(tuple(masked(at_ends.from_start, x) for x in gf))
            written.append(x)
            parts.put_values(grefs.tokens[op.split], i, n, gv)

        def second(p, _):
            own, pull = jax.vjp(op.factors, *piece_of(i, p))
            greads, gwrites, gkept = 0.0, 0.0, 0.0
            greads, gwrites = [0.0] * len(own.reads), [0.0] * len(own.writes)
            for n in blocks:
                s, g = parts.tile(entry, n, p, i), parts.tile(gstate, n, p)
                greads = [a + dot(x, s) for a, x in zip(greads, gfound[n])]
                gwrites = [a + dot(x, g) for a, x in zip(gwrites, written[n])]
                gkept += (s * g).sum(0, keepdims=True)
                new = masked(at_ends.through, own.kept * g)
                for x, q in zip(gfound[n], own.reads):
                    new += dot(x, q, (0, 0))
                parts.put_tile(gstate, n, p, new)
            cot = Factors(tuple(greads), tuple(masked(at_ends.to_end, x) for x in gwrites), masked(at_ends.through, gkept), gscores)
            gk, gsh = pull(cot)
            for ref, g in zip(gkeys, gk, strict=True):
                parts.put_piece(ref, i, p, g)
            for ref, g in zip(grefs.shared, gsh, strict=True):
                ref[:, parts._piece(p)] += g

        lax.fori_loop(0, parts.num_pieces, lambda p, c: second(p, c), None)
        _barrier(interpret)

    for ref in grefs.shared:
        for p in range(parts.num_pieces):
            ref[:, parts._piece(p)] = jnp.zeros((1, parts.piece), ref.dtype)
    _barrier(interpret)
    lax.fori_loop(0, parts.chunks, body, None)


def _barrier(interpret):
    if not interpret:
        from jax.experimental.pallas import triton
        triton.debug_barrier()


def _of_tokens(x: Any) -> pl.BlockSpec:
    """A head's part of [B, T, H, X]."""
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda b, h, *_: (b, 0, h, 0))


def _of_heads(x: Any) -> pl.BlockSpec:
    """A head's part of [B, H, ...]."""
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, *_: (b, h, *(0,) * (len(x.shape) - 2)))


def _of_shared(x: Any) -> pl.BlockSpec:
    """A head's part of [H, 1, X]."""
    return pl.BlockSpec((None, 1, x.shape[2]), lambda b, h, *_: (h, 0, 0))


def _of_marks(x: Any) -> pl.BlockSpec:
    """A row of [B, T]."""
    return pl.BlockSpec((None, x.shape[1]), lambda b, h, *_: (b, 0))


def _inputs(problem: Problem, with_state: bool = True) -> list[Any]:
    tokens, shared, state, marks = problem
    return [
        *((x, _of_tokens) for x in tokens),
        *((x, _of_shared) for x in shared),
        *((x, _of_heads) for x in state if with_state),
        *([] if marks is None else [(marks, _of_marks)]),
    ]


class _Parts:
    """How a program reads and writes its head: chunk by chunk, block of values by block of values."""

    def __init__(self, op: Recurrence, problem: Problem, block: Block):
        self.op, self.wide = op, problem.state[0].dtype
        batch_size, num_tokens, num_heads, keys = problem.tokens[0].shape
        self.heads, self.chunks = (batch_size, num_heads), num_tokens // op.num_tokens
        self.piece = keys if op.by_row else min(block.key_piece, keys)
        values = problem.tokens[-1 if op.split is None else op.split].shape[3]
        self.block = values if op.split is None else min(values, block.values)
        self.blocks = values // self.block
        self.num_pieces = keys // self.piece

    def shared(self, ref: Any) -> Any:
        """A shared parameter's numbers: pieces of key channels, or all if tokens come by row."""
        return ref[...] if self.op.by_row else tuple(ref[:, piece] for piece in self._pieces(ref))

    def put_shared(self, ref: Any, value: Any) -> None:
        """The reverse of `shared`."""
        if self.op.by_row:
            ref[...] = value
        else:
            for at, piece in zip(self._pieces(ref), value, strict=True):
                ref[:, at] = piece

    def state(self, ref: Any, n: Any, *entry: Any) -> Any:
        """The n-th block's rows of a state (that at a chunk's start), in pieces, or all if tokens come by row."""
        if self.op.by_row:
            return ref[(*entry, ...)]
        return tuple(ref[(*entry, self._block(n), piece)] for piece in self._pieces(ref))

    def put_state(self, ref: Any, n: Any, value: Any, *entry: Any) -> None:
        """The reverse of `state`."""
        if self.op.by_row:
            ref[(*entry, ...)] = value
        else:
            for at, piece in zip(self._pieces(ref), value, strict=True):
                ref[(*entry, self._block(n), at)] = piece

    def chunk(self, refs: list[Any], i: Any, n: Any) -> tuple[Any, ...]:
        """The i-th chunk of every array of tokens, with the n-th block of values."""
        return tuple(
            self.values(ref, i, n) if self.op.by_row or m == self.op.split else self.pieces(ref, i)
            for m, ref in enumerate(refs)
        )

    def values(self, ref: Any, i: Any, n: Any) -> Any:
        """A chunk's rows, or all of it."""
        if self.op.by_row:
            rows = (pl.ds(i * self.op.num_tokens + t, 1) for t in range(self.op.num_tokens))
            return tuple(ref[row, :].astype(self.wide) for row in rows)
        return ref[self._tokens(i), self._block(n)].astype(self.wide)

    def pieces(self, ref: Any, i: Any) -> Any:
        """A chunk in pieces of its key channels."""
        return tuple(ref[self._tokens(i), piece].astype(self.wide) for piece in self._pieces(ref))

    def put_values(self, ref: Any, i: Any, n: Any, value: Any) -> None:
        """The reverse of `values`."""
        if self.op.by_row:
            for t, row in enumerate(value):
                ref[pl.ds(i * self.op.num_tokens + t, 1), :] = row.astype(ref.dtype)
        else:
            ref[self._tokens(i), self._block(n)] = value.astype(ref.dtype)

    def put_pieces(self, ref: Any, i: Any, value: Any) -> None:
        """The reverse of `pieces`."""
        for at, piece in zip(self._pieces(ref), value, strict=True):
            ref[self._tokens(i), at] = piece.astype(ref.dtype)

    def marks(self, ref: Any, i: Any) -> Any:
        """A chunk's marks: scalars, or [C, 1] and [1, C]; None if there are none."""
        if ref is None:
            return None
        if self.op.by_row:
            return tuple(ref[i * self.op.num_tokens + t] for t in range(self.op.num_tokens))
        marks = ref[self._tokens(i)]
        return marks[:, None], marks[None, :]

    def piece_of(self, ref, i, p):
        return ref[self._tokens(i), self._piece(p)].astype(self.wide)

    def put_piece(self, ref, i, p, value):
        ref[self._tokens(i), self._piece(p)] = value.astype(ref.dtype)

    def shared_piece(self, ref, p):
        return ref[:, self._piece(p)]

    def tile(self, ref, n, p, *entry):
        return ref[(*entry, self._block(n), self._piece(p))]

    def put_tile(self, ref, n, p, value):
        ref[self._block(n), self._piece(p)] = value

    def _piece(self, p):
        return pl.ds(p * self.piece, self.piece)

    def _tokens(self, i: Any) -> Any:
        return pl.ds(i * self.op.num_tokens, self.op.num_tokens)

    def _block(self, n: Any) -> Any:
        return pl.ds(n * self.block, self.block)

    def _pieces(self, ref: Any) -> list[Any]:
        return [pl.ds(at, self.piece) for at in range(0, ref.shape[-1], self.piece)]


def _call(kernel, name, grid, num_warps, interpret, inputs, outputs, aliases=None):
    """Runs a kernel on pairs of an array and what makes its spec."""
    params: dict[str, Any] = {"interpret": interpret}
    if not interpret:
        from jax.experimental.pallas import triton

        params |= {"compiler_params": triton.CompilerParams(num_warps=num_warps, num_stages=1)}
    call = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        grid=grid,
        in_specs=[spec(x) for x, spec in inputs],
        out_specs=[spec(x) for x, spec in outputs],
        input_output_aliases=aliases or {},
        name=name,
        **params,
    )
    return call(*(x for x, _ in inputs))
