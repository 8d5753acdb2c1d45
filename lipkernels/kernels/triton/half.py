"""Matrices of norm at most one, times their scales, in half precision within these scales.

What `lipkernels.reference.rounding` does in attempts, one after the other, with the norm of each in
float64, is done here for all :data:`SHRINK` at once, in three launches and without a decision on
the host: the matrix is multiplied by scale (1 - c eps) and rounded to V, for every c. With R what
rounding has changed, in units of eps scale,

    |V|_2 <= scale (1 - c eps + eps |R|_2),    |R|_2 <= min(|R|_F, |R R^T|_F^(1/2)),

and the largest V whose bound is at most scale is taken; where none is, the worst case is paid in
full.
"""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton import planes
from lipkernels.kernels.triton.elements import launch, part_of
from lipkernels.kernels.triton.group import Matrix, group
from lipkernels.kernels.triton.planes import (
    SCALE,
    raw_block,
    store_planes,
    store_raw_block,
)
from lipkernels.kernels.triton.products import (
    B,
    add_a_bt,
    sum_of_symmetric,
    tiling,
)
from lipkernels.kernels.triton.rounding import rounded
from lipkernels.kernels.triton.workspace import (
    LANES,
    WIDTH,
    Layout,
    is_tall,
    layout,
    lower_blocks,
    of_kind,
    sides,
    sum_at,
    sum_of,
    sum_of_blocks,
    wide_at,
    wide_blocks,
)
from lipkernels.reference.rounding import worst_case_factor

SHRINK = (0.3, 0.6, 1.2, 2.5)  # units of rounding
_N = tl.constexpr(len(SHRINK))
_UNSCALE = tl.constexpr(1.0 / (128.0 * 128.0))

# numbers[p] = (the multiplier of each V, c of each V, the worst case, 1 / (eps scale), 1 / eps)
_WORST, _UNIT, _EPS = (tl.constexpr(2 * len(SHRINK) + i) for i in range(3))
_NUMBERS = tl.constexpr(2 * len(SHRINK) + 3)


@triton.jit
def _number(numbers, p, which):
    return tl.load(numbers + p * _NUMBERS + which).to(tl.float32)


@triton.jit
def attempt(
    matrices, results, table, tiles, places, numbers, hi, lo, squares, n_blocks,
    ALIGNED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """R for every c, and |R|_F^2."""
    t = tl.program_id(0)
    p, c = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    m, n, _, ldn = sides(table, p)
    x = raw_block(part_of(matrices, places, p, 0, 2, ALIGNED), i, j, m, n, is_tall(table, p), B)
    x *= _number(numbers, p, c)
    r = (rounded(x, results.dtype.element_ty).to(tl.float32) - x) * _number(numbers, p, _UNIT)
    first = tl.load(table + p * WIDTH + 8)
    at = c * n_blocks + first + i * tl.cdiv(n, B) + j
    tl.store(squares + at, tl.sum(tl.sum(r * r, 1), 0))
    store_planes(hi, lo, wide_at(table, p, m, ldn, c), i, j, m, ldn, SCALE, r, B, B)


@triton.jit
def fourth_powers(
    table, tiles, hi, lo, sums, n_sums,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """|R R^T|_F^2 for every c."""
    t = tl.program_id(0)
    p, c = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    m, _, _, ldn = sides(table, p)
    r = wide_at(table, p, m, ldn, c)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, r, r, i, j, m, m, ldn, B, BK, DESCRIPTORS) * _UNSCALE
    tl.store(sums + sum_at(table, p, i, j, n_sums, c), sum_of_symmetric(acc * acc, i, j))


@triton.jit
def choose(
    matrices, results, table, tiles, places, numbers, squares, n_blocks, sums, n_sums,
    ALIGNED: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The largest V that is certain not to exceed its scale, or the worst case."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, _, _ = sides(table, p)
    # float32 roundings of the matrix, of its multiplier and of their product, in units of eps
    room = _number(numbers, p, _EPS) * (2 + tl.sqrt(m.to(tl.float32))) * (1.0 / 4194304.0)
    multiplier = _number(numbers, p, _WORST)
    for k in range(_N):
        c = _N - 1 - k
        f = tl.sqrt(sum_of_blocks(table, squares + c * n_blocks, p, m, n, B, LANES))
        q = tl.sqrt(tl.sqrt(sum_of(table, sums, p, n_sums, c, LANES)))
        within = tl.minimum(f, q) * (1.0 + 1e-4) + room <= _number(numbers, p, _N + c)
        multiplier = tl.where(within, _number(numbers, p, c), multiplier)
    tall = is_tall(table, p)
    x = raw_block(part_of(matrices, places, p, 0, 2, ALIGNED), i, j, m, n, tall, B)
    v = rounded(x * multiplier, results.dtype.element_ty)
    store_raw_block(part_of(results, places, p, 1, 2, ALIGNED), i, j, m, n, tall, v, B)


def _layout(matrices: tuple[Matrix, ...]) -> Layout:
    return layout(matrices, n_wide=len(SHRINK), n_squares=0)


def _every(blocks: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    return [block for c in range(len(SHRINK)) for block in of_kind(c, blocks)]


def _numbers(matrix: Tensor, scale: float, dtype: torch.dtype) -> list[float]:
    """What `attempt` and `choose` multiply by: see _NUMBERS."""
    eps = torch.finfo(dtype).eps
    multipliers = [scale * max(0.0, 1.0 - c * eps) for c in SHRINK]
    worst_case = scale * worst_case_factor(matrix, scale, dtype)
    return [*multipliers, *SHRINK, worst_case, 1.0 / (eps * scale), 1.0 / eps]


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
    sums = torch.empty(len(SHRINK) * place.n_lower, dtype=torch.float32, device=device)
    squares = torch.empty(len(SHRINK) * place.n_blocks, dtype=torch.float32, device=device)
    product = tiling(device)
    built = product.constants | product.options
    wide = shapes.tiles("half wide", lambda a: _every(wide_blocks(a)))
    lower = shapes.tiles("half lower", lambda a: _every(lower_blocks(a)))
    launch(
        attempt, len(wide),
        matrices[0], results[0], table, wide, places, numbers, hi, lo,
        squares, place.n_blocks, ALIGNED=aligned, B=B, num_warps=planes.WARPS,
    )  # fmt: skip
    launch(fourth_powers, len(lower), table, lower, hi, lo, sums, place.n_lower, **built)
    wide = shapes.tiles("wide blocks", wide_blocks)
    launch(
        choose, len(wide),
        matrices[0], results[0], table, wide, places, numbers,
        squares, place.n_blocks, sums, place.n_lower,
        ALIGNED=aligned, B=B, LANES=LANES, num_warps=planes.WARPS,
    )  # fmt: skip
    return results
