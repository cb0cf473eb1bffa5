"""A recurrence as Pallas kernels for GPUs, lowered through Triton: NVIDIA Ampere and later, and ROCm.

A program walks the chunks of one head (and of a block of its value channels) with the state in registers, and stores the state at each
chunk's start if a gradient is asked. The backward pass walks from the last chunk to the first. Where tokens come by row, it pulls
back each chunk on its way; where they are multiplied as matrices, that would not fit in the registers beside the state: it takes
only the state's cotangent along, and a third kernel pulls back all chunks at once, each from the two states at its ends.
"""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from . import dispatch
from .recurrence import Factors, Problem, Products, Recurrence, dot, masked, masks
from .tuning import Block, Sizes, sizes


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
        if op.products is None:
            return *_backward(op, problem, entries, gy, gfinal, interpret), None
        exits, gstate = _backward_state(op, problem, gy, gfinal, interpret)
        return *_backward_chunks(op, op.products, problem, entries, exits, gy, interpret), gstate, None

    walk.defvjp(walk_fwd, walk_bwd)
    return walk


def _forward(op: Recurrence, problem: Problem, interpret: bool, *, save: bool):
    """Returns y, the final state, and the states at the chunks' starts, if they are to be saved."""
    tokens, shared, state, marks = problem
    block = _sizes(op, problem).forward
    parts = _Parts(op, problem, block)

    def kernel(*refs):
        refs = iter(refs)
        token_refs, shared_refs = ([next(refs) for _ in group] for group in (tokens, shared))
        mark_ref = None if marks is None else next(refs)
        state_refs, y_ref, final_refs = [next(refs) for _ in state], next(refs), [next(refs) for _ in state]
        entry_refs = [*refs]
        weights = tuple(parts.whole(ref) for ref in shared_refs)

        def body(i, carry):
            for ref, leaf in zip(entry_refs, carry, strict=save):
                parts.put(ref, leaf, i)
            y, new = parts.chunk_from(token_refs, shared_refs, weights, mark_ref, i)(carry)
            parts.put_tokens(y_ref, i, y)
            return new

        final = lax.fori_loop(0, parts.num_chunks, body, tuple(parts.whole(ref) for ref in state_refs))
        for ref, leaf in zip(final_refs, final, strict=True):
            parts.put(ref, leaf)

    inputs = [*parts.inputs(), *parts.of_heads(state)]
    outputs = [parts.of_values(parts.y), *parts.of_heads(state), *(parts.of_chunks(parts.states) if save else [])]
    y, *states = _call(kernel, f"{op.name}_forward", inputs, outputs, parts.grid, block, interpret)
    return y, tuple(states[: len(state)]), tuple(states[len(state) :])


def _backward(op: Recurrence, problem: Problem, entries, gy, gfinal, interpret: bool):
    """Returns the cotangents of tokens, shared and state, where tokens come by row."""
    tokens, shared, state, marks = problem
    block = _sizes(op, problem).backward
    parts = _Parts(op, problem, block)

    def kernel(*refs):
        refs = iter(refs)
        token_refs, shared_refs = ([next(refs) for _ in group] for group in (tokens, shared))
        mark_ref = None if marks is None else next(refs)
        gy_ref, entry_refs, gfinal_refs = next(refs), [next(refs) for _ in state], [next(refs) for _ in state]
        gtoken_refs, gshared_refs, gstate_refs = ([next(refs) for _ in group] for group in (tokens, shared, state))
        weights = tuple(parts.whole(ref) for ref in shared_refs)

        def body(i, carry):
            gstate, gshared = carry
            i = parts.num_chunks - 1 - i
            step = partial(op.chunk, marks=parts.marks_of(mark_ref, i))
            entry = tuple(parts.whole(ref, i) for ref in entry_refs)
            _, pullback = jax.vjp(step, parts.chunk(token_refs, i), weights, entry)
            gchunk, gweights, gstate = pullback((parts.values_of(gy_ref, i), gstate))
            for ref, g in zip(gtoken_refs, gchunk, strict=True):
                parts.put_tokens(ref, i, g)
            return gstate, jax.tree.map(jnp.add, gshared, gweights)

        gfinal = tuple(parts.whole(ref) for ref in gfinal_refs)
        start = gfinal, jax.tree.map(jnp.zeros_like, weights)
        gentry, gshared = lax.fori_loop(0, parts.num_chunks, body, start)
        for ref, g in zip((*gshared_refs, *gstate_refs), (*gshared, *gentry), strict=True):
            parts.put(ref, g)

    inputs = [*parts.inputs(), parts.of_values(gy), *parts.of_chunks(entries), *parts.of_heads(gfinal)]
    outputs = [*parts.of_tokens(), *parts.of_programs(parts.sums), *parts.of_heads(state)]
    out = _call(kernel, f"{op.name}_backward", inputs, outputs, parts.grid, block, interpret)
    gtokens, gshared, gstate = out[: len(tokens)], out[len(tokens) : -len(state)], out[-len(state) :]
    return tuple(gtokens), tuple(g.sum((0, 2)) for g in gshared), tuple(gstate)


def _backward_state(op: Recurrence, problem: Problem, gy, gfinal, interpret: bool):
    """Returns the cotangents of the states at the chunks' ends, and of the state before the first."""
    tokens, shared, state, marks = problem
    block = _sizes(op, problem).backward
    parts = _Parts(op, problem, block)

    def kernel(*refs):
        refs = iter(refs)
        token_refs, shared_refs = ([next(refs) for _ in group] for group in (tokens, shared))
        mark_ref = None if marks is None else next(refs)
        gy_ref, gfinal_refs = next(refs), [next(refs) for _ in state]
        exit_refs, gstate_refs = ([next(refs) for _ in state] for _ in range(2))
        weights = tuple(parts.whole(ref) for ref in shared_refs)

        def body(i, gstate):
            i = parts.num_chunks - 1 - i
            for ref, g in zip(exit_refs, gstate, strict=True):
                parts.put(ref, g, i)
            step = parts.chunk_from(token_refs, shared_refs, weights, mark_ref, i)
            # A chunk is linear in the state before it: where it is pulled back makes no difference.
            _, pullback = jax.vjp(step, jax.tree.map(jnp.zeros_like, gstate))
            return pullback((parts.values_of(gy_ref, i), gstate))[0]

        gstate = lax.fori_loop(0, parts.num_chunks, body, tuple(parts.whole(ref) for ref in gfinal_refs))
        for ref, g in zip(gstate_refs, gstate, strict=True):
            parts.put(ref, g)

    inputs = [*parts.inputs(), parts.of_values(gy), *parts.of_heads(gfinal)]
    outputs = [*parts.of_chunks(parts.states), *parts.of_heads(state)]
    out = _call(kernel, f"{op.name}_backward_state", inputs, outputs, parts.grid, block, interpret)
    return tuple(out[: len(state)]), tuple(out[len(state) :])


def _backward_chunks(op: Recurrence, products: Products, problem: Problem, entries, exits, gy, interpret: bool):
    """Returns the cotangents of tokens and shared, from the states at the chunks' starts and the cotangents of those at their ends.

    All that a product is taken over comes in short pieces, of keys and of values, because its operands are in registers as a whole.
    """
    tokens, shared, _, marks = problem
    block = _sizes(op, problem).chunk
    assert block is not None, f"tuning.py has no sizes for the chunks of {op.name}"
    parts = _Parts(op, problem, block, at_once=True)

    def kernel(*refs):
        refs = iter(refs)
        token_refs, shared_refs = ([next(refs) for _ in group] for group in (tokens, shared))
        mark_ref = None if marks is None else next(refs)
        gy_ref, entry_ref, exit_ref = (next(refs) for _ in range(3))
        gtoken_refs, gshared_refs = ([next(refs) for _ in group] for group in (tokens, shared))
        v_ref, gv_ref = token_refs.pop(products.split), gtoken_refs.pop(products.split)
        marks_ = parts.marks_of(mark_ref, 0)
        ends, mix = masks(marks_), partial(products.mix, marks=marks_)

        keys_of = partial(parts.keys, token_refs, shared_refs, 0)

        def blocks_of(ref, p):
            return [ref[0, block, pl.ds(p * parts.piece, parts.piece)] for block in parts.blocks]

        def meet(p, sums):
            """Adds up the scores, what each block of values finds in the state, and the cotangent of what it writes."""
            scores, found, gwritten = sums
            own = products.factors(*keys_of(p))
            writes = [masked(ends.to_end, x) for x in own.writes]
            return (
                jax.tree.map(jnp.add, scores, own.scores),
                [_add(f, own.reads, x, (1, 1)) for f, x in zip(found, blocks_of(entry_ref, p), strict=True)],
                [_add(g, writes, x, (1, 1)) for g, x in zip(gwritten, blocks_of(exit_ref, p), strict=True)],
            )

        zeros = _zeros(products, keys_of)
        row = jnp.zeros((op.num_tokens, parts.values), parts.wide)
        found, gwritten = ([(row,) * len(x) for _ in parts.blocks] for x in (zeros.reads, zeros.writes))
        scores, found, gwritten = lax.fori_loop(0, parts.pieces, meet, (zeros.scores, found, gwritten))

        gscores, gfound, written = zeros.scores, [], []
        for block, f, g in zip(parts.blocks, found, gwritten, strict=True):
            f, v = tuple(masked(ends.from_start, x) for x in f), v_ref[:, block].astype(parts.wide)
            (_, x), pullback = jax.vjp(mix, scores, f, v)
            gscores_n, gf, gv = pullback((gy_ref[:, block].astype(parts.wide), g))
            gv_ref[:, block] = gv.astype(gv_ref.dtype)
            gscores = jax.tree.map(jnp.add, gscores, gscores_n)
            gfound.append([masked(ends.from_start, x) for x in gf])
            written.append(x)

        def pull_back(p, _):
            _, pullback = jax.vjp(products.factors, *keys_of(p))
            greads, gwrites, gkept = zeros.reads, zeros.writes, zeros.kept
            entries, exits = blocks_of(entry_ref, p), blocks_of(exit_ref, p)
            # In a loop of its own, since within the next it would spill registers.
            for entry, exit in zip(entries, exits, strict=True):
                gkept += (entry * exit).sum(0, keepdims=True)
            for gf, x, entry, exit in zip(gfound, written, entries, exits, strict=True):
                greads, gwrites = _add(greads, gf, entry), _add(gwrites, x, exit)
            gwrites = tuple(masked(ends.to_end, x) for x in gwrites)
            gtokens, gshared = pullback(Factors(greads, gwrites, masked(ends.through, gkept), gscores))
            for ref, g in zip((*gtoken_refs, *gshared_refs), (*gtokens, *gshared), strict=True):
                ref[:, pl.ds(p * parts.piece, parts.piece)] = g.astype(ref.dtype)

        lax.fori_loop(0, parts.pieces, pull_back, None)

    inputs = [*parts.inputs(), parts.of_values(gy), *parts.of_chunks(entries), *parts.of_chunks(exits)]
    outputs = [*parts.of_gradients(), *parts.of_programs(parts.sums)]
    out = _call(kernel, f"{op.name}_backward_chunks", inputs, outputs, parts.grid, block, interpret)
    return parts.summed(out[: len(tokens)]), tuple(g.sum((0, 2)) for g in out[len(tokens) :])


def _sizes(op: Recurrence, problem: Problem) -> Sizes:
    return sizes(op.name, problem.tokens[0].shape[3], dispatch.here().capability)


def _zeros(products: Products, keys: Any) -> Any:
    """Factors of zeros."""
    shapes = jax.eval_shape(products.factors, *jax.eval_shape(lambda: keys(0)))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _add(sums, rows, matrix, contract: tuple[int, int] = (1, 0)) -> tuple[Array, ...]:
    return tuple(x + dot(row, matrix, contract) for x, row in zip(sums, rows, strict=True))


class _Parts:
    """Which part of each array a program sees, and in what form.

    The grid is (B, H, N), N being blocks of value channels, each with all tokens, or, `at_once`, chunks, each with all key channels
    and, of the values, as many of a head's as registers hold: the programs of a chunk share its sums over values.
    """

    def __init__(self, op: Recurrence, problem: Problem, block: Block, *, at_once: bool = False):
        self.op, self.problem, self.at_once, self.wide = op, problem, at_once, problem.state[0].dtype
        batch_size, num_tokens, num_heads, keys = problem.tokens[0].shape
        self.y = problem.tokens[-1 if op.split is None else op.split]
        size = self.y.shape[3]
        self.values = size if op.split is None else min(size, block.values)
        self.piece = keys if op.by_row else min(block.key_piece, keys)
        self.num_chunks, self.pieces = num_tokens // op.num_tokens, keys // self.piece
        self.seen_chunks, self.seen_values = (
            (1, min(size, block.all_values)) if at_once else (self.num_chunks, self.values)
        )
        self.blocks = [pl.ds(at, self.values) for at in range(0, self.seen_values, self.values)]
        self.programs = size // self.seen_values
        self.grid = (batch_size, num_heads, self.programs * self.num_chunks // self.seen_chunks)
        self.states = [
            jax.ShapeDtypeStruct((*x.shape[:2], self.num_chunks, *x.shape[2:]), x.dtype) for x in problem.state
        ]
        self.sums = [jax.ShapeDtypeStruct((*self.grid, *x.shape[1:]), x.dtype) for x in problem.shared]

    def inputs(self) -> list[Any]:
        """What every kernel sees: tokens, shared and marks."""
        shared = [(x, pl.BlockSpec((None, 1, x.shape[2]), lambda b, h, n: (h, 0, 0))) for x in self.problem.shared]
        seen = pl.BlockSpec((None, self.seen_chunks * self.op.num_tokens), lambda b, h, n: (b, self.time(n)))
        return [*self.of_tokens(), *shared, *([] if self.problem.marks is None else [(self.problem.marks, seen)])]

    def of_tokens(self) -> list[Any]:
        """The arrays of tokens [B, T, H, X]."""
        size = self.seen_chunks * self.op.num_tokens
        return [
            self.of_values(x)
            if i == self.op.split
            else (x, pl.BlockSpec((None, size, None, x.shape[3]), lambda b, h, n: (b, self.time(n), h, 0)))
            for i, x in enumerate(self.problem.tokens)
        ]

    def of_gradients(self) -> list[Any]:
        """The arrays of their gradients; where programs share a sum, each has a batch of its own, in the state's dtype."""
        if self.programs == 1:
            return self.of_tokens()
        size, batch_size = self.seen_chunks * self.op.num_tokens, self.grid[0]
        return [
            (x, spec)
            if i == self.op.split
            else (
                jax.ShapeDtypeStruct((self.programs * batch_size, *x.shape[1:]), self.wide),
                pl.BlockSpec(
                    (None, size, None, x.shape[3]), lambda b, h, n: (self.value(n) * batch_size + b, self.time(n), h, 0)
                ),
            )
            for i, (x, spec) in enumerate(self.of_tokens())
        ]

    def summed(self, gradients: Any) -> tuple[Array, ...]:
        """The gradients of tokens, from what the kernel gives in the arrays of `of_gradients`."""
        if self.programs == 1:
            return tuple(gradients)
        return tuple(
            g if i == self.op.split else g.reshape(self.programs, *x.shape).sum(0).astype(x.dtype)
            for i, (g, x) in enumerate(zip(gradients, self.problem.tokens, strict=True))
        )

    def of_values(self, x: Array) -> Any:
        """An array [B, T, H, V]."""
        block = (None, self.seen_chunks * self.op.num_tokens, None, self.seen_values)
        return x, pl.BlockSpec(block, lambda b, h, n: (b, self.time(n), h, self.value(n)))

    def of_heads(self, arrays: Any) -> list[Any]:
        """Arrays [B, H, 1, X] or [B, H, V, K], for all of time."""
        rows = 1 if self.op.split is None else self.seen_values
        return [
            (x, pl.BlockSpec((None, None, rows, x.shape[3]), lambda b, h, n: (b, h, self.value(n), 0))) for x in arrays
        ]

    def of_chunks(self, arrays: Any) -> list[Any]:
        """The same, one a chunk: [B, H, chunks, 1, X] or [B, H, chunks, V, K]."""
        rows = 1 if self.op.split is None else self.seen_values
        block = (None, None, self.seen_chunks, rows)
        return [
            (x, pl.BlockSpec((*block, x.shape[4]), lambda b, h, n: (b, h, self.time(n), self.value(n), 0)))
            for x in arrays
        ]

    def of_programs(self, arrays: Any) -> list[Any]:
        """Arrays [B, H, N, 1, X], one a program."""
        return [(x, pl.BlockSpec((None, None, None, 1, x.shape[4]), lambda b, h, n: (b, h, n, 0, 0))) for x in arrays]

    def time(self, n: Any) -> Any:
        return n // self.programs if self.at_once else 0

    def value(self, n: Any) -> Any:
        return n % self.programs if self.at_once else n

    def chunk_from(self, token_refs: list[Any], shared_refs: list[Any], weights: Any, mark_ref: Any, i: Any) -> Any:
        """The i-th chunk as a function of the state before it."""
        marks, products = self.marks_of(mark_ref, i), self.op.products
        if products is None:
            tokens = self.chunk(token_refs, i)
            return lambda state: self.op.chunk(tokens, weights, state, marks)
        keys = partial(self.keys, [ref for n, ref in enumerate(token_refs) if n != products.split], shared_refs, i)

        # In a loop, since unrolled it would take more registers than there are.
        def add(p: Any, sums: Any) -> Any:
            return jax.tree.map(jnp.add, sums, products.factors(*keys(p)).scores)

        scores = lax.fori_loop(0, self.pieces, add, _zeros(products, keys).scores)
        tokens = self.chunk(token_refs, i)  # Here, because registers would hold them through the loop.
        return lambda state: self.op.chunk(tokens, weights, state, marks, scores)

    def keys(self, token_refs: list[Any], shared_refs: list[Any], i: Any, p: Any) -> Any:
        """What `factors` takes of the i-th chunk and the p-th piece of key channels."""
        at = pl.ds(p * self.piece, self.piece)
        tokens = tuple(ref[self._tokens(i), at].astype(self.wide) for ref in token_refs)
        return tokens, tuple(ref[:, at] for ref in shared_refs)

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


def _call(kernel, name, inputs, outputs, grid, block, interpret):
    """Runs a kernel on pairs of an array and the part of it that a program sees."""
    params: dict[str, Any] = {"interpret": interpret}
    if not interpret:
        from jax.experimental.pallas import triton

        params |= {"compiler_params": triton.CompilerParams(num_warps=block.warps, num_stages=1)}
    call = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        name=name,
        **params,
    )
    return call(*(x for x, _ in inputs))
