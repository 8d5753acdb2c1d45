"""One step of the polar iteration, X <- z X and Z <- z Z: see `polar` and `schedule`."""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from lipkernels.kernels.triton import schedule
from lipkernels.kernels.triton.planes import SCALE, load_planes, store_planes, store_symmetric
from lipkernels.kernels.triton.polar_state import (
    ALL_Z,
    DEFECT,
    FOURTH,
    UNSCALE,
    Z_SCALE,
    E,
    S,
    Z,
    inverse_scale,
)
from lipkernels.kernels.triton.products import add_a_b, add_a_bt, identity, sum_of_symmetric
from lipkernels.kernels.triton.workspace import sides, square_at, sum_at, sum_of, wide_at


# state: for each step, for each matrix, which X and Z are current (bit 0) and if it is done (bit 1)
@triton.jit
def gram(
    table, tiles, hi, lo, state, sums, n_sums, FAST: tl.constexpr,
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
    PLANES: tl.constexpr = 1 if FAST else 3
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, x, x, i, j, m, m, ldn, B, BK, DESCRIPTORS, PLANES)
    e = identity(i, j, m, B) - acc * UNSCALE
    store_symmetric(hi, lo, square_at(table, p, m, ldm, E), i, j, m, ldm, SCALE, e, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, DEFECT), sum_of_symmetric(e * e, i, j))


@triton.jit
def square(
    table, tiles, hi, lo, state, sums, n_sums, FAST: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """E^2."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    if (tl.load(state + p) & 2) != 0:
        return
    m, _, ldm, _ = sides(table, p)
    e = square_at(table, p, m, ldm, E)
    PLANES: tl.constexpr = 1 if FAST else 3
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, e, e, i, j, m, m, ldm, B, BK, DESCRIPTORS, PLANES) * UNSCALE
    store_symmetric(hi, lo, square_at(table, p, m, ldm, S), i, j, m, ldm, SCALE, acc, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, FOURTH), sum_of_symmetric(acc * acc, i, j))


@triton.jit
def polynomial(
    table, tiles, coefficients, hi, lo, state, following, last, sums, n_sums,
    FIRST: tl.constexpr, FAST: tl.constexpr,
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
    f = tl.sqrt(sum_of(table, sums, p, n_sums, DEFECT, LANES))
    t4 = sum_of(table, sums, p, n_sums, FOURTH, LANES)
    row = schedule.choose(f, t4, m.to(tl.float32), FAST)
    row = tl.where((row == 0) & (last != 0), 2, row)  # what is at one shall end there
    if FIRST:
        row = tl.where(row < 0, 2, row)  # W is not yet divided by s
    if i == 0:
        tl.store(following + p, tl.where(row < 0, now | 2, 1 - now))
    if row < 0:
        return
    c = coefficients + row * 5
    c3 = tl.load(c + 3)
    e, s = square_at(table, p, m, ldm, E), square_at(table, p, m, ldm, S)
    PLANES: tl.constexpr = 1 if FAST else 3
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, s, s, i, j, m, m, ldm, B, BK, DESCRIPTORS, PLANES)
    acc *= tl.load(c + 4) / c3
    acc = add_a_bt(acc, hi, lo, e, s, i, j, m, m, ldm, B, BK, DESCRIPTORS, PLANES)
    z = c3 * UNSCALE * acc
    z += tl.load(c + 2) * load_planes(hi, lo, s, i, j, m, ldm, SCALE, B, B)
    z += tl.load(c + 1) * load_planes(hi, lo, e, i, j, m, ldm, SCALE, B, B)
    z += tl.load(c) * identity(i, j, m, B)
    store_symmetric(hi, lo, square_at(table, p, m, ldm, Z), i, j, m, ldm, SCALE, z, B)
    if FIRST:
        store_symmetric(hi, lo, square_at(table, p, m, ldm, ALL_Z), i, j, m, ldm, Z_SCALE, z, B)


@triton.jit
def apply(
    table, tiles, hi, lo, state, following, norms, n_matrices,
    FIRST: tl.constexpr, FAST: tl.constexpr,
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
    z = square_at(table, p, m, ldm, Z)
    PLANES: tl.constexpr = 2 if FAST else 3  # of X all: see Note [Fast]
    acc = tl.zeros((B, B), tl.float32)
    if FIRST:
        factor = inverse_scale(tl.load(norms + n_matrices + p), tl.load(norms + p))
        x = wide_at(table, p, m, ldn, 0)
        acc = add_a_b(acc, hi, lo, z, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS, PLANES)
        acc *= UNSCALE * factor
        store_planes(hi, lo, wide_at(table, p, m, ldn, 1), i, j, m, ldn, SCALE, acc, B, B)
    else:
        if of_z == 0:
            x, out = (
                wide_at(table, p, m, ldn, 2 - (then & 1)),
                wide_at(table, p, m, ldn, 1 + (then & 1)),
            )
            acc = add_a_b(acc, hi, lo, z, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS, PLANES)
            store_planes(hi, lo, out, i, j, m, ldn, SCALE, acc * UNSCALE, B, B)
        else:
            x = square_at(table, p, m, ldm, ALL_Z + 1 - (then & 1))
            out = square_at(table, p, m, ldm, ALL_Z + (then & 1))
            acc = add_a_b(acc, hi, lo, z, x, i, j, m, m, ldm, ldm, B, BK, DESCRIPTORS, PLANES)
            store_planes(hi, lo, out, i, j, m, ldm, Z_SCALE, acc / SCALE, B, B)
