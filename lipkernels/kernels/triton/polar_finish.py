"""The polishing at the end of the polar iteration, and what it leaves: see `polar`."""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from lipkernels.kernels.triton.elements import part_of
from lipkernels.kernels.triton.planes import (
    SCALE,
    load_planes,
    store_planes,
    store_raw_block,
    store_symmetric,
)
from lipkernels.kernels.triton.polar_state import (
    ALL_Z,
    DEFECT,
    FOURTH_Z,
    UNSCALE,
    Z_SCALE,
    E,
    inverse_scale,
)
from lipkernels.kernels.triton.products import add_a_b, add_a_bt, identity, sum_of_symmetric
from lipkernels.kernels.triton.workspace import (
    WIDTH as TABLE,
)
from lipkernels.kernels.triton.workspace import (
    is_tall,
    sides,
    square_at,
    sum_at,
    sum_of,
    sum_of_blocks,
    wide_at,
)

_ENOUGH = tl.constexpr(2e-6)  # |E|_F that only the last polishing is needed for


@triton.jit
def _certain(
    table, p, m, n, sums, n_sums, products, n_products, B: tl.constexpr, LANES: tl.constexpr
):
    """A factor that makes |X|_2 <= 1 certain after the first polishing: 1 where it is; 0 for NaN.

    Polishing maps singular values x in [0, 2] to [-1, 1]. With e = 1 - x^2 they are there if
    |E|_F <= 3; if a = |E X|_F^2 = sum x^2 e^2 is at most 36, what x = 2 adds to it; or, where many
    are still on their way to one, if sum x^2 (e - b)^2 is at most 4 (3 + b)^2 for a b > -3. For
    the mean b of e that sum is a - b <E X, X>. Otherwise x > 2 has x^6 <= 16 a / 9, and polishing
    makes x^3 / 2 of it at most.
    """
    f = tl.sqrt(sum_of(table, sums, p, n_sums, DEFECT, LANES))
    a = sum_of_blocks(table, products, p, m, n, B, LANES)
    along = sum_of_blocks(table, products + n_products, p, m, n, B, LANES)
    squares = sum_of_blocks(table, products + 2 * n_products, p, m, n, B, LANES)
    b = along / tl.where(squares > 0, squares, 1.0)
    is_near = (b > -2.9) & (a - b * along <= 3.5 * (3.0 + b) * (3.0 + b))
    # What polishing has not computed, where f <= _ENOUGH, is not looked at.
    factor = tl.where((f <= 2.9) | (a <= 35.0) | is_near, 1.0, tl.minimum(1.0, 1.49 / tl.sqrt(a)))
    return tl.where((f <= 2.9) | (a < float("inf")), factor, 0.0)


@triton.jit
def polish(
    table, tiles, hi, lo, state, following, sums, n_sums, products, n_products, FAST: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """X + E X / 2 and Z + E Z / 2, unless E is so small that the last polishing is enough.

    products: with FAST, what each block adds to |E X|_F^2, <E X, X> and |X|_F^2.
    """
    t = tl.program_id(0)
    p, of_z = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    now = tl.load(state + p) & 1
    small = tl.sqrt(sum_of(table, sums, p, n_sums, DEFECT, LANES)) <= _ENOUGH
    if (of_z == 0) & (i == 0) & (j == 0):
        tl.store(following + p, tl.where(small, now, 1 - now))
    if small:
        return
    m, n, ldm, ldn = sides(table, p)
    e = square_at(table, p, m, ldm, E)
    acc = tl.zeros((B, B), tl.float32)
    if of_z == 0:
        x, out = wide_at(table, p, m, ldn, 1 + now), wide_at(table, p, m, ldn, 2 - now)
        acc = add_a_b(acc, hi, lo, e, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
        now_x = load_planes(hi, lo, x, i, j, m, ldn, SCALE, B, B)
        if FAST:
            ex = acc * UNSCALE
            at = products + tl.load(table + p * TABLE + 8) + i * tl.cdiv(n, B) + j
            tl.store(at, tl.sum(tl.sum(ex * ex, 1), 0))
            tl.store(at + n_products, tl.sum(tl.sum(ex * now_x, 1), 0))
            tl.store(at + 2 * n_products, tl.sum(tl.sum(now_x * now_x, 1), 0))
        acc = now_x + acc * (0.5 * UNSCALE)
        store_planes(hi, lo, out, i, j, m, ldn, SCALE, acc, B, B)
    else:
        x = square_at(table, p, m, ldm, ALL_Z + now)
        out = square_at(table, p, m, ldm, ALL_Z + 1 - now)
        acc = add_a_b(acc, hi, lo, e, x, i, j, m, m, ldm, ldm, B, BK, DESCRIPTORS)
        acc = load_planes(hi, lo, x, i, j, m, ldm, Z_SCALE, B, B) + acc * (0.5 / SCALE)
        store_planes(hi, lo, out, i, j, m, ldm, Z_SCALE, acc, B, B)


@triton.jit
def last_gram(
    factors, table, tiles, places, hi, lo, state, sums, n_sums, products, n_products,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr, FAST: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A tile's kind says of what it is a block: 0: E; 1: P = W X^T; 2: Z Z^T, for its norm."""
    t = tl.program_id(0)
    p, kind = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    now = tl.load(state + p) & 1
    m, n, ldm, ldn = sides(table, p)
    acc = tl.zeros((B, B), tl.float32)
    if kind == 2:
        z = square_at(table, p, m, ldm, ALL_Z + now)
        acc = add_a_bt(acc, hi, lo, z, z, i, j, m, m, ldm, B, BK, DESCRIPTORS)
        tl.store(sums + sum_at(table, p, i, j, n_sums, FOURTH_Z), sum_of_symmetric(acc * acc, i, j))
    else:
        x = wide_at(table, p, m, ldn, 1 + now)
        a = tl.where(kind == 0, x, wide_at(table, p, m, ldn, 0))
        acc = add_a_bt(acc, hi, lo, a, x, i, j, m, m, ldn, B, BK, DESCRIPTORS) * UNSCALE
        if FAST:
            c = _certain(table, p, m, n, sums, n_sums, products, n_products, B, LANES)
            if kind == 0:
                acc = tl.where(c > 0, acc * (c * c), 0.0)
            else:  # the gradient of what is not the polar factor has no meaning: a finite one
                acc = tl.where(c == 1, acc, identity(i, j, m, B))
        if kind == 0:
            e = identity(i, j, m, B) - acc
            store_symmetric(hi, lo, square_at(table, p, m, ldm, E), i, j, m, ldm, SCALE, e, B)
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
    units, norms, sums, n_sums, n_matrices, products, n_products,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr, FAST: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Kind 0: the result, factor (X + E X / 2), and what is saved with it; 1: P^-1 = Z / s."""
    t = tl.program_id(0)
    p, kind = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    now = tl.load(state + p) & 1
    m, n, ldm, ldn = sides(table, p)
    e = square_at(table, p, m, ldm, E)
    squares, alpha = tl.load(norms + p), tl.load(norms + n_matrices + p)
    factor = tl.load(multipliers + p).to(tl.float32) * tl.load(units + n_matrices + p)
    acc = tl.zeros((B, B), tl.float32)
    certain = 1.0
    if FAST:
        certain = _certain(table, p, m, n, sums, n_sums, products, n_products, B, LANES)
    if kind == 0:
        x = wide_at(table, p, m, ldn, 1 + now)
        acc = add_a_b(acc, hi, lo, e, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
        acc = load_planes(hi, lo, x, i, j, m, ldn, SCALE, B, B) + acc * (0.5 * UNSCALE)
        if FAST:
            acc = tl.where(certain > 0, acc * certain, 0.0)
        base = part_of(results, places, p, 0, WIDTH, ALIGNED)
        store_raw_block(base, i, j, m, n, is_tall(table, p), acc * factor, B)
        if (i == 0) & (j == 0):
            pair = part_of(scalars, places, p, 3, WIDTH, ALIGNED)
            tl.store(pair, tl.load(units + p))
            tl.store(pair + 1, factor)
            # At least the largest eigenvalue of Z: what is saved is at most the smallest of P.
            z = tl.sqrt(tl.sqrt(sum_of(table, sums, p, n_sums, FOURTH_Z, LANES)))
            s = tl.sqrt(squares / alpha)
            if FAST:
                s, z = tl.where(certain == 1, s, 1.0), tl.where(certain == 1, z, 1.0)
            spectrum = part_of(spectra, places, p, 2, WIDTH, ALIGNED)
            lane = tl.arange(0, LANES)
            for start in range(0, m, LANES):
                at = start + lane
                entry = tl.where(at == 0, -s, tl.where(at == 1, s / z, 0.0))
                tl.store(spectrum + at, entry, mask=at < m)
    else:
        x = square_at(table, p, m, ldm, ALL_Z + now)
        acc = add_a_b(acc, hi, lo, e, x, i, j, m, m, ldm, ldm, B, BK, DESCRIPTORS)
        acc = load_planes(hi, lo, x, i, j, m, ldm, Z_SCALE, B, B) + acc * (0.5 / SCALE)
        acc *= inverse_scale(alpha, squares)
        if FAST:
            acc = tl.where(certain == 1, acc, identity(i, j, m, B))
        base = part_of(factors, places, p, 1, WIDTH, ALIGNED)
        store_raw_block(base, i, j, m, m, 0, acc, B)
