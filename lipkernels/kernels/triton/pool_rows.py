"""Pools whose one window is a whole contiguous image: sums of rows, each of one channel."""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from lipkernels.kernels.triton.pool_terms import of_pixel, of_window, share, summand, zeros_like

_SIZES = ["n", "length", "high", "low"]


@triton.jit
def _rows(n, ROWS: tl.constexpr, LONG: tl.constexpr):
    """The rows of this program, and which of them there are."""
    program = tl.program_id(0)
    if LONG:
        program, n = program.to(tl.int64), n.to(tl.int64)
    r = program * ROWS + tl.arange(0, ROWS)
    return r, r < n


@triton.jit(do_not_specialize=_SIZES)
def gather_rows(
    x, y, number, high, low,
    n,
    length,  # over VL
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VL: tl.constexpr, LONG: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """y from x."""
    r, there = _rows(n, ROWS, LONG)
    at = r[:, None] * (length * VL)
    total = zeros_like(x, (ROWS, BLOCK))
    for start in range(0, length * VL, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < length * VL)[None, :]
        total += summand(tl.load(x + at + column[None, :], mask=inside, other=0.0), NORM)
    total = tl.sum(total, axis=1)
    tl.store(y + r, of_window(total, number, high, low, y.dtype.element_ty, NORM), mask=there)


@triton.jit(do_not_specialize=_SIZES)
def spread_rows(
    x, y, grad, out, number, high, low, n, length,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VL: tl.constexpr, LONG: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of x from that of y."""
    r, there = _rows(n, ROWS, LONG)
    at = r[:, None] * (length * VL)
    weight = share(grad, y, r, there, number, high, low, NORM)[:, None]
    weight = tl.broadcast_to(weight, (ROWS, BLOCK))
    for start in range(0, length * VL, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < length * VL)[None, :]
        here = at + column[None, :]
        v = of_pixel(weight, x, here, inside, number, high, low, out.dtype.element_ty, NORM)
        tl.store(out + here, v, mask=inside)
