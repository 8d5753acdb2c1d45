"""Matrices of norm at most one, times their scales, in half precision within these scales.

What `lipkernels.reference.rounding` does in attempts, one after the other, with the norm of each in
float64, is done here for all :data:`SHRINK` at once, in four launches and without a decision on the
host: the matrix is multiplied by scale (1 - c eps) and rounded to V, for every c, and

    |V|_2^2 <= g + min(|D|_F, |D^2|_F^(1/2)),    D = g I - V V^T

for any g; with g = scale^2 (1 - c eps)^2 D is what rounding has done. The largest V whose bound is
at most scale^2 is taken; where none is, the worst case is paid in full. Sums are float32, and the
bound allows for all that their roundings can do: |rounding|_2 <= |rounding|_F, and an entry of
V V^T is off by (n/64 + 16) 2^-23 of the product of two rows' norms at most.
"""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton import planes
from lipkernels.kernels.triton.elements import launch, on_device, part_of
from lipkernels.kernels.triton.group import Matrix, group
from lipkernels.kernels.triton.planes import (
    SCALE,
    raw_block,
    store_planes,
    store_raw_block,
    store_symmetric,
)
from lipkernels.kernels.triton.products import (
    B,
    add_a_bt,
    identity,
    sum_of_symmetric,
    tiling,
)
from lipkernels.kernels.triton.rounding import rounded
from lipkernels.kernels.triton.workspace import (
    LANES,
    Layout,
    is_tall,
    layout,
    lower_blocks,
    of_kind,
    sides,
    square_at,
    sum_at,
    sum_of,
    wide_at,
    wide_blocks,
)
from lipkernels.reference.rounding import worst_case_factor

SHRINK = (0.125, 0.5, 1.5, 4.0)  # units of rounding
_N = tl.constexpr(len(SHRINK))
_UNSCALE = tl.constexpr(1.0 / (128.0 * 128.0))

# numbers[p] = (the multiplier of each V, the worst case, 2^-e, (scale 2^-e)^2)
_WORST, _POWER, _BOUND = (tl.constexpr(len(SHRINK) + i) for i in range(3))
_NUMBERS = tl.constexpr(len(SHRINK) + 3)


@triton.jit
def _number(numbers, p, which):
    return tl.load(numbers + p * _NUMBERS + which).to(tl.float32)


@triton.jit
def attempt(
    matrices, results, table, tiles, places, numbers, hi, lo,
    ALIGNED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """V 2^-e for every c."""
    t = tl.program_id(0)
    p, c = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    m, n, _, ldn = sides(table, p)
    x = raw_block(part_of(matrices, places, p, 0, 2, ALIGNED), i, j, m, n, is_tall(table, p), B)
    v = rounded(x * _number(numbers, p, c), results.dtype.element_ty).to(tl.float32)
    v *= _number(numbers, p, _POWER)
    store_planes(hi, lo, wide_at(table, p, m, ldn, c), i, j, m, ldn, SCALE, v, B, B)


@triton.jit
def defect(
    table, tiles, numbers, hi, lo, sums, n_sums,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """D for every c, and |D|_F^2."""
    t = tl.program_id(0)
    p, c = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    m, _, ldm, ldn = sides(table, p)
    v = wide_at(table, p, m, ldn, c)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, v, v, i, j, m, m, ldn, B, BK, DESCRIPTORS) * _UNSCALE
    root = _number(numbers, p, c) * _number(numbers, p, _POWER)
    d = root * root * identity(i, j, m, B) - acc
    store_symmetric(hi, lo, square_at(table, p, m, ldm, c), i, j, m, ldm, SCALE, d, B)
    tl.store(sums + sum_at(table, p, i, j, n_sums, c), sum_of_symmetric(d * d, i, j))


@triton.jit
def fourth_powers(
    table, tiles, hi, lo, sums, n_sums,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """|D^2|_F^2 for every c."""
    t = tl.program_id(0)
    p, c = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    m, _, ldm, _ = sides(table, p)
    d = square_at(table, p, m, ldm, c)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, d, d, i, j, m, m, ldm, B, BK, DESCRIPTORS) * _UNSCALE
    tl.store(sums + sum_at(table, p, i, j, n_sums, _N + c), sum_of_symmetric(acc * acc, i, j))


@triton.jit
def choose(
    matrices, results, table, tiles, places, numbers, sums, n_sums,
    ALIGNED: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The largest V that is certain not to exceed its scale, or the worst case."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, _, _ = sides(table, p)
    rounding = m.to(tl.float32) * (n.to(tl.float32) / 64 + 16) * (1.0 / 8388608.0)
    limit = _number(numbers, p, _BOUND) * (1.0 - 1e-6 - rounding)
    multiplier = _number(numbers, p, _WORST)
    for k in range(_N):
        c = _N - 1 - k
        root = _number(numbers, p, c) * _number(numbers, p, _POWER)
        f = tl.sqrt(sum_of(table, sums, p, n_sums, c, LANES))
        q = tl.sqrt(tl.sqrt(sum_of(table, sums, p, n_sums, _N + c, LANES)))
        within = root * root + tl.minimum(f, q) * (1.0 + 1e-5) <= limit
        multiplier = tl.where(within, _number(numbers, p, c), multiplier)
    tall = is_tall(table, p)
    x = raw_block(part_of(matrices, places, p, 0, 2, ALIGNED), i, j, m, n, tall, B)
    v = rounded(x * multiplier, results.dtype.element_ty)
    store_raw_block(part_of(results, places, p, 1, 2, ALIGNED), i, j, m, n, tall, v, B)


def _layout(matrices: tuple[Matrix, ...]) -> Layout:
    return layout(matrices, n_wide=len(SHRINK), n_squares=len(SHRINK))


def _every(blocks: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    return [block for c in range(len(SHRINK)) for block in of_kind(c, blocks)]


def _numbers(matrix: Tensor, scale: float, dtype: torch.dtype) -> list[float]:
    """What `attempt` and `choose` multiply by: see _NUMBERS."""
    eps, power = torch.finfo(dtype).eps, 2.0 ** -math.frexp(scale)[1]
    worst_case = worst_case_factor(matrix, scale, dtype)
    multipliers = [scale * max(0.0, 1.0 - c * eps) for c in SHRINK]
    return [*multipliers, scale * worst_case, power, (scale * power) ** 2]


def rounded_within(
    matrices: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype
) -> list[Tensor]:
    """``scale x`` in ``dtype``, of norm at most ``scale``; ``x``: float32, of norm at most one."""
    results = [torch.empty_like(x, dtype=dtype) for x in matrices]
    shapes = group(matrices)
    place, device = shapes.plan("half", _layout), shapes.device
    table = shapes.table("half", torch.int64, lambda: place.rows)
    rows = [_numbers(x, scale, dtype) for x, scale in zip(matrices, scales, strict=True)]
    numbers = shapes.numbers(*zip(*rows, strict=True))
    places, aligned = shapes.places(matrices, results)
    hi, lo = torch.empty((2, place.size), dtype=torch.float16, device=device)
    sums = torch.empty(2 * len(SHRINK) * place.n_lower, dtype=torch.float32, device=device)
    product = tiling(device)
    built = product.constants | product.options
    wide = shapes.tiles("half wide", lambda a: _every(wide_blocks(a)))
    lower = shapes.tiles("half lower", lambda a: _every(lower_blocks(a)))
    with on_device(device):
        launch(
            attempt, len(wide),
            matrices[0], results[0], table, wide, places, numbers, hi, lo,
            ALIGNED=aligned, B=B, num_warps=planes.WARPS,
        )  # fmt: skip
        launch(defect, len(lower), table, lower, numbers, hi, lo, sums, place.n_lower, **built)
        launch(fourth_powers, len(lower), table, lower, hi, lo, sums, place.n_lower, **built)
        wide = shapes.tiles("wide blocks", wide_blocks)
        launch(
            choose, len(wide),
            matrices[0], results[0], table, wide, places, numbers, sums, place.n_lower,
            ALIGNED=aligned, B=B, LANES=LANES, num_warps=planes.WARPS,
        )  # fmt: skip
    return results
