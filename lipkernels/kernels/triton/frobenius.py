"""Frobenius normalization of a group of weights, and its gradient, in at most two launches each.

Sums and products are float64, whose range holds the square of any float32 number: nothing needs
to be scaled first, and the sum of a million equal squares is exact to 1e-14. The kernels read each
number once or twice and compute next to nothing with it, so that memory sets their pace.

Whole matrices: ``partial_sums`` leaves one sum for every block of a matrix, and every program of
``normalize`` (``differentiate``) adds up those of its matrix, in their order. Rows: one program of
``normalize_rows`` (``differentiate_rows``) has some rows to itself, and goes over them twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton.elements import (
    block_at,
    launch,
    narrowed,
    part_of,
    saturated,
    sum_of,
    widened,
)
from lipkernels.kernels.triton.group import Group, Matrix, group

WHOLE = {"BLOCK": 2048, "LANES": 128}  # elements of a program; sums of blocks added at a time
BY_ROWS = {"ROWS": 16, "COLUMNS": 128}  # rows of a program, and how much of them it has at a time
WARPS = 4


@triton.jit
def write_block(base, start, n, x, BLOCK: tl.constexpr):
    """Write ``x`` there, what is beyond the ``n``-th element left out."""
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        tl.store(base + i, x)
    else:
        tl.store(base + i, x, mask=i < n)


@triton.jit
def _inverse(squares):
    """1 / |W|_F: zero for a zero matrix, NaN where an entry is not finite."""
    norm = tl.sqrt(squares)
    inverse = tl.where(norm == 0.0, 0.0, 1.0 / tl.where(norm == 0.0, 1.0, norm))
    return tl.where(norm < float("inf"), inverse, float("nan"))


# --------------------------------------------------------------------------- whole matrices
# table: (elements, first block); tiles: (matrix, block)
@triton.jit
def partial_sums(
    weights, grads, table, tiles, places, squares, products,
    HAS_GRADS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of every block: the sum of W^2, and, where there is a gradient, of Gamma W."""
    t = tl.program_id(0).to(tl.int64)
    p, b = tl.load(tiles + 2 * t), tl.load(tiles + 2 * t + 1)
    n, first = tl.load(table + 2 * p), tl.load(table + 2 * p + 1)
    start = b.to(tl.int64) * BLOCK
    x = block_at(part_of(weights, places, p, 0, WIDTH, ALIGNED), start, n, BLOCK)
    tl.store(squares + first + b, tl.sum(x * x))
    if HAS_GRADS:
        grad = block_at(part_of(grads, places, p, 1, WIDTH, ALIGNED), start, n, BLOCK)
        tl.store(products + first + b, tl.sum(grad * x))


@triton.jit
def normalize(
    weights, results, table, tiles, places, factors, squares,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """factor W / |W|_F, rounded."""
    t = tl.program_id(0).to(tl.int64)
    p, b = tl.load(tiles + 2 * t), tl.load(tiles + 2 * t + 1)
    n, first = tl.load(table + 2 * p), tl.load(table + 2 * p + 1)
    inverse = _inverse(sum_of(squares + first, tl.cdiv(n, BLOCK), LANES))
    start = b.to(tl.int64) * BLOCK
    x = block_at(part_of(weights, places, p, 0, 2, ALIGNED), start, n, BLOCK)
    out = narrowed(x * (inverse * tl.load(factors + p)), results.dtype.element_ty)
    write_block(part_of(results, places, p, 1, 2, ALIGNED), start, n, out, BLOCK)


@triton.jit
def differentiate(
    weights, grads, results, table, tiles, places, scales, squares, products, limit,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """scale (Gamma - <Gamma, W> / |W|^2 W) / |W|, saturated."""
    t = tl.program_id(0).to(tl.int64)
    p, b = tl.load(tiles + 2 * t), tl.load(tiles + 2 * t + 1)
    n, first = tl.load(table + 2 * p), tl.load(table + 2 * p + 1)
    blocks = tl.cdiv(n, BLOCK)
    inverse = _inverse(sum_of(squares + first, blocks, LANES))
    along = sum_of(products + first, blocks, LANES) * inverse * inverse
    start = b.to(tl.int64) * BLOCK
    x = block_at(part_of(weights, places, p, 0, 3, ALIGNED), start, n, BLOCK)
    grad = block_at(part_of(grads, places, p, 1, 3, ALIGNED), start, n, BLOCK)
    out = (grad - along * x) * (inverse * tl.load(scales + p))
    out = narrowed(saturated(out, limit), results.dtype.element_ty)
    write_block(part_of(results, places, p, 2, 3, ALIGNED), start, n, out, BLOCK)


# ---------------------------------------------------------------------------------- row by row
# table: (rows, columns); tiles: (matrix, block of rows)
@triton.jit
def normalize_rows(
    weights, results, table, tiles, places, factors,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """factor W_i / |W_i| for every row, rounded."""
    t = tl.program_id(0).to(tl.int64)
    p, b = tl.load(tiles + 2 * t), tl.load(tiles + 2 * t + 1)
    rows, columns = tl.load(table + 2 * p), tl.load(table + 2 * p + 1)
    row = b.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    weight = part_of(weights, places, p, 0, 2, ALIGNED) + row * columns + column
    result = part_of(results, places, p, 1, 2, ALIGNED) + row * columns + column
    squares = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(0, columns, COLUMNS):
        inside = (row < rows) & (start + column < columns)
        x = widened(tl.load(weight + start, mask=inside, other=0.0))
        squares += x * x
    factor = _inverse(tl.sum(squares, axis=1))[:, None] * tl.load(factors + p)
    for start in range(0, columns, COLUMNS):
        inside = (row < rows) & (start + column < columns)
        x = widened(tl.load(weight + start, mask=inside, other=0.0))
        tl.store(result + start, narrowed(x * factor, results.dtype.element_ty), mask=inside)


@triton.jit
def differentiate_rows(
    weights, grads, results, table, tiles, places, scales, limit,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As ``differentiate``, for every row."""
    t = tl.program_id(0).to(tl.int64)
    p, b = tl.load(tiles + 2 * t), tl.load(tiles + 2 * t + 1)
    rows, columns = tl.load(table + 2 * p), tl.load(table + 2 * p + 1)
    row = b.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    weight = part_of(weights, places, p, 0, 3, ALIGNED) + row * columns + column
    gamma = part_of(grads, places, p, 1, 3, ALIGNED) + row * columns + column
    result = part_of(results, places, p, 2, 3, ALIGNED) + row * columns + column
    squares = tl.zeros((ROWS, COLUMNS), tl.float64)
    products = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(0, columns, COLUMNS):
        inside = (row < rows) & (start + column < columns)
        x = widened(tl.load(weight + start, mask=inside, other=0.0))
        grad = widened(tl.load(gamma + start, mask=inside, other=0.0))
        squares += x * x
        products += grad * x
    inverse = _inverse(tl.sum(squares, axis=1))
    along = (tl.sum(products, axis=1) * inverse * inverse)[:, None]
    factor = inverse[:, None] * tl.load(scales + p)
    for start in range(0, columns, COLUMNS):
        inside = (row < rows) & (start + column < columns)
        x = widened(tl.load(weight + start, mask=inside, other=0.0))
        grad = widened(tl.load(gamma + start, mask=inside, other=0.0))
        out = saturated((grad - along * x) * factor, limit)
        tl.store(result + start, narrowed(out, results.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------ launchers
def _n_blocks(matrix: Matrix) -> int:
    return -(-matrix.rows * matrix.cols // WHOLE["BLOCK"])


def blocks_of(shapes: Group) -> tuple[Tensor, Tensor]:
    """The table and the tiles of whole matrices in blocks."""

    def rows() -> list[tuple[int, int]]:
        found, first = [], 0
        for matrix in shapes.matrices:
            found.append((matrix.rows * matrix.cols, first))
            first += _n_blocks(matrix)
        return found

    table = shapes.table("frobenius", torch.int64, rows)
    tiles = shapes.tiles("frobenius", lambda m: [(b,) for b in range(_n_blocks(m))])
    return table, tiles


def _by_rows(shapes: Group) -> tuple[Tensor, Tensor]:
    size = BY_ROWS["ROWS"]
    table = shapes.table(
        "frobenius rows", torch.int64, lambda: [(m.rows, m.cols) for m in shapes.matrices]
    )
    tiles = shapes.tiles("frobenius rows", lambda m: [(b,) for b in range(-(-m.rows // size))])
    return table, tiles


def _factor(weight: Tensor, scale: float, dtype: torch.dtype) -> float:
    """What W / |W| is multiplied by, so that its norm is at most ``scale`` when it is rounded.

    Rounding moves each entry by at most 0.51 eps of itself, and so the norm; below the normal range
    by half the smallest number, and the norm by that times the root of the number of entries.
    float64 sums, roots and products are good to 2^-44 at any size.
    """
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps * (weight.shape[-2] * weight.shape[-1]) ** 0.5
    return scale * max(0.0, 1.0 - 0.51 * info.eps - 2.0**-44 - tiny / scale)


def same_formats(*lists: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of tensors with equal formats, for one launch each: all of them, nearly always."""
    formats = list(zip(*([t.dtype for t in tensors] for tensors in lists), strict=True))
    for wanted in dict.fromkeys(formats):
        yield [i for i, found in enumerate(formats) if found == wanted]


def forward(
    weights: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype, per_row: bool
) -> list[Tensor]:
    """As ``lipkernels::frobenius_normalize``; the weights are not float64."""
    weights = [w.contiguous() for w in weights]
    results = [w.new_empty(w.shape, dtype=dtype) for w in weights]
    for members in same_formats(weights):
        chosen, outs = [weights[i] for i in members], [results[i] for i in members]
        shapes = group(chosen)
        places, aligned = shapes.places(chosen, outs)
        factors = shapes.numbers([_factor(weights[i], scales[i], dtype) for i in members])
        settings = {"ALIGNED": aligned, "num_warps": WARPS}
        if per_row:
            table, tiles = _by_rows(shapes)
            launch(
                normalize_rows, len(tiles), chosen[0], outs[0], table, tiles, places, factors,
                **BY_ROWS, **settings,
            )  # fmt: skip
            continue
        table, tiles = blocks_of(shapes)
        squares = torch.empty(len(tiles), dtype=torch.float64, device=shapes.device)
        launch(
            partial_sums, len(tiles),
            chosen[0], chosen[0], table, tiles, places, squares, squares,
            HAS_GRADS=False, WIDTH=2, BLOCK=WHOLE["BLOCK"], **settings,
        )  # fmt: skip
        launch(
            normalize, len(tiles), chosen[0], outs[0], table, tiles, places, factors, squares,
            **WHOLE, **settings,
        )  # fmt: skip
    return results


def backward(
    grads: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[float], per_row: bool
) -> list[Tensor]:
    """As ``lipkernels::frobenius_normalize_backward``; the weights are not float64."""
    grads, weights = [g.contiguous() for g in grads], [w.contiguous() for w in weights]
    results = [w.new_empty(w.shape) for w in weights]
    for members in same_formats(weights, grads):
        lists = [[tensors[i] for i in members] for tensors in (weights, grads, results)]
        first = [tensors[0] for tensors in lists]
        shapes = group(lists[0])
        places, aligned = shapes.places(*lists)
        numbers = shapes.numbers([scales[i] for i in members])
        limit = torch.finfo(first[0].dtype).max
        settings = {"ALIGNED": aligned, "num_warps": WARPS}
        if per_row:
            table, tiles = _by_rows(shapes)
            launch(
                differentiate_rows, len(tiles), *first, table, tiles, places, numbers, limit,
                **BY_ROWS, **settings,
            )  # fmt: skip
            continue
        table, tiles = blocks_of(shapes)
        sums = torch.empty((2, len(tiles)), dtype=torch.float64, device=shapes.device)
        launch(
            partial_sums, len(tiles), *first[:2], table, tiles, places, sums[0], sums[1],
            HAS_GRADS=True, WIDTH=3, BLOCK=WHOLE["BLOCK"], **settings,
        )  # fmt: skip
        launch(
            differentiate, len(tiles),
            *first, table, tiles, places, numbers, sums[0], sums[1], limit,
            **WHOLE, **settings,
        )  # fmt: skip
    return results
