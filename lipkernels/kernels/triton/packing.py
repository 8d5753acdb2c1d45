"""Weights of any half or single format, copied into one float32 workspace, exactly.

Every matrix gets whole tiles there, ROWS x COLUMNS, zeros where it ends: the kernels that read it
over and over need neither masks nor strides, and load 16 bytes at a time. Tall matrices can be
packed transposed, so that the small side comes first.

A row of :func:`table` (int64) speaks of the matrix as it is packed, without its padding:
    offset / ALIGNMENT, rows, columns, leading dimension / ALIGNMENT, whether it is transposed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton.elements import launch, part_of, widened
from lipkernels.kernels.triton.group import ALIGNMENT, Group, Matrix, offsets

TILE = {"ROWS": 32, "COLUMNS": 128}
WIDTH = 5  # of the table
WARPS = {True: 4, False: 8}  # EIGHTS or not: single elements need more threads


@dataclass(frozen=True)
class Layout:
    """Where the matrices are in a workspace of ``size`` elements: sides with padding, offsets."""

    sides: tuple[tuple[int, int], ...]
    padded: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    transposed: tuple[bool, ...]
    size: int


def _whole(n: int, tile: int) -> int:
    return -(-n // tile) * tile


def layout(shapes: Group, wide: bool) -> Layout:
    """The layout of a group's matrices; with ``wide`` tall ones are transposed."""

    def build(matrices: Sequence[Matrix]) -> Layout:
        transposed = tuple(wide and m.tall for m in matrices)
        sides = tuple(
            (m.cols, m.rows) if t else (m.rows, m.cols)
            for m, t in zip(matrices, transposed, strict=True)
        )
        padded = tuple(
            (_whole(rows, TILE["ROWS"]), _whole(columns, TILE["COLUMNS"]))
            for rows, columns in sides
        )
        starts, size = offsets([rows * columns for rows, columns in padded])
        return Layout(sides, padded, tuple(starts), transposed, size)

    return shapes.plan(("packed", wide), build)


def table(shapes: Group, wide: bool) -> Tensor:
    """Where :func:`layout` has the matrices, on the device."""
    form = layout(shapes, wide)

    def rows() -> list[tuple[int, ...]]:
        return [
            (start // ALIGNMENT, *sides, padded[1] // ALIGNMENT, int(transposed))
            for start, sides, padded, transposed in zip(
                form.starts, form.sides, form.padded, form.transposed, strict=True
            )
        ]

    return shapes.table(("packed", wide), torch.int64, rows)


@triton.jit
def pack(
    weights, packed, table, tiles, places,
    ALIGNED: tl.constexpr, EIGHTS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile. EIGHTS: every weight has a multiple of UNIT columns, and begins at 16 bytes."""
    t = tl.program_id(0).to(tl.int64)
    p = tl.load(tiles + 3 * t)
    row = tl.load(tiles + 3 * t + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.load(tiles + 3 * t + 2).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    its = table + p * WIDTH
    rows, columns = tl.load(its + 1), tl.load(its + 2)
    source = part_of(weights, places, p, 0, 1, ALIGNED)
    to = packed + tl.load(its) * UNIT
    to += row[:, None] * (tl.load(its + 3) * UNIT) + column[None, :]
    if tl.load(its + 4) == 0:
        if EIGHTS:
            columns = columns // UNIT * UNIT
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        x = tl.load(source + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
        tl.store(to, widened(x).to(tl.float32))
    else:  # the weight has `columns` rows of `rows` numbers
        if EIGHTS:
            rows = rows // UNIT * UNIT
        within = (column < columns)[:, None] & (row < rows)[None, :]
        y = tl.load(source + column[:, None] * rows + row[None, :], mask=within, other=0.0)
        tl.store(to, tl.trans(widened(y).to(tl.float32)))


def packed(weights: Sequence[Tensor], shapes: Group, wide: bool) -> Tensor:
    """The workspace (float32) with these contiguous weights of one format, in one launch."""
    form = layout(shapes, wide)
    places, aligned = shapes.places(weights)
    workspace = torch.empty(form.size, dtype=torch.float32, device=shapes.device)
    every = [(rows // TILE["ROWS"], columns // TILE["COLUMNS"]) for rows, columns in form.padded]
    tiles = shapes.table(
        ("packed tiles", wide),
        torch.int32,
        lambda: [(p, i, j) for p, (n, k) in enumerate(every) for i in range(n) for j in range(k)],
    )
    eights = aligned and all(m.cols % ALIGNMENT == 0 for m in shapes.matrices)
    launch(
        pack, len(tiles), weights[0], workspace, table(shapes, wide), tiles, places,
        ALIGNED=aligned, EIGHTS=eights, UNIT=ALIGNMENT, WIDTH=WIDTH, **TILE,
        num_warps=WARPS[eights],
    )  # fmt: skip
    return workspace
