"""Pools of any geometry and layout, an element at a time.

Neighbouring elements are neighbouring columns, or, where the channels are last in memory,
neighbouring channels, which are read 16 bytes at a time.
"""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from lipkernels.kernels.triton.pool_terms import of_pixel, of_window, share, summand, zeros_like

_SIZES = ["n", "height", "width", "out_height", "out_width", "channels", "high", "low"]


@triton.jit
def _places(
    n, channels, VC: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr, LONG: tl.constexpr
):
    """Elements, and which there are; their pixels, the channels of these, the elements of one."""
    program = tl.program_id(0)
    if LONG:
        program, n = program.to(tl.int64), n.to(tl.int64)
    e = program * BLOCK + tl.arange(0, BLOCK)
    step = channels * VC if LAST else 1
    pixel = e // step if LAST else e
    channel = e % step if LAST else 0
    return e, e < n * VC, pixel, channel, step


@triton.jit(do_not_specialize=_SIZES)
def gather_windows(
    x, y, number, high, low,
    n,  # windows, over VC
    height,
    width,
    out_height,
    out_width,
    channels,  # side by side in memory, over VC
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, BLOCK: tl.constexpr, VC: tl.constexpr, LAST: tl.constexpr,
    LONG: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """y from x."""
    o, there, pixel, channel, step = _places(n, channels, VC, BLOCK, LAST, LONG)
    row = pixel // out_width
    top, left = row % out_height * SH - PH, pixel % out_width * SW - PW
    at = row // out_height * (height * width) * step + channel
    total = zeros_like(x, (BLOCK,))
    for a in range(KH):
        h = top + a
        for d in range(KW):
            w = left + d
            inside = there & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            v = tl.load(x + at + (h * width + w) * step, mask=inside, other=0.0)
            total += summand(v, NORM)
    tl.store(y + o, of_window(total, number, high, low, y.dtype.element_ty, NORM), mask=there)


@triton.jit(do_not_specialize=_SIZES)
def spread_windows(
    x, y, grad, out, number, high, low,
    n,  # pixels, over VC
    height, width, out_height, out_width, channels,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, BLOCK: tl.constexpr, VC: tl.constexpr, LAST: tl.constexpr,
    LONG: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of x from that of y."""
    e, there, pixel, channel, step = _places(n, channels, VC, BLOCK, LAST, LONG)
    row = pixel // width
    h, w = row % height + PH, pixel % width + PW
    at = row // height * (out_height * out_width) * step + channel
    total = zeros_like(out, (BLOCK,))
    # The last window that could hold a pixel, and those before it.
    for a in range((KH + SH - 1) // SH):
        i = h // SH - a
        for d in range((KW + SW - 1) // SW):
            j = w // SW - d
            held = there & (h - i * SH < KH) & (w - j * SW < KW)
            held = held & (i >= 0) & (i < out_height) & (j >= 0) & (j < out_width)
            total += share(grad, y, at + (i * out_width + j) * step, held, number, high, low, NORM)
    v = of_pixel(total, x, e, there, number, high, low, out.dtype.element_ty, NORM)
    tl.store(out + e, v, mask=there)
