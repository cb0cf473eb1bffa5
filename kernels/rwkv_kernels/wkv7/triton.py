"""RWKV-7's WKV operator as Triton kernels, which take a chunk's key channels in pieces.

The mathematics, both ways, is that of `parallel.py`, with the state [V, K]: A, R, B and K are the rows that a, r, b and k become in a
chunk, and the names of products say of which. A product's operands are in registers as a whole, so all keys at once would spill.

Forward, a program walks the chunks of a head, or of a block of its value channels, and stores the state at each chunk's start.
Back, one kernel walks from the last chunk to the first with the state's cotangent alone, and stores it at each chunk's end;
another pulls back all chunks side by side, each from the two at its ends.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Triton need not be installed where types are checked; without it, its name is that of this file.

from collections.abc import Sequence
from typing import no_type_check

import jax
import triton
import triton.language as tl
from jaxtyping import Array

from ..recurrence import Problem
from ..triton_gpu import Kernels, Launch, Launcher
from ..tuning import Block, Sizes, sizes
from .chunk import RECURRENCE

_LEVELS = tl.constexpr(RECURRENCE.num_tokens.bit_length() - 1)
"""How often blocks of a chunk's tokens double in size."""


def _forward(launcher: Launcher, problem: Problem, save: bool) -> tuple[Array, ...]:
    tokens, _, (state,), marks = problem
    block = _sizes(problem).forward
    constants = _constants(problem, block)
    entries = _each_chunk(problem) if save else jax.ShapeDtypeStruct((1,), state.dtype)
    inputs = (*tokens, state, tokens[0] if marks is None else marks)
    grid, constants = _by_value(problem, constants), constants | {"SAVE": save}
    return launcher(
        Launch(_forward_kernel, grid, inputs, (_like(tokens[3]), _like(state), entries), constants, block.warps)
    )


def _backward(
    launcher: Launcher, problem: Problem, entries: Sequence[Array], gy: Array, gstate: Sequence[Array]
) -> tuple[Array, ...]:
    (r, w, _, _, a, b), _, (state,), marks = problem
    marks = r if marks is None else marks
    cuts = _sizes(problem)
    constants = _constants(problem, cuts.backward)
    exits, gstart = launcher(
        Launch(
            _backward_state_kernel, _by_value(problem, constants), (r, w, a, b, marks, gy, *gstate),
            (_each_chunk(problem), _like(state)), constants, cuts.backward.warps,
        )
    )  # fmt: skip
    assert cuts.chunk is not None
    constants = _constants(problem, cuts.chunk)
    chunks = state.shape[0] * state.shape[1] * constants["N"], 1, 1
    gtokens = launcher(
        Launch(
            _backward_chunks_kernel, chunks, (*problem.tokens, marks, *entries, exits, gy),
            tuple(_like(x) for x in problem.tokens), constants, cuts.chunk.warps,
        )
    )  # fmt: skip
    return *gtokens, gstart


KERNELS = Kernels(_forward, _backward)


def _sizes(problem: Problem) -> Sizes:
    """The cuts; what a kernel holds of all values or of all keys counts, whichever are more."""
    return sizes("wkv7_triton", max(problem.state[0].shape[2:]))


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _each_chunk(problem: Problem) -> jax.ShapeDtypeStruct:
    """States at one end of every chunk."""
    (state,) = problem.state
    num_chunks = problem.tokens[0].shape[1] // RECURRENCE.num_tokens
    return jax.ShapeDtypeStruct((*state.shape[:2], num_chunks, *state.shape[2:]), state.dtype)


def _by_value(problem: Problem, constants: dict[str, int | bool]) -> tuple[int, int, int]:
    """A program for every head and block of its value channels."""
    batch_size, _, num_heads, _ = problem.tokens[0].shape
    return batch_size * num_heads * (constants["V"] // constants["PART"]), 1, 1  # The other axes end at 65535.


def _constants(problem: Problem, block: Block) -> dict[str, int | bool]:
    _, num_tokens, num_heads, keys = problem.tokens[0].shape
    values, size = problem.tokens[3].shape[3], RECURRENCE.num_tokens
    return {
        "N": num_tokens // size, "C": size, "H": num_heads, "K": keys, "V": values, "PIECE": min(keys, block.key_piece),
        "PART": min(values, block.values), "MARKED": problem.marks is not None,
    }  # fmt: skip


@triton.jit
@no_type_check
def _forward_kernel(
    r, w, k, v, a, b, state, marks, y, state_end, state_at,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PIECE: tl.constexpr,
    PART: tl.constexpr, MARKED: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    part, head, row = _program(H, V // PART)
    matrix = part * PART * K + _places(PART, PIECE, K)
    states = _load_pieces(state + (row * H + head) * V * K + matrix, K, PIECE)
    for n in range(N):
        if SAVE:
            _store_pieces(state_at + ((row * H + head) * N + n) * V * K + matrix, states, PIECE)
        start = (row * N + n) * C * H + head
        at_k, at_v = start * K + _places(C, PIECE, H * K), start * V + part * PART + _places(C, PART, H * V)
        sequence, earlier, present = _masks(marks + (row * N + n) * C, C, MARKED)
        end = tl.max(sequence, 0)
        zeros, found = tl.zeros([C, C], tl.float32), tl.zeros([C, PART], tl.float32)
        ab, ak, rb, rk, read = zeros, zeros, zeros, zeros, found
        writes = ()
        for p in tl.static_range(K // PIECE):
            at = at_k + p * PIECE
            a_cp, r_cp, b_cp, k_cp, _, _, _, decay = _factors(r + at, w + at, k + at, a + at, b + at)
            ab, ak, rb, rk = _scores(ab, ak, rb, rk, a_cp, r_cp, b_cp, k_cp)
            found += _dot(a_cp, states[p].T)
            read += _dot(r_cp, states[p].T)
            writes += ((b_cp, k_cp, decay),)
        v_cv = tl.load(v + at_v).to(tl.float32)
        inverse = _inverse(tl.where(earlier, ab, 0.0))
        u_cv = _dot(inverse, _masked(sequence == 0, found) + _dot(tl.where(earlier, ak, 0.0), v_cv))
        y_cv = (
            _masked(sequence == 0, read)
            + _dot(tl.where(present, rb, 0.0), u_cv)
            + _dot(tl.where(present, rk, 0.0), v_cv)
        )
        tl.store(y + at_v, y_cv.to(y.dtype.element_ty))
        u_cv, v_cv = _masked(sequence == end, u_cv), _masked(sequence == end, v_cv)
        ends = ()
        for p in tl.static_range(K // PIECE):
            b_cp, k_cp, decay = writes[p]
            end_vp = tl.where(end == 0, states[p], 0.0) + _dot(u_cv.T, b_cp) + _dot(v_cv.T, k_cp)
            ends += (end_vp * decay[None, :],)
        states = ends
    _store_pieces(state_end + (row * H + head) * V * K + matrix, states, PIECE)


@triton.jit
@no_type_check
def _backward_state_kernel(
    r, w, a, b, marks, gy, gstate_end, gstate_at, gstate,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PIECE: tl.constexpr,
    PART: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    part, head, row = _program(H, V // PART)
    matrix = part * PART * K + _places(PART, PIECE, K)
    gstates = _load_pieces(gstate_end + (row * H + head) * V * K + matrix, K, PIECE)
    for i in range(N):
        n = N - 1 - i
        _store_pieces(gstate_at + ((row * H + head) * N + n) * V * K + matrix, gstates, PIECE)
        start = (row * N + n) * C * H + head
        at_k, at_v = start * K + _places(C, PIECE, H * K), start * V + part * PART + _places(C, PART, H * V)
        sequence, earlier, present = _masks(marks + (row * N + n) * C, C, MARKED)
        end = tl.max(sequence, 0)
        ab, rb, gu_cv = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C, PART], tl.float32)
        for p in tl.static_range(K // PIECE):
            at = at_k + p * PIECE
            # The state's cotangent has no need of k: here and below b stands in.
            a_cp, r_cp, b_cp, _, _, _, _, decay = _factors(r + at, w + at, b + at, a + at, b + at)
            ab += _dot(a_cp, b_cp.T)
            rb += _dot(r_cp, b_cp.T)
            gu_cv += _dot(b_cp, (gstates[p] * decay[None, :]).T)
        gy_cv = tl.load(gy + at_v).to(tl.float32)
        gu_cv = _masked(sequence == end, gu_cv) + _dot(tl.where(present, rb, 0.0).T, gy_cv)
        gfound = _masked(sequence == 0, _dot(_inverse(tl.where(earlier, ab, 0.0)).T, gu_cv))
        gy_cv = _masked(sequence == 0, gy_cv)
        starts = ()
        for p in tl.static_range(K // PIECE):
            at = at_k + p * PIECE
            a_cp, r_cp, _, _, _, _, _, decay = _factors(r + at, w + at, b + at, a + at, b + at)
            through = tl.where(end == 0, gstates[p] * decay[None, :], 0.0)
            starts += (through + _dot(gfound.T, a_cp) + _dot(gy_cv.T, r_cp),)
        gstates = starts
    _store_pieces(gstate + (row * H + head) * V * K + matrix, gstates, PIECE)


@triton.jit
@no_type_check
def _backward_chunks_kernel(
    r, w, k, v, a, b, marks, state_at, gstate_at, gy, gr, gw, gk, gv, ga, gb,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PIECE: tl.constexpr,
    PART: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n, head, row = program % N, program // N % H, (program // N // H).to(tl.int64)
    start, matrix = (row * N + n) * C * H + head, ((row * H + head) * N + n) * V * K + _places(PART, PIECE, K)
    at_k, at_v = start * K + _places(C, PIECE, H * K), start * V + _places(C, PART, H * V)
    sequence, earlier, present = _masks(marks + (row * N + n) * C, C, MARKED)
    end = tl.max(sequence, 0)
    from_start, to_end = sequence == 0, sequence == end

    zeros, rows = tl.zeros([C, C], tl.float32), ()
    ab, ak, rb, rk = zeros, zeros, zeros, zeros
    for _q in tl.static_range(V // PART):
        rows += (tl.zeros([C, PART], tl.float32),)
    found, gu, gv_end = rows, rows, rows
    for p in range(K // PIECE):
        at = at_k + p * PIECE
        a_cp, r_cp, b_cp, k_cp, _, _, _, decay = _factors(r + at, w + at, k + at, a + at, b + at)
        ab, ak, rb, rk = _scores(ab, ak, rb, rk, a_cp, r_cp, b_cp, k_cp)
        new_found, new_gu, new_gv = (), (), ()
        for q in tl.static_range(V // PART):
            state_vp = tl.load(state_at + matrix + q * PART * K + p * PIECE)
            new_found += (found[q] + _dot(a_cp, state_vp.T),)
        b_cp, k_cp = b_cp * decay[None, :], k_cp * decay[None, :]
        for q in tl.static_range(V // PART):
            gstate_vp = tl.load(gstate_at + matrix + q * PART * K + p * PIECE)
            new_gu += (gu[q] + _dot(b_cp, gstate_vp.T),)
            new_gv += (gv_end[q] + _dot(k_cp, gstate_vp.T),)
        found, gu, gv_end = new_found, new_gu, new_gv
    ab, ak = tl.where(earlier, ab, 0.0), tl.where(earlier, ak, 0.0)
    rb, rk = tl.where(present, rb, 0.0), tl.where(present, rk, 0.0)
    inverse = _inverse(ab)

    # In loops of their own: what is multiplied again and again stays in registers for as long as a loop does.
    written, gfound, gab, gak, grb, grk = (), (), zeros, zeros, zeros, zeros
    for q in tl.static_range(V // PART):
        v_cv = tl.load(v + at_v + q * PART).to(tl.float32)
        written += (_dot(inverse, _masked(from_start, found[q]) + _dot(ak, v_cv)),)
    for q in tl.static_range(V // PART):
        gy_cv = tl.load(gy + at_v + q * PART).to(tl.float32)
        gfound += (_dot(inverse.T, _masked(to_end, gu[q]) + _dot(rb.T, gy_cv)),)
    for q in tl.static_range(V // PART):
        gy_cv = tl.load(gy + at_v + q * PART).to(tl.float32)
        gv_cv = _masked(to_end, gv_end[q]) + _dot(ak.T, gfound[q]) + _dot(rk.T, gy_cv)
        tl.store(gv + at_v + q * PART, gv_cv.to(gv.dtype.element_ty))
    for q in tl.static_range(V // PART):
        v_cv, gy_cv = tl.load(v + at_v + q * PART).to(tl.float32), tl.load(gy + at_v + q * PART).to(tl.float32)
        gab += _dot(gfound[q], written[q].T)
        gak += _dot(gfound[q], v_cv.T)
        grb += _dot(gy_cv, written[q].T)
        grk += _dot(gy_cv, v_cv.T)
    gab, gak = tl.where(earlier, gab, 0.0), tl.where(earlier, gak, 0.0)
    grb, grk = tl.where(present, grb, 0.0), tl.where(present, grk, 0.0)

    for p in range(K // PIECE):
        at = at_k + p * PIECE
        zero = tl.zeros([C, PIECE], tl.float32)
        ga_cp, gr_cp, gb_cp, gk_cp, gkept = zero, zero, zero, zero, tl.zeros([PIECE], tl.float32)
        for q in tl.static_range(V // PART):
            place = matrix + q * PART * K + p * PIECE
            gkept += tl.sum(tl.load(state_at + place) * tl.load(gstate_at + place), 0)
        for q in tl.static_range(V // PART):
            place = matrix + q * PART * K + p * PIECE
            state_vp, gstate_vp = tl.load(state_at + place), tl.load(gstate_at + place)
            v_cv, gy_cv = tl.load(v + at_v + q * PART).to(tl.float32), tl.load(gy + at_v + q * PART).to(tl.float32)
            ga_cp += _dot(_masked(from_start, gfound[q]), state_vp)
            gr_cp += _dot(_masked(from_start, gy_cv), state_vp)
            gb_cp += _dot(_masked(to_end, written[q]), gstate_vp)
            gk_cp += _dot(_masked(to_end, v_cv), gstate_vp)
        a_cp, r_cp, b_cp, k_cp, scale_a, scale_r, scale_p, decay = _factors(r + at, w + at, k + at, a + at, b + at)
        # What reaches the state after the chunk decays to its end, whatever the token.
        gb_cp, gk_cp = gb_cp * decay[None, :], gk_cp * decay[None, :]
        gdecay = tl.sum(gb_cp * b_cp + gk_cp * k_cp, 0) + tl.where(end == 0, gkept * decay, 0.0)
        ga_cp += _dot(gab, b_cp) + _dot(gak, k_cp)
        gr_cp += _dot(grb, b_cp) + _dot(grk, k_cp)
        gb_cp += _dot(gab.T, a_cp) + _dot(grb.T, r_cp)
        gk_cp += _dot(gak.T, a_cp) + _dot(grk.T, r_cp)
        gw_cp = tl.cumsum(ga_cp * a_cp + gr_cp * r_cp - gb_cp * b_cp - gk_cp * k_cp, 0, reverse=True)
        gw_cp += gdecay[None, :] - ga_cp * a_cp
        tl.store(gr + at, (gr_cp * scale_r).to(gr.dtype.element_ty))
        tl.store(gw + at, gw_cp.to(gw.dtype.element_ty))
        tl.store(gk + at, (gk_cp * scale_p).to(gk.dtype.element_ty))
        tl.store(ga + at, (ga_cp * scale_a).to(ga.dtype.element_ty))
        tl.store(gb + at, (gb_cp * scale_p).to(gb.dtype.element_ty))


@triton.jit
@no_type_check
def _program(H: tl.constexpr, PARTS: tl.constexpr):
    """The block of value channels, the head and the row of a program."""
    at = tl.program_id(0)
    return at % PARTS, at // PARTS % H, (at // PARTS // H).to(tl.int64)


@triton.jit
@no_type_check
def _load_pieces(at, K: tl.constexpr, PIECE: tl.constexpr):
    """A matrix [.., K] in pieces."""
    pieces = ()
    for p in tl.static_range(K // PIECE):
        pieces += (tl.load(at + p * PIECE),)
    return pieces


@triton.jit
@no_type_check
def _store_pieces(at, pieces, PIECE: tl.constexpr):
    for p in tl.static_range(len(pieces)):
        tl.store(at + p * PIECE, pieces[p])


@triton.jit
@no_type_check
def _factors(r, w, k, a, b):
    """A piece of A, R, B and K, what a, r, and both b and k were multiplied by, and its decay over the chunk."""
    w_cp = tl.load(w).to(tl.float32)
    summed = tl.cumsum(w_cp, 0)
    scale_a, scale_r, scale_p = tl.exp(summed - w_cp), tl.exp(summed), tl.exp(-summed)
    a_cp, r_cp = tl.load(a).to(tl.float32) * scale_a, tl.load(r).to(tl.float32) * scale_r
    b_cp, k_cp = tl.load(b).to(tl.float32) * scale_p, tl.load(k).to(tl.float32) * scale_p
    return a_cp, r_cp, b_cp, k_cp, scale_a, scale_r, scale_p, tl.exp(tl.sum(w_cp, 0))


@triton.jit
@no_type_check
def _scores(ab, ak, rb, rk, a_cp, r_cp, b_cp, k_cp):
    """The sums over keys so far and those of a piece."""
    return ab + _dot(a_cp, b_cp.T), ak + _dot(a_cp, k_cp.T), rb + _dot(r_cp, b_cp.T), rk + _dot(r_cp, k_cp.T)


@triton.jit
@no_type_check
def _inverse(lower):
    """(I - lower)^-1 of a strictly lower triangular matrix, in blocks of doubled size: T_21 = T_22 M_21 T_11."""
    row, column = tl.arange(0, lower.shape[0])[:, None], tl.arange(0, lower.shape[0])[None, :]
    inverse = tl.where(row == column, 1.0, 0.0)
    for level in tl.static_range(_LEVELS):
        pairs = ((row >> level) % 2 == 1) & ((row >> level) - 1 == column >> level)
        inverse += _dot(_dot(inverse, tl.where(pairs, lower, 0.0)), inverse)
    return inverse


@triton.jit
@no_type_check
def _masks(marks, C: tl.constexpr, MARKED: tl.constexpr):
    """How many sequences have started in the chunk at each token, and which tokens see which without and with themselves."""
    sequence = tl.load(marks + tl.arange(0, C)) if MARKED else tl.zeros([C], tl.int32)
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    same = sequence[:, None] == sequence[None, :]
    return sequence, same & (column < row), same & (column <= row)


@triton.jit
@no_type_check
def _places(rows: tl.constexpr, columns: tl.constexpr, stride: tl.constexpr):
    """Offsets of a matrix."""
    return tl.arange(0, rows)[:, None] * stride + tl.arange(0, columns)[None, :]


@triton.jit
@no_type_check
def _masked(rows, x):
    return tl.where(rows[:, None], x, 0.0)


@triton.jit
@no_type_check
def _dot(x, y):
    """A product in full float32: in parts of TF32 on tensor cores ("tf32x3") it would spill kilobytes of registers."""
    return tl.dot(x, y, input_precision="ieee")
