"""Where the matrices of a group are in a workspace of planes, and which blocks they have.

Every matrix has some slots as wide as itself (m rows of n) and some squares (m by m), m <= n its
sides, rows padded to :data:`~lipkernels.kernels.triton.group.ALIGNMENT`. Sums over a matrix are one
number for each block on or below the diagonal, block (i, j) at i (i + 1) / 2 + j.

    table[p] = (m, n, ldm/8, ldn/8, wide/8, squares/8, lower, n_lower, blocks, maxima, n_maxima,
                tall)

``wide`` and ``squares`` are where its slots begin, ``lower``, ``blocks`` and ``maxima`` the first
of its numbers in arrays with one for each block on or below the diagonal, for each block of the
wide matrix, for each block of `planes.magnitudes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

from lipkernels.kernels.triton import planes
from lipkernels.kernels.triton.group import ALIGNMENT, Matrix, offsets, padded
from lipkernels.kernels.triton.planes import total
from lipkernels.kernels.triton.products import B

LANES = 128  # numbers of an array that are added at a time
WIDTH = tl.constexpr(12)


@triton.jit
def sides(table, p):
    """m, n, and the lengths of rows in the workspace."""
    row = table + p * WIDTH
    m, n = tl.load(row).to(tl.int32), tl.load(row + 1).to(tl.int32)
    return m, n, tl.load(row + 2).to(tl.int32) * 8, tl.load(row + 3).to(tl.int32) * 8


@triton.jit
def wide_at(table, p, m, ldn, slot):
    """Where a wide slot of matrix ``p`` begins."""
    return tl.load(table + p * WIDTH + 4) * 8 + (m * (ldn // 8)).to(tl.int64) * (slot * 8)


@triton.jit
def square_at(table, p, m, ldm, slot):
    """Where a square slot of matrix ``p`` begins."""
    return tl.load(table + p * WIDTH + 5) * 8 + (m * (ldm // 8)).to(tl.int64) * (slot * 8)


@triton.jit
def sum_at(table, p, i, j, n_sums, which):
    """Position of what block (i, j) adds to a sum."""
    return which * n_sums + tl.load(table + p * WIDTH + 6) + i * (i + 1) // 2 + j


@triton.jit
def sum_of(table, sums, p, n_sums, which, LANES: tl.constexpr):
    """A sum over matrix ``p``."""
    row = table + p * WIDTH
    return total(sums, which * n_sums + tl.load(row + 6), tl.load(row + 7), LANES)


@triton.jit
def sum_of_blocks(table, sums, p, m, n, B: tl.constexpr, LANES: tl.constexpr):
    """The sum of the numbers of all blocks of the wide matrix ``p``."""
    first = tl.load(table + p * WIDTH + 8)
    return total(sums, first, tl.cdiv(m, B) * tl.cdiv(n, B), LANES)


@triton.jit
def largest(table, maxima, p, LANES: tl.constexpr):
    """The bits of the largest |entry| of matrix ``p``."""
    row = table + p * WIDTH
    return planes.largest(maxima, tl.load(row + 9), tl.load(row + 10), LANES)


@triton.jit
def is_tall(table, p):
    return tl.load(table + p * WIDTH + 11)


@dataclass(frozen=True)
class Layout:
    """The rows of a group's table, and the sizes of what its matrices share."""

    rows: tuple[tuple[int, ...], ...]
    size: int  # of one plane
    n_lower: int
    n_blocks: int
    n_maxima: int


def _n(a: int) -> range:
    return range(-(-a // B))


def lower_blocks(matrix: Matrix) -> list[tuple[int, int]]:
    """The blocks on or below the diagonal of one of its squares."""
    return [(i, j) for i in _n(matrix.small) for j in range(i + 1)]


def square_blocks(matrix: Matrix) -> list[tuple[int, int]]:
    return [(i, j) for i in _n(matrix.small) for j in _n(matrix.small)]


def wide_blocks(matrix: Matrix) -> list[tuple[int, int]]:
    return [(i, j) for i in _n(matrix.small) for j in _n(matrix.large)]


def maxima_blocks(matrix: Matrix) -> list[tuple[int]]:
    return [(b,) for b in range(-(-matrix.rows * matrix.cols // planes.BLOCK))]


def of_kind(kind: int, blocks: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """(kind, i, j) for each block: for launches that compute more than one matrix."""
    return [(kind, i, j) for i, j in blocks]


def _starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:p]) for p in range(len(counts))]


def layout(matrices: tuple[Matrix, ...], n_wide: int, n_squares: int) -> Layout:
    """A workspace with so many slots for each matrix."""
    sizes = []
    for a in matrices:
        sizes += [n_wide * a.small * padded(a.large), n_squares * a.small * padded(a.small)]
    places, size = offsets(sizes)
    lower, blocks, maxima = (
        [len(of(a)) for a in matrices] for of in (lower_blocks, wide_blocks, maxima_blocks)
    )
    columns = (
        [a.small for a in matrices],
        [a.large for a in matrices],
        [padded(a.small) // ALIGNMENT for a in matrices],
        [padded(a.large) // ALIGNMENT for a in matrices],
        [place // ALIGNMENT for place in places[::2]],
        [place // ALIGNMENT for place in places[1::2]],
        _starts(lower),
        lower,
        _starts(blocks),
        _starts(maxima),
        maxima,
        [int(a.tall) for a in matrices],
    )
    rows = tuple(zip(*columns, strict=True))
    return Layout(rows, size, sum(lower), sum(blocks), sum(maxima))
