"""Matrices as two half-precision planes, 22 bits of every number: what the products multiply.

    x = (hi + lo) / SCALE,    hi = fp16(SCALE x),    lo = fp16(SCALE x - hi)

A product of fp16 numbers is exact in float32, and three of the four products of planes (hi hi +
hi lo + lo hi) have all but 2^-22 of the whole, at the rate of half-precision matrix units. The
range of fp16 is what SCALE is for: numbers up to 500 fit, and what is below 1e-5 keeps an absolute
error of 2^-32. So a matrix is divided by a power of two first, which brings its largest entry into
[1, 2): :func:`magnitudes` finds it and :func:`pack` divides, two launches for a whole group.

In a workspace all matrices are wide (a tall one is transposed on the way), and their rows begin at
multiples of eight entries, zeros in between: masks of 16 bytes at a time are then all that is
needed.
"""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from lipkernels.kernels.triton.elements import part_of

SCALE = tl.constexpr(128.0)
BLOCK = 4096  # entries of a program of `magnitudes`
TILE = 64  # rows and columns of a program of `pack`
WARPS = 4
_INFINITE = tl.constexpr(0x7F800000)  # the bits of infinity; those of NaN are above


@triton.jit
def power_of_two(e):
    """2^e as float32, for e in [-149, 127]."""
    normal = (tl.maximum(e, -126) + 127) << 23
    subnormal = 1 << (tl.minimum(e, -127) + 149)
    return tl.where(e < -126, subnormal, normal).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(bits):
    """floor(log2 x) of a positive float32 number, or of a subnormal one, from its bits."""
    of_subnormal = (bits.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127 - 149
    return tl.where(bits < 0x00800000, of_subnormal, (bits >> 23) - 127)


@triton.jit
def split(x, scale):
    """``(hi, lo)`` of float32 ``x``."""
    x = x * scale
    hi = x.to(tl.float16)
    return hi, (x - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def load_planes(hi, lo, start, i, j, rows, ld, scale, BM: tl.constexpr, BN: tl.constexpr):
    """Block (i, j) of the matrix (rows, ld) at ``start``, in float32, zeros outside."""
    row = i * BM + tl.arange(0, BM)[:, None]
    col = j * BN + tl.arange(0, BN)[None, :]
    at = row * ld + col
    mask = (row < rows) & (col < ld)
    high = tl.load(hi + start + at, mask=mask, other=0.0).to(tl.float32)
    return (high + tl.load(lo + start + at, mask=mask, other=0.0).to(tl.float32)) * (1.0 / scale)


@triton.jit
def store_planes(hi, lo, start, i, j, rows, ld, scale, x, BM: tl.constexpr, BN: tl.constexpr):
    """The inverse of :func:`load_planes`; ``x`` is zero in the columns that only fill up rows."""
    row = i * BM + tl.arange(0, BM)[:, None]
    col = j * BN + tl.arange(0, BN)[None, :]
    at = row * ld + col
    mask = (row < rows) & (col < ld)
    high, low = split(x, scale)
    tl.store(hi + start + at, high, mask=mask)
    tl.store(lo + start + at, low, mask=mask)


@triton.jit
def store_symmetric(hi, lo, start, i, j, rows, ld, scale, x, B: tl.constexpr):
    """Block (i, j), i >= j, of a symmetric matrix, and its mirror image: equal bits."""
    if i == j:
        store_planes(hi, lo, start, i, i, rows, ld, scale, 0.5 * (x + tl.trans(x)), B, B)
    else:
        store_planes(hi, lo, start, i, j, rows, ld, scale, x, B, B)
        store_planes(hi, lo, start, j, i, rows, ld, scale, tl.trans(x), B, B)


@triton.jit
def raw_block(base, i, j, rows, cols, tall, B: tl.constexpr):
    """Block (i, j) in float32 of the wide one of a contiguous matrix and its transpose.

    ``rows`` <= ``cols`` are the sides of the wide one.
    """
    a = tl.arange(0, B)[:, None]
    b = tl.arange(0, B)[None, :]
    if tall != 0:  # neighbours in memory are neighbours in a row of what is loaded
        row, col = j * B + a, i * B + b
        at = row.to(tl.int64) * rows + col
        x = tl.trans(tl.load(base + at, mask=(row < cols) & (col < rows), other=0.0))
    else:
        row, col = i * B + a, j * B + b
        at = row.to(tl.int64) * cols + col
        x = tl.load(base + at, mask=(row < rows) & (col < cols), other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_raw_block(base, i, j, rows, cols, tall, x, B: tl.constexpr):
    """The inverse of :func:`raw_block`; ``x`` is in the format of ``base``."""
    a = tl.arange(0, B)[:, None]
    b = tl.arange(0, B)[None, :]
    if tall != 0:
        row, col = j * B + a, i * B + b
        at = row.to(tl.int64) * rows + col
        tl.store(base + at, tl.trans(x), mask=(row < cols) & (col < rows))
    else:
        row, col = i * B + a, j * B + b
        at = row.to(tl.int64) * cols + col
        tl.store(base + at, x, mask=(row < rows) & (col < cols))


@triton.jit
def magnitudes(
    weights, tiles, places, numbers, maxima,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest |entry| of each block, as bits: those of NaN and infinity are the largest.

    tiles: (matrix, block); numbers: entries of each matrix (int64).
    """
    t = tl.program_id(0)
    p, b = tl.load(tiles + 2 * t), tl.load(tiles + 2 * t + 1)
    base = part_of(weights, places, p, 0, WIDTH, ALIGNED)
    at = b.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(base + at, mask=at < tl.load(numbers + p), other=0.0).to(tl.float32)
    tl.store(maxima + t, tl.max(tl.abs(x).to(tl.int32, bitcast=True)))


@triton.jit
def largest(maxima, first, n, LANES: tl.constexpr):
    """The largest of ``n`` maxima."""
    lane = tl.arange(0, LANES)
    found = tl.zeros((LANES,), tl.int32)
    for start in range(0, n, LANES):
        here = tl.load(maxima + first + start + lane, mask=start + lane < n, other=0)
        found = tl.maximum(found, here)
    return tl.max(found)


@triton.jit
def to_unit_magnitude(x, bits):
    """``(x / u, u)``, u the power of two that the largest entry is at least; 0 where not finite."""
    finite = bits < _INFINITE
    e = tl.where(finite & (bits > 0), exponent_of(bits), 0)
    half = -e // 2  # 2^149 is no float32
    x = tl.where(finite, x, 0.0)
    return x * power_of_two(half) * power_of_two(-e - half), power_of_two(e)


@triton.jit
def total(sums, first, n, LANES: tl.constexpr):
    """The sum of ``n`` float32 numbers, always added in the same order."""
    lane = tl.arange(0, LANES)
    found = tl.zeros((LANES,), tl.float32)
    for start in range(0, n, LANES):
        found += tl.load(sums + first + start + lane, mask=start + lane < n, other=0.0)
    return tl.sum(found)
