"""Pools whose windows lie side by side and fill a contiguous image.

A program has BLOCK windows. Each row of theirs is one piece of memory, a part of a row of the image
or several ones, and is folded in registers: KW neighbours at a time, KW a power of two.

Sizes come divided by a power of two (V...: a constant) and are multiplied back: see `sampling`.
"""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from lipkernels.kernels.triton.pool_terms import of_pixel, of_window, share, summand, zeros_like

_SIZES = ["n", "height", "width", "out_height", "out_columns", "high", "low"]


@triton.jit
def _places(
    n, height, width, out_height, out_columns, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK: tl.constexpr, VN: tl.constexpr, VW: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Windows, and where the pixels of their first rows are; which of both there are."""
    program = tl.program_id(0)
    if LONG:
        program, n = program.to(tl.int64), n.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    f = program * (BLOCK * KW) + tl.arange(0, BLOCK * KW)
    row = f // (out_columns * VW)
    line = row // out_height * height + row % out_height * KH
    at = line * (width * VW) + f % (out_columns * VW)
    return o, o < n * VN, at, f < n * VN * KW


@triton.jit(do_not_specialize=_SIZES)
def gather_tiles(
    x, y, number, high, low,
    n,  # windows, over VN
    height,
    width,  # over VW
    out_height,
    out_columns,  # columns that windows cover, over VW
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr, VN: tl.constexpr, VW: tl.constexpr,
    LONG: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """y from x."""
    o, there, at, inside = _places(
        n, height, width, out_height, out_columns, KH, KW, BLOCK, VN, VW, LONG
    )
    total = zeros_like(x, (BLOCK,))
    for a in range(KH):
        v = summand(tl.load(x + at + a * (width * VW), mask=inside, other=0.0), NORM)
        total += tl.sum(tl.reshape(v, (BLOCK, KW)), axis=1)
    tl.store(y + o, of_window(total, number, high, low, y.dtype.element_ty, NORM), mask=there)


@triton.jit(do_not_specialize=_SIZES)
def spread_tiles(
    x, y, grad, out, number, high, low, n, height, width, out_height, out_columns,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr, VN: tl.constexpr, VW: tl.constexpr,
    LONG: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of x from that of y."""
    o, there, at, inside = _places(
        n, height, width, out_height, out_columns, KH, KW, BLOCK, VN, VW, LONG
    )
    weight = share(grad, y, o, there, number, high, low, NORM)
    weight = tl.reshape(tl.broadcast_to(weight[:, None], (BLOCK, KW)), (BLOCK * KW,))
    for a in range(KH):
        here = at + a * (width * VW)
        v = of_pixel(weight, x, here, inside, number, high, low, out.dtype.element_ty, NORM)
        tl.store(out + here, v, mask=inside)
