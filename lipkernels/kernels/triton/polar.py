"""The polar factor of every weight of a group, by matrix products alone: 31 launches.

    X <- z_k(X X^T) X,  Z <- z_k Z      up to STEPS times: see `schedule` for the polynomials
    X <- X + 1/2 E X,   E = I - X X^T   twice: polishing, in a form that rounding does not harm

from X = W / s, s^2 >= lambda_max(W W^T) rigorously, and Z = I. X ends as U, and Z as s P^-1. Each
step starts from the exact X X^T of what the one before left, so errors in the direction of U grow
with the condition number of W, not with its square. Every matrix has its own state on the device: a
row of numbers that says which of its buffers is current and whether it is done. The host launches
the same sequence for any weights; programs of matrices that are done return at once.

A step is four launches: E (`gram`), E^2 (`square`), z (`polynomial`: the powers E^3 and E^4 are
products of E and E^2) and X, Z (`apply`). The first one has a fifth, since s is known only when two
of its products are there: with G = W W^T / |W|_F^2, whose trace is one, and mu = 1/m,

    s^2 = min(|G|_F, mu + |(G - mu I)^2|_F^(1/2)) |W|_F^2,

which is within 1% to 46% of the largest eigenvalue.

What sums over a matrix need is added up by the programs of the next launch, each for itself, always
in the same order: no atomics, and equal inputs give equal bits.
"""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton import planes, schedule
from lipkernels.kernels.triton.elements import launch, on_device, part_of
from lipkernels.kernels.triton.group import Group, Matrix, group
from lipkernels.kernels.triton.half import rounded_within
from lipkernels.kernels.triton.planes import (
    SCALE,
    load_planes,
    raw_block,
    store_planes,
    store_raw_block,
    store_symmetric,
    to_unit_magnitude,
)
from lipkernels.kernels.triton.products import (
    B,
    Tiling,
    add_a_b,
    add_a_bt,
    identity,
    sum_of_symmetric,
    tiling,
)
from lipkernels.kernels.triton.workspace import (
    LANES,
    Layout,
    is_tall,
    largest,
    layout,
    lower_blocks,
    maxima_blocks,
    of_kind,
    sides,
    square_at,
    square_blocks,
    sum_at,
    sum_of,
    sum_of_blocks,
    wide_at,
    wide_blocks,
)
from lipkernels.reference.rounding import worst_case_factor

_ENOUGH = tl.constexpr(2e-6)  # |E|_F that only the last polishing is needed for
_OWN_MARGIN = 1.0 - 2.0**-22  # for roundings of this file beyond those of the worst-case factor
_UNSCALE = tl.constexpr(1.0 / (128.0 * 128.0))
_Z_SCALE = tl.constexpr(1.0)  # Z grows to 5.7^STEPS = 34,000

# What a matrix has in the workspace: X three times (W, and two that take turns), then squares.
_E, _S, _Z, _ALL_Z = (tl.constexpr(i) for i in range(4))  # E, E^2, z, and the two Z
_SQUARES = 5
# What is summed over a matrix, one number for each block on or below the diagonal.
_GRAM, _QUARTIC, _DEFECT, _FOURTH, _FOURTH_Z = (tl.constexpr(i) for i in range(5))
_SUMS = 5


@triton.jit
def _scale(alpha, squares):
    """1/s, from s^2 = |W|_F^2 / alpha; 0 for a zero matrix."""
    return tl.where(squares > 0, tl.sqrt(alpha / tl.where(squares > 0, squares, 1.0)), 0.0)


# ------------------------------------------------------------------------------------- the first
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
    table, tiles, hi, lo, squares, norms, sums, n_sums,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """G = W W^T / |W|_F^2, in the place of E."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, ldm, ldn = sides(table, p)
    x = wide_at(table, p, m, ldn, 0)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, x, x, i, j, m, m, ldn, B, BK, DESCRIPTORS)
    square = sum_of_blocks(table, squares, p, m, n, B, LANES)
    g = acc * (_UNSCALE / tl.where(square > 0, square, 1.0))
    store_symmetric(hi, lo, square_at(table, p, m, ldm, _E), i, j, m, ldm, SCALE, g, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, _GRAM), sum_of_symmetric(g * g, i, j))
    if i == 0:
        tl.store(norms + p, square)


@triton.jit
def first_square(
    table, tiles, hi, lo, sums, n_sums,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """G^2, in the place of E^2, and |(G - mu)^2|_F^2."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, _, ldm, _ = sides(table, p)
    g = square_at(table, p, m, ldm, _E)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, g, g, i, j, m, m, ldm, B, BK, DESCRIPTORS) * _UNSCALE
    store_symmetric(hi, lo, square_at(table, p, m, ldm, _S), i, j, m, ldm, SCALE, acc, B)
    mu = 1.0 / m.to(tl.float32)
    d = acc - 2 * mu * load_planes(hi, lo, g, i, j, m, ldm, SCALE, B, B)
    d += mu * mu * identity(i, j, m, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, _QUARTIC), sum_of_symmetric(d * d, i, j))


@triton.jit
def center(
    table, tiles, hi, lo, sums, norms, n_sums, n_matrices, B: tl.constexpr, LANES: tl.constexpr
):
    """E = I - alpha G and E^2 in the places of G and G^2; norms: |W|_F^2 and alpha."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, _, ldm, _ = sides(table, p)
    frobenius = tl.sqrt(sum_of(table, sums, p, n_sums, _GRAM, LANES))
    quartic = tl.sqrt(tl.sqrt(sum_of(table, sums, p, n_sums, _QUARTIC, LANES)))
    bound = tl.minimum(frobenius, 1.0 / m.to(tl.float32) + quartic) * (1 + 4e-6)
    alpha = tl.where(bound > 0, 1.0 / tl.where(bound > 0, bound, 1.0), 1.0)
    at_e, at_s = square_at(table, p, m, ldm, _E), square_at(table, p, m, ldm, _S)
    g = load_planes(hi, lo, at_e, i, j, m, ldm, SCALE, B, B)
    g2 = load_planes(hi, lo, at_s, i, j, m, ldm, SCALE, B, B)
    eye = identity(i, j, m, B)
    e, s = eye - alpha * g, eye - 2 * alpha * g + alpha * alpha * g2
    store_symmetric(hi, lo, at_e, i, j, m, ldm, SCALE, e, B)
    store_symmetric(hi, lo, at_s, i, j, m, ldm, SCALE, s, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, _DEFECT), sum_of_symmetric(e * e, i, j))
    tl.store(sums + sum_at(table, p, i, j, n_sums, _FOURTH), sum_of_symmetric(s * s, i, j))
    if i == 0:
        tl.store(norms + n_matrices + p, alpha)


# ---------------------------------------------------------------------------------------- a step
# state: for each step, for each matrix, which X and Z are current (bit 0) and if it is done (bit 1)
@triton.jit
def gram(
    table, tiles, hi, lo, state, sums, n_sums,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """E = I - X X^T."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    now = tl.load(state + p)
    if (now & 2) != 0:
        return
    m, _, ldm, ldn = sides(table, p)
    x = wide_at(table, p, m, ldn, 1 + (now & 1))
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, x, x, i, j, m, m, ldn, B, BK, DESCRIPTORS)
    e = identity(i, j, m, B) - acc * _UNSCALE
    store_symmetric(hi, lo, square_at(table, p, m, ldm, _E), i, j, m, ldm, SCALE, e, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, _DEFECT), sum_of_symmetric(e * e, i, j))


@triton.jit
def square(
    table, tiles, hi, lo, state, sums, n_sums,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """E^2."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    if (tl.load(state + p) & 2) != 0:
        return
    m, _, ldm, _ = sides(table, p)
    e = square_at(table, p, m, ldm, _E)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, e, e, i, j, m, m, ldm, B, BK, DESCRIPTORS) * _UNSCALE
    store_symmetric(hi, lo, square_at(table, p, m, ldm, _S), i, j, m, ldm, SCALE, acc, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, _FOURTH), sum_of_symmetric(acc * acc, i, j))


@triton.jit
def polynomial(
    table, tiles, coefficients, hi, lo, state, following, last, sums, n_sums, FIRST: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """z = c0 + c1 E + c2 E^2 + c3 E^3 + c4 E^4, and the state after this step."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    now = 1  # so that the first step writes into the first X
    if not FIRST:
        now = tl.load(state + p)
        if (now & 2) != 0:
            if i == 0:
                tl.store(following + p, now)
            return
    m, _, ldm, _ = sides(table, p)
    f = tl.sqrt(sum_of(table, sums, p, n_sums, _DEFECT, LANES))
    row = schedule.choose(f, sum_of(table, sums, p, n_sums, _FOURTH, LANES), m.to(tl.float32))
    row = tl.where((row == 0) & (last != 0), 2, row)  # what is at one shall end there
    if FIRST:
        row = tl.where(row < 0, 2, row)  # W is not yet divided by s
    if i == 0:
        tl.store(following + p, tl.where(row < 0, now | 2, 1 - now))
    if row < 0:
        return
    c = coefficients + row * 5
    c3 = tl.load(c + 3)
    e, s = square_at(table, p, m, ldm, _E), square_at(table, p, m, ldm, _S)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, s, s, i, j, m, m, ldm, B, BK, DESCRIPTORS)
    acc *= tl.load(c + 4) / c3
    acc = add_a_bt(acc, hi, lo, e, s, i, j, m, m, ldm, B, BK, DESCRIPTORS)
    z = c3 * _UNSCALE * acc
    z += tl.load(c + 2) * load_planes(hi, lo, s, i, j, m, ldm, SCALE, B, B)
    z += tl.load(c + 1) * load_planes(hi, lo, e, i, j, m, ldm, SCALE, B, B)
    z += tl.load(c) * identity(i, j, m, B)
    store_symmetric(hi, lo, square_at(table, p, m, ldm, _Z), i, j, m, ldm, SCALE, z, B)
    if FIRST:
        store_symmetric(hi, lo, square_at(table, p, m, ldm, _ALL_Z), i, j, m, ldm, _Z_SCALE, z, B)


@triton.jit
def apply(
    table, tiles, hi, lo, state, following, norms, n_matrices, FIRST: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """X <- z X, and, where a tile says so, Z <- z Z. The first: X <- z W / s."""
    t = tl.program_id(0)
    p, of_z = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    then = tl.load(following + p)
    if (then & 2) != 0:
        return
    m, _, ldm, ldn = sides(table, p)
    z = square_at(table, p, m, ldm, _Z)
    acc = tl.zeros((B, B), tl.float32)
    if FIRST:
        factor = _scale(tl.load(norms + n_matrices + p), tl.load(norms + p))
        x = wide_at(table, p, m, ldn, 0)
        acc = add_a_b(acc, hi, lo, z, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
        acc *= _UNSCALE * factor
        store_planes(hi, lo, wide_at(table, p, m, ldn, 1), i, j, m, ldn, SCALE, acc, B, B)
    else:
        if of_z == 0:
            x, out = (
                wide_at(table, p, m, ldn, 2 - (then & 1)),
                wide_at(table, p, m, ldn, 1 + (then & 1)),
            )
            acc = add_a_b(acc, hi, lo, z, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
            store_planes(hi, lo, out, i, j, m, ldn, SCALE, acc * _UNSCALE, B, B)
        else:
            x = square_at(table, p, m, ldm, _ALL_Z + 1 - (then & 1))
            out = square_at(table, p, m, ldm, _ALL_Z + (then & 1))
            acc = add_a_b(acc, hi, lo, z, x, i, j, m, m, ldm, ldm, B, BK, DESCRIPTORS)
            store_planes(hi, lo, out, i, j, m, ldm, _Z_SCALE, acc / SCALE, B, B)


# ----------------------------------------------------------------------------------- the last two
@triton.jit
def polish(
    table, tiles, hi, lo, state, following, sums, n_sums,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """X + E X / 2 and Z + E Z / 2, unless E is so small that the last polishing is enough."""
    t = tl.program_id(0)
    p, of_z = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    now = tl.load(state + p) & 1
    small = tl.sqrt(sum_of(table, sums, p, n_sums, _DEFECT, LANES)) <= _ENOUGH
    if (of_z == 0) & (i == 0) & (j == 0):
        tl.store(following + p, tl.where(small, now, 1 - now))
    if small:
        return
    m, _, ldm, ldn = sides(table, p)
    e = square_at(table, p, m, ldm, _E)
    acc = tl.zeros((B, B), tl.float32)
    if of_z == 0:
        x, out = wide_at(table, p, m, ldn, 1 + now), wide_at(table, p, m, ldn, 2 - now)
        acc = add_a_b(acc, hi, lo, e, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
        acc = load_planes(hi, lo, x, i, j, m, ldn, SCALE, B, B) + acc * (0.5 * _UNSCALE)
        store_planes(hi, lo, out, i, j, m, ldn, SCALE, acc, B, B)
    else:
        x = square_at(table, p, m, ldm, _ALL_Z + now)
        out = square_at(table, p, m, ldm, _ALL_Z + 1 - now)
        acc = add_a_b(acc, hi, lo, e, x, i, j, m, m, ldm, ldm, B, BK, DESCRIPTORS)
        acc = load_planes(hi, lo, x, i, j, m, ldm, _Z_SCALE, B, B) + acc * (0.5 / SCALE)
        store_planes(hi, lo, out, i, j, m, ldm, _Z_SCALE, acc, B, B)


@triton.jit
def last_gram(
    factors, table, tiles, places, hi, lo, state, sums, n_sums,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile's kind says of what it is a block: 0: E; 1: P = W X^T; 2: Z Z^T, for its norm."""
    t = tl.program_id(0)
    p, kind = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    now = tl.load(state + p) & 1
    m, _, ldm, ldn = sides(table, p)
    acc = tl.zeros((B, B), tl.float32)
    if kind == 2:
        z = square_at(table, p, m, ldm, _ALL_Z + now)
        acc = add_a_bt(acc, hi, lo, z, z, i, j, m, m, ldm, B, BK, DESCRIPTORS)
        tl.store(
            sums + sum_at(table, p, i, j, n_sums, _FOURTH_Z), sum_of_symmetric(acc * acc, i, j)
        )
    else:
        x = wide_at(table, p, m, ldn, 1 + now)
        a = tl.where(kind == 0, x, wide_at(table, p, m, ldn, 0))
        acc = add_a_bt(acc, hi, lo, a, x, i, j, m, m, ldn, B, BK, DESCRIPTORS) * _UNSCALE
        if kind == 0:
            e = identity(i, j, m, B) - acc
            store_symmetric(hi, lo, square_at(table, p, m, ldm, _E), i, j, m, ldm, SCALE, e, B)
        else:
            base = part_of(factors, places, p, 1, WIDTH, ALIGNED)
            if i == j:
                store_raw_block(base, i, j, m, m, 0, 0.5 * (acc + tl.trans(acc)), B)
            else:
                store_raw_block(base, i, j, m, m, 0, acc, B)
                store_raw_block(base, j, i, m, m, 0, tl.trans(acc), B)


@triton.jit
def finish(
    results, factors, spectra, scalars, table, tiles, places, multipliers, hi, lo, state,
    units, norms, sums, n_sums, n_matrices, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Kind 0: the result, factor (X + E X / 2), and what is saved with it; 1: P^-1 = Z / s."""
    t = tl.program_id(0)
    p, kind = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    now = tl.load(state + p) & 1
    m, n, ldm, ldn = sides(table, p)
    e = square_at(table, p, m, ldm, _E)
    squares, alpha = tl.load(norms + p), tl.load(norms + n_matrices + p)
    factor = tl.load(multipliers + p).to(tl.float32) * tl.load(units + n_matrices + p)
    acc = tl.zeros((B, B), tl.float32)
    if kind == 0:
        x = wide_at(table, p, m, ldn, 1 + now)
        acc = add_a_b(acc, hi, lo, e, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
        acc = load_planes(hi, lo, x, i, j, m, ldn, SCALE, B, B) + acc * (0.5 * _UNSCALE)
        base = part_of(results, places, p, 0, WIDTH, ALIGNED)
        store_raw_block(base, i, j, m, n, is_tall(table, p), acc * factor, B)
        if (i == 0) & (j == 0):
            pair = part_of(scalars, places, p, 3, WIDTH, ALIGNED)
            tl.store(pair, tl.load(units + p))
            tl.store(pair + 1, factor)
            # At least the largest eigenvalue of Z: what is saved is at most the smallest of P.
            z = tl.sqrt(tl.sqrt(sum_of(table, sums, p, n_sums, _FOURTH_Z, LANES)))
            s = tl.sqrt(squares / alpha)
            spectrum = part_of(spectra, places, p, 2, WIDTH, ALIGNED)
            lane = tl.arange(0, LANES)
            for start in range(0, m, LANES):
                at = start + lane
                entry = tl.where(at == 0, -s, tl.where(at == 1, s / z, 0.0))
                tl.store(spectrum + at, entry, mask=at < m)
    else:
        x = square_at(table, p, m, ldm, _ALL_Z + now)
        acc = add_a_b(acc, hi, lo, e, x, i, j, m, m, ldm, ldm, B, BK, DESCRIPTORS)
        acc = load_planes(hi, lo, x, i, j, m, ldm, _Z_SCALE, B, B) + acc * (0.5 / SCALE)
        base = part_of(factors, places, p, 1, WIDTH, ALIGNED)
        store_raw_block(base, i, j, m, m, 0, acc * _scale(alpha, squares), B)


# ----------------------------------------------------------------------------------- the launches


def _layout(matrices: tuple[Matrix, ...]) -> Layout:
    return layout(matrices, n_wide=3, n_squares=_SQUARES)


class _Forward:
    """The launches of one group, all float32 results, in order."""

    def __init__(
        self, weights: list[Tensor], outputs: list[list[Tensor]], multipliers: list[float]
    ):
        self.shapes: Group = group(weights)
        device = self.shapes.device
        self.layout: Layout = self.shapes.plan("polar", _layout)
        self.kept = weights  # copies among them, which must outlive the launches
        self.weights, self.outputs = weights[0], [part[0] for part in outputs]
        self.table = self.shapes.table("polar", torch.int64, lambda: self.layout.rows)
        self.places, self.aligned = self.shapes.places(weights)
        self.to, self.to_aligned = self.shapes.places(*outputs)
        self.multipliers = self.shapes.numbers(multipliers)
        self.n = len(self.shapes.matrices)
        self.hi, self.lo = torch.empty((2, self.layout.size), dtype=torch.float16, device=device)
        self.state = torch.empty((schedule.STEPS + 2, self.n), dtype=torch.int32, device=device)
        self.units = torch.empty(2 * self.n, dtype=torch.float32, device=device)
        self.norms = torch.empty(2 * self.n, dtype=torch.float32, device=device)
        self.sums = torch.empty(_SUMS * self.layout.n_lower, dtype=torch.float32, device=device)
        self.product: Tiling = tiling(device)

    def _start(self) -> None:
        shapes, layout, device = self.shapes, self.layout, self.shapes.device
        maxima = torch.empty(layout.n_maxima, dtype=torch.int32, device=device)
        squares = torch.empty(layout.n_blocks, dtype=torch.float32, device=device)
        numbers = shapes.table(
            "entries", torch.int64, lambda: [(a.rows * a.cols,) for a in shapes.matrices]
        )
        tiles = shapes.tiles("maxima", maxima_blocks)
        launch(
            planes.magnitudes, len(tiles),
            self.weights, tiles, self.places, numbers, maxima,
            WIDTH=1, ALIGNED=self.aligned, BLOCK=planes.BLOCK, num_warps=planes.WARPS,
        )  # fmt: skip
        tiles = shapes.tiles("wide blocks", wide_blocks)
        launch(
            pack, len(tiles),
            self.weights, self.table, tiles, self.places, maxima, self.hi, self.lo, self.units,
            squares, self.n,
            WIDTH=1, ALIGNED=self.aligned, B=B, LANES=LANES, num_warps=planes.WARPS,
        )  # fmt: skip
        tiles, product = self._lower(), self.product
        grid, common = len(tiles), (self.table, tiles, self.hi, self.lo)
        launch(
            first_gram, grid,
            *common, squares, self.norms, self.sums, layout.n_lower,
            LANES=LANES, **product.constants, **product.options,
        )  # fmt: skip
        launch(
            first_square,
            grid,
            *common,
            self.sums,
            layout.n_lower,
            **product.constants,
            **product.options,
        )
        launch(
            center, grid,
            *common, self.sums, self.norms, layout.n_lower, self.n,
            B=B, LANES=LANES, num_warps=planes.WARPS,
        )  # fmt: skip

    def _lower(self) -> Tensor:
        return self.shapes.tiles("lower blocks", lower_blocks)

    def _step(self, k: int) -> None:
        layout, product, first = self.layout, self.product, k == 0
        coefficients = self.shapes.table(
            "polar coefficients", torch.float32, lambda: schedule.COEFFICIENTS
        )
        tiles = self._lower()
        grid, now, following = len(tiles), self.state[k], self.state[k + 1]
        common, built = (self.table, tiles, self.hi, self.lo), product.constants | product.options
        if not first:
            launch(gram, grid, *common, now, self.sums, layout.n_lower, **built)
            launch(square, grid, *common, now, self.sums, layout.n_lower, **built)
        launch(
            polynomial, grid,
            self.table, tiles, coefficients, self.hi, self.lo, now, following,
            int(k == schedule.STEPS - 1), self.sums, layout.n_lower,
            FIRST=first, LANES=LANES, **built,
        )  # fmt: skip
        tiles = self._first_applied() if first else self._applied()
        launch(
            apply, len(tiles),
            self.table, tiles, self.hi, self.lo, now, following, self.norms, self.n,
            FIRST=first, **built,
        )  # fmt: skip

    def _first_applied(self) -> Tensor:
        return self.shapes.tiles("blocks of X", lambda a: of_kind(0, wide_blocks(a)))

    def _applied(self) -> Tensor:
        def blocks(a: Matrix) -> list[tuple[int, ...]]:
            return of_kind(0, wide_blocks(a)) + of_kind(1, square_blocks(a))

        return self.shapes.tiles("blocks of X and Z", blocks)

    def _finish(self) -> None:
        def last(a: Matrix) -> list[tuple[int, ...]]:
            lower = lower_blocks(a)
            p = of_kind(1, lower) if a.rows == a.cols else []
            return of_kind(0, lower) + p + of_kind(2, lower)

        def results(a: Matrix) -> list[tuple[int, ...]]:
            inverse = of_kind(1, square_blocks(a)) if a.rows != a.cols else []
            return of_kind(0, wide_blocks(a)) + inverse

        shapes, product, n_sums = self.shapes, self.product, self.layout.n_lower
        built = product.constants | product.options
        now, following = self.state[schedule.STEPS], self.state[schedule.STEPS + 1]
        tiles = self._lower()
        launch(
            gram, len(tiles), self.table, tiles, self.hi, self.lo, now, self.sums, n_sums, **built
        )
        tiles = self._applied()
        launch(
            polish, len(tiles),
            self.table, tiles, self.hi, self.lo, now, following, self.sums, n_sums,
            LANES=LANES, **built,
        )  # fmt: skip
        tiles = shapes.tiles("E, P, Z Z^T", last)
        launch(
            last_gram, len(tiles),
            self.outputs[1], self.table, tiles, self.to, self.hi, self.lo, following,
            self.sums, n_sums, WIDTH=4, ALIGNED=self.to_aligned, **built,
        )  # fmt: skip
        tiles = shapes.tiles("U, Q", results)
        launch(
            finish, len(tiles),
            *self.outputs, self.table, tiles, self.to, self.multipliers, self.hi, self.lo,
            following, self.units, self.norms, self.sums, n_sums, self.n,
            WIDTH=4, ALIGNED=self.to_aligned, LANES=LANES, **built,
        )  # fmt: skip

    def run(self) -> None:
        with on_device(self.shapes.device):
            self._start()
            for k in range(schedule.STEPS):
                self._step(k)
            self._finish()


def empty_outputs(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Lists of results, factors, spectra and scalars, as ``lipkernels::polar_factor`` has them."""
    shapes = []
    for w in weights:
        *batch, rows, cols = w.shape
        m = min(rows, cols)
        shapes.append((w.shape, (*batch, m, m), (*batch, m), (*batch, 2)))
    device = weights[0].device
    return [
        [torch.empty(shape, dtype=torch.float32, device=device) for shape in kind]
        for kind in zip(*shapes, strict=True)
    ]


def polar_factors(weights: Sequence[Tensor], factors: Sequence[float]) -> list[list[Tensor]]:
    """Results ``factor U`` in float32 of weights that are not float64, and what is saved."""
    outputs = empty_outputs(weights)
    for kind in dict.fromkeys(w.dtype for w in weights):
        members = [i for i, w in enumerate(weights) if w.dtype == kind]
        _Forward(
            [weights[i].contiguous() for i in members],
            [[part[i] for i in members] for part in outputs],
            [factors[i] for i in members],
        ).run()
    return outputs


def forward(
    weights: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """As ``lipkernels::polar_factor``, for weights that are not float64."""
    multipliers = [1.0] * len(weights)
    if dtype == torch.float32:
        multipliers = [
            scale * worst_case_factor(w.to("meta", torch.float32), scale, dtype) * _OWN_MARGIN
            for w, scale in zip(weights, scales, strict=True)
        ]
    results, *saved = polar_factors(weights, multipliers)
    if dtype != torch.float32:
        results = rounded_within(results, scales, dtype)
    return results, [tensor for parts in zip(*saved, strict=True) for tensor in parts]
