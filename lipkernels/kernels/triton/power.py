"""Power iteration on a group of weights: two launches for each round of all of them.

A matrix of one tile, at most 32 x 128, stays in the registers of one program for all rounds.
Vectors and sums are float64, whose range holds the squares of any float32 number, so no matrix is
scaled first. A vector is normalized when it is read: each program needs all of it anyway, and finds
its norm on the way. sigma = u^T W v of the last round is then |W v|, the norm of what becomes u: a
lower bound of the largest singular value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton import packing
from lipkernels.kernels.triton.elements import launch, part_of, saturated, widened
from lipkernels.kernels.triton.group import ALIGNMENT, Group, group, offsets

DOWN = {"ROWS": 32, "COLUMNS": 64}  # W^T u: the columns of a program, the rows of a step
ACROSS = {"ROWS": 8, "COLUMNS": 128}  # W v: the rows of a program, the columns of a step
BLOCK = 256  # elements of a vector at a time
COLUMNS_OF_TABLE = 7  # of vectors()
WARPS = 4

FLOAT32_MAX = torch.finfo(torch.float32).max


@triton.jit
def inverse_or_zero(x):
    """1 / x, and zero for zero."""
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


# table: offsets / UNIT of W, u, v; rows, columns, leading dimension / UNIT; where u starts
@triton.jit
def start(table, starts, u, UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """u / |u|, by its largest entry first: the square of a large one would overflow."""
    its = table + tl.program_id(0).to(tl.int64) * WIDTH
    rows, first = tl.load(its + 3), starts + tl.load(its + 6)
    i = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, rows, BLOCK):
        x = widened(tl.load(first + at + i, mask=at + i < rows, other=0.0))
        largest = tl.maximum(largest, tl.abs(x))
    inverse = inverse_or_zero(tl.max(largest))
    squares = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, rows, BLOCK):
        x = widened(tl.load(first + at + i, mask=at + i < rows, other=0.0)) * inverse
        squares += x * x
    norm = inverse_or_zero(tl.sqrt(tl.sum(squares)))
    to = u + tl.load(its + 1) * UNIT
    for at in range(0, rows, BLOCK):
        x = widened(tl.load(first + at + i, mask=at + i < rows, other=0.0)) * inverse
        tl.store(to + at + i, x * norm, mask=at + i < rows)


@triton.jit
def down(
    w, u, v, table, tiles,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """v = W^T u / |u|, some columns of one matrix."""
    t = tl.program_id(0).to(tl.int64)
    its = table + tl.load(tiles + 2 * t).to(tl.int64) * WIDTH
    column = tl.load(tiles + 2 * t + 1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    leading = tl.load(its + 5) * UNIT
    vector = u + tl.load(its + 1) * UNIT + row
    matrix = w + tl.load(its) * UNIT + row[:, None] * leading + column[None, :]
    squares = tl.zeros((ROWS,), tl.float64)
    sums = tl.zeros((ROWS, COLUMNS), tl.float64)
    for at in range(0, tl.load(its + 3), ROWS):
        x = tl.load(vector + at)
        sums += tl.load(matrix + at * leading).to(tl.float64) * x[:, None]
        squares += x * x
    inverse = inverse_or_zero(tl.sqrt(tl.sum(squares)))
    tl.store(v + tl.load(its + 2) * UNIT + column, tl.sum(sums, axis=0) * inverse)


@triton.jit
def across(
    w, u, v, table, tiles,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """u = W v / |v|, some rows of one matrix."""
    t = tl.program_id(0).to(tl.int64)
    its = table + tl.load(tiles + 2 * t).to(tl.int64) * WIDTH
    row = tl.load(tiles + 2 * t + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    leading = tl.load(its + 5) * UNIT
    vector = v + tl.load(its + 2) * UNIT + column
    matrix = w + tl.load(its) * UNIT + row[:, None] * leading + column[None, :]
    squares = tl.zeros((COLUMNS,), tl.float64)
    sums = tl.zeros((ROWS, COLUMNS), tl.float64)
    for at in range(0, tl.load(its + 4), COLUMNS):
        x = tl.load(vector + at)
        sums += tl.load(matrix + at).to(tl.float64) * x[None, :]
        squares += x * x
    inverse = inverse_or_zero(tl.sqrt(tl.sum(squares)))
    tl.store(u + tl.load(its + 1) * UNIT + row, tl.sum(sums, axis=1) * inverse)


@triton.jit(do_not_specialize=["n_iter"])
def rounds(
    w, u, v, table, tiles, n_iter,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All of ``down`` and ``across`` for a matrix of one tile."""
    its = table + tl.load(tiles + tl.program_id(0)).to(tl.int64) * WIDTH
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    leading = tl.load(its + 5) * UNIT
    x = tl.load(w + tl.load(its) * UNIT + row[:, None] * leading + column[None, :]).to(tl.float64)
    left, right = u + tl.load(its + 1) * UNIT + row, v + tl.load(its + 2) * UNIT + column
    a = tl.load(left)
    b = tl.sum(x * (a * inverse_or_zero(tl.sqrt(tl.sum(a * a))))[:, None], axis=0)
    for i in range(n_iter):
        if i > 0:
            b = tl.sum(x * (a * inverse_or_zero(tl.sqrt(tl.sum(a * a))))[:, None], axis=0)
        a = tl.sum(x * (b * inverse_or_zero(tl.sqrt(tl.sum(b * b))))[None, :], axis=1)
    tl.store(left, a)
    tl.store(right, b)


@triton.jit
def _normalized(vector, n, result, BLOCK: tl.constexpr):
    """Write the vector over its norm, which is returned."""
    i = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, n, BLOCK):
        x = tl.load(vector + at + i, mask=at + i < n, other=0.0)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares))
    inverse = inverse_or_zero(norm)
    for at in range(0, n, BLOCK):
        inside = at + i < n
        x = tl.load(vector + at + i, mask=inside, other=0.0)
        tl.store(result + at + i, (x * inverse).to(tl.float32), mask=inside)
    return norm


@triton.jit
def finish(
    u, v, sigmas, lefts, rights, table, places, limit,
    ALIGNED: tl.constexpr, ROUNDS: tl.constexpr,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The unit vectors, and sigma: |W v| after a round, |W^T u| if there was none."""
    p = tl.program_id(0)
    its = table + p.to(tl.int64) * WIDTH
    left, right = u + tl.load(its + 1) * UNIT, v + tl.load(its + 2) * UNIT
    norm = _normalized(left, tl.load(its + 3), part_of(lefts, places, p, 1, 3, ALIGNED), BLOCK)
    other = _normalized(right, tl.load(its + 4), part_of(rights, places, p, 2, 3, ALIGNED), BLOCK)
    sigma = saturated(norm if ROUNDS else other, limit)
    tl.store(part_of(sigmas, places, p, 0, 3, ALIGNED), sigma.to(tl.float32))


# ------------------------------------------------------------------------------------- launcher
class Vectors(NamedTuple):
    """The table of the kernels here, and the sizes of the workspaces for all u and all v."""

    table: Tensor
    left: int
    right: int


def vectors(shapes: Group) -> Vectors:
    """Where the vectors of the matrices, packed as they are, have their places."""
    form = packing.layout(shapes, wide=False)
    lefts, n_left = offsets([rows for rows, _ in form.padded])
    rights, n_right = offsets([columns for _, columns in form.padded])

    def rows() -> list[tuple[int, ...]]:
        found, first = [], 0
        for p, matrix in enumerate(shapes.matrices):
            places = [form.starts[p] // ALIGNMENT, lefts[p] // ALIGNMENT, rights[p] // ALIGNMENT]
            leading = form.padded[p][1] // ALIGNMENT
            found.append((*places, matrix.rows, matrix.cols, leading, first))
            first += matrix.rows
        return found

    return Vectors(shapes.table("power", torch.int64, rows), n_left, n_right)


_ONE_TILE = (packing.TILE["ROWS"], packing.TILE["COLUMNS"])


def _one_tile(shapes: Group) -> Tensor | None:
    """The matrices (int32) that ``rounds`` takes."""
    form = packing.layout(shapes, wide=False)
    found = [(p,) for p, padded in enumerate(form.padded) if padded == _ONE_TILE]
    return shapes.table("power tile", torch.int32, lambda: found) if found else None


def _tiles(shapes: Group, name: str, side: int, size: int) -> Tensor | None:
    """Tiles of the others, along one side."""
    form = packing.layout(shapes, wide=False)
    others = [(p, padded) for p, padded in enumerate(form.padded) if padded != _ONE_TILE]

    def rows() -> list[tuple[int, int]]:
        return [(p, b) for p, padded in others for b in range(padded[side] // size)]

    return shapes.table(name, torch.int32, rows) if others else None


def _of_one_format(
    weights: Sequence[Tensor], us: Sequence[Tensor], n_iter: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    shapes = group(weights)
    device = shapes.device
    sigmas = [w.new_empty(w.shape[:-2], dtype=torch.float32) for w in weights]
    lefts = [w.new_empty(w.shape[:-1], dtype=torch.float32) for w in weights]
    rights = [w.new_empty((*w.shape[:-2], w.shape[-1]), dtype=torch.float32) for w in weights]
    packed = packing.packed(weights, shapes, wide=False)
    starts = torch.cat([u.reshape(-1) for u in us])
    table, n_left, n_right = vectors(shapes)
    u = torch.zeros(n_left, dtype=torch.float64, device=device)  # zeros where a vector ends
    v = torch.zeros(n_right, dtype=torch.float64, device=device)
    single = _one_tile(shapes)
    columns = _tiles(shapes, "power columns", 1, DOWN["COLUMNS"])
    rows = _tiles(shapes, "power rows", 0, ACROSS["ROWS"])
    places, aligned = shapes.places(sigmas, lefts, rights)
    settings = {"UNIT": ALIGNMENT, "WIDTH": COLUMNS_OF_TABLE, "num_warps": WARPS}
    n = len(shapes.matrices)
    launch(start, n, table, starts, u, BLOCK=BLOCK, **settings)
    if single is not None:
        launch(rounds, len(single), packed, u, v, table, single, n_iter, **packing.TILE, **settings)
    if columns is not None and rows is not None:
        launch(down, len(columns), packed, u, v, table, columns, **DOWN, **settings)
        for i in range(n_iter):
            if i:
                launch(down, len(columns), packed, u, v, table, columns, **DOWN, **settings)
            launch(across, len(rows), packed, u, v, table, rows, **ACROSS, **settings)
    launch(
        finish, n, u, v, sigmas[0], lefts[0], rights[0], table, places, FLOAT32_MAX,
        ALIGNED=aligned, ROUNDS=n_iter > 0, BLOCK=BLOCK, **settings,
    )  # fmt: skip
    return sigmas, lefts, rights


def power_iteration(
    weights: Sequence[Tensor], us: Sequence[Tensor], n_iter: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As ``lipkernels::power_iteration``; the weights are not float64."""
    weights = [w.contiguous() for w in weights]
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for dtype in dict.fromkeys(w.dtype for w in weights):
        members = [i for i, w in enumerate(weights) if w.dtype == dtype]
        parts = _of_one_format([weights[i] for i in members], [us[i] for i in members], n_iter)
        found.update(zip(members, zip(*parts, strict=True), strict=True))
    sigmas, lefts, rights = zip(*(found[i] for i in range(len(weights))), strict=True)
    return list(sigmas), list(lefts), list(rights)
