"""What the kernels of all ops have in common: a recurrence over chunks of tokens, whose chunk is a function of arrays.

An op's `chunk.py` gives the mathematics of one chunk of one head; `pallas_gpu.py` and `pallas_tpu.py` walk the chunks with it and
derive the backward walk from it: from the states stored at the chunks' starts, last to first, each chunk is computed again and
pulled back (`jax.vjp`, inside the kernel).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


class Step(NamedTuple):
    """One token of one head, whose state is a tuple of pieces [V, P] of its key channels.

    `token(i, p)` gives the token's numbers from the i-th array, spread over the p-th piece; of values, `token(i)`, the same in all.
    `spread(x)` does that with a sum over key channels, [V].
    """

    forward: Callable[..., Any]
    """forward(token, state, spread) -> (y [V], state after the token)."""
    backward: Callable[..., Any]
    """backward(token, state before the token, gy, gstate after it, spread, put) -> gstate before it.

    `put(i, g, p)` takes the cotangent of the token's numbers from the i-th array, the p-th piece [P]; of values, `put(i, g)`, [V].
    """


class Recurrence(NamedTuple):
    """An op, as its kernels see it: heads with a token of X numbers from each of several arrays, and a state."""

    name: str
    chunk: Callable[..., Any]
    """chunk(tokens, shared, state, marks) -> (y, state) of one head, in the state's dtype.

    With `by_row`, an array of tokens, y and marks are tuples of C rows [1, X] (marks: scalars or [1, 1]); shared and state are
    [1, X]. Else v and y are [C, V], marks are both [C, 1] and [1, C], and key channels come in pieces, so that products of matrices
    are small: tuples of [C, P] for every other array of tokens, of [1, P] for a shared one, of [V, P] for the state.
    """
    num_tokens: int
    """C, the tokens in a chunk."""
    by_row: bool
    """Whether a chunk is handed over token by token, because its tokens depend on each other."""
    split: int | None
    """Which array of tokens has value channels, which the rows of the state and y share and which do not mix; None: none."""
    products: "Products | None" = None
    """What its chunk is made of, if it is `of_products`."""
    step: Step | None = None
    """One token of an op whose state is a matrix, for kernels that hold it in registers."""


class Problem(NamedTuple):
    """Arrays that a kernel works on, cut into whole chunks: all that an op's own wrapper does not change any more."""

    tokens: tuple[Array, ...]
    """[B, T, H, X] each."""
    shared: tuple[Array, ...]
    """[H, 1, X] each."""
    state: tuple[Array, ...]
    """[B, H, 1, X] or [B, H, V, K] each."""
    marks: Array | None
    """int32 [B, T], what the op's chunk makes of them: where sequences start and which tokens count."""


def pad_tokens(x: Array, multiple: int, value: Any = 0) -> Array:
    """Returns x [B, T, ...] with T padded to a multiple."""
    padding = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)], constant_values=value) if padding else x


def pad_channels(x: Array, axis: int, size: int) -> Array:
    """Returns x with one axis padded with zeros to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return x if size == x.shape[axis] else jnp.pad(x, widths)


def sequence_of(reset: Array, num_tokens: int) -> Int[Array, "B T"]:
    """Returns how many sequences have started in its chunk at each token, T being whole chunks of `num_tokens`."""
    chunks = reset.reshape(reset.shape[0], -1, num_tokens)
    return jnp.cumsum(chunks.astype(jnp.int32), -1).reshape(reset.shape)


def starts_of(sequence: Array, num_tokens: int) -> Int[Array, "B T"]:
    """Returns the reverse of `sequence_of`: 1 where a sequence starts."""
    chunks = sequence.reshape(sequence.shape[0], -1, num_tokens)
    return jnp.diff(chunks, axis=-1, prepend=0).reshape(sequence.shape)


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Returns the product of two matrices over an axis of each, without rounding to fewer digits."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype)


class Factors(NamedTuple):
    """What a piece of P key channels contributes to a chunk."""

    reads: tuple[Array, ...]
    """What tokens read from the state before the chunk with, [C, P] each."""
    writes: tuple[Array, ...]
    """What carries to the state what `mix` makes of the values, [C, P] each."""
    kept: Array
    """What the state before the chunk is multiplied by, [1, P]."""
    scores: tuple[Array, ...]
    """Sums over the piece's channels for pairs of tokens, [C, C], or for each token alone, [C, 1]."""


class Masks(NamedTuple):
    """Which tokens see the states at a chunk's ends, where there are resets; else None."""

    from_start: Array | None
    """Those before the chunk's first reset [C, 1]."""
    to_end: Array | None
    """Those after its last [C, 1]."""
    through: Array | None
    """Whether there is none."""


def masks(marks: Any) -> Masks:
    """Returns the masks of a chunk's marks, which count its sequences."""
    if marks is None:
        return Masks(None, None, None)
    sequence, _ = marks
    end = sequence.max()
    return Masks(sequence == 0, sequence == end, end == 0)


def masked(mask: Array | None, x: Array) -> Array:
    """Returns x, and 0 where a mask is False."""
    return x if mask is None else jnp.where(mask, x, 0)


class Products(NamedTuple):
    """A chunk that meets its state S in products of matrices only, as two functions.

    found = reads S^T      y, written = mix(scores, found, v)      S <- kept S + written^T writes
    """

    factors: Callable[..., Factors]
    """factors(tokens, shared) -> Factors, of a piece of key channels: [C, P] and [1, P] each."""
    mix: Callable[..., Any]
    """mix(scores, found, v, marks) -> (y, written), of a block of values: v, y and each of found and written [C, V]."""
    split: int
    """Which array of tokens is v."""


def of_products(name: str, products: Products, *, num_tokens: int, step: Step | None = None) -> Recurrence:
    """Returns the recurrence whose chunk two functions make; its chunk also takes the scores, if they have been summed before.

    Args:
        name: Of the op.
        products: The functions.
        num_tokens: C.
        step: As in `Recurrence`.
    """
    factors, mix, split = products

    def chunk(tokens, shared, state, marks, scores=None):
        keys, ends = (*tokens[:split], *tokens[split + 1 :]), masks(marks)
        summed, found, left = None, None, []
        for *own, state_p in zip(*keys, *shared, *state, strict=True):
            reads, writes, kept, scores_p = factors(tuple(own[: len(keys)]), tuple(own[len(keys) :]))
            summed, found = _plus(summed, scores_p), _plus(found, tuple(dot(x, state_p, (1, 1)) for x in reads))
            left.append((masked(ends.through, kept * state_p), [masked(ends.to_end, x) for x in writes]))
        found = tuple(masked(ends.from_start, x) for x in found or ())
        y, written = mix(summed if scores is None else scores, found, tokens[split], marks)
        new = (sum((dot(x, g, (0, 0)) for x, g in zip(written, writes, strict=True)), start) for start, writes in left)
        return y, (tuple(new),)

    return Recurrence(name, chunk, num_tokens, by_row=False, split=split, step=step, products=products)


def _plus(total: Any, more: Any) -> Any:
    return more if total is None else jax.tree.map(jnp.add, total, more)


class Grid(NamedTuple):
    """The row and the column of each element of a [C, C] matrix of pairs of tokens."""

    row: Int[Array, "C C"]
    column: Int[Array, "C C"]

    def pairs(self, level: int) -> Bool[Array, "C C"]:
        """Tokens in the right of two neighbouring blocks of 2^level tokens that one block of twice the size holds, with the left's."""
        return ((self.row >> level) & 1 == 1) & ((self.row >> level) - 1 == self.column >> level)


def grid(size: int) -> Grid:
    """Returns the grid of C = size tokens."""
    return Grid(*(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)))


Run = Callable[[Recurrence, Problem], tuple[Array, tuple[Array, ...]]]
"""Runs a recurrence: y [B, T, H, V] in the dtype of the tokens, and the state after it."""
