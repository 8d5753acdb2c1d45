"""L2-norm pooling and its gradient, one kernel each way.

    y_o = sqrt(sum over the window o of x_i^2)
    dL/dx_i = x_i  sum over the windows o that hold i of  Gamma_o / (y_o + eps)

Three shapes of it: ``tiled``, windows side by side that fill a contiguous image, whose rows are
read in one piece and folded in registers; ``rows``, a window that is the whole image; and any
other, an element at a time, with the channels side by side where they are last in memory. The sum
runs in float32 (float64 for float64), with the square root of IEEE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton.offsets import is_long
from lipkernels.kernels.triton.rounding import from_halves, halves, rounded
from lipkernels.reference import pooling as reference

NUM_WARPS = 4
_TILE_BYTES = 8192
_ANY_BLOCK = 1024
_WIDEST_TILE = 16  # columns of a window that is folded in registers


@triton.jit
def _wide(x):
    half: tl.constexpr = x.dtype == tl.float16 or x.dtype == tl.bfloat16
    return x.to(tl.float32) if half else x


@triton.jit
def _root(square, dtype: tl.constexpr):
    root = tl.sqrt_rn(square) if square.dtype == tl.float32 else tl.sqrt(square)
    return rounded(root, dtype)


@triton.jit
def _weight(grad, norm, eps, high, low):
    """Gamma / (y + eps)."""
    g, y = _wide(grad), _wide(norm)
    double: tl.constexpr = g.dtype == tl.float64
    return g / (y + from_halves(high, low)) if double else tl.div_rn(g, y + eps)


# Sizes come divided by a power of two (V...: a constant) and are multiplied back: see sampling.py.
@triton.jit(do_not_specialize=["n", "height", "width", "out_height", "out_columns"])
def norm_of_tiles(
    x,
    y,
    n,  # windows, over VN
    height,
    width,  # over VW
    out_height,
    out_columns,  # columns that windows cover, over VW
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK: tl.constexpr,
    VN: tl.constexpr,
    VW: tl.constexpr,
    LONG: tl.constexpr,
):
    program = tl.program_id(0)
    if LONG:
        program, n = program.to(tl.int64), n.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    f = program * (BLOCK * KW) + tl.arange(0, BLOCK * KW)
    row = f // (out_columns * VW)
    line = row // out_height * height + row % out_height * KH
    at = line * (width * VW) + f % (out_columns * VW)
    total = tl.zeros((BLOCK,), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    for a in range(KH):
        v = _wide(tl.load(x + at + a * (width * VW), mask=f < n * VN * KW, other=0.0))
        total += tl.sum(tl.reshape(v * v, (BLOCK, KW)), axis=1)
    tl.store(y + o, _root(total, y.dtype.element_ty), mask=o < n * VN)


@triton.jit(do_not_specialize=["n", "height", "width", "out_height", "out_columns", "high", "low"])
def spread_to_tiles(
    x,
    y,
    grad,
    out,
    eps,
    high,
    low,
    n,
    height,
    width,
    out_height,
    out_columns,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK: tl.constexpr,
    VN: tl.constexpr,
    VW: tl.constexpr,
    LONG: tl.constexpr,
):
    program = tl.program_id(0)
    if LONG:
        program, n = program.to(tl.int64), n.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    f = program * (BLOCK * KW) + tl.arange(0, BLOCK * KW)
    row = f // (out_columns * VW)
    line = row // out_height * height + row % out_height * KH
    at = line * (width * VW) + f % (out_columns * VW)
    inside = f < n * VN * KW
    norm = tl.load(y + o, mask=o < n * VN, other=1.0)
    weight = _weight(tl.load(grad + o, mask=o < n * VN, other=0.0), norm, eps, high, low)
    weight = tl.reshape(tl.broadcast_to(weight[:, None], (BLOCK, KW)), (BLOCK * KW,))
    for a in range(KH):
        v = _wide(tl.load(x + at + a * (width * VW), mask=inside, other=0.0)) * weight
        tl.store(out + at + a * (width * VW), rounded(v, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "length"])
def norm_of_rows(
    x,
    y,
    n,
    length,  # over VL
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VL: tl.constexpr,
    LONG: tl.constexpr,
):
    program = tl.program_id(0)
    if LONG:
        program, n = program.to(tl.int64), n.to(tl.int64)
    r = program * ROWS + tl.arange(0, ROWS)
    at = r[:, None] * (length * VL)
    total = tl.zeros((ROWS, BLOCK), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    for start in range(0, length * VL, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (r < n)[:, None] & (column < length * VL)[None, :]
        v = _wide(tl.load(x + at + column[None, :], mask=inside, other=0.0))
        total += v * v
    tl.store(y + r, _root(tl.sum(total, axis=1), y.dtype.element_ty), mask=r < n)


@triton.jit(do_not_specialize=["n", "length", "high", "low"])
def spread_to_rows(
    x,
    y,
    grad,
    out,
    eps,
    high,
    low,
    n,
    length,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VL: tl.constexpr,
    LONG: tl.constexpr,
):
    program = tl.program_id(0)
    if LONG:
        program, n = program.to(tl.int64), n.to(tl.int64)
    r = program * ROWS + tl.arange(0, ROWS)
    at = r[:, None] * (length * VL)
    norm = tl.load(y + r, mask=r < n, other=1.0)
    weight = _weight(tl.load(grad + r, mask=r < n, other=0.0), norm, eps, high, low)
    for start in range(0, length * VL, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (r < n)[:, None] & (column < length * VL)[None, :]
        v = _wide(tl.load(x + at + column[None, :], mask=inside, other=0.0)) * weight[:, None]
        tl.store(out + at + column[None, :], rounded(v, out.dtype.element_ty), mask=inside)


_SIZES = ["n", "height", "width", "out_height", "out_width", "channels"]


@triton.jit(do_not_specialize=_SIZES)
def norm_of_windows(
    x,
    y,
    n,  # windows, over VC
    height,
    width,
    out_height,
    out_width,
    channels,  # side by side in memory, over VC
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK: tl.constexpr,
    VC: tl.constexpr,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
):
    program = tl.program_id(0)
    if LONG:
        program, n = program.to(tl.int64), n.to(tl.int64)
    o = program * BLOCK + tl.arange(0, BLOCK)
    step = channels * VC if LAST else 1
    pixel = o // step if LAST else o
    row = pixel // out_width
    top, left = row % out_height * SH - PH, pixel % out_width * SW - PW
    at = row // out_height * (height * width) * step
    at += o % step if LAST else 0
    total = tl.zeros((BLOCK,), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    for a in range(KH):
        h = top + a
        for d in range(KW):
            w = left + d
            inside = (o < n * VC) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            v = _wide(tl.load(x + at + (h * width + w) * step, mask=inside, other=0.0))
            total += v * v
    tl.store(y + o, _root(total, y.dtype.element_ty), mask=o < n * VC)


@triton.jit(do_not_specialize=[*_SIZES, "high", "low"])
def spread_to_windows(
    x,
    y,
    grad,
    out,
    eps,
    high,
    low,
    n,  # pixels, over VC
    height,
    width,
    out_height,
    out_width,
    channels,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK: tl.constexpr,
    VC: tl.constexpr,
    LAST: tl.constexpr,
    LONG: tl.constexpr,
):
    program = tl.program_id(0)
    if LONG:
        program, n = program.to(tl.int64), n.to(tl.int64)
    e = program * BLOCK + tl.arange(0, BLOCK)
    step = channels * VC if LAST else 1
    pixel = e // step if LAST else e
    row = pixel // width
    h, w = row % height + PH, pixel % width + PW
    at = row // height * (out_height * out_width) * step
    at += e % step if LAST else 0
    own = _wide(tl.load(x + e, mask=e < n * VC, other=0.0))
    total = tl.zeros((BLOCK,), own.dtype)
    # The last window that could hold a pixel, and those before it.
    for a in range((KH + SH - 1) // SH):
        i = h // SH - a
        for d in range((KW + SW - 1) // SW):
            j = w // SW - d
            held = (h - i * SH < KH) & (w - j * SW < KW) & (e < n * VC)
            held = held & (i >= 0) & (i < out_height) & (j >= 0) & (j < out_width)
            o = at + (i * out_width + j) * step
            norm = tl.load(y + o, mask=held, other=1.0)
            total += _weight(tl.load(grad + o, mask=held, other=0.0), norm, eps, high, low)
    tl.store(out + e, rounded(own * total, out.dtype.element_ty), mask=e < n * VC)


@dataclass(frozen=True)
class Plan:
    """Which kernels, over how many elements, and their arguments."""

    kind: str
    sizes: dict[str, int]
    constants: dict[str, Any]
    n: int  # programs of the forward kernel, of the backward kernel
    n_backward: int
    backward_sizes: dict[str, int]


def _output_size(size: int, k: int, s: int, p: int, ceil_mode: bool) -> int:
    """As torch counts windows: with ``ceil_mode`` the last one starts inside of the image."""
    n = (size + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
    return n - 1 if ceil_mode and (n - 1) * s >= size + p else n


def plan(
    shape: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    channels_last: bool,
    itemsize: int,
) -> tuple[tuple[int, int], Plan]:
    """(height, width) of the output, and how to compute it."""
    *outer, height, width = shape
    out_height, out_width = (
        _output_size(*numbers, ceil_mode)
        for numbers in zip((height, width), kernel, stride, padding, strict=True)
    )
    planes, most = math.prod(outer), 16 // itemsize
    windows, pixels = planes * out_height * out_width, planes * height * width
    long = {"LONG": is_long(max(windows, pixels)), "num_warps": NUM_WARPS}
    fills = kernel == stride and (out_height * kernel[0], out_width * kernel[1]) == (height, width)
    whole = fills and (out_height, out_width) == (1, 1)
    columns = kernel[1]
    if not channels_last and padding == [0, 0] and fills:
        if whole and height * width > _WIDEST_TILE:
            length = height * width
            block = min(1 << (length - 1).bit_length(), 1024)
            rows = max(_TILE_BYTES // itemsize // block, 1)
            vl = math.gcd(length, most)
            sizes = {"n": planes, "length": length // vl}
            constants = {"ROWS": rows, "BLOCK": block, "VL": vl, **long}
            programs = -(-planes // rows)
            return (1, 1), Plan("rows", sizes, constants, programs, programs, sizes)
        if columns <= _WIDEST_TILE and columns & (columns - 1) == 0:
            block = _TILE_BYTES // itemsize // columns
            vw, vn = math.gcd(width, most), math.gcd(windows, most)
            sizes = {
                **{"n": windows // vn, "height": height, "width": width // vw},
                **{"out_height": out_height, "out_columns": out_width * columns // vw},
            }
            constants = {"KH": kernel[0], "KW": columns, "BLOCK": block, "VN": vn, "VW": vw, **long}
            programs = -(-windows // block)
            size = (out_height, out_width)
            return size, Plan("tiles", sizes, constants, programs, programs, sizes)
    channels = outer[-1] if channels_last else 1
    vc = math.gcd(channels, most)
    sizes = {
        **{"height": height, "width": width, "out_height": out_height, "out_width": out_width},
        "channels": channels // vc,
    }
    constants = {
        **dict(
            zip(("KH", "KW", "SH", "SW", "PH", "PW"), (*kernel, *stride, *padding), strict=True)
        ),
        **{"BLOCK": _ANY_BLOCK, "VC": vc, "LAST": channels_last, **long},
    }
    return (out_height, out_width), Plan(
        "windows",
        {"n": windows // vc, **sizes},
        constants,
        -(-windows // _ANY_BLOCK),
        -(-pixels // _ANY_BLOCK),
        {"n": pixels // vc, **sizes},
    )


NORM: dict[str, Any] = {
    "tiles": norm_of_tiles,
    "rows": norm_of_rows,
    "windows": norm_of_windows,
}
SPREAD: dict[str, Any] = {
    "tiles": spread_to_tiles,
    "rows": spread_to_rows,
    "windows": spread_to_windows,
}


def l2_norm_pool2d(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> Tensor:
    """As :func:`lipkernels.reference.pooling.l2_norm_pool2d`."""
    memory_format = reference.memory_format(x)
    x = x.resolve_neg().contiguous(memory_format=memory_format)
    last = memory_format == torch.channels_last
    size, how = plan(tuple(x.shape), kernel, stride, padding, ceil_mode, last, x.itemsize)
    y = torch.empty(
        (*x.shape[:-2], *size), dtype=x.dtype, device=x.device, memory_format=memory_format
    )
    if y.numel():
        NORM[how.kind][(how.n,)](x, y, **how.sizes, **how.constants)
    return y


def l2_norm_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    eps: float,
) -> Tensor:
    """As :func:`lipkernels.reference.pooling.l2_norm_pool2d_vjp`."""
    memory_format = reference.memory_format(x)
    x, y, grad = (t.resolve_neg().contiguous(memory_format=memory_format) for t in (x, y, grad))
    last = memory_format == torch.channels_last
    _, how = plan(tuple(x.shape), kernel, stride, padding, ceil_mode, last, x.itemsize)
    out = torch.empty_like(x)
    if x.numel():
        high, low = halves(eps)
        sizes = how.backward_sizes
        SPREAD[how.kind][(how.n_backward,)](
            x, y, grad, out, eps, high, low, **sizes, **how.constants
        )
    return out
