"""RWKV-7's WKV operator as Triton kernels: a program walks the chunks of a head, or of a block of its value channels.

The mathematics, both ways, is that of `parallel.py`, with the state [V, K]: A, R, B and K are the rows that a, r, b and k become in a
chunk, and the names of products say of which. What a program stores for the backward pass is the state at each chunk's start. Programs
that share a head each give their part of the cotangents of all but v.
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
from ..triton_gpu import Kernels, Launch
from ..tuning import Block, sizes
from .chunk import RECURRENCE

_LEVELS = tl.constexpr(RECURRENCE.num_tokens.bit_length() - 1)
"""How often blocks of a chunk's tokens double in size."""


def _forward(problem: Problem, save: bool) -> Launch:
    tokens, _, (state,), marks = problem
    block = sizes("wkv7_triton", tokens[0].shape[3]).forward
    constants = _constants(problem, block) | {"SAVE": save}
    entries = (*state.shape[:2], constants["N"], *state.shape[2:]) if save else (1,)
    outputs = (tokens[3], state, jax.ShapeDtypeStruct(entries, state.dtype))
    outputs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs)
    inputs = (*tokens, state, tokens[0] if marks is None else marks)
    return Launch(_forward_kernel, _grid(problem, constants), inputs, outputs, constants, block.warps)


def _backward(problem: Problem, entries: Sequence[Array], gy: Array, gstate: Sequence[Array]) -> Launch:
    tokens, _, (state,), marks = problem
    block = sizes("wkv7_triton", tokens[0].shape[3]).backward
    constants = _constants(problem, block)
    parts = constants["V"] // constants["PART"]
    outputs = [
        jax.ShapeDtypeStruct(x.shape, x.dtype)
        if parts == 1 or i == RECURRENCE.split
        else jax.ShapeDtypeStruct((x.shape[0], parts, *x.shape[1:]), state.dtype)
        for i, x in enumerate(tokens)
    ]
    outputs.append(jax.ShapeDtypeStruct(state.shape, state.dtype))
    inputs = (*tokens, tokens[0] if marks is None else marks, *entries, gy, *gstate)
    return Launch(_backward_kernel, _grid(problem, constants), inputs, tuple(outputs), constants, block.warps)


KERNELS = Kernels(_forward, _backward)


def _grid(problem: Problem, constants: dict[str, int | bool]) -> tuple[int, int, int]:
    batch_size, _, num_heads, _ = problem.tokens[0].shape
    return batch_size * num_heads * (constants["V"] // constants["PART"]), 1, 1  # The other axes end at 65535.


def _constants(problem: Problem, block: Block) -> dict[str, int | bool]:
    _, num_tokens, num_heads, keys = problem.tokens[0].shape
    values, size = problem.tokens[3].shape[3], RECURRENCE.num_tokens
    return {
        "N": num_tokens // size, "C": size, "H": num_heads, "K": keys, "V": values, "PART": min(values, block.values),
        "MARKED": problem.marks is not None,
    }  # fmt: skip


@triton.jit
@no_type_check
def _forward_kernel(
    r, w, k, v, a, b, state, marks, y, state_end, state_at,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PART: tl.constexpr,
    MARKED: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    part, head, row = _program(H, V // PART)
    matrix = part * PART * K + _places(PART, K, K)
    state_vk = tl.load(state + (row * H + head) * V * K + matrix)
    for n in range(N):
        if SAVE:
            tl.store(state_at + ((row * H + head) * N + n) * V * K + matrix, state_vk)
        start = (row * N + n) * C * H + head
        at_k, at_v = start * K + _places(C, K, H * K), start * V + part * PART + _places(C, PART, H * V)
        sequence = _sequence(marks + (row * N + n) * C, C, MARKED)
        a_ck, r_ck, b_ck, k_ck, _, _, _, decay_k = _factors(r + at_k, w + at_k, k + at_k, a + at_k, b + at_k)
        v_cv = tl.load(v + at_v).to(tl.float32)
        _, _, _, rb, rk, _, u_cv = _solve(a_ck, r_ck, b_ck, k_ck, v_cv, state_vk, sequence, C)
        y_cv = _masked(sequence == 0, _dot(r_ck, state_vk.T)) + _dot(rb, u_cv) + _dot(rk, v_cv)
        tl.store(y + at_v, y_cv.to(y.dtype.element_ty))
        end = tl.max(sequence, 0)
        b_ck, k_ck = _masked(sequence == end, b_ck), _masked(sequence == end, k_ck)
        state_vk = tl.where(end == 0, state_vk, 0.0) + _dot(u_cv.T, b_ck) + _dot(v_cv.T, k_ck)
        state_vk *= decay_k[None, :]
    tl.store(state_end + (row * H + head) * V * K + matrix, state_vk)


@triton.jit
@no_type_check
def _backward_kernel(
    r, w, k, v, a, b, marks, state_at, gy, gstate_end, gr, gw, gk, gv, ga, gb, gstate,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PART: tl.constexpr,
    MARKED: tl.constexpr,
):  # fmt: skip
    part, head, row = _program(H, V // PART)
    matrix = part * PART * K + _places(PART, K, K)
    gstate_vk = tl.load(gstate_end + (row * H + head) * V * K + matrix)
    for i in range(N):
        n = N - 1 - i
        start = (row * N + n) * C * H + head
        at_k, at_v = start * K + _places(C, K, H * K), start * V + part * PART + _places(C, PART, H * V)
        sequence = _sequence(marks + (row * N + n) * C, C, MARKED)
        from_start, end = sequence == 0, tl.max(sequence, 0)
        to_end = sequence == end
        a_ck, r_ck, b_ck, k_ck, scale_a, scale_r, scale_p, decay_k = _factors(
            r + at_k, w + at_k, k + at_k, a + at_k, b + at_k
        )
        v_cv, gy_cv = tl.load(v + at_v).to(tl.float32), tl.load(gy + at_v).to(tl.float32)
        state_vk = tl.load(state_at + ((row * H + head) * N + n) * V * K + matrix)
        earlier, present, ak, rb, rk, inverse, u_cv = _solve(a_ck, r_ck, b_ck, k_ck, v_cv, state_vk, sequence, C)

        gstate_vk *= decay_k[None, :]
        gu_cv = _dot(rb.T, gy_cv) + _masked(to_end, _dot(b_ck, gstate_vk.T))
        gfound = _dot(inverse.T, gu_cv)
        gv_cv = _dot(rk.T, gy_cv) + _masked(to_end, _dot(k_ck, gstate_vk.T)) + _dot(ak.T, gfound)
        tl.store(gv + at_v, gv_cv.to(gv.dtype.element_ty))
        gab, gak = tl.where(earlier, _dot(gfound, u_cv.T), 0.0), tl.where(earlier, _dot(gfound, v_cv.T), 0.0)
        grb, grk = tl.where(present, _dot(gy_cv, u_cv.T), 0.0), tl.where(present, _dot(gy_cv, v_cv.T), 0.0)
        gfound, gy_cv = _masked(from_start, gfound), _masked(from_start, gy_cv)

        ga_ck = _dot(gab, b_ck) + _dot(gak, k_ck) + _dot(gfound, state_vk)
        gr_ck = _dot(grb, b_ck) + _dot(grk, k_ck) + _dot(gy_cv, state_vk)
        # What reaches the state after the chunk decays to its end, whatever the token.
        gb_end, gk_end = _masked(to_end, _dot(u_cv, gstate_vk)), _masked(to_end, _dot(v_cv, gstate_vk))
        gb_ck = _dot(gab.T, a_ck) + _dot(grb.T, r_ck) + gb_end
        gk_ck = _dot(gak.T, a_ck) + _dot(grk.T, r_ck) + gk_end
        gstate_through = tl.where(end == 0, gstate_vk, 0.0)
        gdecay_k = tl.sum(gb_end * b_ck + gk_end * k_ck, 0) + tl.sum(gstate_through * state_vk, 0)
        gw_ck = tl.cumsum(ga_ck * a_ck + gr_ck * r_ck - gb_ck * b_ck - gk_ck * k_ck, 0, reverse=True)
        gw_ck += gdecay_k[None, :] - ga_ck * a_ck
        gstate_vk = gstate_through + _dot(gfound.T, a_ck) + _dot(gy_cv.T, r_ck)

        out = ((row * (V // PART) + part) * N + n) * C * H * K + head * K + _places(C, K, H * K)
        tl.store(gr + out, (gr_ck * scale_r).to(gr.dtype.element_ty))
        tl.store(gw + out, gw_ck.to(gw.dtype.element_ty))
        tl.store(gk + out, (gk_ck * scale_p).to(gk.dtype.element_ty))
        tl.store(ga + out, (ga_ck * scale_a).to(ga.dtype.element_ty))
        tl.store(gb + out, (gb_ck * scale_p).to(gb.dtype.element_ty))
    tl.store(gstate + (row * H + head) * V * K + matrix, gstate_vk)


@triton.jit
@no_type_check
def _program(H: tl.constexpr, PARTS: tl.constexpr):
    """The block of value channels, the head and the row of a program."""
    at = tl.program_id(0)
    return at % PARTS, at // PARTS % H, (at // PARTS // H).to(tl.int64)


@triton.jit
@no_type_check
def _factors(r, w, k, a, b):
    """A, R, B, K of a chunk, what a, r, and both b and k were multiplied by, and the chunk's decay."""
    w_ck = tl.load(w).to(tl.float32)
    summed = tl.cumsum(w_ck, 0)
    scale_a, scale_r, scale_p = tl.exp(summed - w_ck), tl.exp(summed), tl.exp(-summed)
    a_ck, r_ck = tl.load(a).to(tl.float32) * scale_a, tl.load(r).to(tl.float32) * scale_r
    b_ck, k_ck = tl.load(b).to(tl.float32) * scale_p, tl.load(k).to(tl.float32) * scale_p
    return a_ck, r_ck, b_ck, k_ck, scale_a, scale_r, scale_p, tl.exp(tl.sum(w_ck, 0))


@triton.jit
@no_type_check
def _solve(a_ck, r_ck, b_ck, k_ck, v_cv, state_vk, sequence, C: tl.constexpr):
    """Which tokens see which without and with themselves, the products AK, RB and RK, the inverse of I - AB, and U."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    same = sequence[:, None] == sequence[None, :]
    earlier, present = same & (column < row), same & (column <= row)
    ab, ak = tl.where(earlier, _dot(a_ck, b_ck.T), 0.0), tl.where(earlier, _dot(a_ck, k_ck.T), 0.0)
    rb, rk = tl.where(present, _dot(r_ck, b_ck.T), 0.0), tl.where(present, _dot(r_ck, k_ck.T), 0.0)
    inverse = _inverse(ab, row, column)
    found = _masked(sequence == 0, _dot(a_ck, state_vk.T))
    return earlier, present, ak, rb, rk, inverse, _dot(inverse, found + _dot(ak, v_cv))


@triton.jit
@no_type_check
def _inverse(lower, row, column):
    """(I - lower)^-1 of a strictly lower triangular matrix, in blocks of doubled size: T_21 = T_22 M_21 T_11."""
    inverse = tl.where(row == column, 1.0, 0.0)
    for level in tl.static_range(_LEVELS):
        pairs = ((row >> level) % 2 == 1) & ((row >> level) - 1 == column >> level)
        inverse += _dot(_dot(inverse, tl.where(pairs, lower, 0.0)), inverse)
    return inverse


@triton.jit
@no_type_check
def _sequence(marks, C: tl.constexpr, MARKED: tl.constexpr):
    """How many sequences have started in the chunk at each token."""
    if MARKED:
        return tl.load(marks + tl.arange(0, C))
    else:
        return tl.zeros([C], tl.int32)


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
