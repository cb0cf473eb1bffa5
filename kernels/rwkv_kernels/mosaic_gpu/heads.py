"""Kernels of recurrences whose state is a matrix a head, such as wkv7's: token by token, with some rows of the state in registers.

They compute what an op's `step.py` says of a token. A chunk's tokens come into shared memory at once, and what is made of them leaves
it so. The backward kernel walks a chunk forward first, and keeps the state before every fourth token in shared memory; from there it
walks up to three tokens again, to the state before the one whose turn it is. Nothing is inverted, so that nothing is lost to rounding.

Of a wide head a program has half as many rows, because the backward kernel holds two matrices of them in registers, and there the
tokens come by four, because a chunk of them does not fit in shared memory beside the states that are kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..recurrence import Problem, Recurrence, pad_channels, starts_of
from .call import call, like, lying

_PIECE = 32
"""Key channels of a matrix that are worked on at a time, beside the state's other pieces: threads have registers for no more."""
_GROUP = 4
"""Tokens between two states that the backward kernel keeps of a chunk: of 16 it keeps four, and with heads of 128 no more fit."""


class _Hold(NamedTuple):
    """How a program holds its part of a head."""

    rows: int
    """Value channels."""
    layout: Any
    """How the threads hold a matrix in registers."""
    swizzle: int
    """Bytes of a matrix's row that lie together in shared memory, where threads can then read and write that layout at once."""
    by_group: bool
    """Whether the backward kernel has a group of tokens in shared memory, rather than a chunk."""


_NARROW = _Hold(64, plgpu.Layout.WGMMA, swizzle=128, by_group=False)
"""For heads of up to 128 keys: as in a product by wgmma a warp has 16 rows, and all keys."""
_WIDE = _Hold(
    32,
    plgpu.Layout.TILED(plgpu.Tiling(((32, _PIECE), (8, 8), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1),
    swizzle=32,
    by_group=True,
)
"""For others: a warp has all rows, and a quarter of a piece's keys, so that what is summed over values stays within it."""


def _hold(keys: int) -> _Hold:
    return _NARROW if keys <= 128 else _WIDE


def run(op: Recurrence, problem: Problem, walk: Any) -> tuple[Array, tuple[Array, ...]]:
    """Returns walk(problem), with the value channels padded to whole programs."""
    (state,) = problem.state
    values = state.shape[2]
    rows = _hold(state.shape[3]).rows
    padded = -(-values // rows) * rows
    tokens = tuple(pad_channels(x, 3, padded) if i == op.split else x for i, x in enumerate(problem.tokens))
    starts = None if problem.marks is None else starts_of(problem.marks, op.num_tokens)
    y, (final,) = walk(Problem(tokens, (), (pad_channels(state, 2, padded),), starts))
    return y[..., :values], (final[:, :, :values],)


def forward(op: Recurrence, problem: Problem, interpret: bool, *, save: bool) -> tuple[Array, tuple, tuple]:
    """Returns y, the state after it, and, to `save`, the states at the chunks' starts [B, H, N, V, K]."""
    tile = _Tile(op, problem, interpret)

    def kernel(inputs, outputs, scratch):
        y_ref, final_ref, entry_refs = outputs
        token_parts, y_part, start, loaded, start_loaded = scratch
        b, h, rows = tile.place()
        plgpu.copy_gmem_to_smem(inputs.state[0].at[b, h, rows], start, start_loaded)
        plgpu.barrier_wait(start_loaded)

        def body(i, state):
            tile.load(inputs.tokens, token_parts, i, loaded)
            for ref in entry_refs:
                tile.put(ref, state, b, h, i, rows)

            def token(t, state):
                state = tile.cut(inputs.marks, i, t, state)
                y, state = tile.step.forward(tile.numbers(token_parts, t), state, tile.spread)
                y_part[t] = y.astype(y_part.dtype)
                return state

            state = lax.fori_loop(0, op.num_tokens, token, state)
            tile.store([y_part], [y_ref], [True], i)
            return state

        tile.put(final_ref, lax.fori_loop(0, tile.num_chunks, body, tile.whole(start)), b, h, rows)

    (state,), v = problem.state, problem.tokens[tile.split]
    entries = (
        (jax.ShapeDtypeStruct((*state.shape[:2], tile.num_chunks, *state.shape[2:]), state.dtype),) if save else ()
    )
    scratch = (
        tile.parts(problem.tokens, tile.by_row, op.num_tokens), *tile.parts([v], [True], op.num_tokens), tile.matrix(),
        plgpu.Barrier(num_arrivals=len(problem.tokens)), plgpu.Barrier(),
    )  # fmt: skip
    y, final, entries = call(
        kernel, f"{op.name}_forward", problem, (like(v), like(state), entries), tile.grid, interpret, scratch
    )
    return y, (final,), entries


def backward(
    op: Recurrence, problem: Problem, entries: tuple[Array, ...], gy: Array, gfinal: tuple[Array, ...], interpret: bool
) -> tuple[tuple, tuple, tuple]:
    """Returns the cotangents of tokens, shared and state."""
    tile = _Tile(op, problem, interpret)
    groups = op.num_tokens // _GROUP
    by_group = tile.hold.by_group
    at_once = _GROUP if by_group else op.num_tokens

    def kernel(inputs, outputs, scratch):
        problem, (entry_ref,), gy_ref, (gfinal_ref,) = inputs
        gtoken_refs, gstate_ref = outputs
        token_parts, gy_part, gtoken_parts, kept, loaded, entry_loaded = scratch
        b, h, rows = tile.place()

        def load(ref):
            plgpu.copy_gmem_to_smem(ref, kept.at[0], entry_loaded)
            plgpu.barrier_wait(entry_loaded)
            return tile.whole(kept, 0)

        def body(i, gstate):
            i = tile.num_chunks - 1 - i

            def fetch(part):
                tile.load((*problem.tokens, gy_ref), (*token_parts, gy_part), part, loaded)

            def place(j, n):
                """A token's place in the chunk, and in shared memory."""
                t = j * _GROUP + n
                return t, n if by_group else t

            def step(j, n, state):
                t, at = place(j, n)
                state = tile.cut(problem.marks, i, t, state)
                return tile.step.forward(tile.numbers(token_parts, at), state, tile.spread)[1]

            def keep(j, state):
                if by_group:
                    fetch(i * groups + j)
                for n in range(_GROUP):
                    state = step(j, n, state)
                tile.put(kept, state, j + 1)
                return state

            def pull(j, gstate):
                j = groups - 1 - j
                if by_group:
                    fetch(i * groups + j)
                for n in reversed(range(_GROUP)):
                    state, (t, at) = tile.whole(kept, j), place(j, n)
                    for earlier in range(n):
                        state = step(j, earlier, state)
                    state = tile.cut(problem.marks, i, t, state)
                    gy = tile.value(gy_part, at)
                    token, put = tile.numbers(token_parts, at), tile.writer(gtoken_parts, at)
                    gstate = tile.step.backward(token, state, gy, gstate, tile.spread, put)
                    gstate = tile.cut(problem.marks, i, t, gstate)
                if by_group:
                    tile.store(gtoken_parts, gtoken_refs, tile.by_row, i * groups + j)
                return gstate

            if not by_group:
                fetch(i)
            lax.fori_loop(0, groups - 1, keep, load(entry_ref.at[b, h, i, rows]))
            gstate = lax.fori_loop(0, groups, pull, gstate)
            if not by_group:
                tile.store(gtoken_parts, gtoken_refs, tile.by_row, i)
            return gstate

        gstate = lax.fori_loop(0, tile.num_chunks, body, load(gfinal_ref.at[b, h, rows]))
        tile.put(gstate_ref, gstate, b, h, rows)

    (state,) = problem.state
    # What is not a value is summed over the programs of a head.
    gtokens = tuple(
        like(x) if tile.alone(by_row) else jax.ShapeDtypeStruct((tile.programs * x.shape[0], *x.shape[1:]), state.dtype)
        for x, by_row in zip(problem.tokens, tile.by_row, strict=True)
    )
    scratch = (
        tile.parts(problem.tokens, tile.by_row, at_once), *tile.parts([gy], [True], at_once),
        tile.parts(gtokens, tile.by_row, at_once), tile.matrix(groups),
        plgpu.Barrier(num_arrivals=len(problem.tokens) + 1), plgpu.Barrier(),
    )  # fmt: skip
    gtokens, gstate = call(
        kernel,
        f"{op.name}_backward",
        (problem, entries, gy, gfinal),
        (gtokens, like(state)),
        tile.grid,
        interpret,
        scratch,
    )
    gtokens = tuple(
        g if tile.alone(by_row) else g.reshape(tile.programs, *x.shape).sum(0).astype(x.dtype)
        for g, by_row, x in zip(gtokens, tile.by_row, problem.tokens, strict=True)
    )
    return gtokens, (), (gstate,)


class _Tile:
    """A program's part of the arrays, and how its threads hold it; the grid is (B, H, programs of a head)."""

    def __init__(self, op: Recurrence, problem: Problem, interpret: bool):
        assert op.step is not None and op.split is not None
        self.op, self.step, self.split, self.interpret = op, op.step, op.split, interpret
        (state,) = problem.state
        self.batch_size, num_heads, values, self.keys = state.shape
        self.wide, self.num_chunks = state.dtype, problem.tokens[0].shape[1] // op.num_tokens
        self.hold = _hold(self.keys)
        self.rows, self.programs = self.hold.rows, values // self.hold.rows
        self.piece = min(self.keys, _PIECE)
        self.pieces = [pl.ds(at, self.piece) for at in range(0, self.keys, self.piece)]
        self.by_row = [i == op.split for i in range(len(problem.tokens))]
        self.grid = {"b": self.batch_size, "h": num_heads, "n": self.programs}

    def alone(self, by_row: bool) -> bool:
        """Whether no other program has gradients of the same numbers of tokens, which may be values."""
        return by_row or self.programs == 1

    def place(self) -> tuple[Any, Any, Any]:
        """Row of the batch, head, and value channels."""
        return lax.axis_index("b"), lax.axis_index("h"), pl.ds(lax.axis_index("n") * self.rows, self.rows)

    def load(self, refs: Sequence[Any], parts: Sequence[Any], i: Any, loaded: Any) -> None:
        """Fetches the i-th part of the tokens, and, after them, of what is like values."""
        by_row = [*self.by_row, *[True] * (len(refs) - len(self.by_row))]
        for ref, part, rows in zip(refs, parts, by_row, strict=True):
            plgpu.copy_gmem_to_smem(self._part(ref, part, i, rows), part, loaded)
        plgpu.barrier_wait(loaded)

    def store(self, parts: Sequence[Any], refs: Sequence[Any], by_row: Sequence[bool], i: Any) -> None:
        """Writes the i-th part."""
        plgpu.commit_smem()
        for part, ref, rows in zip(parts, refs, by_row, strict=True):
            plgpu.copy_smem_to_gmem(part, self._part(ref, part, i, rows))
        plgpu.wait_smem_to_gmem(0)

    def _part(self, ref: Any, part: Any, i: Any, by_row: bool) -> Any:
        b, h, rows = self.place()
        if ref.shape[0] != self.batch_size:  # Every program of a head has a batch of its own.
            b += lax.axis_index("n") * self.batch_size
        tokens = pl.ds(i * part.shape[0], part.shape[0])
        return ref.at[b, tokens, h, rows] if by_row else ref.at[b, tokens, h]

    def hint(self, x: Any, *summed: int) -> Any:
        """Says how threads hold x: as they do a matrix, or what is left of one after a sum over an axis."""
        layout = self.hold.layout
        return lying(x, layout.reduce(*summed) if summed else layout, self.interpret)

    def whole(self, ref: Any, *at: Any) -> tuple[Any, ...]:
        """A matrix, in pieces."""
        return tuple(self.hint(ref[(*at, slice(None), piece)]) for piece in self.pieces)

    def put(self, ref: Any, matrix: tuple[Any, ...], *at: Any) -> None:
        """The reverse of `whole`; `at` ends with the rows where the reference has more."""
        for piece, x in zip(self.pieces, matrix, strict=True):
            ref[(*at, *[slice(None)] * (len(ref.shape) - len(at) - 1), piece)] = x

    def spread(self, x: Any, axis: int = 0) -> Any:
        """x [V], or, for axis 1, [P], as [V, P]."""
        return self.hint(lax.broadcast_in_dim(x, (self.rows, self.piece), (axis,)))

    def value(self, part: Any, t: Any) -> Any:
        """One token's values, spread."""
        return self.spread(self.hint(part[t], 1).astype(self.wide))

    def numbers(self, parts: Sequence[Any], t: Any) -> Callable[..., Any]:
        """Reads one token's numbers from an array, spread over a piece."""

        def token(i: int, p: int = 0) -> Any:
            if self.by_row[i]:
                return self.value(parts[i], t)
            return self.spread(self.hint(parts[i][t, self.pieces[p]], 0).astype(self.wide), 1)

        return token

    def writer(self, parts: Sequence[Any], t: Any) -> Callable[..., None]:
        """Writes what one token has in an array, or a piece of it."""

        def put(i: int, x: Any, p: int = 0) -> None:
            at = t if self.by_row[i] else (t, self.pieces[p])
            parts[i][at] = x.astype(parts[i].dtype)

        return put

    def cut(self, starts: Any, i: Any, t: Any, matrix: tuple[Any, ...]) -> tuple[Any, ...]:
        """The state before a token, or its cotangent: 0 where a sequence starts."""
        if starts is None:
            return matrix
        start = starts[lax.axis_index("b"), i * self.op.num_tokens + t] != 0
        return tuple(jnp.where(start, 0.0, x) for x in matrix)

    def parts(self, arrays: Sequence[Any], by_row: Sequence[bool], at_once: int) -> list[Any]:
        """Shared memory for as many tokens of arrays as are there at once."""
        return [
            plgpu.SMEM((at_once, self.rows if rows else self.keys), x.dtype)
            for x, rows in zip(arrays, by_row, strict=True)
        ]

    def matrix(self, *count: int) -> Any:
        """Shared memory for states."""
        size = jnp.dtype(self.wide).itemsize
        swizzle = min(self.hold.swizzle, self.keys * size)
        transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
        return plgpu.SMEM((*count, self.rows, self.keys), self.wide, transforms=transforms)
