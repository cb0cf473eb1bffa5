"""RWKV-4's WKV operator as Triton kernels: a program walks the tokens of a block of channels of one row.

The mathematics is that of `chunk.py`, with its derivative written out. The backward kernel takes chunks from the last to the first: it
walks one again from the state stored at its start, keeping what each token was weighted with, and then back. With past and now the
weights of the mean y, over their denominator, and keep and add those of the state's update, a token gives its cotangents and hands on

    gv = now gy + add gaa       gk = now gy (v - y) + add (gaa v + gbb) + [k is the maximum] gpp       gu = now gy (v - y)
    gw = keep (gaa aa + gbb bb) + [k is not] gpp
    gaa <- keep gaa + past gy      gbb <- keep gbb - past gy y      gpp <- [k is not] gpp
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
from ..tuning import sizes
from . import chunk
from .reference import EMPTY

_EMPTY = tl.constexpr(EMPTY)
_STARTS, _COUNTS = tl.constexpr(chunk.STARTS), tl.constexpr(chunk.COUNTS)


def _forward(launcher: Launcher, problem: Problem, save: bool) -> tuple[Array, ...]:
    tokens, shared, state, marks = problem
    constants = _constants(problem) | {"SAVE": save}
    entries = [(*x.shape[:2], constants["N"], *x.shape[2:]) if save else (1,) for x in state]
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (tokens[1], *state)]
    outputs += [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(entries, state, strict=True)]
    inputs = (*tokens, *shared, *state, tokens[0] if marks is None else marks)
    warps = sizes("wkv4", 64).forward.warps
    return launcher(Launch(_forward_kernel, _grid(problem), inputs, tuple(outputs), constants, warps))


def _backward(
    launcher: Launcher, problem: Problem, entries: Sequence[Array], gy: Array, gstate: Sequence[Array]
) -> tuple[Array, ...]:
    tokens, shared, state, marks = problem
    rows = tokens[0].shape[0]
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tokens]
    outputs += [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in shared]
    outputs += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state]
    inputs = (*tokens, *shared, tokens[0] if marks is None else marks, *entries, gy, *gstate)
    warps = sizes("wkv4", 64).backward.warps
    return launcher(Launch(_backward_kernel, _grid(problem), inputs, tuple(outputs), _constants(problem), warps))


KERNELS = Kernels(_forward, _backward)


def _grid(problem: Problem) -> tuple[int, int, int]:
    batch_size, _, num_blocks, _ = problem.tokens[0].shape
    return batch_size * num_blocks, 1, 1  # The other axes end at 65535.


def _constants(problem: Problem) -> dict[str, int | bool]:
    batch_size, num_tokens, num_blocks, width = problem.tokens[0].shape
    size = chunk.RECURRENCE.num_tokens
    return {
        "N": num_tokens // size, "C": size, "H": num_blocks, "X": width,
        "ROWS": batch_size // problem.shared[0].shape[0], "MARKED": problem.marks is not None,
    }  # fmt: skip


@triton.jit
@no_type_check
def _forward_kernel(
    k, v, w, u, aa, bb, pp, marks, y, aa_end, bb_end, pp_end, aa_at, bb_at, pp_at,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, X: tl.constexpr, ROWS: tl.constexpr, MARKED: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    channel = tl.arange(0, X)
    shared, state = (row // ROWS * H + block) * X + channel, (row * H + block) * X + channel
    w_x, u_x = tl.load(w + shared), tl.load(u + shared)
    aa_x, bb_x, pp_x = tl.load(aa + state), tl.load(bb + state), tl.load(pp + state)
    at = (row * N * C * H + block) * X + channel
    next_k, next_v = _rows(k + at, C, H * X, True), _rows(v + at, C, H * X, True)
    for n in range(N):
        if SAVE:
            entry = ((row * H + block) * N + n) * X + channel
            tl.store(aa_at + entry, aa_x)
            tl.store(bb_at + entry, bb_x)
            tl.store(pp_at + entry, pp_x)
        k_c, v_c = next_k, next_v
        # Loads take longer than a chunk's arithmetic: the next chunk's are under way meanwhile.
        later = at + C * H * X
        next_k, next_v = _rows(k + later, C, H * X, n + 1 < N), _rows(v + later, C, H * X, n + 1 < N)
        mark = marks + (row * N + n) * C
        peak, decays = pp_x, tl.zeros_like(pp_x)
        for t in tl.static_range(C):
            starts, counts = _mark(mark + t, MARKED)
            past_aa, past_bb, past_pp = aa_x, bb_x, tl.where(starts, _EMPTY, pp_x)
            past, now = _weights(past_pp, u_x + k_c[t])
            y_t = (past * past_aa + now * v_c[t]) / (past * past_bb + now)
            tl.store(y + at + t * H * X, tl.where(counts, y_t, 0.0).to(y.dtype.element_ty))
            aa_x, bb_x, pp_x, peak, decays, _, _, _ = _advance(
                aa_x, bb_x, pp_x, peak, decays, k_c[t], v_c[t], w_x, starts, counts
            )
        at = later
    tl.store(aa_end + state, aa_x)
    tl.store(bb_end + state, bb_x)
    tl.store(pp_end + state, pp_x)


@triton.jit
@no_type_check
def _backward_kernel(
    k, v, w, u, marks, aa_at, bb_at, pp_at, gy, gaa_end, gbb_end, gpp_end, gk, gv, gw, gu, gaa, gbb, gpp,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, X: tl.constexpr, ROWS: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    channel = tl.arange(0, X)
    shared, state = (row // ROWS * H + block) * X + channel, (row * H + block) * X + channel
    w_x, u_x = tl.load(w + shared), tl.load(u + shared)
    gaa_x, gbb_x, gpp_x = tl.load(gaa_end + state), tl.load(gbb_end + state), tl.load(gpp_end + state)
    gw_x, gu_x = tl.zeros_like(w_x), tl.zeros_like(u_x)
    for i in range(N):
        n = N - 1 - i
        at = ((row * N + n) * C * H + block) * X + channel
        k_c, v_c, gy_c = _rows(k + at, C, H * X, True), _rows(v + at, C, H * X, True), _rows(gy + at, C, H * X, True)
        entry = ((row * H + block) * N + n) * X + channel
        aa_x, bb_x, pp_x = tl.load(aa_at + entry), tl.load(bb_at + entry), tl.load(pp_at + entry)
        mark = marks + (row * N + n) * C
        peak, decays = pp_x, tl.zeros_like(pp_x)
        kept = ()
        for t in tl.static_range(C):
            starts, counts = _mark(mark + t, MARKED)
            past, now = _weights(tl.where(starts, _EMPTY, pp_x), u_x + k_c[t])
            share = 1 / (past * bb_x + now)
            y_t = (past * aa_x + now * v_c[t]) * share
            before_aa, before_bb = aa_x, bb_x
            aa_x, bb_x, pp_x, peak, decays, keep, add, stays = _advance(
                aa_x, bb_x, pp_x, peak, decays, k_c[t], v_c[t], w_x, starts, counts
            )
            of_t = before_aa, before_bb, y_t, past * share, now * share, keep, add, stays
            kept += (of_t,)
        for t in tl.static_range(C - 1, -1, -1):
            starts, counts = _mark(mark + t, MARKED)
            aa_t, bb_t, y_t, past, now, keep, add, stays = kept[t]
            gy_t = tl.where(counts, gy_c[t], 0.0)
            through_u = now * gy_t * (v_c[t] - y_t)
            # A token that does not count hands the cotangents on as they are.
            gaa_t, gbb_t = tl.where(counts, gaa_x, 0.0), tl.where(counts, gbb_x, 0.0)
            gpp_t = tl.where(counts, gpp_x, 0.0)
            gk_t = through_u + add * (gaa_t * v_c[t] + gbb_t) + tl.where(stays, 0.0, gpp_t)
            tl.store(gk + at + t * H * X, gk_t.to(gk.dtype.element_ty))
            tl.store(gv + at + t * H * X, (now * gy_t + add * gaa_t).to(gv.dtype.element_ty))
            gu_x += through_u
            gw_x += keep * (gaa_t * aa_t + gbb_t * bb_t) + tl.where(stays, gpp_t, 0.0)
            gaa_x = tl.where(counts, keep * gaa_x + past * gy_t, gaa_x)
            gbb_x = tl.where(counts, keep * gbb_x - past * gy_t * y_t, gbb_x)
            gpp_x = tl.where(counts, tl.where(stays & (starts == 0), gpp_x, 0.0), gpp_x)
    tl.store(gw + state, gw_x)
    tl.store(gu + state, gu_x)
    tl.store(gaa + state, gaa_x)
    tl.store(gbb + state, gbb_x)
    tl.store(gpp + state, gpp_x)


@triton.jit
@no_type_check
def _rows(pointers, C: tl.constexpr, stride: tl.constexpr, wanted):
    """C rows of tokens, or zeros."""
    rows = ()
    for t in tl.static_range(C):
        row = tl.load(pointers + t * stride, mask=wanted, other=0.0)
        rows += (row.to(tl.float32),)
    return rows


@triton.jit
@no_type_check
def _mark(pointer, MARKED: tl.constexpr):
    """Whether a token starts a sequence, and whether it counts."""
    if MARKED:
        mark = tl.load(pointer)
        return (mark & _STARTS) != 0, (mark & _COUNTS) != 0
    else:
        return False, True


@triton.jit
@no_type_check
def _weights(x, y):
    """e^{x-q} and e^{y-q} with q = max(x, y), from one exponential: one of the weights is 1."""
    e = tl.exp(-tl.abs(x - y))
    return tl.where(x > y, 1.0, e), tl.where(x > y, e, 1.0)


@triton.jit
@no_type_check
def _advance(aa, bb, pp, peak, decays, k, v, w, starts, counts):
    """The state after a token, its scale also as `chunk.py` counts it, the weights of its two parts, and whether pp stayed."""
    decayed = tl.where(starts, _EMPTY, peak) + (decays + 1) * w
    keep, add = _weights(decayed, k)
    stays = decayed > k
    return (
        tl.where(counts, keep * aa + add * v, aa),
        tl.where(counts, keep * bb + add, bb),
        tl.where(counts, tl.where(stays, decayed, k), pp),
        tl.where(counts, tl.where(stays, tl.where(starts, _EMPTY, peak), k), peak),
        tl.where(counts, tl.where(stays, decays + 1, 0.0), decays),
        keep,
        add,
        stays,
    )
