"""The scale s of each matrix, and E = I - X X^T and E^2 of X = W / s: see `polar`."""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from lipkernels.kernels.triton.elements import part_of
from lipkernels.kernels.triton.planes import (
    SCALE,
    load_planes,
    raw_block,
    store_planes,
    store_symmetric,
    to_unit_magnitude,
)
from lipkernels.kernels.triton.polar_state import DEFECT, FOURTH, GRAM, QUARTIC, UNSCALE, E, S
from lipkernels.kernels.triton.products import add_a_bt, identity, sum_of_symmetric
from lipkernels.kernels.triton.workspace import (
    is_tall,
    largest,
    sides,
    square_at,
    sum_at,
    sum_of,
    sum_of_blocks,
    wide_at,
)


@triton.jit
def pack(
    weights, table, tiles, places, maxima, hi, lo, units, squares, n_matrices,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """W / unit in planes; units: the unit, and NaN instead of 1 where W is not finite."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, _, ldn = sides(table, p)
    bits = largest(table, maxima, p, LANES)
    base = part_of(weights, places, p, 0, WIDTH, ALIGNED)
    x, unit = to_unit_magnitude(raw_block(base, i, j, m, n, is_tall(table, p), B), bits)
    store_planes(hi, lo, wide_at(table, p, m, ldn, 0), i, j, m, ldn, SCALE, x, B, B)
    tl.store(squares + t, tl.sum(tl.sum(x * x, 1), 0))
    if (i == 0) & (j == 0):
        tl.store(units + p, unit)
        tl.store(units + n_matrices + p, tl.where(bits < 0x7F800000, 1.0, float("nan")))


@triton.jit
def first_gram(
    table, tiles, hi, lo, squares, norms, sums, n_sums, FAST: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """G = W W^T / |W|_F^2, in the place of E."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, ldm, ldn = sides(table, p)
    x = wide_at(table, p, m, ldn, 0)
    PLANES: tl.constexpr = 1 if FAST else 3
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, x, x, i, j, m, m, ldn, B, BK, DESCRIPTORS, PLANES)
    square = sum_of_blocks(table, squares, p, m, n, B, LANES)
    g = acc * (UNSCALE / tl.where(square > 0, square, 1.0))
    store_symmetric(hi, lo, square_at(table, p, m, ldm, E), i, j, m, ldm, SCALE, g, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, GRAM), sum_of_symmetric(g * g, i, j))
    if i == 0:
        tl.store(norms + p, square)


@triton.jit
def first_square(
    table, tiles, hi, lo, sums, n_sums, FAST: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """G^2, in the place of E^2, and |(G - mu)^2|_F^2."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, _, ldm, _ = sides(table, p)
    g = square_at(table, p, m, ldm, E)
    PLANES: tl.constexpr = 1 if FAST else 3
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, g, g, i, j, m, m, ldm, B, BK, DESCRIPTORS, PLANES) * UNSCALE
    store_symmetric(hi, lo, square_at(table, p, m, ldm, S), i, j, m, ldm, SCALE, acc, B)
    mu = 1.0 / m.to(tl.float32)
    d = acc - 2 * mu * load_planes(hi, lo, g, i, j, m, ldm, SCALE, B, B)
    d += mu * mu * identity(i, j, m, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, QUARTIC), sum_of_symmetric(d * d, i, j))


@triton.jit
def center(
    table, tiles, hi, lo, sums, norms, n_sums, n_matrices, B: tl.constexpr, LANES: tl.constexpr
):
    """E = I - alpha G and E^2 in the places of G and G^2; norms: |W|_F^2 and alpha."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, _, ldm, _ = sides(table, p)
    frobenius = tl.sqrt(sum_of(table, sums, p, n_sums, GRAM, LANES))
    quartic = tl.sqrt(tl.sqrt(sum_of(table, sums, p, n_sums, QUARTIC, LANES)))
    bound = tl.minimum(frobenius, 1.0 / m.to(tl.float32) + quartic) * (1 + 4e-6)
    alpha = tl.where(bound > 0, 1.0 / tl.where(bound > 0, bound, 1.0), 1.0)
    at_e, at_s = square_at(table, p, m, ldm, E), square_at(table, p, m, ldm, S)
    g = load_planes(hi, lo, at_e, i, j, m, ldm, SCALE, B, B)
    g2 = load_planes(hi, lo, at_s, i, j, m, ldm, SCALE, B, B)
    eye = identity(i, j, m, B)
    e, s = eye - alpha * g, eye - 2 * alpha * g + alpha * alpha * g2
    store_symmetric(hi, lo, at_e, i, j, m, ldm, SCALE, e, B)
    store_symmetric(hi, lo, at_s, i, j, m, ldm, SCALE, s, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, DEFECT), sum_of_symmetric(e * e, i, j))
    tl.store(sums + sum_at(table, p, i, j, n_sums, FOURTH), sum_of_symmetric(s * s, i, j))
    if i == 0:
        tl.store(norms + n_matrices + p, alpha)
